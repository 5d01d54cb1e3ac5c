"""Work shared out: over the processes of torchrun, over helper processes of this one; with a progress bar.

    for image_id in progress(share(ids), desc="inference", unit="image"):      # this process's part
    for result in run_jobs(functools.partial(convert, palette), paths, workers=8, name="masks", unit="image"):

torchrun tells a process by environment variables which of how many it is.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

Item = TypeVar("Item")

CHUNK = 4  # jobs handed to a worker at a time
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}  # variables that torchrun sets, among others
SAMPLE = 100  # images that stand for all: for a threshold, or to see whether masks fit the labels
READERS = 16  # threads that read small files, which cost latency on a network disk


def launched() -> bool:
    """Whether torchrun, or what sets all that it sets, started this process.

    Clusters and batch scripts export WORLD_SIZE or RANK for other programs' use.
    """
    return os.environ.keys() >= LAUNCHER


def left_over() -> str:
    """A line about variables in the environment that mean nothing here; "" if there are none."""
    found = [f"{name}={os.environ[name]}" for name in ("WORLD_SIZE", "RANK") if name in os.environ]
    if launched() or not found:
        return ""
    missing = " and ".join(sorted(LAUNCHER - os.environ.keys()))
    return f"{' '.join(found)} in the environment is ignored: no {missing}, so this is not started by torchrun."


def rank() -> int:
    """Number of this process among all, from torchrun; 0 in a single one."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Number of this process among those of this machine: also that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def world_size() -> int:
    """Number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_main() -> bool:
    """Whether this is the process that speaks, and writes checkpoints and logs."""
    return rank() == 0


def own_workers(workers: int) -> int:
    """This process's part of the `workers` of the machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1
    return -(-workers // processes)


def share(items: Sequence[Item], *, shard: tuple[int, int] | None = None) -> Sequence[Item]:
    """This process's part of a job: every n-th item; if there are others, it says which part it does.

    Items that are done already are dealt out, too: while processes start, more get done.

    Args:
        shard: which part of how many, (0..n-1, n); by default that of torchrun.
    """
    index, number = shard or (rank(), world_size())
    mine = items[index::number]
    if number > 1:
        print(f"part {index + 1} of {number}: {len(mine)} of {len(items)} images", file=sys.stderr)
    return mine


def sample(items: Sequence[Item]) -> list[Item]:
    """`SAMPLE` of the items, evenly spread; all, if there are fewer."""
    count = min(SAMPLE, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def pending(ids: Sequence[str], is_done: Callable[[str], bool], what: str, folder: Path) -> list[str]:
    """The ids that are not done yet; a line says how many of `what` are, and to which folder the others are written."""
    todo = [image_id for image_id in ids if not is_done(image_id)]
    print(f"{what}, {len(ids) - len(todo)} done already; writing to {folder}")
    return todo


def progress(items: Iterable, *, desc: str, unit: str, total: int | None = None, **options: object) -> tqdm:
    """A progress bar with rate and ETA; into a log file it writes a line a minute instead of redrawing.

    Of several processes only the first shows one.
    """
    interval = 0.5 if sys.stderr.isatty() else 60
    intervals = {"mininterval": interval, "maxinterval": interval, "disable": not is_main()}
    return tqdm(items, desc=desc, unit=unit, total=total, smoothing=0.1, **intervals, **options)


def run_jobs(
    work: Callable[[Any], Any], jobs: Sequence, workers: int = 0, name: str = "", unit: str = "image", threads: int = 0
) -> Iterator:
    """Yield work(job) for every job, in their order, from `threads` threads, or without these from `workers` processes.

    `work` is sent to each process once, so it may be a `functools.partial` that holds a whole dataset. What it raises
    is raised here. The processes end with the iteration, with an error, and with this process. Of one that cannot be
    started, or is killed, `tools.cli` tells the user.
    """
    bar = functools.partial(progress, total=len(jobs), desc=name, unit=unit)
    workers = min(workers, len(jobs))
    if threads or not workers:
        yield from bar(thread_map(work, jobs, threads))
        return
    chunk = max(1, min(CHUNK, len(jobs) // (4 * workers)))
    with _opencv_on_one_thread(), contextlib.ExitStack() as stack:
        try:
            pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(work,))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_call, jobs, chunksize=chunk)
        except OSError:
            for started in multiprocessing.active_children():  # the pool does not know them yet
                started.terminate()
            raise
        yield from bar(results)


def thread_map(work: Callable[[Item], Any], items: Sequence[Item], threads: int) -> Iterator:
    """Yield work(item) for every item, in their order, from `threads` threads that share PyTorch's cores.

    For work on tensors: several images at a time gain more from several cores than the operations on one image do, and
    a GPU need not wait for files. With one thread at most, everything happens in this one, on all cores.
    """
    threads = min(threads, len(items))
    if threads <= 1:
        yield from map(work, items)
        return
    torch = sys.modules.get("torch")  # not imported: no tensors here, and importing it takes longer than many a job
    allowed = torch.get_num_threads() if torch else 0
    each = {"initializer": torch.set_num_threads, "initargs": (max(1, allowed // threads),)} if torch else {}
    try:
        with ThreadPoolExecutor(threads, **each) as pool:
            yield from pool.map(work, items)
    finally:
        if torch:
            torch.set_num_threads(allowed)  # some libraries took the threads' 1 for everybody's


@contextlib.contextmanager
def _opencv_on_one_thread() -> Iterator[None]:
    """Stop OpenCV's threads before a fork, and keep each process to its core: together they already use them all.

    A process that inherits the threads' pool, but not the threads, would wait for them for ever once it resizes the
    pool.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _start(work: Callable[[Any], Any]) -> None:
    """Make a helper process ready. It ends with its parent, which also answers Ctrl-C."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(job: Any) -> Any:
    return _work(job)
