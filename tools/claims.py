"""Which process makes which file, when several work at one output folder.

    with claim(folder, path) as mine:
        if mine and not path.exists():
            ...  # nobody else is at it

A claim is a lock that the operating system keeps for a process: it ends with the process, however that ends, so nothing
of a killed run stands in the way of the next one. Look whether the file exists after claiming it, not only before:
another process may have finished in between.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from tools.files import check_writable, claim_folder


@contextlib.contextmanager
def claim(folder: Path, path: Path) -> Iterator[bool]:
    """Yield whether `path`, below the shared `folder`, is this process's to make, until the block ends. Never waits.

    Threads of one process are not kept apart. Where the file system has no locks, a warning says so and all is granted.
    """
    lock_file = _lock_file(folder.absolute())
    # One byte of the lock file stands for each name. It need not exist to be locked.
    name = path.relative_to(folder).as_posix().encode()
    place = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")
    mine = _lock(lock_file, place)
    try:
        yield mine
    finally:
        if mine:
            with contextlib.suppress(OSError):  # no locks, see `_lock`
                fcntl.lockf(lock_file, fcntl.LOCK_UN, 1, place)


def remove_leftovers(folder: Path, paths: Iterable[Path]) -> None:
    """Delete the temporary files of killed processes that were writing one of `paths`, below `folder`."""
    wanted = set(paths)
    for parent in {path.parent for path in wanted}:
        for temporary in parent.glob(".*.*"):  # .NAME.RANDOM.SUFFIX, see `tools.files.atomic_write`
            path = parent / f"{temporary.name[1:].rsplit('.', 2)[0]}{temporary.suffix}"
            if path in wanted:
                with claim(folder, path) as mine:
                    if mine:
                        temporary.unlink(missing_ok=True)


def share_folder(folder: Path, settings: dict[str, object], paths: Iterable[Path]) -> None:
    """`tools.files.claim_folder` for a folder that others may be entering: one process at a time, and swept first.

    Args:
        paths: the files that are going to be in `folder`.

    Raises:
        UserError: the folder was made with other settings, or cannot be written to.
    """
    record = check_writable(folder) / "settings.json"
    remove_leftovers(folder, [record, *paths])
    while True:
        with claim(folder, record) as mine:
            if mine:
                claim_folder(folder, settings)
                return
        time.sleep(0.05)


def _lock(lock_file: IO, place: int) -> bool:
    try:
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        warnings.warn(
            f"{lock_file.name}: no locks on this file system ({error.strerror}). Processes that share this folder may "
            "repeat each other's work; give each its own --shard.",
            stacklevel=2,
        )
    return True


@functools.cache
def _lock_file(folder: Path) -> IO:
    """Open once and for ever: closing any handle of a file gives up all of a process's locks on it."""
    return open(folder / ".claims", "ab")  # noqa: SIM115
