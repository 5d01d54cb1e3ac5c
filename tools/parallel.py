"""Many independent jobs on the processor's cores, with a progress bar.

for result in run_jobs(functools.partial(convert, palette), paths, workers=8, name="masks", unit="image"):
    ...
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2

from tools import cli

CHUNK = 16  # jobs handed to a worker at a time


def run_jobs(work: Callable[[Any], Any], jobs: Sequence, workers: int, name: str, unit: str) -> Iterator:
    """Yield work(job) for every job, in their order, from `workers` processes (0: from this one).

    `work` is sent to each process once, so it may be a `functools.partial` that holds a whole dataset.
    """
    progress = functools.partial(cli.progress, total=len(jobs), desc=name, unit=unit)
    workers = min(workers, len(jobs))
    if workers == 0:
        yield from progress(map(work, jobs))
        return
    with process_pool(workers, _start, work) as pool:
        yield from progress(pool.imap(_call, jobs, chunksize=max(1, min(CHUNK, len(jobs) // (4 * workers)))))


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
