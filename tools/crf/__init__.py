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
label. `tools.crf.lattice` filters in two or five dimensions in a time that is linear in the number of pixels.

The result is that of pydensecrf (`DenseCRF2D`, diagonal kernels, symmetric normalisation) up to float32 rounding.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tools.crf.lattice import Kernel
from tools.errors import require
from tools.options import CRF_BACKENDS
from tools.parallel import thread_map


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
    """Energies -log(p), float32 [B,C,H,W], with p clamped to at least 1e-5 (as pydensecrf): no label is ruled out."""
    return -probabilities.float().clamp(1e-5, 1).log()


@torch.no_grad()
def mean_field(
    images: Tensor,
    unary: Tensor,
    settings: CRFSettings = CAM_SETTINGS,
    iterations: int = 10,
    *,
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
        backend: one of `tools.options.CRF_BACKENDS`; "pydensecrf" is the original C++ code, always on the CPU.

    Returns:
        float32 of the shape of `unary`, summing to 1 over C; 0 where the unary is +inf.

    Raises:
        UserError: backend "pydensecrf" is not installed.
    """
    _check(images, unary, backend)
    energy = (unary if unary.ndim == 5 else unary[:, None]).float()
    q = torch.empty_like(energy)
    infer, step = (_infer, _images_per_chunk(energy)) if backend == "torch" else (_infer_pydensecrf, 1)
    parts = [slice(start, start + step) for start in range(0, len(images), step)]

    @torch.inference_mode()  # what a thread is told about gradients holds for no other
    def solve(part: slice) -> None:
        q[part] = infer(images[part], energy[part], settings, iterations)

    # On a CPU a thread per part: operations on so few pixels gain nothing from several threads. Each writes its own
    # result: a copy by this thread would wake PyTorch's other threads, which then spin where these work.
    threads = torch.get_num_threads() if images.device.type == "cpu" else 1
    for _ in thread_map(solve, parts, threads):
        pass
    return q.reshape(unary.shape)


def _check(images: Tensor, unary: Tensor, backend: str) -> None:
    assert images.dtype == torch.uint8, f"images must be uint8 RGB in [0, 255], got {images.dtype}"
    assert images.ndim == 4 and images.shape[1] == 3, f"images must be [B,3,H,W], got {tuple(images.shape)}"
    assert unary.ndim in (4, 5), f"unary must be [B,C,H,W] or [B,U,C,H,W], got {tuple(unary.shape)}"
    same = len(unary) == len(images) and unary.shape[-2:] == images.shape[-2:]
    assert same, f"unary {tuple(unary.shape)} does not fit images {tuple(images.shape)}"
    assert backend in CRF_BACKENDS, f"backend must be one of {CRF_BACKENDS}, got {backend!r}"


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
    package = require("pydensecrf.densecrf", "pydensecrf2")
    _, _, labels, height, width = energy.shape
    q = torch.empty(energy.shape)
    for image, energies, result in zip(images, energy, q, strict=True):
        pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
        for unary, probabilities in zip(energies, result, strict=True):
            crf = package.DenseCRF2D(width, height, labels)
            crf.setUnaryEnergy(unary.reshape(labels, -1).contiguous().cpu().numpy())
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
    logits = energy.amin(dim=2, keepdim=True) - energy  # the likeliest label has 0, for `_softmax`
    logits = logits.reshape(batch, unaries * labels, -1).transpose(1, 2).contiguous().flatten(0, 1)
    bounded = settings.gaussian_weight + settings.bilateral_weight < 20
    q = _softmax(logits, labels, bounded=bounded)
    for _ in range(iterations):
        q = _softmax(kernels[1](q, kernels[0](q, logits)), labels, bounded=bounded)
    return q.view(batch, -1, unaries, labels).permute(0, 2, 3, 1).unflatten(-1, (height, width))


def _softmax(rows: Tensor, labels: int, *, bounded: bool) -> Tensor:
    """Softmax over each group of `labels` columns.

    Args:
        bounded: whether the largest of each group is at least 0 and far below 88; faster on a CPU. Logits begin with a
            largest of 0 and grow by what neighbours say, about the weights of the kernels at most.
    """
    groups = rows.view(-1, labels)
    if not bounded or rows.device.type != "cpu":
        return groups.softmax(dim=1).view_as(rows)
    groups = groups.exp()
    # A sum over a short last dimension is slow.
    total = functools.reduce(torch.add, groups.unbind(1)) if labels < 16 else groups.sum(dim=1)
    return groups.div_(total[:, None]).view_as(rows)


@functools.lru_cache(maxsize=2)
def _grid_kernel(batch: int, height: int, width: int, sxy: float, weight: float, device: torch.device) -> Kernel:
    """The kernel over positions: the same for all images of one size, hence kept."""
    features = _positions(height, width, sxy, device).expand(2, batch, height, width)
    return Kernel(features.flatten(2), [(width - 1) / sxy, (height - 1) / sxy], weight)


def _image_kernel(images: Tensor, settings: CRFSettings) -> Kernel:
    """The kernel over positions and colours."""
    batch, _, height, width = images.shape
    sxy, srgb = settings.bilateral_sxy, settings.bilateral_srgb
    positions = _positions(height, width, sxy, images.device).expand(2, batch, height, width)
    features = torch.cat([positions, images.transpose(0, 1) / torch.full((), srgb, device=images.device)])
    return Kernel(
        features.flatten(2), [(width - 1) / sxy, (height - 1) / sxy] + [255 / srgb] * 3, settings.bilateral_weight
    )


def _positions(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    """(x, y) / sxy as float32 [2,1,H,W]."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    # Divided by a tensor: a number on the right would become a reciprocal on a GPU, and lattices differ by roundings.
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[:, None] / torch.full((), sxy, device=device)
