"""Rules that draw the mask, on equal solutions: ``python benchmarks/decisions.py ROOT --out FOLDER --weights FILE``.

Eq. (12) is solved once for each defective image of a data set in MVTec layout, and the solutions are kept in FOLDER. Each
rule then draws its masks from the same solutions. The default rule comes first, then ablations of its stages, and its
constants, halved and doubled. Then other ways take the place of a stage: a graph cut, a dense CRF, a random walker and
closed-form matting. The peers start from the coarse mask alone. "Oracle" is the best of the default rule's masks under
nine shifts of the prior odds, chosen by the truth for each part: a bound for any better cut of this evidence.

A line gives the mean IoU of each category and of all, the difference to the default with its standard error over the
images, the share of defects that shrink to a quarter of m0 ∩ truth, and the share of masks in more than three pieces.

``--protocol hard`` takes synthetic defects at 224x224 pixels instead, made from the same folders. ``--half report`` takes
the half of the test images on which no constant was chosen. ``--rules NAME ...`` limits the rules. ``--reliability`` prints
another table instead: how often pixels of a stated probability are anomalous. The other ways to a mask need
``pip install pymatting PyMaxflow pydensecrf2 opencv-python-headless``.
"""

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from fitted import categories_command_line, kept_detector
from skimage.segmentation import random_walker

from f2pad_jax import Settings
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import half_of, spread
from f2pad_jax.evaluation import peers
from f2pad_jax.evaluation.cases import REAL
from f2pad_jax.evaluation.runs import SIDE, generate_defects
from f2pad_jax.images import read_image, to_unit
from f2pad_jax.images._morphology import filled, opened, reached
from f2pad_jax.images._smoothing import attracted
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import denormalise, resized
from f2pad_jax.inpainting._choice import choose
from f2pad_jax.method import Evidence, Mixture, Residual, look
from f2pad_jax.method._tiling import WINDOWS, crop_size, divided
from f2pad_jax.method.algorithm import advance, start
from f2pad_jax.method.decision import remaining_scores
from f2pad_jax.method.window import Window
from f2pad_jax.solvers.loop import finish

SHIFTS = (-8.0, -5.0, -3.0, -1.5, 0.0, 1.5, 3.0, 5.0, 8.0)
"""Shifts of the prior log-odds of the oracle."""


class Solution(NamedTuple):
    """Solution of a defective image at the detector's size."""

    image: np.ndarray
    """Input in 0..1."""
    truth: np.ndarray
    """Ground truth."""
    anomaly_map: np.ndarray
    """Coarse map."""
    m0: np.ndarray
    """Coarse mask."""
    region: np.ndarray
    """Suspect region."""
    parts: list[tuple[Evidence, np.ndarray]]
    """Evidence of each part without its detector, and the corner of its crop, row and column."""

    def pasted(self, masks) -> np.ndarray:
        """Returns the mask of the image from the masks of its parts; m0 if they are all empty."""
        whole = np.zeros(self.truth.shape, bool)
        for (_, (i, j)), mask in zip(self.parts, masks, strict=True):
            whole[i : i + mask.shape[0], j : j + mask.shape[1]] |= np.asarray(mask)
        return whole if whole.any() else self.m0


# solutions

around, begin = eqx.filter_jit(Window.around), eqx.filter_jit(start)


@eqx.filter_jit
def solve(detector, settings, run):
    """Runs the first phase of a part to its end."""
    run = jax.lax.while_loop(lambda run: run.going, lambda run: advance(detector, settings, run), run)
    return finish(run.with_detector(detector), run.iterate).n


def solved(detector, settings, image: np.ndarray, truth: np.ndarray) -> Solution:
    """Solves the parts of an image in 0..1, up to the decision."""
    coarse, inpaint = look(detector, jnp.asarray(image), settings), choose("exemplar", detector.calibrated.normals)
    parts = []
    if bool(coarse.region.any()) and not bool(coarse.covered):
        for part, size in divided(np.asarray(coarse.region), settings.margin, detector.stride, WINDOWS):
            crop = crop_size(part, size, image.shape[:2], settings.margin)
            window = around(detector, image, coarse, jnp.asarray(part), size, crop)
            run = begin(detector, window, window.region, jnp.asarray(0), settings, inpaint)
            n = solve(detector, settings, run)
            evidence = Evidence(run.problem, run.n0, n, window.excess, window.threshold)
            parts.append(jax.device_get((evidence, window.crop.corner)))
    return Solution(image, truth, *jax.device_get((coarse.anomaly_map, coarse.mask, coarse.region)), parts)


