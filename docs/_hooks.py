"""Hooks of the documentation's build: files from outside this folder, and notebooks with their outputs."""

import logging
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
INCLUDED = ("CHANGELOG.md", "SECURITY.md", "benchmarks/*.md", "benchmarks/results/**/*.*")
"""Files of the repository that are part of the site as they are."""
log = logging.getLogger(f"mkdocs.hooks.{__name__}")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the included files, and a page with its pictures for each notebook."""
    for path in sorted(path for pattern in INCLUDED for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        for uri, content in notebook_page(path, execute=config.extra["execute_notebooks"]).items():
            files.append(File.generated(config, f"notebooks/{uri}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the included files, which hold in the repository, into links of the site."""
    if page.file.src_uri.startswith("benchmarks/"):
        markdown = markdown.replace("](../docs/", "](../").replace("](results/)", "](results/README.md)")
    return markdown


def notebook_page(path: Path, *, execute: bool) -> dict[str, str | bytes]:
    """Runs a notebook and returns the page and its pictures, by file name. A cell that fails ends the build."""
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    if execute:
        log.info(f"Running {path.name}")
        config = Config(KernelManager={"transport": "ipc"})  # no port, and no warning of an unencrypted one
        runner = ExecutePreprocessor(timeout=600, kernel_name="python3", coalesce_streams=True, config=config)
        runner.preprocess(notebook)
    folder = f"{path.stem}_files"
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"unique_key": path.stem, "output_files_dir": folder}
    )
    body += f"\n\n[Download this notebook]({path.name})\n"
    return {f"{path.stem}.md": body, **resources["outputs"]}
