"""Official archives: downloaded so that an interruption costs nothing, checked, and unpacked with care.

    archive = Archive("train2014.zip", "http://...", md5="...", size=13_510_573_713, yields="train2014")
    if not archive.is_unpacked(target):
        unpack(archive, fetch(archive, downloads), target)

A download goes to `NAME.part`, is continued from there (HTTP Range) after an interruption, and is renamed when its size
and checksum are right. Unpacking goes to a hidden folder and is moved in place when all is there.
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from tools import parallel
from tools.errors import UserError
from tools.files import check_writable, writing

ATTEMPTS = 5  # connections in a row that bring nothing before a download is given up
PAUSE = 2.0  # seconds before the second attempt; doubled from then on
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20

_UNSOUND = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


@dataclass(frozen=True)
class Archive:
    """A file to download, and what comes out of it."""

    name: str  # of the file
    url: str  # official address; empty if there is none without a login
    md5: str  # checksum, hexadecimal
    yields: str  # path, below the folder it is unpacked to, that exists once it is unpacked
    size: int | None = None  # bytes; None if it is not downloaded, but put there by hand
    strip: str = ""  # leading folders of the members, removed; members elsewhere are not unpacked
    wanted: tuple[str, ...] = ("",)  # what the rest of a member's path must begin with to be unpacked

    def is_unpacked(self, target: Path) -> bool:
        """Whether it has been unpacked to `target`."""
        return (target / self.yields).exists()


def fetch(archive: Archive, folder: Path, mirror: str | None = None) -> Path:
    """Download an archive into `folder`, unless it lies there, and check it.

    Args:
        mirror: address of a folder that holds files of the same names, used instead of the official one.

    Raises:
        UserError: no connection, a full disk, a wrong size or checksum, a mirror that is no web address.
    """
    path = folder / archive.name
    if path.exists():
        wrong = _difference(archive, path)
        if wrong:
            raise UserError(f"{path}: not the official file: {wrong}. Delete it and run again.")
        return path
    if mirror and not mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {mirror}: not an http(s) address. For files at hand, pass --download_dir.")
    check_writable(folder)
    url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
    part = path.with_name(f"{path.name}.part")
    _download(url, part, archive.size)
    wrong = _difference(archive, part)
    if wrong:
        part.unlink()  # what is wrong stays wrong however often it is continued
        raise UserError(f"{url}: not the official file: {wrong}. It was deleted; run again, or use another --mirror.")
    part.replace(path)
    return path


def unpack(archive: Archive, path: Path, target: Path) -> None:
    """Unpack the wanted members of the archive at `path` into `target`; goes on where an interrupted call stopped.

    Raises:
        UserError: a damaged archive, members that would lie outside of `target`, a full disk, another content; a Python
            without tarfile's data filter.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"Python {sys.version.split()[0]}: lacks tarfile's data filter. Use 3.10.12, 3.11.4 or newer.")
    staging = check_writable(target) / f".{archive.name}.unpacking"
    staging.mkdir(exist_ok=True)
    try:
        with _members(path, staging) as members:
            for item, open_member in members:
                # tarfile's own rules, also for zip files: nothing outside of the folder, no devices.
                name = tarfile.data_filter(item, str(staging)).name
                inside = name.removeprefix(archive.strip)
                if item.issym() or item.islnk():
                    raise tarfile.TarError(f"'{name}' is a link")
                if name.startswith(archive.strip) and inside.startswith(archive.wanted):
                    _write(open_member, item.size, staging / inside)
    except _UNSOUND as error:
        shutil.rmtree(staging)
        raise UserError(f"{path}: not a sound archive ({error}). Delete it and run again.") from error
    if not archive.is_unpacked(staging):
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{path}: no '{archive.strip}{archive.yields}' in it. Is it the official file?")
    _move(staging, target, staging / archive.yields)
    shutil.rmtree(staging)


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Refuse to start what cannot end (UserError: the disk of `folder` has less than `needed` bytes free)."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {purpose} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free some, or choose "
            "another folder."
        )


# --------------------------------------------------------------------------------------------------------- downloading


def _download(url: str, part: Path, size: int) -> None:
    """Fill `part` from `url`, over as many connections as it takes."""
    failures = 0
    while True:
        before = _length(part)
        try:
            if _continue(url, part, size):
                return
            problem = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is nothing beyond what we have: it belongs to another file
                part.unlink()
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url}: {error.code} {error.reason}. {_by_hand(part)}") from error
            problem = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _length(part) > before else failures + 1
        if failures == ATTEMPTS:
            raise UserError(f"{url}: could not be downloaded ({problem}). Try again later. {_by_hand(part)}")
        time.sleep(PAUSE * 2 ** max(0, failures - 1))


