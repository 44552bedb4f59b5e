"""The course of a pen along the middle of a region: medial axis, longest path, smoothing and a hand's unsteadiness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter, gaussian_filter1d, minimum_filter1d
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from skimage.morphology import skeletonize

from training.data.rasterise import resample

# Half of the 8 neighbours; the graph is undirected.
_NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))
_WORK_SIDE = 96
_STEP = 0.5


def draw_stroke(region: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
    """The points of one stroke through a connected region, end to end.

    The stroke follows the longest path of the medial axis of the region's smoothed shape: people draw along the bulk
    and ignore frayed borders. It stays clear of the border where the region is wide enough.

    Args:
        region: (H, W), one connected region.
        rng: Source of the hand's unsteadiness; how much is drawn from it depends on the region only.

    Returns:
        (P, 2) of y, x in pixels (centres at integers), half a pixel apart; equal points for a region without extent.
    """
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    path = _middle_path(region, depth)
    if np.hypot(*np.diff(path, axis=0).T).sum() < depth.max():
        path = _chord(path, depth, rng)
    path = resample(path, _STEP)
    smooth = _unsteady(path, depth, rng)
    return resample(_keep_inside(smooth, path, depth), _STEP)


def _middle_path(region: NDArray[np.bool_], depth: NDArray[np.float64]) -> NDArray[np.float64]:
    factor = max(region.shape) / _WORK_SIDE
    if factor <= 1 or depth.max() < 3 * factor:
        # Thin regions would fall apart at a lower resolution; they have few pixels anyway.
        return _longest_path(skeletonize(_simplify(region, depth)), depth)
    shape = [max(1, round(side / factor)) for side in region.shape]
    rows = ((np.arange(shape[0]) + 0.5) * region.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * region.shape[1] / shape[1]).astype(int)
    small_depth = depth[np.ix_(rows, columns)]
    path = _longest_path(skeletonize(_simplify(region[np.ix_(rows, columns)], small_depth)), small_depth)
    return np.stack([rows[path[:, 0].astype(int)], columns[path[:, 1].astype(int)]], axis=1).astype(float)


def _chord(path: NDArray[np.float64], depth: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A straight stroke across a round region, whose medial axis is hardly more than a point."""
    middle = np.array(np.unravel_index(np.argmax(depth), depth.shape), float)
    along = path[-1] - path[0]
    angle = np.arctan2(along[0], along[1]) if along.any() else rng.uniform(0, np.pi)
    # Inside the largest inscribed circle, hence inside the region.
    reach = 0.6 * (depth.max() - 1) * np.array([np.sin(angle), np.cos(angle)])
    return np.stack([middle - reach, middle, middle + reach])


def _simplify(region: NDArray[np.bool_], depth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The region without the fringes that are thin beside its thickest part."""
    sigma = 0.15 * float(np.sqrt(region.sum()))
    sigma = min(sigma, 0.35 * float(depth.max()))
    if sigma < 0.7:
        return region
    simple: NDArray[np.bool_] = (gaussian_filter(region.astype(np.float32), sigma, mode="constant") > 0.5) & region
    return simple if simple.any() else region


def _longest_path(skeleton: NDArray[np.bool_], depth: NDArray[np.float64]) -> NDArray[np.float64]:
    """The longest of the shortest paths through a skeleton (two sweeps: exact on a tree, close to it with loops).

    Args:
        skeleton: (H, W), one pixel wide.
        depth: (H, W), distance to the region's border; without a skeleton the deepest pixel is the path.
    """
    ys, xs = np.nonzero(skeleton)
    if len(ys) == 0:
        return np.array([np.unravel_index(np.argmax(depth), depth.shape)], float)
    number = np.full((skeleton.shape[0] + 1, skeleton.shape[1] + 2), -1)
    number[ys, xs + 1] = np.arange(len(ys))
    heads, tails, lengths = [], [], []
    for dy, dx in _NEIGHBOURS:
        other = number[ys + dy, xs + 1 + dx]
        found = np.nonzero(other >= 0)[0]
        heads.append(found)
        tails.append(other[found])
        lengths.append(np.full(len(found), float(np.hypot(dy, dx))))
    edges = (np.concatenate(lengths), (np.concatenate(heads), np.concatenate(tails)))
    graph = coo_array(edges, shape=(len(ys), len(ys))).tocsr()
    # From the deepest pixel, so that of several pieces the most central one is taken.
    first = int(np.argmax(depth[ys, xs]))
    start = _farthest(dijkstra(graph, directed=False, indices=first))
    distances, previous = dijkstra(graph, directed=False, indices=start, return_predecessors=True)
    node, nodes = _farthest(distances), []
    while node >= 0:
        nodes.append(node)
        node = int(previous[node])
    return np.stack([ys[nodes], xs[nodes]], axis=1).astype(float)


def _farthest(distances: NDArray[np.float64]) -> int:
    return int(np.argmax(np.where(np.isfinite(distances), distances, -1)))


def _unsteady(path: NDArray[np.float64], depth: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """The path rounded off and swaying slowly, in proportion to the room that there is."""
    count = len(path)
    sigma = max(3.0, 0.04 * count)
    smooth = gaussian_filter1d(path, sigma, axis=0, mode="nearest")
    room = gaussian_filter1d(_sample(depth, path), sigma, mode="nearest")
    wave = max(8.0, 0.08 * count)
    sway = gaussian_filter1d(rng.standard_normal((count, 2)), wave, axis=0, mode="reflect")
    # A filtered white noise has this standard deviation; dividing brings it back to 1.
    sway *= np.sqrt(2 * np.sqrt(np.pi) * wave)
    swaying: NDArray[np.float64] = smooth + sway * np.minimum(0.18 * room, 0.02 * count)[:, None]
    return swaying


def _keep_inside(
    wanted: NDArray[np.float64], safe: NDArray[np.float64], depth: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Blend from the wanted course to the safe one where the wanted one comes too close to the border."""
    margin = np.minimum(2.0, 0.5 * _sample(depth, safe))
    share = np.zeros(len(wanted))
    for weight in (0.25, 0.5, 0.75, 1.0):
        course = weight * wanted + (1 - weight) * safe
        share = np.where((_sample(depth, course) >= margin), weight, share)
    # Neighbours give way too, or the stroke would have kinks.
    width = max(5, len(wanted) // 16)
    share = gaussian_filter1d(minimum_filter1d(share, width), width / 4)
    blended: NDArray[np.float64] = share[:, None] * wanted + (1 - share[:, None]) * safe
    return blended


def _sample(depth: NDArray[np.float64], path: NDArray[np.float64]) -> NDArray[np.float64]:
    ys = np.clip(np.rint(path[:, 0]).astype(int), 0, depth.shape[0] - 1)
    xs = np.clip(np.rint(path[:, 1]).astype(int), 0, depth.shape[1] - 1)
    values: NDArray[np.float64] = depth[ys, xs]
    return values
