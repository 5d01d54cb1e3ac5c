"""Class activation maps: from logits to normalised maps, over scales and flips, and the files that hold them.

    keys, cam, hr_cam = multi_scale_cams(cam_logits, image, label, scales=(0.5, 1, 1.5, 2), hflip=True)
    save_cams("cams/2007_000032.npz", keys, cam, hr_cam)

A CAM file holds `keys` int64 [n+1] = [0, 1 + class, ...] of the n classes the image is labelled with, `cam` float16
[n, ceil(H/4), ceil(W/4)] and `hr_cam` float16 [n, H, W], both in [0, 1]; there is no background map. Peers' tools keep
the same three in a pickled dict (`.npy`); that format is written, and read, only on request.
"""

import io
import math
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tools.errors import FileError
from tools.files import atomic_write, check_size, reading
from tools.maps import cells, fit, resize_maps, unit_maximum
from tools.options import Views

WORKING_SIDE = 1024
"""Pixels; longer photographs are reduced to this before anything looks at them."""

_IN_PICKLES = {"numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"}
_IN_PICKLES |= {"_codecs.encode", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
"""What a pickle of arrays and tensors calls. None of it runs code of the file."""

Forward = Callable[[torch.Tensor], torch.Tensor]
"""Maps a normalised image batch f32[B,3,h,w] to logit maps f32[B,C,h',w'] at any stride."""


def scaled_views(image: torch.Tensor, scales: Sequence[float], long_side: float = math.inf) -> list[torch.Tensor]:
    """The normalised image f32[1,3,H,W] at each scale, its sides rounded to the nearest 16n + 1 pixels.

    At these sizes the n + 1 cells of a map at stride 16 sit on a grid from corner to corner, so corner-aligned
    upsampling puts them back where they came from. At other sizes the far edge is off by up to 15 pixels.

    Scales are relative to the image as in training: reduced to the long side `long_side`, pixels, where it is longer.
    """
    height, width = image.shape[-2:]
    factors = [scale * fit(height, width, long_side) for scale in scales]
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
    *,
    scales: Sequence[float],
    hflip: bool,
    long_side: float = math.inf,
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CAMs of one image, summed over scales and flips (IRN, Ahn et al., CVPR 2019).

    Args:
        forward: gives CAM logits f32[B,K,h,w].
        image: normalised, f32[1,3,H,W].
        label: f32[K], 1 for the classes in the image.
        scales, long_side: see `scaled_views`.
        hflip: also use the mirrored image.
        size: (H, W) of the photograph, if `image` is a reduced one.

    Returns:
        keys int64 [n+1], cam f32[n, ceil(H/4), ceil(W/4)] and hr_cam f32[n,H,W] (see the module docstring).
    """
    present = label.nonzero().flatten()
    keys = np.concatenate([[0], 1 + present.cpu().numpy()]).astype(np.int64)
    size = size or image.shape[-2:]
    if len(present) == 0:
        return keys, np.zeros((0, *cells(size, 4)), np.float32), np.zeros((0, *size), np.float32)
    cam = hr_cam = 0
    for view in scaled_views(image, scales, long_side):
        pair = flipped_pair(forward, view, hflip)
        activation = sum(F.relu(maps[:, present].float()) for maps in pair)
        cam = cam + resize_maps(activation, cells(size, 4))
        hr_cam = hr_cam + resize_maps(activation, size)
    return keys, unit_maximum(cam[0]).cpu().numpy(), unit_maximum(hr_cam[0]).cpu().numpy()


def multi_scale_logits(
    forward: Forward, image: torch.Tensor, *, scales: Sequence[float], hflip: bool, long_side: float = math.inf
) -> torch.Tensor:
    """Mean segmentation logits f32[1,C,H,W] of the normalised image f32[1,3,H,W] over scales and flips."""
    views = scaled_views(image, scales, long_side)
    total = 0
    for view in views:
        for maps in flipped_pair(forward, view, hflip):
            total = total + resize_maps(maps, image.shape[-2:])
    return total / (len(views) * (1 + hflip))


def working_photograph(photograph: torch.Tensor, views: Views) -> torch.Tensor:
    """The photograph, uint8 RGB [1,3,H,W], reduced to `WORKING_SIDE` pixels (or its largest view) where it is longer.

    Networks see photographs at most as long as their largest view, and the dense CRF was set for pictures of that size:
    what lies in between costs memory only. `enlarged_argmax` brings the result back.
    """
    limit = max(WORKING_SIDE, views.long_side * max(views.scales))
    height, width = photograph.shape[-2:]
    factor = fit(height, width, limit)
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


def save_cams(path: Path, keys: np.ndarray, cam: np.ndarray, hr_cam: np.ndarray) -> None:
    """Write one CAM file; the suffix of `path` chooses `.npz` or the pickled `.npy` of peers' tools."""
    arrays = {"keys": keys.astype(np.int64), "cam": cam.astype(np.float16), "hr_cam": hr_cam.astype(np.float16)}
    with atomic_write(path, durable=False) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".npy":
            np.save(file, np.array(arrays, dtype=object), allow_pickle=True)
        else:
            np.savez(file, **arrays)


def load_cams(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read one CAM file: keys int64 [n+1], cam [n,h,w], hr_cam [n,H,W] (float16 or float32).

    Of a pickled `.npy` file only arrays and tensors are made; no code in it runs. It has no check sum: damage to its
    numbers is not noticed.

    Raises:
        UserError: missing, truncated, or not a CAM file.
    """
    path = Path(path)
    with reading(path, "CAM file", "Run inference.py again; if the file is there, delete it first."):
        if path.suffix == ".npy":
            content = _unpickle(path)
            return np.asarray(content["keys"]), np.asarray(content["cam"]), np.asarray(content["hr_cam"])
        with np.load(path, allow_pickle=False) as content:
            return content["keys"], content["cam"], content["hr_cam"]


def read_cams(path: Path, size: tuple[int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys int64 [n+1] and full-size CAMs float [n, H, W] of the CAM file of an image of `size`.

    Raises:
        UserError: the file cannot be read, the size differs, keys are not [0, classes...], or values are not finite.
    """
    keys, _, cams = load_cams(path)
    check_size(path, cams.shape[1:], size)
    foreground = keys[1:]
    in_range = np.all((foreground > 0) & (foreground < num_classes))
    if keys[:1].tolist() != [0] or len(foreground) != len(cams) or not in_range:
        raise FileError(
            f"{path}: keys {keys.tolist()} for {len(cams)} CAMs; expected 0 and one class from 1 to {num_classes - 1} "
            "per CAM. Check that --dataset is the one that was predicted."
        )
    if not np.isfinite(cams).all():
        raise FileError(f"{path}: the CAMs hold values that are not finite. Delete it and make it again.")
    return keys, cams


class _ArraysOnly(pickle.Unpickler):
    """Refuses everything but arrays and tensors."""

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if f"{module}.{name}".replace("numpy.core.", "numpy._core.") not in _IN_PICKLES:
            raise pickle.UnpicklingError(f"{module}.{name} in a CAM file")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict:
    """The dict that peers' tools save with `np.save`."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return _ArraysOnly(file).load().item()


def cam_labels(hr_cam: np.ndarray, background: float | np.ndarray) -> np.ndarray:
    """Index into `keys` of each pixel, int64 [H,W]: argmax of [background; hr_cam]; background wins ties.

    The background is a threshold in [0, 1], or a map [H,W] of its own.
    """
    first = np.broadcast_to(np.asarray(background, dtype=np.float32), (1, *hr_cam.shape[1:]))
    return np.concatenate([first, hr_cam.astype(np.float32)]).argmax(axis=0)
