"""Class activation maps: from logits to normalised maps, over scales and flips.

keys, cam, hr_cam = multi_scale_cams(cam_logits, image, label, views)
save_cams("cams/2007_000032.npz", keys, cam, hr_cam)  # of tools.cam_files
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from tools.maps import cells, fit, resize_maps, unit_maximum
from tools.options import Views

WORKING_SIDE = 1024
"""Pixels; longer photographs are reduced to this before anything looks at them."""

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Maps a normalised image batch f32[B,3,h,w] to logit maps f32[B,C,h',w'] at any stride."""


def scaled_views(image: torch.Tensor, views: Views) -> list[torch.Tensor]:
    """The normalised image f32[1,3,H,W] at each scale, its sides rounded to the nearest 16n + 1 pixels.

    At these sizes the n + 1 cells of a map at stride 16 sit on a grid from corner to corner, so corner-aligned
    upsampling puts them back where they came from. At other sizes the far edge is off by up to 15 pixels.

    Scales are relative to the image as in training: with its long side brought into the range `long_side`.
    """
    height, width = image.shape[-2:]
    factors = [scale * fit(height, width, views.long_side) for scale in views.scales]
    sizes = [tuple(16 * max(1, round((side * factor - 1) / 16)) + 1 for side in (height, width)) for factor in factors]
    return [
        image
        if size == tuple(image.shape[-2:])
        else F.interpolate(image, size, mode="bilinear", antialias=True)  # corner-aligned, antialiasing shifts images
        for size in sizes
    ]


def flipped_pair(forward: Forward, view: torch.Tensor, hflip: bool) -> list[torch.Tensor]:
    """Logit maps of a view and, with `hflip`, of its mirror image (mirrored back)."""
    if not hflip:
        return [forward(view)]
    maps = forward(torch.cat([view, view.flip(-1)]))
    return [maps[:1], maps[1:].flip(-1)]


def multi_scale_cams(
    forward: Forward,
    image: torch.Tensor,
    label: torch.Tensor,
    views: Views,
    *,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CAMs of one image, summed over scales and flips (IRN, Ahn et al., CVPR 2019).

    Args:
        forward: gives CAM logits f32[B,K,h,w].
        image: normalised, f32[1,3,H,W].
        label: f32[K], 1 for the classes in the image.
        size: (H, W) of the photograph, if `image` is a reduced one.

    Returns:
        keys int64 [n+1], cam f32[n, ceil(H/4), ceil(W/4)] and hr_cam f32[n,H,W] (see `tools.cam_files`).
    """
    present = label.nonzero().flatten()
    keys = np.concatenate([[0], 1 + present.cpu().numpy()]).astype(np.int64)
    size = size or image.shape[-2:]
    if len(present) == 0:
        return keys, np.zeros((0, *cells(size, 4)), np.float32), np.zeros((0, *size), np.float32)
    cam = hr_cam = 0
    for view in scaled_views(image, views):
        pair = flipped_pair(forward, view, views.hflip)
        activation = sum(F.relu(maps[:, present].float()) for maps in pair)
        cam = cam + resize_maps(activation, cells(size, 4))
        hr_cam = hr_cam + resize_maps(activation, size)
    return keys, unit_maximum(cam[0]).cpu().numpy(), unit_maximum(hr_cam[0]).cpu().numpy()


def multi_scale_logits(forward: Forward, image: torch.Tensor, views: Views) -> torch.Tensor:
    """Mean segmentation logits f32[1,C,H,W] of the normalised image f32[1,3,H,W] over scales and flips."""
    total = 0
    for view in scaled_views(image, views):
        for maps in flipped_pair(forward, view, views.hflip):
            total = total + resize_maps(maps, image.shape[-2:])
    return total / (len(views.scales) * (1 + views.hflip))


def working_photograph(photograph: torch.Tensor, views: Views) -> torch.Tensor:
    """The photograph, uint8 RGB [1,3,H,W], reduced to `WORKING_SIDE` pixels (or its largest view) where it is longer.

    Networks see photographs at most as long as their largest view, and the dense CRF was set for pictures of that size:
    what lies in between costs memory only. Shorter ones than the smallest of the training are enlarged to that, for the
    dense CRF too. `enlarged_argmax` brings the result back.
    """
    limit = max(WORKING_SIDE, views.long_side[1] * max(views.scales))
    height, width = photograph.shape[-2:]
    factor = fit(height, width, (views.long_side[0], limit))
    if factor == 1:
        return photograph
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    return F.interpolate(photograph, size, mode="bilinear", antialias=True)


def enlarged_argmax(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Argmax over C of maps f32[1,C,h,w] enlarged to size (H, W): int64 [H,W], one map of full size at a time."""
    best = resize_maps(maps[:, :1], size)[0, 0]
    index = torch.zeros(size, dtype=torch.long, device=maps.device)
    for c in range(1, maps.shape[1]):
        score = resize_maps(maps[:, c : c + 1], size)[0, 0]
        index.masked_fill_(score > best, c)
        best = torch.maximum(best, score)
    return index


def values_at(maps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The value of channel `index` int64 [H,W] at each pixel of maps f32[1,C,h,w] enlarged to (H, W): f32[H,W]."""
    values = torch.zeros(index.shape, device=maps.device)
    for c in index.unique().tolist():
        values = torch.where(index == c, resize_maps(maps[:, c : c + 1], index.shape)[0, 0], values)
    return values
