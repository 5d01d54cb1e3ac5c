"""The files that stages exchange: written whole or not at all, read with one clear line if they are damaged.

Every file is written by `atomic_write`. So a killed run leaves the old file, the new file or none, and a stage that is
started again can trust the files that it finds.
"""

import codecs
import contextlib
import fcntl
import json
import os
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.errors import FileError, UserError

DELIMITERS = ",;\t"
"""Of the fields of a table: Excel writes its lists with semicolons where the comma is the decimal sign."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if not.

    Args:
        durable: wait some milliseconds until the disk has the content and the new name, so that a power cut leaves the
            old file or the new one. Without it, a power cut may leave an empty file; empty files of single images are
            made again (`tools.identity.claim_folder`).

    Raises:
        UserError: the folder cannot be created or written to.
    """
    path = Path(path)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
    temporary = Path(name)
    try:
        with writing(path):
            yield temporary
            temporary.chmod(0o644)
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
            if durable:
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into a UserError that names the file or folder, and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "Check free space and permissions, or choose another folder."
        raise UserError(f"{path}: could not be written ({error.strerror}). {remedy}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: str | os.PathLike) -> Path:
    """Create `folder` and prove that a file can be written in it, before hours of work (UserError: it cannot)."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
    return folder


def file_of(folder: Path, image_id: str, suffix: str) -> Path:
    """The file of an image in a folder that people may have copied, where a Mac writes é as two characters (NFD)."""
    path, copied = (folder / f"{name}{suffix}" for name in (image_id, unicodedata.normalize("NFD", image_id)))
    return copied if copied != path and copied.is_file() and not path.is_file() else path


def check_present(folder: Path, ids: Sequence[str], suffix: str, remedy: str, *, some: bool = False) -> None:
    """Raise UserError unless `folder` has a file of every id, or of at least one if `some` are enough."""
    missing = [image_id for image_id in ids if not file_of(folder, image_id, suffix).is_file()]
    if missing and (not some or len(missing) == len(ids)):
        raise UserError(f"{folder}: {missing[0]}{suffix} is missing ({len(missing)} of {len(ids)} are). {remedy}")


def check_size(
    path: Path, found: Sequence[int], expected: Sequence[int], remedy: str = "Make it again, from this photograph."
) -> None:
    """Raise FileError unless what a file holds has the (height, width) of its photograph."""
    if tuple(found) != tuple(expected):
        sizes = [f"{width}x{height} pixels" for height, width in (found, expected)]
        raise FileError(f"{path}: {sizes[0]}, but its image is {sizes[1]}. {remedy}")


@contextlib.contextmanager
def locked(folder: Path, seconds: float = 60) -> Iterator[bool]:
    """Lock an existing folder for this process. The operating system releases the lock when the process ends.

    Args:
        seconds: how long to wait for another process.

    Yields:
        Whether this process has the lock. Also true where the file system has no locks.
    """
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    try:
        while not (mine := _lock(handle)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield mine
    finally:
        with contextlib.suppress(OSError):
            if mine:
                fcntl.flock(handle, fcntl.LOCK_UN)  # helper processes have the handle too
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def read_text(path: str | os.PathLike) -> str:
    """A text file of a user: UTF-8, or UTF-16 with a byte order mark, as Windows writes it.

    Raises:
        UserError: the file is missing, unreadable or not such text.
    """
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        if "\0" in text:
            raise UnicodeError  # UTF-16 without its mark
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check that it is a file you may read.") from error
    except UnicodeError as error:
        remedy = "Unpack a zip; save a spreadsheet as CSV." if data.startswith(b"PK") else "Save it as UTF-8."
        raise UserError(f"{path}: not UTF-8 text. {remedy}") from error
    return text


def read_lines(path: str | os.PathLike) -> list[str]:
    """The non-empty lines of a text file, stripped (UserError: see `read_text`)."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: str | os.PathLike, remedy: str) -> Any:
    """The content of a JSON file (UserError, with the remedy: it cannot be read as such)."""
    with reading(path, "JSON file", remedy):
        return json.loads(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error of a decoder into a FileError that names the file, `what` it should be, and the remedy."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such {what}. {remedy}".rstrip()) from error
    except Exception as error:  # for damaged files, decoders raise many kinds: struct.error, KeyError, zlib.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{path}: not a readable {what} ({reason}). {remedy or 'Replace or remove it.'}") from error


def save_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON."""
    save_text(path, json.dumps(content, indent=2) + "\n")
