"""Large photographs, one tile after the other: maps of overlapping tiles blended to maps of the whole.

    for strip in blended_strips(predict, photograph, tile=1024):      # f32[B,C,rows,W], from the top down
        masks.append(strip.argmax(dim=1))

Only the rows that the current tiles reach are kept, so memory does not grow with the height of the photograph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def blended_strips(
    predict: Callable[[torch.Tensor], torch.Tensor], photograph: torch.Tensor, tile: int
) -> Iterator[torch.Tensor]:
    """Class maps of a photograph from those of its tiles, in strips of rows.

    Args:
        predict: from a tile, a part of `photograph`, to float maps [B,C,h,w] of the same height and width.
        photograph: [1,3,H,W].
        tile: side of a tile, pixels; tiles overlap by a quarter.

    Yields:
        The mean of the maps of all tiles that hold a pixel, each weighted by `windows`: f32[B,C,rows,W].
    """
    (tops, row_weights), (lefts, column_weights) = (windows(side, tile) for side in photograph.shape[-2:])
    height, width = row_weights.shape[1], column_weights.shape[1]
    unfinished = None
    for top, end, rows in zip(tops, [*tops[1:], photograph.shape[-2]], row_weights, strict=True):
        strip = None
        for left, columns in zip(lefts, column_weights, strict=True):
            maps = predict(photograph[..., top : top + height, left : left + width])
            if strip is None:
                strip = maps.new_zeros(*maps.shape[:2], height, photograph.shape[-1])
            strip[..., left : left + width] += maps * (rows[:, None] * columns).to(maps.device)
        if unfinished is not None:
            strip[..., : unfinished.shape[-2], :] += unfinished
        yield strip[..., : end - top, :]
        unfinished = strip[..., end - top :, :]


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
