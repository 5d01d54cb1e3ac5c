"""Masks as runs of pixels, the way COCO's RLE stores them: overlaps and unions without painting every mask.

    runs = Runs.from_rle([annotation["segmentation"] for annotation in content["annotations"]], size=(375, 500))
    overlaps = runs.overlaps(Stretches.of(runs.flatten(pseudo_mask)), classes)
    unions = runs.unions(groups, number)

A hundred masks of 375x500 pixels have some ten thousand runs, so what would be a pass over all pixels of all masks is
one over a few thousand numbers. Everything here works on flattened images; `order` says in which direction. Places are
int32, half the memory to move; that bounds images at 2^31 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np


@dataclass(frozen=True)
class Stretches:
    """A flattened label map as stretches of equal labels.

    Attributes:
        begins: int64 [S], their first pixels; the first one is 0.
        lengths: int64 [S], in pixels.
        values: uint8 [S], their labels.
    """

    begins: np.ndarray
    lengths: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> Stretches:
        """The stretches of labels uint8 [H*W], of which there is at least one."""
        begins = np.append(0, np.flatnonzero(labels[1:] != labels[:-1]) + 1)
        return cls(begins, np.diff(begins, append=len(labels)), labels[begins])

    def areas(self) -> np.ndarray:
        """Pixels of each of the labels 0..255, int64 [256]."""
        return np.bincount(self.values, weights=self.lengths, minlength=256).astype(np.int64)


@dataclass(frozen=True)
class Runs:
    """N masks of one image, each a list of runs [start, end) of the flattened image, like the rows of a sparse matrix.

    Attributes:
        starts, ends: int32 [R]; those of one mask lie side by side, ascend and do not overlap. A run may be empty.
        counts: int64 [N], the number of runs of each mask; it may be 0.
        size: (H, W) of the image.
        order: "C" if the image is read row by row, "F" if column by column (COCO).
    """

    starts: np.ndarray
    ends: np.ndarray
    counts: np.ndarray
    size: tuple[int, int]
    order: Literal["C", "F"]

    @classmethod
    def from_masks(cls, masks: np.ndarray) -> Runs:
        """The runs of masks bool [N, H, W], row by row."""
        count, size = len(masks), masks.shape[1:]
        pixels = size[0] * size[1]
        framed = np.zeros((count, pixels + 2), dtype=bool)
        framed[:, 1:-1] = masks.reshape(count, pixels)
        owners, places = np.divmod(np.flatnonzero(framed[:, 1:] != framed[:, :-1]), pixels + 1)
        starts, ends = places.astype(np.int32).reshape(-1, 2).T
        return cls(starts, ends, np.bincount(owners[::2], minlength=count), size, "C")

    @classmethod
    def from_rle(cls, masks: Sequence[dict], size: tuple[int, int]) -> Runs:
        """The runs of compressed COCO RLE ("counts" as text) of masks of `size`, column by column.

        Raises:
            ValueError: the counts are damaged, or do not add up to the image.
        """
        pixels = size[0] * size[1]
        gaps, lengths, counts = _gaps_and_runs(*_decompress([mask["counts"] for mask in masks]))
        if (gaps < 0).any() or (lengths < 0).any():
            raise ValueError("damaged run lengths")
        tails = np.cumsum(counts) - 1
        gaps[tails[:-1] + 1] -= pixels  # each mask counts from 0 again
        ends = np.cumsum(gaps + lengths, dtype=np.int32)
        if (ends[tails] != pixels).any():
            raise ValueError("run lengths that do not add up to the image")
        return cls(ends - lengths, ends, counts, size, "F")

    def flatten(self, image: np.ndarray) -> np.ndarray:
        """An image HxW in the order of these runs, [H*W]."""
        return (image if self.order == "C" else cv2.transpose(image)).ravel()

    def unflatten(self, pixels: np.ndarray) -> np.ndarray:
        """The reverse of `flatten`: HxW, row by row in memory."""
        return pixels.reshape(self.size) if self.order == "C" else cv2.transpose(pixels.reshape(self.size[::-1]))

    def areas(self) -> np.ndarray:
        """Pixels of each mask, int32 [N]."""
        return self._sum_by_mask(self.ends - self.starts)

    def overlaps(self, labels: Stretches, classes: np.ndarray) -> np.ndarray:
        """Pixels that each mask shares with each of n classes, int64 [N, n]: the matrix product with one-hot labels.

        That is, for each run, how many pixels of a class come before its end, less those before its start. A 64-bit
        number holds the counts of several classes side by side.
        """
        pixels, places = self.size[0] * self.size[1], np.concatenate((self.starts, self.ends))
        lengths = np.diff(labels.begins, append=pixels + 1)  # a run may end behind the last pixel
        stretch = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths).take(places).astype(np.intp)
        rest = places - labels.begins.take(stretch)
        bits = pixels.bit_length()
        overlaps = np.empty((len(self.counts), len(classes)), dtype=np.int64)
        for first in range(0, len(classes), 62 // bits):
            group = classes[first : first + 62 // bits]
            shifts = bits * np.arange(len(group))
            units = ((labels.values[:, None] == group) << shifts).sum(
                axis=1
            )  # a pixel of this stretch in such a number
            before = np.cumsum(units * lengths) - units * lengths
            starts, ends = np.split(before.take(stretch) + rest * units.take(stretch), 2)
            counts = self._sum_by_mask(ends - starts)[:, None] >> shifts & (1 << bits) - 1
            overlaps[:, first : first + len(group)] = counts
        return overlaps

    def unions(self, groups: np.ndarray, number: int) -> np.ndarray:
        """The pixels that the masks of each group cover: bool [number, H*W].

        Args:
            groups: int64 [N], the group 0..number-1 of each mask, or -1: in none.
        """
        pixels = self.size[0] * self.size[1]
        group = np.repeat(groups, self.counts)
        kept = np.flatnonzero(group >= 0)
        if not len(kept):
            return np.zeros((number, pixels), dtype=bool)
        # The groups lie one behind the other, as in one long image. Numbers are sorted faster than pairs.
        starts, bits = self.starts.take(kept), pixels.bit_length()
        keys = np.sort((starts + group.take(kept) * pixels) << bits | self.ends.take(kept) - starts)
        starts = keys >> bits
        reach = np.maximum.accumulate(starts + (keys & (1 << bits) - 1))
        apart = starts[1:] > reach[:-1]
        edges = np.stack((starts[np.append(True, apart)], reach[np.append(apart, True)]), axis=1).ravel()
        lengths = np.diff(edges, prepend=0, append=number * pixels)
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(number, pixels)

    def _sum_by_mask(self, values: np.ndarray) -> np.ndarray:
        """Sums over the runs of each mask, [N]."""
        heads = np.cumsum(self.counts) - self.counts
        sums = np.add.reduceat(np.append(values, values.dtype.type(0)), heads)
        return sums * (self.counts > 0)  # of no elements, reduceat takes one all the same


def _decompress(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in COCO's compressed counts: int32 [n] of all texts, and how many are in each text, int64 [N].

    A character holds five bits of a number, lowest first, and whether more follow; the last one's top bit is the sign.
    """
    stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
    codes = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8) - np.uint8(48)
    if "" in texts or (codes > 63).any() or (codes[stops - 1] >= 32).any():
        raise ValueError("damaged run lengths")
    lasts = np.flatnonzero(codes < 32)
    numbers = (codes.take(lasts) ^ 16).astype(np.int32) - np.int32(16)
    # Few numbers have more characters. The i-th of those further characters belongs to number (its place - i).
    further = np.flatnonzero(codes >= 32)
    owners = further - np.arange(len(further))
    heads = np.flatnonzero(np.diff(owners, prepend=-1))
    lengths = np.diff(heads, append=len(further))
    if lengths.max(initial=0) > 6:
        raise ValueError("damaged run lengths")
    shifts = 5 * (np.arange(len(further)) - np.repeat(heads, lengths))
    numbers[owners[heads]] <<= 5 * lengths
    numbers[owners[heads]] += np.add.reduceat((codes[further] & 31) << shifts, heads)
    return numbers, np.diff(np.searchsorted(lasts, stops), prepend=0)


def _gaps_and_runs(numbers: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Undo COCO's differences: pixels outside and inside the mask by turns, int32 [R] each, and runs of each mask [N].

    From a mask's fourth number on, each is the difference to the number two before it, the previous one of its kind.
    """
    runs = (counts + 1) // 2
    tails = np.cumsum(runs) - 1
    heads = tails - runs + 1
    outside_last = counts % 2 == 1  # such a mask gets a last run of no pixels
    gaps, lengths = np.insert(numbers, np.cumsum(counts)[outside_last], 0).reshape(-1, 2).T.copy()
    first, gaps[heads] = gaps[heads], 0  # the first gap is no part of its chain
    for kind in (gaps, lengths):
        before = np.append(np.int32(0), np.cumsum(kind, dtype=np.int32))
        np.subtract(before[1:], np.repeat(before[heads], runs), out=kind)
    gaps[heads], lengths[tails[outside_last]] = first, 0
    return gaps, lengths, runs
