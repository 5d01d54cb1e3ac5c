"""Fully connected CRF by mean field over permutohedral lattices: batched, on the tensors' device, without a compiler.

    unary = unary_from_labels(labels, num_labels=3, gt_prob=0.7)        # int64 [B,H,W] -> float32 [B,3,H,W]
    q = mean_field(images, unary, CAM_SETTINGS, iterations=10)          # uint8 [B,3,H,W] -> float32 [B,3,H,W]
    refined = q.argmax(dim=1)

**The model** (Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
NIPS 2011). Every pixel i carries a label x_i; every *pair* of pixels pays if the labels differ and the pixels look
alike:

    E(x) = sum_i U_i(x_i) + sum_{i<j} [x_i != x_j] sum_m w_m k_m(f_i, f_j)

with two Gaussian kernels k(f_i, f_j) = exp(-|f_i - f_j|^2 / 2): one over the position f = (x, y) / sxy (removes
specks) and one over position and colour f = (x / sxy, y / sxy, r / srgb, g / srgb, b / srgb) (snaps borders to edges).

**Mean field.** The posterior is approximated by independent distributions Q_i, updated all at once:

    Q_i(l)  <-  softmax_l( -U_i(l) + sum_m w_m n_i sum_j k_m(f_i, f_j) n_j Q_j(l) )

where n_i = 1 / sqrt(sum_j k_m(f_i, f_j)) is the symmetric normalisation. The sum over all j is one Gaussian filter per
label, and filtering in two or five dimensions is what the lattice makes linear in the number of pixels.

**The permutohedral lattice** (Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
Eurographics 2010). Features in d dimensions are embedded in the hyperplane sum(y) = 0 of d+1 dimensions, which the
lattice tiles with simplices of d+1 vertices. Filtering is three sparse steps:

* splat: each pixel adds its value to the d+1 vertices around it, with barycentric weights;
* blur: along each of d+1 axes, v <- v + (v_previous + v_next) / 2, absent vertices counting as zero;
* slice: each pixel reads its d+1 vertices back with the same weights, times 1 / (1 + 2^-d).

All coordinates of a vertex have the same remainder r = 0..d modulo d+1, so the vertex is determined by r and by d
quotients (the last follows, because the sum is zero). Quotients, image index and remainder are packed in one integer,
the key; sorting the keys of all pixels finds the distinct vertices *and* the list of pixels around each. The three
steps are then weighted sums over short lists of rows (`tools.bags`), on CPU and GPU, with a fixed order of summation.

The result is that of pydensecrf (`DenseCRF2D`, diagonal kernels, symmetric normalisation) up to float32 rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tools.bags import Bags, split
from tools.errors import UserError


@dataclass(frozen=True)
class CRFSettings:
    """Standard deviations (pixels; grey levels) and weights of the two kernels, named as in pydensecrf."""

    gaussian_sxy: float
    gaussian_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float


# Refines CAMs: wide in space, strict in colour, and strong, because hard CAM labels are rough.
CAM_SETTINGS = CRFSettings(3, 3, 50, 5, 10)
# Polishes the probabilities of a trained segmentation model: weaker, they are mostly right already.
SEGMENTATION_SETTINGS = CRFSettings(1, 3, 67, 3, 4)

BACKENDS = ("torch", "pydensecrf")

Part = tuple[slice | EllipsisType, ...]
"""Index of some images, and of the valid pixels in them."""


def unary_from_labels(
    labels: Tensor, num_labels: int | Tensor, gt_prob: float = 0.7, *, channels: int | None = None
) -> Tensor:
    """Energies of hard labels that are right with probability `gt_prob`, the rest shared by the other labels.

    Args:
        labels: int64 [B,H,W] in [0, n); any other value, such as 255, makes all labels of the pixel equally likely.
        num_labels: n; or int64 [B], one n per image. Labels n..C-1 get energy +inf: impossible.
        gt_prob: in (0, 1).
        channels: C, at least the largest n; None: just that, for which a GPU must wait.

    Returns:
        float32 [B,C,H,W]. Where n = 1 the only label has energy -log(gt_prob), that is, it is certain.
    """
    assert 0 < gt_prob < 1, f"gt_prob must lie strictly between 0 and 1, got {gt_prob}"
    channels = channels or int(torch.as_tensor(num_labels).max())
    counts = torch.as_tensor(num_labels, device=labels.device).expand(len(labels))
    index = torch.arange(channels, device=labels.device)
    others = -torch.log((1 - gt_prob) / (counts - 1).clamp(min=1).float())
    energy = torch.where(index < counts[:, None], others[:, None], torch.inf)[..., None, None]
    return torch.where(labels[:, None] == index[:, None, None], -math.log(gt_prob), energy)


def unary_from_probabilities(probabilities: Tensor) -> Tensor:
    """Energies -log(p), with p clamped to at least 1e-5 (as pydensecrf) so that no label is ruled out.

    Args:
        probabilities: float [B,C,H,W] in [0, 1].

    Returns:
        float32 [B,C,H,W].
    """
    return -probabilities.float().clamp(1e-5, 1).log()


@torch.no_grad()
def mean_field(
    images: Tensor,
    unary: Tensor,
    settings: CRFSettings = CAM_SETTINGS,
    iterations: int = 10,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    backend: str = "torch",
) -> Tensor:
    """Label probabilities of the dense CRF after `iterations` parallel mean-field updates.

    Args:
        images: uint8 [B,3,H,W], RGB.
        unary: float [B,C,H,W], energies (negative log probabilities) on the device of `images`; or [B,U,C,H,W]: U
            unaries per image, solved independently on one lattice. +inf marks an impossible label (some label of every
            pixel must be finite), so images with fewer labels than C are padded exactly.
        settings: kernel widths and weights.
        iterations: number of updates; 0 gives softmax(-unary).
        sizes: (height, width) of the valid top-left part of each image, if images were padded to a common size. Pixels
            outside take no part; they get softmax(-unary). Such images are solved one by one.
        backend: one of `BACKENDS`; "pydensecrf" is the original C++ code, on the CPU whatever the device.

    Returns:
        float32 of the shape of `unary`, summing to 1 over C; 0 where the unary is +inf.

    Raises:
        UserError: backend "pydensecrf" is not installed.
    """
    _check(images, unary, backend)
    energy = (unary if unary.ndim == 5 else unary[:, None]).float()
    q = (-energy).softmax(dim=2)
    infer, step = (_infer, _images_per_chunk(energy)) if backend == "torch" else (_infer_pydensecrf, 1)
    if sizes is None:
        parts = [(slice(start, start + step),) for start in range(0, len(images), step)]
    else:
        parts = [(slice(i, i + 1), ..., slice(height), slice(width)) for i, (height, width) in enumerate(sizes)]
    solve = lambda part: infer(images[part], energy[part], settings, iterations)  # noqa: E731
    for part, result in zip(parts, _map(solve, parts, images.device), strict=True):
        q[part] = result
    return q.reshape(unary.shape)


def _map(function: Callable[[Part], Tensor], parts: list[Part], device: torch.device) -> Iterator[Tensor]:
    """`map`; on a CPU with a thread per part, because operations on so few pixels gain nothing from several threads."""
    allowed = torch.get_num_threads()
    threads = min(allowed, len(parts))
    if device.type != "cpu" or threads <= 1:
        yield from map(function, parts)
        return
    within = torch.inference_mode()(function)  # what a thread is told about gradients holds for no other
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(within, parts)
    finally:
        torch.set_num_threads(allowed)  # some libraries took the threads' 1 for everybody's


def _check(images: Tensor, unary: Tensor, backend: str) -> None:
    assert images.dtype == torch.uint8, f"images must be uint8 RGB in [0, 255], got {images.dtype}"
    assert images.ndim == 4 and images.shape[1] == 3, f"images must be [B,3,H,W], got {tuple(images.shape)}"
    assert unary.ndim in (4, 5), f"unary must be [B,C,H,W] or [B,U,C,H,W], got {tuple(unary.shape)}"
    same = len(unary) == len(images) and unary.shape[-2:] == images.shape[-2:]
    assert same, f"unary {tuple(unary.shape)} does not fit images {tuple(images.shape)}"
    assert backend in BACKENDS, f"backend must be one of {BACKENDS}, got {backend!r}"


def _images_per_chunk(energy: Tensor) -> int:
    """Images solved together: on a GPU as many as memory allows, on a CPU few, for its cache."""
    _, unaries, labels, height, width = energy.shape
    if energy.device.type != "cuda":
        return max(1, 2**14 // (height * width))
    free, _ = torch.cuda.mem_get_info(energy.device)
    # An upper bound, for noise: up to 6 vertices per pixel. Beyond 6 GB a GPU is busy, and more gains nothing.
    bytes_per_image = (1600 + 80 * unaries * labels) * height * width
    return max(1, min(free // 4, 6 * 2**30) // bytes_per_image)


def _infer_pydensecrf(images: Tensor, energy: Tensor, settings: CRFSettings, iterations: int) -> Tensor:
    """`mean_field` by the package pydensecrf, image by image and unary by unary."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise UserError(
            "--crf_backend pydensecrf: not installed. Run `pip install pydensecrf2`, or use --crf_backend torch."
        ) from error
    _, _, labels, height, width = energy.shape
    q = torch.empty(energy.shape)
    for image, energies, result in zip(images, energy, q, strict=True):
        pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        for unary, probabilities in zip(energies, result, strict=True):
            crf = DenseCRF2D(width, height, labels)
            crf.setUnaryEnergy(unary.reshape(labels, -1).cpu().numpy())
            crf.addPairwiseGaussian(settings.gaussian_sxy, settings.gaussian_weight)
            crf.addPairwiseBilateral(settings.bilateral_sxy, settings.bilateral_srgb, pixels, settings.bilateral_weight)
            probabilities.copy_(torch.from_numpy(np.array(crf.inference(iterations))).view_as(probabilities))
    return q.to(energy.device)


