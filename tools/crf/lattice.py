"""The permutohedral lattice (Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010). Features in d dimensions are embedded in the hyperplane sum(y) = 0 of d+1 dimensions, which the
lattice tiles with simplices of d+1 vertices. Filtering is three sparse steps:

* splat: each pixel adds its value to the d+1 vertices around it, with barycentric weights;
* blur: along each of d+1 axes, v <- v + (v_previous + v_next) / 2, absent vertices counting as zero;
* slice: each pixel reads its d+1 vertices back with the same weights, times 1 / (1 + 2^-d).

All coordinates of a vertex have the same remainder r = 0..d modulo d+1, so the vertex is determined by r and by d
quotients (the last follows, because the sum is zero). Quotients, image index and remainder are packed in one integer,
the key; sorting the keys of all pixels finds the distinct vertices *and* the list of pixels around each. The three
steps are then weighted sums over short lists of rows (`tools.crf.sums`), on CPU and GPU, in a fixed order.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tools.crf.sums import Bags, split


class Kernel:
    """weight * diag(n) K diag(n), one symmetrically normalised Gaussian kernel, as a function of rows of values.

    Args:
        features: float32 [d,B,P], P pixels of B images, in units of the kernel's standard deviation.
        highest: upper bound of each of the d features; the lower bound is 0.
        weight: of the kernel in the energy.
    """

    def __init__(self, features: Tensor, highest: list[float], weight: float):
        dimensions, batch, pixels = features.shape
        image = torch.arange(batch, device=features.device).repeat_interleave(pixels)
        points = features.flatten(1)
        if pixels % 4:
            # pydensecrf works on four pixels at a time and fills the last four with zeros. These weigh nothing, but
            # their vertices let values spread further among dark pixels near the origin. We do the same.
            image = torch.cat([image, torch.arange(batch, device=features.device)])
            points = pad(points, (0, batch))
        quotients, rank, barycentric = _enclosing_simplex(points)
        barycentric[:, batch * pixels :] = 0
        digits = _vertex_digits(highest, batch)
        keys = _vertex_keys(quotients, rank, image, digits)
        vertices, splat, slicing = _connect(keys, barycentric, batch * pixels)
        self._stages = [*splat, *_blur(vertices, digits), slicing]
        self._normalise(weight, 1 / (1 + 2.0**-dimensions))

    def _normalise(self, weight: float, scale: float) -> None:
        """Fold n = 1 / sqrt(K 1), the scale of the blur and the weight into the weights of splat and slice."""
        splat, slicing = self._stages[0], self._stages[-1]
        slicing.weights.mul_(scale)
        norm = self(torch.ones(len(slicing.weights), 1, device=slicing.weights.device)).rsqrt()
        splat.weights.mul_(norm[:, 0].index_select(0, splat.index))
        slicing.weights.mul_(norm * weight)

    def __call__(self, rows: Tensor, base: Tensor | None = None) -> Tensor:
        """Filter each column of float32 [N,L], N = B * P pixels; the result is added to `base` [N,L]."""
        for stage in self._stages[:-1]:
            rows = stage(rows)
        return self._stages[-1](rows, base)


def _connect(keys: Tensor, barycentric: Tensor, pixels: int) -> tuple[Tensor, list[Bags], Bags]:
    """Link pixels and vertices both ways, given key and weight of the vertices of each point, [d+1,N or more].

    Returns:
        The distinct keys [M], ascending: vertex v has the v-th. Splat, from pixels to M+1 vertices, of which the last
        is always zero. Slice, from vertices to pixels.
    """
    corners, points = keys.shape
    sorted_keys, order = keys.flatten().sort()
    is_first = torch.ones_like(sorted_keys, dtype=torch.bool)
    torch.ne(sorted_keys[1:], sorted_keys[:-1], out=is_first[1:])
    first = is_first.nonzero().squeeze(1)
    vertex = is_first.cumsum(0, dtype=torch.int32).sub_(1)
    unsorted = torch.empty_like(vertex).scatter_(0, order, vertex).view(corners, points)
    slicing = Bags(unsorted[:, :pixels].t().contiguous(), barycentric[:, :pixels].t().contiguous())
    weights = barycentric.flatten().index_select(0, order)
    # The remainder is the highest digit of a key: row r of `keys` is sorted in place, no entry leaves its row.
    row_start = torch.arange(0, len(order), points, dtype=torch.int32, device=keys.device)[:, None]
    index = order.int().view(corners, points).sub_(row_start).clamp_(max=pixels - 1).flatten()
    splat = Bags(index, weights, pad(first, (0, 2), value=len(order)).int())
    return sorted_keys[first], split(splat) if keys.is_cuda else [splat], slicing


def _enclosing_simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex in which each point lies, and where; features are float32 [d,N].

    Returns:
        quotients: float32 [d+1,N]: d+1 times these is the vertex of remainder 0.
        rank: int64 [d+1,N]: 0 for the coordinate in which the point is furthest above that vertex, d for the lowest.
        barycentric: float32 [d+1,N]: weights of the vertices of remainder 0..d.
    """
    corners = len(features) + 1
    elevated = _elevate(features)
    quotients = (elevated * (1 / corners)).round_()
    rank = _descending_rank(elevated - quotients * corners)
    # Rounding may leave the plane; moving the coordinates with the largest rounding errors brings it back.
    rank += quotients.sum(dim=0)
    shift = (rank < 0).float() - (rank >= corners).float()
    quotients += shift
    rank = (rank + corners * shift).long()
    offset = (elevated - quotients * corners) * (1 / corners)
    falling = torch.empty_like(offset).scatter_(0, rank, offset)
    barycentric = falling.flip(0).diff(dim=0, prepend=falling[:1] - 1)
    return quotients, rank, barycentric


