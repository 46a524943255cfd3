"""Cross-references of docstrings: Sphinx roles, such as ``:func:`~f2pad_jax.fit```, become links."""

import re

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Extension of the reader of the package's source."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Rewrites the docstrings of a package when all of it has been read."""
        public = {}
        for namespace in (*pkg.modules.values(), pkg):  # the package itself last: its names win
            for name in namespace.exports or ():
                member = namespace.members[str(name)]
                if member.is_alias:
                    public[member.target_path] = member.path
        self._rewrite(pkg, public)

    def _rewrite(self, found: griffe.Object, public: dict[str, str]) -> None:
        if found.docstring:
            found.docstring.value = ROLE.sub(lambda role: _link(found, *role.groups(), public), found.docstring.value)
        for member in found.members.values():
            if not member.is_alias:
                self._rewrite(member, public)


def _link(found: griffe.Object, short: str, name: str, public: dict[str, str]) -> str:
    """Returns the HTML of a role's name, looked up in the scope of ``found``; no link if it is not on the site."""
    title, (first, _, rest) = name.rpartition(".")[2] if short else name, name.partition(".")
    path = name
    if first != "f2pad_jax":
        try:
            path = found.resolve(first)
        except griffe.NameResolutionError:
            return f"`{title}`"
        path = public.get(path, path) + (f".{rest}" if rest else "")
    return f'<autoref identifier="{path}" optional><code>{title}</code></autoref>'
