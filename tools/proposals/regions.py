"""Mask proposals without weights: small regions of even colour, merged step by step into a hierarchy.

    masks = RegionGenerator().propose(load_image("photo.jpg"))  # bool [N, H, W]

The leaves are the regions of Felzenszwalb and Huttenlocher (IJCV 2004). As in selective search (Uijlings et al., IJCV
2013), the two most alike neighbours are merged until one region is left; every region on the way is a candidate. A
stand-in for Segment Anything on machines without its weights: its edges are good, but it does not know objects.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from skimage.segmentation import felzenszwalb

from tools.cam import WORKING_SIDE
from tools.errors import UserError
from tools.maps import fit
from tools.rle import encode

CHANNEL_BINS = (16, 24, 24)  # of L, a, b: chroma is finer because photographs use only the middle of its range
ORIENTATIONS, STRENGTHS = 4, 6  # of the texture histogram
MAX_LOG_GRADIENT = 9.0  # log2 of the largest value of a 3x3 Sobel filter on 8 bits, rounded up
EDGE_WEIGHT = 0.02  # of the mean edge strength in grey levels, against a histogram distance in [0, 1]
SIZE_POWER = 0.3  # small regions are merged first; 0 would let them survive to the end


@dataclass(frozen=True)
class RegionTree:
    """A binary merge tree of T = 2n-1 regions (fewer if some are not connected), the n leaves first."""

    members: np.ndarray  # bool [T, n], the leaves each region consists of
    sizes: np.ndarray  # int64 [T], pixels
    parents: np.ndarray  # int64 [T], -1 where there is none; always a higher index than the region's own
    # float64 [T], mean edge strength along the border, in grey levels per pixel; 0 without a border
    contrasts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RegionGenerator:
    """Regions of a merge hierarchy as mask proposals. A `tools.proposals.Propose`."""

    scale: float = 50.0  # of the leaves: larger gives fewer and larger ones
    sigma: float = 0.8  # Gaussian smoothing before the leaves are found, in pixels
    min_size: float = 0.002  # smallest region, as a fraction of the image's area
    # largest region, likewise. Merging takes every mask that is half inside a class, so a region that joins an object
    # and its surroundings does more harm than a missing whole object, whose parts are there
    max_size: float = 0.15
    # least mean edge strength along a region's border, in grey levels per pixel. What Segment Anything's stability
    # score is for: a region without a clear edge is a guess
    min_contrast: float = 0.0
    duplicate_iou: float = 0.85  # a region that shares this much with the next larger kept region around it is left out
    max_masks: int = 150  # at most this many per image, the largest ones
    # pixels; longer photographs are reduced to it. The numbers above are for smaller ones, and the time grows faster
    # than the number of pixels
    long_side: int = WORKING_SIDE

    def __post_init__(self) -> None:
        if self.max_size <= self.min_size:
            raise UserError(f"--region_max_size {self.max_size}: not above {self.min_size}, the smallest. Raise it.")

    def __call__(self, image_ids: Sequence[str], images: Sequence[np.ndarray]) -> list[np.ndarray | list[dict]]:
        """`propose` for each image; for a photograph longer than `long_side`, on a reduced one, as COCO RLE."""
        return [self._propose_reduced(image) for image in images]

    def _propose_reduced(self, image: np.ndarray) -> np.ndarray | list[dict]:
        height, width = image.shape[:2]
        factor = fit(height, width, (0, self.long_side))
        if factor == 1:
            return self.propose(image)
        size = [max(1, round(side * factor)) for side in (width, height)]
        masks = self.propose(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        # One at a time, and column by column as RLE: together they would take gigabytes.
        columns = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
        large = (cv2.resize(each, (height, width), interpolation=cv2.INTER_NEAREST_EXACT) for each in columns)
        return [encode(each.T[None].view(bool))[0] for each in large]

    def propose(self, image: np.ndarray) -> np.ndarray:
        """Propose masks for an image, uint8 RGB HxWx3; bool [N, H, W], large to small, N may be 0."""
        min_pixels = max(1, round(self.min_size * image.shape[0] * image.shape[1]))
        labels = felzenszwalb(image, scale=self.scale, sigma=self.sigma, min_size=min_pixels, channel_axis=-1)
        tree = merge_regions(image, labels)
        return tree.members[self._select(tree, labels.size)][:, labels]

    def _select(self, tree: RegionTree, pixels: int) -> np.ndarray:
        """Indices of the regions to propose, large to small."""
        allowed = (tree.sizes >= self.min_size * pixels) & (tree.sizes <= self.max_size * pixels)
        allowed &= tree.contrasts >= self.min_contrast
        around = np.full(len(tree.sizes), -1)  # the nearest proposed region that contains this one
        for index in range(len(tree.sizes) - 1, -1, -1):  # parents come before their children
            parent = tree.parents[index]
            if parent >= 0:
                around[index] = parent if allowed[parent] else around[parent]
            if around[index] >= 0 and tree.sizes[index] > self.duplicate_iou * tree.sizes[around[index]]:
                allowed[index] = False
        chosen = np.flatnonzero(allowed)
        return chosen[np.argsort(-tree.sizes[chosen], kind="stable")][: self.max_masks]


def merge_regions(image: np.ndarray, labels: np.ndarray) -> RegionTree:
    """Merge neighbouring regions, the most alike first, until none is left to merge.

    Args:
        image: uint8 RGB HxWx3.
        labels: int HxW, a partition into regions 0..n-1, all of them present.
    """
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    merger = _Merger(_histograms(lab, labels), np.bincount(labels.ravel()), _borders(lab, labels))
    merger.run()
    return RegionTree(
        np.stack(merger.members), np.array(merger.sizes), np.array(merger.parents), np.array(merger.contrasts)
    )


class _Merger:
    """The state of the greedy merging: lists indexed by region, which grow as regions are born."""

    def __init__(self, histograms: np.ndarray, sizes: np.ndarray, borders: list[dict[int, tuple[int, float]]]) -> None:
        self.histograms = list(histograms)
        self.sizes = sizes.tolist()
        self.borders = borders  # per living region: neighbour -> (length, summed edge strength) of the common border
        self.parents = [-1] * len(sizes)
        self.members = list(np.eye(len(sizes), dtype=bool))
        self.contrasts = [_contrast(border) for border in borders]
        self.pixels = int(sizes.sum())
        self.queue: list[tuple[float, int, int]] = []

    def run(self) -> None:
        for first, neighbours in enumerate(self.borders):
            for second in neighbours:
                if first < second:
                    self._enqueue(first, second)
        while self.queue:
            _, first, second = heapq.heappop(self.queue)
            if self.parents[first] == self.parents[second] == -1:
                self._merge(first, second)

    def _enqueue(self, first: int, second: int) -> None:
        length, strength = self.borders[first][second]
        groups = len(CHANNEL_BINS) + 1
        distance = 1 - np.minimum(self.histograms[first], self.histograms[second]).sum() / groups
        share = min(self.sizes[first], self.sizes[second]) / self.pixels
        cost = (distance + EDGE_WEIGHT * strength / length) * share**SIZE_POWER
        heapq.heappush(self.queue, (float(cost), first, second))

    def _merge(self, first: int, second: int) -> None:
        merged, size = len(self.sizes), self.sizes[first] + self.sizes[second]
        weighted = self.histograms[first] * self.sizes[first] + self.histograms[second] * self.sizes[second]
        self.histograms.append(weighted / size)
        self.sizes.append(size)
        self.members.append(self.members[first] | self.members[second])
        self.parents[first] = self.parents[second] = merged
        self.parents.append(-1)
        self.borders.append(self._joined_borders(first, second))
        self.contrasts.append(_contrast(self.borders[merged]))
        for neighbour, border in self.borders[merged].items():
            self.borders[neighbour].pop(first, None)
            self.borders[neighbour].pop(second, None)
            self.borders[neighbour][merged] = border
            self._enqueue(neighbour, merged)

    def _joined_borders(self, first: int, second: int) -> dict[int, tuple[int, float]]:
        joined: dict[int, tuple[int, float]] = {}
        for region in (first, second):
            for neighbour, (length, strength) in self.borders[region].items():
                if neighbour not in (first, second):
                    old_length, old_strength = joined.get(neighbour, (0, 0.0))
                    joined[neighbour] = (old_length + length, old_strength + strength)
        return joined


def _contrast(borders: dict[int, tuple[int, float]]) -> float:
    """Mean edge strength over all borders of a region."""
    length = sum(length for length, _ in borders.values())
    return sum(strength for _, strength in borders.values()) / length if length else 0.0


def _histograms(lab: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Normalised histograms of L, a, b and texture (gradient orientation x strength), one after another: [n, bins]."""
    codes = [(lab[..., k] * bins / 256).astype(np.int64) for k, bins in enumerate(CHANNEL_BINS)]
    counts = [_count(labels, code, bins) for code, bins in zip(codes, CHANNEL_BINS, strict=True)]
    dx, dy = cv2.Sobel(lab[..., 0], cv2.CV_32F, 1, 0), cv2.Sobel(lab[..., 0], cv2.CV_32F, 0, 1)
    orientation = ((np.arctan2(dy, dx) % np.pi) * (ORIENTATIONS / np.pi)).astype(np.int64) % ORIENTATIONS
    strength = np.log2(1 + np.hypot(dx, dy)) * (STRENGTHS / MAX_LOG_GRADIENT)
    texture = orientation * STRENGTHS + np.minimum(strength.astype(np.int64), STRENGTHS - 1)
    counts.append(_count(labels, texture, ORIENTATIONS * STRENGTHS))
    return np.concatenate(counts, axis=1) / np.bincount(labels.ravel())[:, None]