def _continue(url: str, part: Path, size: int) -> bool:
    """One connection: append what `part` lacks; whether it is complete now.

    Raises:
        UserError: the server has a file of another size or answers with a web page, or the disk is full.
    """
    start = _length(part)
    if start == size:
        return True
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":  # a login or an error; it would replace what we have
            raise UserError(f"{url}: a web page, not the official file. {_by_hand(part)}")
        if response.status != 206:
            start = 0  # a server that cannot continue: from the beginning
        length = size if response.length is None else start + response.length
        if length != size:
            raise UserError(f"{url}: {length} bytes, but the official file has {size}. {_by_hand(part)}")
        check_space(part.parent, 2 * size - start, f"downloading and unpacking {part.stem}")
        counts = {"unit": "B", "unit_scale": True, "total": size, "initial": start}
        with parallel.progress((), desc=part.stem, **counts) as bar:
            _pour(response, part, "ab" if start else "wb", bar)
    return _length(part) >= size


def _pour(source: IO[bytes], path: Path, mode: str, bar: tqdm | None = None) -> None:
    """Write all of `source` to a file."""
    with writing(path):  # else taken for an error of the network or the archive
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open(mode)
    with file:
        while block := source.read(BLOCK):
            _write_block(file, block, path)
            if bar is not None:
                bar.update(len(block))


def _write_block(file: IO[bytes], block: bytes, path: Path) -> None:
    with writing(path):
        file.write(block)
        file.flush()


def _difference(archive: Archive, path: Path) -> str | None:
    """What tells a file from the official one; None if nothing does."""
    size = _length(path)
    if archive.size not in (None, size):
        return f"{size} bytes instead of {archive.size}"
    digest = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        parallel.progress((), desc=f"checking {archive.name}", unit="B", total=size, unit_scale=True) as progress,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    return None if digest.hexdigest() == archive.md5 else f"checksum {digest.hexdigest()} instead of {archive.md5}"


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _by_hand(part: Path) -> str:
    return f"Or put the file at {part.with_suffix('')} yourself."


# ----------------------------------------------------------------------------------------------------------- unpacking


@contextlib.contextmanager
def _members(path: Path, staging: Path) -> Iterator[Iterator[tuple[tarfile.TarInfo, Callable[[], IO[bytes]]]]]:
    """The files of a zip or tar archive: name and size as tarfile has them, and how to open each."""
    unpacked = sum(_length(file) for file in staging.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            files = [item for item in archive.infolist() if not item.is_dir()]
            check_space(staging, sum(item.file_size for item in files) - unpacked, f"unpacking {path.name}")
            members = ((_tar_info(item), functools.partial(archive.open, item)) for item in files)
            yield parallel.progress(members, desc=f"unpacking {path.name}", unit="file", total=len(files))
    else:
        check_space(staging, _length(path) - unpacked, f"unpacking {path.name}")
        with tarfile.open(path, "r:gz" if path.suffix in (".tgz", ".gz") else "r:") as archive:
            files = (item for item in archive if not item.isdir())
            members = ((item, functools.partial(archive.extractfile, item)) for item in files)
            yield parallel.progress(members, desc=f"unpacking {path.name}", unit="file")
            while archive.fileobj.read(BLOCK):  # gzip's own checksum is at its end, behind the last member
                pass


def _tar_info(item: zipfile.ZipInfo) -> tarfile.TarInfo:
    info = tarfile.TarInfo(item.filename)
    info.size = item.file_size
    return info


def _write(open_member: Callable[[], IO[bytes]], size: int, path: Path) -> None:
    """Unpack one member, unless an earlier call did."""
    if path.is_file() and _length(path) == size:
        return
    with open_member() as source:
        _pour(source, path, "wb")
    if _length(path) != size:
        raise EOFError(f"'{path.name}' has not the length it should have")


def _move(source: Path, target: Path, last: Path) -> None:
    """Move what is in `source` into `target`, the path `last` at the end: its presence says that all is there."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path == last or path in last.parents):
        place = target / path.name
        if path.is_dir() and place.is_dir():
            _move(path, place, last)
        else:
            os.replace(path, place)