# rules: functions of the detector and of the evidence

Rule = Callable[[Any, Evidence], Any]


@eqx.filter_jit
def posteriors(rule: Mixture, evidence: Evidence):
    """Returns the posteriors of both starts."""
    return rule.posteriors(evidence)


fill = jax.jit(jax.vmap(filled))


def complete(detector, evidence: Evidence) -> Evidence:
    """Returns the evidence with its detector."""
    return evidence._replace(problem=dataclasses.replace(evidence.problem, detector=detector))


@eqx.filter_jit
def remaining(detector, evidence: Evidence, masks):
    """Returns the remaining scores of two masks; all rules share this program, the longest to compile."""
    return remaining_scores(complete(detector, evidence), masks)


@eqx.filter_jit
def cleaned(rule: Mixture, evidence: Evidence, mask):
    """Returns the cleaned mask."""
    return rule.cleaned(evidence, mask)


@eqx.filter_jit
def at_edges(evidence: Evidence, mask):
    """Returns the mask with its border on the edges of x."""
    rule = Mixture()
    return evidence.problem.region & attracted(mask, evidence.problem.x, rule.reach, rule.floor, rule.inertia)


def mixture(rule: Mixture, clean: Callable = cleaned, begin: int | None = None, extend: bool = True) -> Rule:
    """Returns the stages of a rule as a function: with another cleaning, with one start, or without extension."""
    rule = jax.tree.map(jnp.asarray, rule)

    def draw(detector, evidence: Evidence):
        masks = fill(posteriors(rule, evidence) > 0.5)
        if begin is not None:
            masks = jnp.stack([masks[begin], masks[begin]])
        total, around = remaining(detector, evidence, masks)
        best = rule.selected(total, masks)
        mask = masks[best]
        if extend:
            grown = mask | rule.doubtful(evidence, around[best])
            _, (before, after) = remaining(detector, evidence, jnp.stack([mask, grown]))
            mask = mask | (grown & (after < rule.unexplained * before))
        return clean(rule, evidence, mask)

    return draw


def unchanged(_, evidence: Evidence, mask):
    """Returns the mask."""
    return mask


class Lone(Mixture):
    """Default rule with the residual of n0, or of n, in place of both."""

    kept: int = eqx.field(static=True, default=0)

    def posteriors(self, evidence):
        """Returns the posteriors of both starts."""
        image = evidence[1 + self.kept]
        return super().posteriors(evidence._replace(n0=image, n=image))


def in_place_of_neighbours(segment: Callable) -> Rule:
    """Returns a rule that gives the odds of the model without its Potts term to another way to a mask."""

    def draw(detector, evidence: Evidence):
        both = posteriors(jax.tree.map(jnp.asarray, Mixture(coupling=0.0)), evidence)
        masks = both > 0.5
        q = np.asarray(both[Mixture().selected(remaining(detector, evidence, masks)[0], masks)], float)
        image = np.clip(np.asarray(denormalise(jnp.asarray(evidence.problem.x)), float), 0, 1)
        return cleaned(Mixture(), evidence, jnp.asarray(segment(np.ascontiguousarray(image), np.clip(q, 1e-6, 1 - 1e-6))))

    return draw