def _count(labels: np.ndarray, codes: np.ndarray, bins: int) -> np.ndarray:
    """How often each code occurs in each region, int64 [n, bins]."""
    regions = int(labels.max()) + 1
    return np.bincount((labels * bins + codes).ravel(), minlength=regions * bins).reshape(regions, bins)


def _borders(lab: np.ndarray, labels: np.ndarray) -> list[dict[int, tuple[int, float]]]:
    """For each region: neighbour -> (pixel pairs along the common border, sum of the edge strength over them)."""
    edges = _edge_strength(lab)
    sides = [(np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])]
    pairs = np.concatenate([np.stack([labels[a], labels[b]]).reshape(2, -1) for a, b in sides], axis=1)
    strengths = np.concatenate([np.maximum(edges[a], edges[b]).ravel() for a, b in sides])
    crossing = pairs[0] != pairs[1]
    pairs, strengths = np.sort(pairs[:, crossing], axis=0), strengths[crossing]

    regions = int(labels.max()) + 1
    keys, inverse, lengths = np.unique(pairs[0] * regions + pairs[1], return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=strengths, minlength=len(keys))
    borders: list[dict[int, tuple[int, float]]] = [{} for _ in range(regions)]
    for key, length, total in zip(keys.tolist(), lengths.tolist(), sums.tolist(), strict=True):
        first, second = divmod(key, regions)
        borders[first][second] = borders[second][first] = (length, total)
    return borders


def _edge_strength(lab: np.ndarray) -> np.ndarray:
    """Length of the colour gradient of the smoothed image, in grey levels per pixel, float32 HxW."""
    smooth = cv2.GaussianBlur(lab, (0, 0), 1.0)
    dx, dy = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=1 / 8)
    return np.sqrt((dx**2 + dy**2).sum(axis=-1))
