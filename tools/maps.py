"""Images and maps as tensors: normalisation, sizes.

inputs = normalize(images)                        # uint8 [B,3,H,W] -> what ImageNet networks take
maps = resize_maps(logits, images.shape[-2:])     # bilinear, corners aligned
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] in [0, 255] -> float32 [B, 3, H, W] with ImageNet's mean 0 and deviation 1."""
    assert images.dtype == torch.uint8, f"expected uint8 images, got {images.dtype}"
    mean, std = _imagenet_statistics(images.device)
    return (images.float() - mean) / std


@functools.cache
def _imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation in grey levels, float32 [3, 1, 1]. Kept: a copy to the device in every step would stall it."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).mul(255).view(2, 3, 1, 1)
    return mean, std


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize float maps [B, C, h, w] to (H, W), in float32: bilinear, corners aligned, as everywhere in this method."""
    maps = maps.float()
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize label maps int64 [B, H, W] to another (H, W): nearest neighbour."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()


def cells(size: Sequence[int], stride: int) -> list[int]:
    """The size of a map at `stride`: ceil(side / stride), without negative numbers, which ONNX divides differently."""
    return [(side + stride - 1) // stride for side in size]


def unit_maximum(maps: Tensor, highest: Tensor | None = None) -> Tensor:
    """Maps [..., h, w] of values >= 0, each divided by its maximum (+1e-5).

    With `highest` [..., 1, 1], the maxima of larger maps of which these are a part, by these.
    """
    highest = maps.amax(dim=(-2, -1), keepdim=True) if highest is None else highest
    return maps / (highest + 1e-5)


def fit(height: int, width: int, long_side: tuple[float, float]) -> float:
    """The factor that brings an image's long side into the range `long_side`, pixels; 1 if it is there."""
    least, most = long_side
    side = max(height, width)
    return min(max(side, least), most) / side
