"""The Triton kernel behind `tools.crf.sums` on GPUs, which alone imports this file: Triton is not everywhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
"""Sums that a program, a group of 128 threads, computes."""


def bag_sum(rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor | None, base: Tensor | None) -> Tensor:
    """`tools.crf.sums.Bags(index, weights, starts)(rows, base)`; all tensors contiguous."""
    width = rows.shape[1]
    bags, length = index.shape if starts is None else (len(starts) - 1, 0)
    sums = rows.new_empty(bags, width)
    columns = min(triton.next_power_of_2(width), 32)
    lists = TILE // columns
    grid = (triton.cdiv(bags, lists), triton.cdiv(width, columns))
    with torch.cuda.device_of(rows):
        _bag_sum[grid](
            rows,
            index,
            weights,
            index if starts is None else starts,
            sums if base is None else base,
            sums,
            bags,
            width,
            HAS_BASE=base is not None,
            LENGTH=length,
            LISTS=lists,
            COLUMNS=columns,
        )
    return sums


# Else it would be compiled again for sizes of 1 and for multiples of 16: photographs have all sizes.
@triton.jit(do_not_specialize=["bags", "width"])
def _bag_sum(
    rows,
    index,
    weights,
    starts,
    base,
    sums,
    bags,
    width,
    HAS_BASE: tl.constexpr,
    LENGTH: tl.constexpr,
    LISTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum `LISTS` lists, `COLUMNS` columns of them; of `LENGTH` entries each, or as `starts` says if that is 0."""
    bag = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = bag < bags
    in_row = (column < width)[None, :]
    place = bag.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.zeros([LISTS, COLUMNS], dtype=tl.float32)
    if LENGTH > 0:
        for i in tl.static_range(LENGTH):
            total += _weighted_rows(rows, index, weights, bag.to(tl.int64) * LENGTH + i, exists, column, in_row, width)
    else:
        entry = tl.load(starts + bag, mask=exists, other=0)
        end = tl.load(starts + bag + 1, mask=exists, other=0)
        for _ in range(tl.max(end - entry, axis=0)):
            total += _weighted_rows(rows, index, weights, entry, entry < end, column, in_row, width)
            entry += 1
    if HAS_BASE:
        total += tl.load(base + place, mask=exists[:, None] & in_row, other=0.0)
    tl.store(sums + place, total, mask=exists[:, None] & in_row)


@triton.jit
def _weighted_rows(rows, index, weights, entry, used, column, in_row, width):
    """What the entries, one of each list, add to the sums; zero where the list has no such entry."""
    row = tl.load(index + entry, mask=used, other=0).to(tl.int64)
    weight = tl.load(weights + entry, mask=used, other=0.0)
    values = tl.load(rows + row[:, None] * width + column[None, :], mask=used[:, None] & in_row, other=0.0)
    return weight[:, None] * values
