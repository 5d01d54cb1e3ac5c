"""Large photographs, one tile after the other: maps of overlapping tiles blended to maps of the whole.

    for rows, strip in blended_strips(predict, (height, width), tile=1024):      # f32[B,C,rows,W], from the top down
        mask[rows] = strip.max(dim=1).indices

Only the rows that the current tiles reach are kept, so memory does not grow with the height of the photograph.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

Place = tuple[slice, slice]
"""Rows and columns of a tile."""

Strip = tuple[slice, torch.Tensor]
"""Rows of a photograph, and a map of them: f32[B,C,rows,W]."""


def blended_strips(predict: Callable[[Place], torch.Tensor], size: tuple[int, int], tile: int) -> Iterator[Strip]:
    """Class maps of a photograph from those of its tiles, in strips of rows.

    Args:
        predict: from the place of a tile to its maps, float [B,C,h,w].
        size: (H, W) of the photograph.
        tile: side of a tile, pixels; tiles overlap by a quarter.

    Yields:
        The rows, and there the mean of the maps of all tiles that hold a pixel, each weighted by `windows`.
    """
    (tops, row_weights), (lefts, column_weights) = (windows(side, tile) for side in size)
    height, width = row_weights.shape[1], column_weights.shape[1]
    unfinished = None
    for top, end, rows in zip(tops, [*tops[1:], size[0]], row_weights, strict=True):
        strip = None
        for left, columns in zip(lefts, column_weights, strict=True):
            maps = predict((slice(top, top + height), slice(left, left + width)))
            if strip is None:
                strip = maps.new_zeros(*maps.shape[:2], height, size[1])
            strip[..., left : left + width] += maps * (rows[:, None] * columns).to(maps.device)
        if unfinished is not None:
            strip[..., : unfinished.shape[-2], :] += unfinished
        yield slice(top, end), strip[..., : end - top, :]
        unfinished = strip[..., end - top :, :].clone()


class Rows:
    """Strips, from the top down, as one map. It keeps only the rows that are still needed."""

    def __init__(self, strips: Iterable[Strip]) -> None:
        self._strips, self._first, self._kept = iter(strips), 0, None

    def __getitem__(self, place: Place) -> torch.Tensor:
        """The map there. Rows above the first that was asked for last are gone."""
        rows, columns = place
        if rows.start > self._first:  # first: their memory is free when strips come
            self._kept, self._first = self._kept[..., rows.start - self._first :, :].clone(), rows.start
        while self._kept is None or self._first + self._kept.shape[-2] < rows.stop:
            _, strip = next(self._strips)
            self._kept = strip if self._kept is None else torch.cat([self._kept, strip], dim=-2)
        return self._kept[..., : rows.stop - rows.start, columns]


def windows(length: int, tile: int) -> tuple[list[int], torch.Tensor]:
    """Evenly spaced tiles along one side of a photograph, as few as overlap by a quarter.

    Args:
        length: of the side, pixels.
        tile: of a tile; at most `length` of it is used.

    Returns:
        The first pixel of each tile, ascending from 0; and the weights of its pixels, f32[tiles,side]: highest in the
        middle and falling linearly to the ends, scaled so that those of the tiles at a pixel add up to 1.
    """
    side = min(tile, length)
    gaps = -(-(length - side) // (side - side // 4))
    starts = [(length - side) * i // max(1, gaps) for i in range(gaps + 1)]
    ramp = torch.arange(1, side + 1).minimum(torch.arange(side, 0, -1)).float()
    total = torch.zeros(length)
    for start in starts:
        total[start : start + side] += ramp
    return starts, torch.stack([ramp / total[start : start + side] for start in starts])
