import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from f2pad_jax.images._morphology import dilate, filled, opened, reached
from f2pad_jax.method._tiling import crop_size, divided, window_offset, window_size
from f2pad_jax.method.coarse import suspect_region
from f2pad_jax.objective.problem import affected_positions

SIDE = 41
DILATION = 3

fill_one = jax.jit(filled)
suspect_of = jax.jit(functools.partial(suspect_region, dilation=DILATION))


def suspect(mask):
    """Where nothing is faint."""
    return suspect_of(2.0 * mask, 1.0, jnp.inf)


def square(radius):
    return np.ones((2 * radius + 1, 2 * radius + 1), bool)


def scipy_dilate(mask, radius):
    return scipy.ndimage.binary_dilation(mask, square(radius))


def scipy_erode(mask, radius):
    """Beyond the border counts as set, as in the library."""
    return scipy.ndimage.binary_erosion(mask, square(radius), border_value=1)


@pytest.fixture(scope="module")
def masks():
    """Noise from sparse to dense, smoothed so that it has shapes as well as dots; some touch the border."""
    noise = np.random.default_rng(0).standard_normal((12, SIDE, SIDE))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 1.2, 1.2)) / 0.23 + 0.4 * noise
    densities = np.repeat([0.02, 0.2, 0.5, 0.9], 3)
    return np.stack([s > np.quantile(s, 1 - density) for s, density in zip(smooth, densities, strict=True)])


def check(function, oracle, masks):
    """The function equals its oracle on every mask, one by one under jit and all together under vmap."""
    one, together = fill_one if function is filled else jax.jit(function), jax.jit(jax.vmap(function))
    expected = np.stack([oracle(mask) for mask in masks])
    np.testing.assert_array_equal(together(jnp.asarray(masks)), expected)
    np.testing.assert_array_equal(np.stack([one(jnp.asarray(mask)) for mask in masks]), expected)


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_dilate_equals_scipys(masks, radius):
    check(lambda m: dilate(m, radius), lambda m: scipy_dilate(m, radius), masks)


