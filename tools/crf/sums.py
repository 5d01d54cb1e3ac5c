"""Weighted sums of short lists of rows, what `torch.nn.functional.embedding_bag` computes: also fast on GPUs.

    bags = Bags(index, weights)            # int32 [B,K], float32 [B,K]: lists of K rows
    bags = Bags(index, weights, starts)    # int32 [E], float32 [E], int32 [B+1]: list b has starts[b] to starts[b+1]
    sums = bags(rows)                      # float32 [R,L] -> float32 [B,L]
    sums = bags(rows, base)                # added to float32 [B,L]

The dense CRF filters rows of 3 to 20 numbers. PyTorch's kernel for GPUs gives each list a warp, of which only as many
threads work as a row has numbers, one entry after the other. Here a Triton kernel (`tools.crf.kernel`), where Triton
works, takes many lists at once. Both add up in the order of the list, so results repeat.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

LONGEST = 32
"""Entries of a list that a GPU sums one after the other; `split` cuts longer lists."""


@dataclass(frozen=True)
class Bags:
    """Lists of rows, and a weight for each entry."""

    index: Tensor  # int32 [B,K], or [E] with `starts`; the rows in each list
    weights: Tensor  # float32 of the same shape
    starts: Tensor | None = None  # int32 [B+1], ascending from 0 to E; None if all lists have K entries

    def __call__(self, rows: Tensor, base: Tensor | None = None) -> Tensor:
        """The sum of each list of the contiguous rows float32 [R,L], added to `base`: float32 [B,L]. Empty lists: 0."""
        if rows.is_cuda:
            return _kernel(rows.device)(rows, self.index, self.weights, self.starts, base)
        return _embedding_bag(rows, *self._flat, base)

    @functools.cached_property
    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index, weights and starts; of lists of one length `embedding_bag` would make the starts in each call."""
        starts = self.starts
        if starts is None:
            bags, length = self.index.shape
            starts = torch.arange(0, bags * length + 1, length, dtype=self.index.dtype)
        return self.index.flatten(), self.weights.flatten(), starts


def split(bags: Bags) -> list[Bags]:
    """Bags with lists of at most `LONGEST` entries that, one after the other, give the sums of `bags` (with `starts`).

    A flat region of an image puts thousands of pixels on one vertex of a lattice: a GPU would wait for that list alone.
    """
    assert bags.starts is not None
    cuts = torch.arange(0, len(bags.index), LONGEST, dtype=bags.starts.dtype, device=bags.index.device)
    starts = torch.cat([bags.starts, cuts]).sort().values
    pieces = torch.arange(len(starts) - 1, dtype=torch.int32, device=starts.device)
    whole = Bags(pieces, torch.ones_like(pieces, dtype=torch.float32), torch.searchsorted(starts, bags.starts).int())
    return [Bags(bags.index, bags.weights, starts), whole]


def _embedding_bag(rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor | None, base: Tensor | None) -> Tensor:
    sums = embedding_bag(
        index, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=starts is not None
    )
    return sums if base is None else sums.add_(base)


@functools.cache
def _kernel(device: torch.device) -> Callable[..., Tensor]:
    """The function for a GPU: the Triton kernel if it gives what PyTorch's gives on a small example.

    Triton needs a C compiler for its launcher, and supports only some GPUs; it says so with exceptions of many types.
    """
    try:
        from tools.crf.kernel import bag_sum

        rows = torch.linspace(0, 1, 70, device=device).view(10, 7)
        index = torch.arange(96, dtype=torch.int32, device=device) % 10
        weights = torch.linspace(-1, 2, 96, device=device)
        starts = torch.arange(0, 97, 12, dtype=torch.int32, device=device)
        base = torch.linspace(0, 1, 112, device=device).view(16, 7)
        for lists in ((index.view(-1, 6), weights.view(-1, 6), None, base), (index, weights, starts, None)):
            torch.testing.assert_close(bag_sum(rows, *lists), _embedding_bag(rows, *lists))
    except Exception as error:
        warnings.warn(f"The dense CRF runs without Triton, more slowly: {error}", stacklevel=2)
        return _embedding_bag
    return bag_sum
