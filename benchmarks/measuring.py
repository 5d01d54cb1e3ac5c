"""What the benchmarks measure with: time by phase, bytes of operations, a processor's best, memory, revisions."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.errors import UserError

HERE = Path(__file__).resolve().parent.parent

PHASES = ("loading", "augmentation", "teacher", "CAM labels", "student", "losses", "backward", "optimiser", "EMA")
"""What the training code marks with `record_function`; PyTorch itself marks the loader."""


@contextlib.contextmanager
def phase_seconds(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of the block by phase; outside all phases it is "other". An inner phase does not count to its outer one.

    The clock waits for a GPU where a phase begins or ends.
    """
    seconds, stack, since = defaultdict(float), ["other"], 0.0

    def switch() -> None:
        nonlocal since
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
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
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
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
    with phase_seconds(device) as spent:
        work()
    return sum(spent.values())


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU those of tensors at the peak; else those of this process, PyTorch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def checkout(revision: str, folder: Path) -> Path:
    """Put the code of a revision, as git names it, into `folder`."""
    archive = ["git", "archive", "--output", f"{folder}.tar", revision]
    if subprocess.run(archive, cwd=HERE, capture_output=True).returncode:
        raise UserError(f"{revision}: git does not know it. Name a commit or a tag.")
    shutil.unpack_archive(f"{folder}.tar", folder)
    return folder


def run(folder: Path, words: list[str], **environment: str) -> None:
    """Run a command in a folder."""
    done = subprocess.run(words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip()[-400:]}. Correct it, then measure.")
