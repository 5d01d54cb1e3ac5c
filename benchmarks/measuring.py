"""What the benchmarks measure with and on: clocks, counters, memory, revisions; random photographs."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from PIL import Image
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.base import voc_palette
from datasets.folder import write_lists
from tools.errors import UserError
from tools.files import save_mask

HERE = Path(__file__).resolve().parent.parent
PHOTOGRAPH = (375, 500)  # height and width of most photographs in VOC

PHASES = ("loading", "augmentation", "teacher", "CAM labels", "student", "losses", "backward", "optimiser", "EMA")
"""What the training code marks with `record_function`; PyTorch itself marks the loader."""


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def phase_seconds(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of the block by phase; outside all phases it is "other". An inner phase does not count to its outer one.

    The clock waits for a GPU where a phase begins or ends.
    """
    seconds, stack, since = defaultdict(float), ["other"], 0.0

    def switch() -> None:
        nonlocal since
        now = clock(device)
        seconds[stack[-1]] += now - since
        since = now

    def enter(mark: record_function) -> None:
        switch()
        name = "loading" if mark.name.startswith("enumerate(DataLoader)") else mark.name
        stack.append(name if name in PHASES else stack[-1])

    def leave(mark: record_function, *error: object) -> None:
        switch()
        stack.pop()

    with mock.patch.multiple(record_function, __enter__=enter, __exit__=leave):
        switch()
        seconds.clear()
        yield seconds
        switch()


class ByteCounter(TorchDispatchMode):
    """Bytes that operations read and write in memory, if none of them is fused with the next and caches are no help."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):  # no view
            self.total += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
        return result


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of large square matrices: what the processor can do at best."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(device, lambda: a @ b) for _ in range(5))


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy of a large tensor, read and written."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(seconds(device, lambda: target.copy_(source)) for _ in range(5))


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long `work` takes, until the device has finished."""
    start = clock(device)
    work()
    return clock(device) - start


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU those of tensors at the peak; else those of this process, PyTorch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_row(title: str, *cells: object) -> None:
    """Print a line of a table; numbers with four digits."""
    shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"{title:<16}", *(f"{cell:>12}" for cell in shown), flush=True)


def checkout(revision: str, folder: Path) -> Path:
    """Put the code of a revision, as git names it, into `folder`."""
    archive = ["git", "archive", "--output", f"{folder}.tar", revision]
    if subprocess.run(archive, cwd=HERE, capture_output=True).returncode:
        raise UserError(f"{revision}: git does not know it. Name a commit or a tag.")
    shutil.unpack_archive(f"{folder}.tar", folder)
    return folder


def run(folder: Path, command: str, **environment: str) -> None:
    """Run Python in a folder; its arguments hold no blanks."""
    words = [sys.executable, *command.split()]
    done = subprocess.run(words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command}: {done.stderr.strip()[-400:]}. Correct it, then measure.")


def random_photograph(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3]: smooth noise of several grains."""
    layers = [smooth_noise(generator, size, 3, cell) * cell**0.5 for cell in (3, 12, 60, 200)]
    return (128 + 9 * sum(layers)).clip(0, 255).astype(np.uint8)


def smooth_noise(generator: np.random.Generator, size: tuple[int, int], channels: int, cell: int) -> np.ndarray:
    """Normal noise on a grid of `cell` pixels, interpolated to float [H,W,channels]."""
    coarse = generator.standard_normal((size[0] // cell + 2, size[1] // cell + 2, channels)).astype(np.float32)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def write_photographs(root: Path, count: int) -> Path:
    """Write `count` JPEG files of random photographs, each with two of 20 classes and a mask."""
    (root / "images").mkdir(parents=True)
    names, labels = ["background", *map(str, range(1, 21))], {}
    for index in range(count):
        generator = np.random.default_rng(index)
        Image.fromarray(random_photograph(generator, PHOTOGRAPH)).save(root / "images" / f"{index:04}.jpg", quality=90)
        classes = np.append(0, 1 + generator.choice(20, 2, replace=False))
        blobs = smooth_noise(generator, PHOTOGRAPH, 3, 90).argmax(axis=-1)
        save_mask(root / "masks" / f"{index:04}.png", classes[blobs], voc_palette())
        labels[f"{index:04}"] = [names[c] for c in classes[1:]]
    write_lists(root, names, labels, {})
    return root
