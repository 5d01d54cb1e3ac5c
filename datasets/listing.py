"""Which files a dataset has: photographs, masks and lists, by id. And which id the user meant, if there is none such.

    index = index_images([root / "images"])
    index.files["2024/a"]                       root/images/2024/a.jpg
    index.others                                files of kinds that are not read, such as .heic
    index.advice("2024/a.JPG")                  ": write ids without suffix (2024/a)"

Names come from people, zip files and three systems. They are compared in one form (Unicode's NFC; a Mac writes é as
two characters). Hidden files and files of file managers are ignored.
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.errors import UserError
from tools.files import read_lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASK_SUFFIXES = (".png",)
_MASK_NAME = re.compile(r"(.+?)(\.\w{3,4})?[ _-]+(masks?|labels?|labelids|seg|segmentation|gt|fuse|pixel|save)", re.I)
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200e\u200f\u2060\u00ad"))  # left by copying and joining texts
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}


@dataclass(frozen=True)
class FileIndex:
    """What is in some folders."""

    files: dict[str, Path]  # by id
    others: list[Path]  # files of other kinds

    def advice(self, text: str) -> str:
        """What to write instead of an id that no file has, as `: ... (the id)`; "" if no id is like it."""
        plain = text.replace("\\", "/")
        stem = _without_suffix(plain)
        tails = [stem.split("/", n)[n] for n in range(stem.count("/") + 1)]
        meant = next((found for tail in tails if (found := self._by_likeness.get(_folded(tail)))), None)
        return "" if meant is None else f": {_difference(plain, stem, meant)} ({meant})"

    @functools.cached_property
    def _by_likeness(self) -> dict[str, str | None]:
        ids: dict[str, str | None] = {}  # None: several look like that
        for file_id in self.files:
            for key in {_folded(file_id), _folded(file_id.rpartition("/")[2])}:
                ids[key] = None if key in ids else file_id
        return ids


def index_images(folders: Iterable[Path]) -> FileIndex:
    """The photographs in `folders` and the folders inside, by id: the path from there without its suffix (`a`, `b/a`).

    Raises:
        UserError: see `index_files`; or there is no image at all.
    """
    folders = list(folders)
    index = index_files(folders, IMAGE_SUFFIXES)
    if not index.files:
        others = f", but {len(index.others)} other files such as {index.others[0].name}" if index.others else ""
        raise UserError(f"{folders[0]}: no images ({', '.join(IMAGE_SUFFIXES)}) in it{others}.")
    return index


def listed_images(path: Path) -> FileIndex:
    """The photographs that a text file lists: one path per line, relative to the folder of the text file.

    The id is that path without suffix; of a file outside the folder, its name.

    Raises:
        UserError: an unreadable or empty list, a line that names no file, two files that share an id.
    """
    folder, files = Path(os.path.abspath(path.parent)), {}
    for line in read_lines(path):
        spellings = (line, *(unicodedata.normalize(form, line) for form in ("NFC", "NFD")))
        places = (Path(os.path.abspath(folder / spelling)) for spelling in spellings)
        if (file := next((place for place in places if place.is_file()), None)) is None:
            raise UserError(f"{path}: no file '{line}'. Write one photograph per line, by its path from here.")
        inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
        image_id = clean_id(inside.with_suffix("").as_posix())
        if image_id in files:
            raise UserError(f"{path}: '{line}' has the same id as {files[image_id]}. Remove or rename one.")
        files[image_id] = file
    if not files:
        raise UserError(f"{path}: an empty list. Write one photograph per line.")
    return FileIndex(files, [])


def index_files(folders: Iterable[Path], suffixes: Sequence[str]) -> FileIndex:
    """The files with one of `suffixes` (in small or capital letters) in `folders` and the folders inside.

    Listing a folder once is much faster than asking for 100,000 files one by one.

    Raises:
        UserError: a folder is missing or unreadable, two files share an id, a name is not UTF-8.
    """
    index = FileIndex({}, [])
    for folder in folders:
        for name, path in _files_in(folder):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in suffixes:
                index.others.append(path)
                continue
            file_id = clean_id(stem)
            if file_id in index.files:
                raise UserError(f"{path}: has the same id as {index.files[file_id]}. Rename one.")
            index.files[utf8_name(file_id, path)] = path
    return index


def index_splits(folder: Path) -> dict[str, Path]:
    """The lists of ids (*.txt) in `folder`, by domain; {} if the folder is empty or missing.

    Raises:
        UserError: the folder cannot be read, or holds only files of other kinds.
    """
    if not folder.is_dir():
        return {}
    try:
        paths = sorted(path for path in folder.iterdir() if not _is_system(path.name))
    except OSError as error:
        _unreadable(error)
    lists = {path.stem: path for path in paths if path.suffix.lower() == ".txt" and path.is_file()}
    if paths and not lists:
        raise UserError(f"{paths[0]}: not a list of ids. Save one as {paths[0].stem}.txt, one id per line.")
    return {utf8_name(name, path): path for name, path in lists.items()}


def clean_id(text: str) -> str:
    """An id as it is compared: Unicode's NFC, without invisible characters and blanks around names."""
    return "/".join(part.strip() for part in visible(text).split("/"))


