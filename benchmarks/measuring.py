"""What the benchmarks measure with: a clock by phases, bytes of operations, a processor's best, peak memory."""

from __future__ import annotations

import contextlib
import functools
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Clock:
    """Seconds by phase of what happens inside `with clock`. A phase within another is not counted to that."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(float)
        self._phase, self._since = "other", 0.0

    def __enter__(self) -> Clock:
        self._switch("other")
        self.seconds.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._switch("other")

    def _switch(self, phase: str) -> str:
        """Count the time since the last call to the phase that was on; returns which that was."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, last = time.perf_counter(), self._phase
        self.seconds[last] += now - self._since
        self._phase, self._since = phase, now
        return last

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block to a phase."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def watch(self, owner: Any, attribute: str, name: Callable[[], str]) -> Any:
        """A patch under which calls of `owner.attribute` are counted to phase `name()`."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.phase(name()):
                return function(*args, **kwargs)

        return mock.patch.object(owner, attribute, timed)


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
    with Clock(device) as clock:
        work()
    return sum(clock.seconds.values())


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU those of tensors at the peak; else those of this process, PyTorch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