def _elevate(features: Tensor) -> Tensor:
    """Embed float32 [d,N] in the plane sum(y) = 0 of d+1 dimensions, scaled for a blur of standard deviation 1."""
    dimensions = len(features)
    elevated = features.new_empty(dimensions + 1, features.shape[1])
    total = torch.zeros_like(features[0])
    for j, scale in reversed(list(enumerate(_scales(dimensions), start=1))):
        scaled = features[j - 1] * scale
        torch.sub(total, scaled * j, out=elevated[j])
        total = total + scaled
    elevated[0] = total
    return elevated


def _scales(dimensions: int) -> list[float]:
    """Scale of each feature: the diagonal of E in section 3 of Adams et al., rounded where the reference rounds."""
    deviation = np.float32(math.sqrt(2 / 3) * (dimensions + 1))
    return [float(np.float32(float(deviation) / math.sqrt((i + 1) * (i + 2)))) for i in range(dimensions)]


def _descending_rank(values: Tensor) -> Tensor:
    """For each column of float32 [d+1,N], how many entries are larger (of equal ones, the first counts as larger)."""
    rank = torch.arange(len(values), dtype=values.dtype, device=values.device)[:, None].repeat(1, values.shape[1])
    rows, smaller = rank.unbind(), torch.empty_like(values[0])
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            torch.lt(values[i], values[j], out=smaller)  # 0 or 1, as float: sums with bool are slow on a CPU
            rows[i].add_(smaller)
            rows[j].sub_(smaller)
    return rank


@dataclass(frozen=True)
class _Digits:
    """Place values of the digits packed in a vertex key: d+1 quotients (the last is implied: 0), image, remainder."""

    quotients: list[int]
    lowest: list[int]
    image: int
    remainder: int
    dtype: torch.dtype