def _infer(images: Tensor, energy: Tensor, settings: CRFSettings, iterations: int) -> Tensor:
    """`mean_field` of one chunk, energy [B,U,C,H,W]. The work is done on rows: float32 [B*H*W,U*C], a row per pixel."""
    batch, unaries, labels, height, width = energy.shape
    kernels = (
        _grid_kernel(batch, height, width, settings.gaussian_sxy, settings.gaussian_weight, images.device),
        _image_kernel(images, settings),
    )
    logits = -energy.reshape(batch, unaries * labels, -1).transpose(1, 2).contiguous().flatten(0, 1)
    q = _softmax(logits, labels)
    for _ in range(iterations):
        q = _softmax(kernels[1](q, kernels[0](q, logits)), labels)
    return q.view(batch, height * width, -1).transpose(1, 2).reshape(batch, unaries, labels, height, width)


def _softmax(rows: Tensor, labels: int) -> Tensor:
    """Softmax over each group of `labels` columns.

    On a CPU, over a short last dimension that is several times faster on planes, transpositions included.
    """
    groups = rows.view(-1, labels)
    if labels < 16 and rows.device.type == "cpu":
        return groups.t().contiguous().softmax(dim=0).t().contiguous().view_as(rows)
    return groups.softmax(dim=1).view_as(rows)