def graph_cut(image, q, weight=2.0, contrast=0.05):
    """Minimises the energy with a contrast-sensitive Potts term exactly (Boykov & Kolmogorov 2004)."""
    import maxflow

    graph = maxflow.Graph[float]()
    nodes = graph.add_grid_nodes(q.shape)
    for axis, structure in ((0, [[0, 0, 0], [0, 0, 0], [0, 1, 0]]), (1, [[0, 0, 0], [0, 0, 1], [0, 0, 0]])):
        square = np.sum(np.diff(image, axis=axis, append=np.take(image, [-1], axis)) ** 2, axis=-1)
        edges = weight * np.exp(-square / (2 * contrast**2))
        graph.add_grid_edges(nodes, edges, structure=np.array(structure), symmetric=True)
    graph.add_grid_tedges(nodes, -np.log(1 - q), -np.log(q))
    graph.maxflow()
    return ~graph.get_grid_segments(nodes)


def dense_crf(image, q):
    """Runs mean field of a dense CRF (Krähenbühl & Koltun 2011), with the kernels of its authors' example."""
    import pydensecrf.densecrf

    h, w = q.shape
    crf = pydensecrf.densecrf.DenseCRF2D(w, h, 2)
    crf.setUnaryEnergy(np.stack([-np.log(1 - q), -np.log(q)]).reshape(2, -1).astype(np.float32))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=20, srgb=13, rgbim=np.ascontiguousarray(np.rint(255 * image).astype(np.uint8)), compat=5)
    return np.argmax(np.array(crf.inference(10)), axis=0).reshape(h, w) == 1


def walker(image, q):
    """Labels unsure pixels by a random walk from the sure ones (Grady 2006)."""
    labels = np.where(q > 0.9, 1, np.where(q < 0.1, 2, 0))
    if not {1, 2} <= set(np.unique(labels)):
        return q > 0.5
    return random_walker(image, labels, mode="cg_j", channel_axis=-1) == 1


def matting(image, q):
    """Labels unsure pixels by closed-form matting (Levin et al. 2008)."""
    from pymatting import estimate_alpha_cf

    trimap = np.where(q > 0.9, 1.0, np.where(q < 0.1, 0.0, 0.5))
    if not {0.0, 1.0} <= set(np.unique(trimap)):
        return q > 0.5
    try:
        return estimate_alpha_cf(image, trimap) > 0.5
    except ValueError:  # its conjugate gradients can fail to converge in a plain area
        return q > 0.5


WAYS = {"graph cut": graph_cut, "dense CRF": dense_crf, "random walker": walker, "matting": matting}
"""Other ways to a mask, functions of the image and of probabilities."""


def ablations() -> dict[str, Rule]:
    """Returns the default rule without one of its parts."""
    above = jax.jit(lambda evidence, mask: reached(evidence.excess > evidence.threshold, mask))
    return {
        "without residual of n0": mixture(Lone(kept=1)),
        "without residual of n": mixture(Lone(kept=0)),
        "without neighbours": mixture(Mixture(coupling=0.0)),
        "start: prior": mixture(Mixture(), begin=0),
        "start: two-means": mixture(Mixture(), begin=1),
        "without extension": mixture(Mixture(), extend=False),
        "not cleaned": mixture(Mixture(), unchanged),
        "border not on edges": mixture(Mixture(), lambda _, e, m: above(e, filled(opened(m, 2)))),
        "border never inert": mixture(Mixture(inertia=0.0)),
        "on edges, twice": mixture(Mixture(), lambda rule, e, m: cleaned(rule, e, at_edges(e, m))),
        "not opened": mixture(Mixture(), lambda _, e, m: above(e, filled(at_edges(e, m)))),
        "opened 3x3": mixture(Mixture(), lambda _, e, m: above(e, filled(opened(at_edges(e, m), 3)))),
        "not filled": mixture(Mixture(), lambda _, e, m: above(e, opened(at_edges(e, m), 2))),
        "no component left out": mixture(Mixture(), lambda _, e, m: filled(opened(at_edges(e, m), 2))),
    }


def constants() -> dict[str, Rule]:
    """Returns the default rule with each constant halved and doubled."""
    rules = {}
    for field in dataclasses.fields(Mixture):
        if field.name == "temperature":  # the mask does not depend on it
            continue
        value = getattr(Mixture(), field.name)
        for factor in (0.5, 2):
            other = round(value * factor) if isinstance(value, int) else value * factor
            rules[f"{field.name} {other:g}"] = mixture(dataclasses.replace(Mixture(), **{field.name: other}))
    return rules