def test_opened_equals_scipys_three_by_three_opening(masks):
    check(opened, lambda m: scipy_dilate(scipy_erode(m, 1), 1), masks)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_opened_equals_scipys_opening_by_other_squares(masks, side):
    def by_scipy(mask):
        wide, inner = np.pad(mask, side // 2, constant_values=True), slice(side // 2, side // 2 + SIDE)
        return scipy.ndimage.binary_opening(wide, np.ones((side, side)))[inner, inner]

    check(functools.partial(opened, side=side), by_scipy, masks)


def test_opened_removes_dots_and_thin_lines_and_keeps_blocks():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[3, 3] = mask[10, 4:30] = mask[15:17, 4:30] = True
    block = np.zeros((SIDE, SIDE), bool)
    block[19:22, 10:14] = block[:3, -3:] = True
    np.testing.assert_array_equal(opened(jnp.asarray(mask | block)), block)


def test_filled_equals_scipys_fill_holes(masks):
    check(filled, scipy.ndimage.binary_fill_holes, masks)


def nested_rings():
    yy, xx = np.mgrid[:SIDE, :SIDE]
    return np.maximum(abs(yy - 20), abs(xx - 20)) % 4 == 2


def spiral():
    """A wall that winds inwards, so that the way in is one pixel wide and as long as can be."""
    mask = np.zeros((SIDE, SIDE), bool)
    y, x, steps = 1, 0, [(0, 1), (1, 0), (0, -1), (-1, 0)]
    length, turn = 39, 0
    while length > 1:
        dy, dx = steps[turn % 4]
        for _ in range(length):
            y, x = y + dy, x + dx
            mask[y, x] = True
        turn += 1
        length -= 2 if turn % 2 else 0
    return mask


def broken_spiral():
    mask = spiral()
    mask[1, 20] = False
    return mask


def closed_spiral():
    mask = spiral()
    mask[1:39, 1] = True
    return mask


def diagonal_diamond():
    """Walls that touch at corners only hold 4-connected water."""
    yy, xx = np.mgrid[:SIDE, :SIDE]
    return abs(yy - 20) + abs(xx - 20) == 9


def at_the_border():
    """A bay open to the border is no hole; a ring that touches the border encloses one."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[0:12, 5], mask[11, 5:15], mask[0:12, 14] = True, True, True
    mask[30:41, 30], mask[30, 30:36], mask[30:41, 35], mask[40, 30:36] = True, True, True, True
    return mask


@pytest.mark.parametrize(
    "shape", [nested_rings, spiral, broken_spiral, closed_spiral, diagonal_diamond, at_the_border], ids=lambda f: f.__name__
)
def test_filled_handles(shape):
    mask = shape()
    np.testing.assert_array_equal(fill_one(jnp.asarray(mask)), scipy.ndimage.binary_fill_holes(mask))


@pytest.mark.parametrize("value", [False, True])
def test_empty_and_full_masks_stay(value):
    mask = jnp.full((SIDE, SIDE), value)
    for function in (fill_one, suspect, opened):
        np.testing.assert_array_equal(function(mask), mask)


def test_suspect_region_is_filled_dilated_and_filled_again():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[5:15, 5:15], mask[8:12, 8:12] = True, False  # a ring
    mask[20:38, 30], mask[20:38, 36], mask[20, 30:37] = True, True, True  # open below, closed by the dilation
    found = np.asarray(suspect(jnp.asarray(mask)))
    fill = scipy.ndimage.binary_fill_holes
    np.testing.assert_array_equal(found, fill(scipy_dilate(fill(mask), DILATION)))
    assert np.all(found[2:18, 2:18])


def test_faint_pixels_are_suspect_where_they_are_connected_to_one_above_the_threshold():
    """Which m0's are, and, of a map whose m0 is cut at half of its height, others as well."""
    mask, faint, apart = np.zeros((3, SIDE, SIDE), bool)
    mask[5:10, 5:10], faint[5:10, 8:30], apart[30:38, 5:30] = True, True, True
    excess = np.where(mask, 2.0, 0.7 * (faint | apart))
    excess[33, 12] = 0.8
    np.testing.assert_array_equal(suspect_of(excess, 1.0, 0.5), scipy_dilate(mask, DILATION) | faint)
    np.testing.assert_array_equal(suspect_of(excess, 0.75, 0.5), scipy_dilate(mask, DILATION) | faint | apart)
    assert not np.asarray(suspect_of(np.where(mask, 0.9, excess), 1.0, 0.5)).any()


def test_reached_equals_scipys_propagation(masks):
    starts = np.random.default_rng(1).random(masks.shape) < 0.01
    expected = [scipy.ndimage.binary_propagation(s & m, mask=m) for s, m in zip(starts, masks, strict=True)]
    np.testing.assert_array_equal(jax.jit(jax.vmap(reached))(starts, masks), np.stack(expected))
    assert 0 < np.sum(expected) < np.sum(masks)


@pytest.mark.parametrize("reach", [0, 1, 4, 8])
def test_affected_positions_are_the_cells_within_reach_of_the_region(masks, reach):
    cells = (6, 5)  # of 4x8 pixels

    def brute(mask):
        out = np.zeros(cells)
        for y, x in np.argwhere(mask):
            for i in range(cells[0]):
                for j in range(cells[1]):
                    near_y = 4 * i - reach <= y <= 4 * i + 3 + reach
                    near_x = 8 * j - reach <= x <= 8 * j + 7 + reach
                    out[i, j] = max(out[i, j], near_y and near_x)
        return out

    check(lambda m: affected_positions(m, cells, reach), brute, masks[:4, :24, :40])


def boxes(shape, count=200):
    """Rectangles anywhere, those at the corners and the borders among them."""
    rng = np.random.default_rng(0)
    h, w = shape
    corners = [(0, 0, 3, 5), (h - 3, w - 5, h, w), (0, w - 1, 1, w), (h - 1, 0, h, 1), (0, 0, h, w), (0, 7, h, 9)]
    ends = np.sort(rng.integers(0, [h, w], (2, count, 2)), axis=0)
    corners += [(y1, x1, y2 + 1, x2 + 1) for (y1, x1), (y2, x2) in zip(*ends, strict=True)]
    for y1, x1, y2, x2 in corners:
        mask = np.zeros(shape, bool)
        mask[y1:y2, x1:x2] = True
        yield (y1, x1, y2, x2), mask


@pytest.mark.parametrize(
    ("shape", "size", "stride"), [((64, 96), (32, 48), 8), ((96, 96), (64, 64), 16), ((32, 64), (32, 64), 16)]
)
def test_window_is_aligned_inside_the_image_and_holds_the_region(shape, size, stride):
    limits, masks = zip(*boxes(shape), strict=True)
    offsets = np.asarray(jax.jit(jax.vmap(lambda m: window_offset(m, size, stride)))(jnp.asarray(masks)))
    assert np.all(offsets % stride == 0)
    assert np.all(offsets >= 0) and np.all(offsets + size <= shape)
    held = 0
    for (y1, x1, y2, x2), (top, left) in zip(limits, offsets, strict=True):
        for first, last, start, side, whole in ((y1, y2, top, size[0], shape[0]), (x1, x2, left, size[1], shape[1])):
            if last - first + stride <= side or side == whole:
                assert start <= first and last <= start + side
                held += 1
    assert held > 100
    one = jax.jit(lambda m: window_offset(m, size, stride))
    np.testing.assert_array_equal(np.stack([one(jnp.asarray(mask)) for mask in masks[:20]]), offsets[:20])


def test_window_is_centred_as_well_as_the_alignment_allows():
    for (y1, x1, y2, x2), mask in boxes((128, 128), count=30):
        top, left = np.asarray(window_offset(jnp.asarray(mask), (32, 32), 8))
        for start, first, last in ((top, y1, y2), (left, x1, x2)):
            wanted = np.clip((first + last) / 2 - 16, 0, 96)
            assert abs(start - wanted) <= 4.5


def test_window_of_an_empty_region_is_inside_the_image():
    top, left = np.asarray(window_offset(jnp.zeros((64, 96), bool), (32, 32), 16))
    assert 0 <= top <= 32 and 0 <= left <= 64


def test_window_size_is_the_smallest_that_holds_region_margin_and_alignment():
    sizes = (96, 64, 32)

    def fits(side, first, last, whole):
        return any(s <= max(first - 4, 0) and min(last + 4, whole) <= s + side for s in range(0, whole - side + 1, 8))

    for (y1, x1, y2, x2), mask in boxes((128, 160), count=60):
        expected = min((s for s in sizes if fits(s, y1, y2, 128) and fits(s, x1, x2, 160)), default=None)
        assert window_size(mask, 4, 8, sizes) == ((expected, expected) if expected else (128, 160))


def test_window_of_that_size_holds_region_and_margin_except_beyond_the_image():
    for (y1, x1, y2, x2), mask in boxes((128, 160), count=60):
        size = window_size(mask, 12, 16, (32, 64, 96))
        top, left = np.asarray(window_offset(jnp.asarray(mask), size, 16))
        assert top <= max(y1 - 12, 0) and min(y2 + 12, 128) <= top + size[0]
        assert left <= max(x1 - 12, 0) and min(x2 + 12, 160) <= left + size[1]


def test_window_sizes_that_do_not_fit_the_stride_or_the_image_are_passed_over():
    mask = np.zeros((64, 96), bool)
    mask[30:34, 30:34] = True
    assert window_size(mask, 0, 16, (40, 48, 64)) == (48, 48)
    assert window_size(mask, 20, 16, (72, 80)) == (64, 96)


def test_the_box_of_a_larger_image_holds_region_and_margin_in_as_few_quarters_of_the_window_as_may_be():
    full = (640, 560)
    for (y1, x1, y2, x2), mask in boxes((128, 160), count=60):
        window = window_size(mask, 4, 8, (32, 64, 96))
        quarters = [math.ceil(window[axis] * full[axis] / mask.shape[axis] / 4) for axis in (0, 1)]
        size = crop_size(mask, window, full, 6)
        needed = 5 * (y2 - y1) + 12, 3.5 * (x2 - x1) + 12
        counts = [-(-size[axis] // quarters[axis]) for axis in (0, 1)]
        assert all(size[axis] == min(max(counts) * quarters[axis], full[axis]) for axis in (0, 1))
        assert all(size[axis] >= min(needed[axis], full[axis]) for axis in (0, 1))
        assert max(counts) == 1 or any((max(counts) - 1) * quarters[axis] < needed[axis] + 2 for axis in (0, 1))


def test_the_box_is_the_window_at_one_size_and_the_image_without_a_margin():
    mask = np.zeros((64, 96), bool)
    mask[30:34, 30:34] = True
    assert crop_size(mask, (32, 32), (64, 96), 8) == crop_size(mask, (32, 32), (64, 96), None) == (32, 32)
    assert crop_size(mask, (32, 32), (640, 960), None) == (640, 960)
    assert crop_size(mask, (32, 32), (640, 960), 8) == (80, 80)
    assert crop_size(mask, (32, 32), (32, 48), 8) == (20, 20)  # more pixels than the window's sixteen
    assert crop_size(np.zeros_like(mask), (32, 32), (640, 960), 8) == (80, 80)


SIZES = (64, 96, 128)


def parts(*boxes, size=224):
    """The parts a region of these boxes (top, left, bottom, right) is divided into: their bounds and windows."""
    region = np.zeros((size, size), bool)
    for top, left, bottom, right in boxes:
        region[top:bottom, left:right] = True
    found = divided(region, 24, 8, SIZES)
    together = np.sum([part for part, _ in found], axis=0)
    np.testing.assert_array_equal(together, region)  # every pixel belongs to one part
    return found


def test_distant_parts_are_solved_for_separately():
    found = parts((10, 10, 15, 18), (200, 180, 220, 215))
    assert {(part.sum(), window) for part, window in found} == {(40, (64, 64)), (700, (96, 96))}


def test_what_lies_in_anothers_margin_belongs_to_it():
    assert len(parts((10, 10, 15, 15), (30, 30, 35, 35))) == 1
    # ... and through a third that is near both
    assert len(parts((10, 10, 15, 40), (10, 60, 15, 90), (10, 110, 15, 130))) == 1


def test_parts_go_together_where_one_window_costs_no_more():
    found = parts((50, 50, 80, 80), (105, 105, 125, 125))
    assert len(found) == 1 and found[0][1] == (128, 128)


def test_a_part_too_large_for_windows_has_the_image_and_takes_all():
    found = parts((0, 0, 150, 150), (200, 200, 210, 210))
    assert len(found) == 1 and found[0][1] == (224, 224)


def test_without_a_margin_all_is_one():
    region = np.zeros((224, 224), bool)
    region[5:9, 5:9] = region[200:210, 200:210] = True
    (part, window), *rest = divided(region, None, 8, SIZES)
    assert not rest and window == (224, 224)
    np.testing.assert_array_equal(part, region)


def test_opening_keeps_what_a_square_fits_into():
    side = 3
    mask = np.random.default_rng(side).random((30, 40)) < 0.85
    mask[:, :3] = mask[:2] = True
    padded = np.pad(mask, side, constant_values=True)
    expected = np.zeros_like(padded)
    for i in range(padded.shape[0] - side + 1):
        for j in range(padded.shape[1] - side + 1):
            if padded[i : i + side, j : j + side].all():
                expected[i : i + side, j : j + side] = True
    found = np.asarray(opened(jnp.asarray(mask)))
    np.testing.assert_array_equal(found[side:-side, side:-side], expected[side:-side, side:-side][side:-side, side:-side])
    assert not (found & ~mask).any() and 0 < found.sum() < mask.sum()
