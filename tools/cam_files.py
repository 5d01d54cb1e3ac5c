"""CAM files, without PyTorch.

    path = Path("cams/2007_000032.npz")
    save_cams(path, keys, cam, hr_cam)
    keys, hr_cam = read_cams(path, (height, width), num_classes)
    mask = keys[cam_labels(hr_cam, background=0.4)]

A CAM file holds `keys` int64 [n+1] = [0, 1 + class, ...] of the n classes the image is labelled with, `cam` float16
[n, ceil(H/4), ceil(W/4)] and `hr_cam` float16 [n, H, W], both in [0, 1]; there is no background map. Peers' tools keep
the same three in a pickled dict (`.npy`); that format is written, and read, only on request.
"""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.errors import FileError
from tools.files import atomic_write, check_size, reading

ARRAYS = ("keys", "cam", "hr_cam")
FORMAT = "Make it as docs/seeds.md says."
_IN_PICKLES = {"numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"}
_IN_PICKLES |= {"_codecs.encode", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"}
"""What a pickle of arrays and tensors calls. None of it runs code of the file."""


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
        else:
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
        if absent := [name for name in ARRAYS if name not in content]:
            held = ", ".join(map(str, content))
            raise FileError(f"{path}: not a readable CAM file: holds {held}, no {absent[0]}. {FORMAT}")
        keys, cam, hr_cam = (np.asarray(content[name]) for name in ARRAYS)
        return keys, cam, hr_cam


def read_cams(path: Path, size: tuple[int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys int64 [n+1] and full-size CAMs float [n, H, W] of the CAM file of an image of `size`.

    Raises:
        UserError: the file cannot be read, its arrays have another form, the size differs, keys are not
            [0, classes...], or values are not finite or far from [0, 1].
    """
    keys, _, cams = load_cams(path)
    if (keys.ndim, cams.ndim) != (1, 3) or keys.dtype.kind not in "iu" or cams.dtype.kind not in "biuf":
        raise FileError(
            f"{path}: keys {keys.dtype} {[*keys.shape]}, hr_cam {cams.dtype} {[*cams.shape]}; expected whole numbers "
            f"[n+1] and numbers [n, H, W]. {FORMAT}"
        )
    check_size(path, cams.shape[1:], size)
    foreground = keys[1:]
    in_range = np.all((foreground > 0) & (foreground < num_classes))
    if keys[:1].tolist() != [0] or len(foreground) != len(cams) or not in_range:
        raise FileError(
            f"{path}: keys {keys.tolist()} for {len(cams)} CAMs; expected 0 and one class from 1 to {num_classes - 1} "
            "per CAM. Check that --dataset is the one that was predicted."
        )
    _check_values(path, cams)
    return keys, cams


def _check_values(path: Path, cams: np.ndarray) -> None:
    """Refuse CAMs that are not in [0, 1], but for what rounding may add: no threshold would fit them."""
    values = cams.astype(np.float32, copy=False)  # NumPy is slow with half precision
    low, high = values.min(initial=0), values.max(initial=0)
    if not np.isfinite(high - low):
        raise FileError(f"{path}: the CAMs hold values that are not finite. Delete it and make it again.")
    if low < -0.01 or high > 1.01:
        raise FileError(
            f"{path}: values from {low:g} to {high:g}; expected 0 to 1. Set what is below 0 to 0, and divide each CAM "
            "by its maximum."
        )


class _ArraysOnly(pickle.Unpickler):
    """Refuses everything but arrays and tensors."""

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            import torch  # takes seconds, and hardly any file needs it

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