def paper(detector, evidence: Evidence):
    """Returns the paper's mask."""
    return Residual()(Settings().solver, jax.tree.map(jnp.asarray, evidence)) > 0.5


def all_rules() -> dict[str, Rule]:
    """Returns all rules by name, the default first."""
    others = {name: in_place_of_neighbours(way) for name, way in WAYS.items()}
    return {"default": mixture(Mixture())} | ablations() | constants() | others | {"paper": paper}


class Shifted(Mixture):
    """Default rule with shifted prior odds."""

    shift: Any = 0.0

    def prior_log_odds(self, excess):
        """Returns the shifted log-odds."""
        return super().prior_log_odds(excess) + self.shift


def oracle(detector, solution: Solution) -> np.ndarray:
    """Returns the mask from the best shift of the prior odds of each part."""
    rules = [mixture(Shifted(shift=shift)) for shift in SHIFTS]
    choices = [[rule(detector, evidence) for rule in rules] for evidence, _ in solution.parts]
    best = [masks[SHIFTS.index(0.0)] for masks in choices]
    for k, masks in enumerate(choices):
        best[k] = max(masks, key=lambda m, k=k: iou(solution.pasted([*best[:k], m, *best[k + 1 :]]), solution.truth))
    return solution.pasted(best)


def from_m0(segment: Callable, solution: Solution) -> np.ndarray:
    """Returns the mask of another way that starts from m0 and the suspect region alone."""
    sure = peers.core(solution.m0) | ~solution.region
    q = np.where(sure, np.where(solution.m0, 0.99, 0.01), np.where(solution.m0, 0.6, 0.4))
    return segment(solution.image.astype(float), q) if solution.m0.any() else solution.m0


def peer_masks(solutions: list[Solution]) -> dict[str, list[np.ndarray]]:
    """Returns the masks of the peers, from the coarse mask."""
    peaks = [float(s.anomaly_map.max()) for s in solutions]
    return {
        "m0": [s.m0 for s in solutions],
        "m0, guided filter": [peers.guided_mask(s.image, s.m0) for s in solutions],
        "m0, GrabCut": [peers.grabcut(s.image, s.m0, s.region) for s in solutions],
        **{f"m0, {name}": [from_m0(way, s) for s in solutions] for name, way in WAYS.items()},
        "map, MEBin": [peers.mebin(s.anomaly_map, min(peaks), max(peaks)) for s in solutions],
    }


def measures(mask: np.ndarray, solution: Solution) -> tuple[float, float, float]:
    """Returns the IoU, whether a found defect shrank to a quarter, and whether the mask has more than three pieces."""
    found = solution.m0 & solution.truth
    shrank = found.any() and (mask & found).sum() < found.sum() / 4
    pieces = scipy.ndimage.label(mask, np.ones((3, 3)))[1]  # pyright: ignore[reportGeneralTypeIssues]
    return iou(mask, solution.truth), float(shrank), float(pieces > 3)


def cases(arguments) -> Iterator[tuple[Any, list[Solution], str]]:
    """Yields detector, solutions and name of each category; solves what is not kept yet."""
    root, out, settings = arguments.root, arguments.out, Settings().traced()
    if arguments.protocol != REAL:
        data = out / "data" / arguments.protocol
        options = (arguments.protocol, arguments.categories, arguments.images, (SIDE, SIDE), 0)
        generate_defects(root, data, *options, lambda *_: None)
        root = data
    for category in open_categories(root, names=arguments.categories):
        case, detector = kept_detector(category, arguments, out / "models", protocol=arguments.protocol)
        samples = category.test if arguments.protocol != REAL else half_of(category.test, arguments.half)
        solutions = []
        for sample in spread([sample for sample in samples if sample.mask], arguments.images):
            file = out / "solutions" / f"{case.folder}-{arguments.half}" / f"{sample.name}.pkl"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                image = np.asarray(resized(to_unit(read_image(sample.path)), detector.size))
                file.write_bytes(pickle.dumps(solved(detector, settings, image, sample.truth(detector.size))._asdict()))
            solutions.append(Solution(**pickle.loads(file.read_bytes())))
        yield detector, solutions, category.name


