"""Work shared out: over the processes of torchrun, over helper processes of this one; with a progress bar.

    for image_id in progress(share(ids), desc="inference", unit="image"):      # this process's part
    for result in run_jobs(functools.partial(convert, palette), paths, workers=8, name="masks", unit="image"):

torchrun tells a process by environment variables which of how many it is.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.pool
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

Item = TypeVar("Item")

CHUNK = 16  # jobs handed to a worker at a time


def rank() -> int:
    """Number of this process among all, from torchrun; 0 in a single one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Number of this process among those of this machine: also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that speaks, and writes checkpoints and logs."""
    return rank() == 0


def own_workers(workers: int) -> int:
    """This process's part of the `workers` of the machine."""
    return -(-workers // local_world_size())


def share(items: Sequence[Item], pending: Iterable[Item] | None = None) -> Sequence[Item]:
    """This process's part of a job: every `world_size()`-th item; of these only the `pending` ones, if they are given.

    What is pending shrinks while processes start, so it is `items` that are dealt out.
    """
    mine = items[rank() :: world_size()]
    if pending is None:
        return mine
    todo = set(pending)
    return [item for item in mine if item in todo]


def progress(items: Iterable, *, desc: str, unit: str, total: int | None = None, **options: object) -> tqdm:
    """A progress bar with rate and ETA; into a log file it writes a line a minute instead of redrawing.

    Of several processes only the first shows one.
    """
    interval = 0.5 if sys.stderr.isatty() else 60
    intervals = {"mininterval": interval, "maxinterval": interval, "disable": not is_main()}
    return tqdm(items, desc=desc, unit=unit, total=total, smoothing=0.1, **intervals, **options)


def run_jobs(work: Callable[[Any], Any], jobs: Sequence, workers: int, name: str, unit: str) -> Iterator:
    """Yield work(job) for every job, in their order, from `workers` processes (0: from this one).

    `work` is sent to each process once, so it may be a `functools.partial` that holds a whole dataset.
    """
    bar = functools.partial(progress, total=len(jobs), desc=name, unit=unit)
    workers = min(workers, len(jobs))
    if workers == 0:
        yield from bar(map(work, jobs))
        return
    with process_pool(workers, _start, work) as pool:
        yield from bar(pool.imap(_call, jobs, chunksize=max(1, min(CHUNK, len(jobs) // (4 * workers)))))


def thread_map(work: Callable[[Item], Any], items: Sequence[Item], threads: int) -> Iterator:
    """Yield work(item) for every item, in their order, from `threads` threads that share PyTorch's cores.

    For work on tensors: several images at a time gain more from several cores than the operations on one image do, and
    a GPU need not wait for files. With one thread at most, everything happens in this one, on all cores.
    """
    threads = min(threads, len(items))
    if threads <= 1:
        yield from map(work, items)
        return
    import torch

    allowed = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(max(1, allowed // threads),)
        ) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(allowed)  # some libraries took the threads' 1 for everybody's


@contextlib.contextmanager
def process_pool(
    workers: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[multiprocessing.pool.Pool]:
    """A pool of `workers` processes, each of which keeps to its core: together they already use them all.

    OpenCV's threads are stopped here, before the fork. A process that inherits their pool, but not the threads, would
    wait for them for ever once it resizes the pool.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with multiprocessing.Pool(workers, initializer, arguments) as pool:
            yield pool
    finally:
        cv2.setNumThreads(threads)


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _call(job: Any) -> Any:
    return _work(job)