@functools.lru_cache(maxsize=2)
def _grid_kernel(batch: int, height: int, width: int, sxy: float, weight: float, device: torch.device) -> _Kernel:
    """The kernel over positions: the same for all images of one size, hence kept."""
    features = _positions(height, width, sxy, device).expand(2, batch, height, width)
    return _Kernel(features.flatten(2), [(width - 1) / sxy, (height - 1) / sxy], weight)


def _image_kernel(images: Tensor, settings: CRFSettings) -> _Kernel:
    """The kernel over positions and colours."""
    batch, _, height, width = images.shape
    sxy, srgb = settings.bilateral_sxy, settings.bilateral_srgb
    positions = _positions(height, width, sxy, images.device).expand(2, batch, height, width)
    features = torch.cat([positions, images.transpose(0, 1) / torch.full((), srgb, device=images.device)])
    return _Kernel(
        features.flatten(2), [(width - 1) / sxy, (height - 1) / sxy] + [255 / srgb] * 3, settings.bilateral_weight
    )


def _positions(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    """(x, y) / sxy as float32 [2,1,H,W]."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    # Divided by a tensor: a number on the right would become a reciprocal on a GPU, and lattices differ by roundings.
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[:, None] / torch.full((), sxy, device=device)


class _Kernel:
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
        norm = (self(torch.ones(len(slicing.weights), 1, device=slicing.weights.device)) + 1e-20).rsqrt()
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
    """The simplex each point lies in, and where.

    Args:
        features: float32 [d,N].

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
    rows = rank.unbind()
    for i in range(len(values)):
        for j in range(i + 1, len(values)):
            smaller = values[i] < values[j]
            rows[i].add_(smaller)
            rows[j].add_(smaller, alpha=-1)
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
    """The blur along each axis: vertices and their two neighbours, of which absent ones are row M, always zero.

    The neighbour before, along axis j, has 1 less in every coordinate but j, where it has d more. In quotients: for
    remainders above 0, the same but one more in j and the remainder one lower; for remainder 0, which becomes d, one
    less everywhere but in j.

    Args:
        vertices: distinct keys [M], ascending.
    """
    count = len(vertices)
    axes = len(digits.quotients)
    wrapped = (axes - 1) * digits.remainder - sum(digits.quotients)
    down = vertices + torch.where(vertices < digits.remainder, wrapped, -digits.remainder).to(digits.dtype)
    stencil = torch.full((axes, count + 1, 3), count, dtype=torch.int32, device=vertices.device)
    index = torch.arange(count, dtype=torch.int32, device=vertices.device)
    stencil[:, :count, 0] = index
    for place, rows in zip(digits.quotients, stencil, strict=True):
        wanted = down + place
        found = torch.searchsorted(vertices, wanted).clamp_(max=count - 1)
        before = torch.where(vertices.index_select(0, found) == wanted, found, count)
        rows[:count, 1] = before
        rows[before, 2] = index
        rows[count:, 2] = count
    weights = torch.full((count + 1, 3), 0.5, device=vertices.device)
    weights[:, 0] = 1
    return [Bags(rows, weights) for rows in stencil]