def visible(text: str) -> str:
    """A text in Unicode's NFC, without invisible characters."""
    return unicodedata.normalize("NFC", text).translate(INVISIBLE)


def utf8_name(name: str, path: Path) -> str:
    """The name or id of a file (UserError: it is not UTF-8, so it can be neither printed nor listed)."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: the name is not UTF-8 (old zip files unpack so). Rename it.") from error
    return name


def mask_of(name: str) -> str | None:
    """The photograph that a mask is of, by the mask's name: `a` of `a_mask`, `a.jpg___fuse`; None for other names."""
    named = _MASK_NAME.fullmatch(name)
    return named and named[1]


def first_repeated(names: Iterable[str]) -> str | None:
    """A name that occurs more than once; None if all differ."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _difference(plain: str, stem: str, meant: str) -> str:
    if plain == meant:
        return "write '/' between folders"
    if stem == meant:
        return "write ids without suffix"
    if stem.endswith(f"/{meant}"):
        return "write ids without the folders above"
    if meant.endswith(f"/{stem}"):
        return "write ids with their folder"
    if stem.casefold() == meant.casefold():
        return "write small and capital letters as in the file's name"
    if stem.lstrip("0") == meant.lstrip("0"):
        return "write leading zeros (have a spreadsheet take the column for text)"
    return "write ids as the files are called"


def _folded(image_id: str) -> str:
    """The same text for ids that look alike. (Users write quotes or '=' so that a spreadsheet shows an id as text.)"""
    folders, slash, name = unicodedata.normalize("NFKC", image_id).casefold().rpartition("/")
    return folders + slash + re.sub("^0+(?=.)", "", name.strip("'\"= "))


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (*IMAGE_SUFFIXES, ".0") else name  # .0: a number to pandas


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path from `folder`, file) of every file below it."""
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if not _is_system(name) and not _leads_back(folder, here / name))
        inside = here.relative_to(folder).as_posix() + "/"
        prefix = "" if inside == "./" else inside
        for name in sorted(names):
            if not _is_system(name):
                yield prefix + name, here / name


def _is_system(name: str) -> bool:
    """Whether it is hidden or a file manager's. Copies from other systems have many `._name.jpg` and `Thumbs.db`."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _leads_back(top: Path, folder: Path) -> bool:
    """Whether `folder` below `top` is a link into `top`, where all files are found anyway, or to a folder above it."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    on_the_way = folder.parents[: len(folder.relative_to(top).parts)]
    return target.is_relative_to(top.resolve()) or any(path.resolve().is_relative_to(target) for path in on_the_way)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: no readable folder of images ({error.strerror}).") from error