def _vertex_digits(highest: list[float], batch: int) -> _Digits:
    """Place values large enough for every quotient that can occur, and for its neighbours on the lattice."""
    corners = len(highest) + 1
    reach = [scale * bound for scale, bound in zip(_scales(len(highest)), highest, strict=True)]
    lowest, places, place = [], [], 1
    for j in range(corners - 1):
        lowest.append(math.floor(-j * reach[j - 1] / corners) - 3)  # -0 * reach[-1] is zero, as it should be
        places.append(place)
        place *= math.ceil(sum(reach[j:]) / corners) + 4 - lowest[j]
    total = place * batch * corners
    assert total < 2**63, f"kernel too narrow: features of up to {highest} standard deviations overflow the keys"
    return _Digits([*places, 0], lowest, place, place * batch, torch.int32 if total < 2**31 else torch.int64)


def _vertex_keys(quotients: Tensor, rank: Tensor, image: Tensor, digits: _Digits) -> Tensor:
    """Keys of the d+1 vertices of each point's simplex, integers [d+1,N] in order of their remainder.

    From the vertex of remainder r to that of r+1, all coordinates grow by 1, except the one of rank d-r, which falls
    by d: all quotients stay, except that one, which falls by 1.
    """
    keys = torch.empty_like(rank, dtype=digits.dtype)
    torch.mul(image, digits.image, out=keys[0])
    for quotient, lowest, place in zip(quotients[:-1], digits.lowest, digits.quotients[:-1], strict=True):
        keys[0].add_((quotient - lowest).to(digits.dtype), alpha=place)
    by_rank = torch.empty_like(keys)
    for j, place in enumerate(digits.quotients):
        by_rank.scatter_(0, rank[j : j + 1], place)
    for r in range(1, len(keys)):
        torch.sub(keys[r - 1], by_rank[len(keys) - r], out=keys[r])
        keys[r].add_(digits.remainder)
    return keys


def _blur(vertices: Tensor, digits: _Digits) -> list[Bags]:
    """The blur along each axis: M vertices (keys, ascending) and their two neighbours; absent ones are row M, always 0.

    The neighbour before, along axis j, has 1 less in every coordinate but j, where it has d more. In quotients: for
    remainders above 0, the same but one more in j and the remainder one lower; for remainder 0, which becomes d, one
    less everywhere but in j.
    """
    count = len(vertices)
    axes = len(digits.quotients)
    wrapped = (axes - 1) * digits.remainder - sum(digits.quotients)
    down = vertices + torch.where(vertices < digits.remainder, wrapped, -digits.remainder).to(digits.dtype)
    stencil = torch.full((axes, count + 1, 3), count, dtype=torch.int32, device=vertices.device)
    stencil[:, :count, 0] = torch.arange(count, dtype=torch.int32, device=vertices.device)
    link = _link_by_search if vertices.is_cuda else _link_by_merging
    for place, rows in zip(digits.quotients, stencil, strict=True):
        link(vertices, down + place, rows)
    weights = torch.full((count + 1, 3), 0.5, device=vertices.device)
    weights[:, 0] = 1
    return [Bags(rows, weights) for rows in stencil]


def _link_by_search(vertices: Tensor, before: Tensor, rows: Tensor) -> None:
    """Enter neighbours into `rows`, int32 [M+1,3], columns 1 and 2, which are M at first. Nothing waits for a GPU.

    Args:
        vertices: distinct keys [M], ascending.
        before: key [M] of each vertex's neighbour before it, whether there is such a vertex or not.
    """
    count = len(vertices)
    found = torch.searchsorted(vertices, before).clamp_(max=count - 1)
    found = torch.where(vertices.index_select(0, found) == before, found, count)
    rows[:count, 1] = found
    rows[found, 2] = torch.arange(count, dtype=rows.dtype, device=rows.device)
    rows[count:, 2] = count


def _link_by_merging(vertices: Tensor, before: Tensor, rows: Tensor) -> None:
    """`_link_by_search`, on a CPU in half the time: NumPy merges what is sorted in runs, as both lists of keys are."""
    _, found, own = np.intersect1d(vertices.numpy(), before.numpy(), assume_unique=True, return_indices=True)
    neighbours = rows.numpy()
    neighbours[own, 1] = found
    neighbours[found, 2] = own