@eqx.filter_jit
def probability(detector, evidence: Evidence):
    """Returns the probability of the default rule."""
    return Mixture()(Settings().solver, complete(detector, evidence))


def print_reliability(arguments) -> None:
    """Prints how often pixels of the suspect regions are anomalous, by their probability."""
    stated, true, others = [], [], 0
    for detector, solutions, _ in cases(arguments):
        for solution in solutions:
            others += solution.truth.size
            for evidence, (i, j) in solution.parts:
                h, w = evidence.problem.region.shape
                stated.append(np.asarray(probability(detector, evidence))[evidence.problem.region])
                true.append(solution.truth[i : i + h, j : j + w][evidence.problem.region])
        jax.clear_caches()
    stated, true = np.concatenate(stated), np.concatenate(true)
    bins = np.minimum((10 * stated).astype(int), 9)
    print("probability   pixels  mean stated  anomalous")
    error = 0.0
    for k in np.unique(bins):
        inside = bins == k
        means = stated[inside].mean(), true[inside].mean()
        error += inside.sum() * abs(means[0] - means[1])
        print(f"{k / 10:.1f} to {(k + 1) / 10:.1f}  {inside.mean():7.3f}  {means[0]:11.3f}  {means[1]:9.3f}")
    share = stated.size / others
    print(f"expected calibration error: {error / stated.size:.3f} in suspect regions, {share:.2f} of all pixels")


def main() -> None:
    """Solves, draws with all rules, and prints the table."""
    parser = categories_command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--protocol", choices=(REAL, "hard", "cut-paste"), default=REAL)
    parser.add_argument("--images", type=int, default=20, help="number of defects of each category")
    parser.add_argument("--rules", nargs="*", help="names of the rules; the default is always among them")
    parser.add_argument("--reliability", action="store_true", help="print the reliability of the probability")
    arguments = parser.parse_args()
    if arguments.reliability:
        print_reliability(arguments)
        return
    rules = all_rules()
    if arguments.rules is not None:
        rules = {name: rule for name, rule in rules.items() if name in ("default", *arguments.rules)}
    names, found = [], {}
    for detector, solutions, name in cases(arguments):
        names.append(name)
        masks = {
            rule_name: [s.pasted([rule(detector, evidence) for evidence, _ in s.parts]) for s in solutions]
            for rule_name, rule in rules.items()
        }
        if arguments.rules is None:
            masks["oracle"] = [oracle(detector, s) for s in solutions]
        for rule_name, drawn in (masks | peer_masks(solutions)).items():
            values = np.array([measures(m, s) for m, s in zip(drawn, solutions, strict=True)])
            found.setdefault(rule_name, []).append(values)
        print(f"  {name}: " + ", ".join(f"{k} {100 * v[-1][:, 0].mean():.1f}" for k, v in found.items()), flush=True)
        jax.clear_caches()  # each program takes memory maps, of which a process has few
    print(f"JAX {jax.__version__}, {jax.default_backend()}; {arguments.method}, {arguments.backbone}", end="; ")
    print(f"{arguments.protocol}, half: {arguments.half}; IoU times 100, {sum(map(len, found['default']))} defects")
    print(f"{'':24}" + "".join(f"{name[:8]:>9}" for name in names) + "     mean  difference  shrunk  in pieces")
    for rule_name, values in found.items():
        differences = np.concatenate([v[:, 0] - d[:, 0] for v, d in zip(values, found["default"], strict=True)])
        mean = np.mean([v[:, 0].mean() for v in values])
        change = mean - np.mean([v[:, 0].mean() for v in found["default"]])
        shrunk, pieces = np.concatenate(values)[:, 1:].mean(axis=0)
        print(
            f"{rule_name:24}"
            + "".join(f"{100 * v[:, 0].mean():9.1f}" for v in values)
            + f"{100 * mean:9.1f} {100 * change:+6.1f} ± {100 * differences.std() / len(differences) ** 0.5:3.1f}"
            + f"{shrunk:8.3f} {pieces:10.3f}"
        )


if __name__ == "__main__":
    main()
