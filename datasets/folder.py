"""Your own images: the `folder` layout, and COCO 2014 in it.

    ROOT/images/ID.jpg       photographs (`listing.IMAGE_SUFFIXES`); in folders too: images/b/a.jpg is `b/a`
    ROOT/classes.txt         one class name per line, background first
    ROOT/labels.csv          header `id,labels`; one row per image, class names joined by `;` (none: only background)
    ROOT/labels.json         instead of it: {"ID": ["class", "class"], ...}
    ROOT/masks/ID.png        optional, for evaluation: class indices, 255 ignored
    ROOT/splits/DOMAIN.txt   optional lists of ids; without them the domain `train` is every image

Without a table of labels, an image shows one class, that of its folder: `images/CLASS/...`. Then `classes.txt` is
optional too: the classes are the folders in alphabetical order. `images/background/` is for images without a class.

If the folders in `images/` are called train, val and the like (`SPLIT_FOLDERS`), as in torchvision's ImageFolder, they
are the domains (unless there are lists), and the folders below them the classes.

Labels and masks are read only when they are needed, so a test set needs neither.
"""

import csv
import functools
import io
import json
import re
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from pathlib import Path

from datasets.base import DatasetInfo, DataSource
from datasets.class_names import BACKGROUND, check_classes, clean_name, is_background
from datasets.listing import FileIndex, clean_id, index_images, index_splits, listed_images, mask_of, utf8_name
from tools.errors import UserError
from tools.files import DELIMITERS, atomic_write, read_lines, read_text, reading, save_text

LABELS_HEADER = ["id", "labels"]
REMEDY = "Write a row per image, 'id,labels', and save it as CSV or JSON, in UTF-8."
ABOVE_HEADER = r'"?(sep=.)?[\s,;"]*'  # lines without content; Excel may begin with the separator
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".xls", ".xlsx", ".ods")
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test", "testing")
MASK_FOLDERS = ("mask", "masks", "labels", "annotations", "gt", "groundtruth", "segmentationclass")
LIST_FOLDERS = ("splits", "split", "lists", "imagesets")
OTHER_FOLDERS = {*SPLIT_FOLDERS, *MASK_FOLDERS, "image", "images", "img", "imgs", "photos", "jpegimages"}
COCO14_PARTS = ("train2014", "val2014")
"""Where COCO 2014 keeps its photographs; otherwise it is in the layout `folder`."""


class FolderSource(DataSource):
    """A dataset in the `folder` layout.

    Args:
        root: folder that holds `images/`, `classes.txt` and the rest.
        masks_dir: folder of ID.png masks to read instead of `masks/`, such as pseudo masks.
        image_folders: folders of photographs inside `root`.

    Raises:
        UserError: a folder or `classes.txt` is missing, or cannot be used.
    """

    def __init__(self, root: Path, masks_dir: Path | None = None, image_folders: Sequence[str] = ("images",)) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder. Pass the one that holds '{image_folders[0]}/' with --data_dir.")
        images = index_images(root / name for name in image_folders)
        self._table_path = _find_label_table(root)
        parts = split_folders(images.files, has_table=self._table_path is not None)
        self._class_depth = 1 if parts else 0
        super().__init__(
            root,
            info=DatasetInfo(self._read_classes(root, images)),
            images=images,
            splits=_find_splits(root),
            masks_dirs=_find_masks(root) if masks_dir is None else [masks_dir],
            parts=parts,
        )

    def _read_classes(self, root: Path, images: FileIndex) -> tuple[str, ...]:
        path = root / "classes.txt"
        folders = {self._class_folder(image_id) for image_id in images.files}
        if path.exists():
            return check_classes(path, read_lines(path))
        others = _files_called(root, ["classes"], (".txt", *TABLE_SUFFIXES))
        others += _files_called(root, ["labels"], (".txt",))  # labelme's list of classes
        _refuse(others, f"Save it as classes.txt, '{BACKGROUND}' first")
        if self._table_path is not None or None in folders:
            raise UserError(
                f"{path}: no such file. Write '{BACKGROUND}' and your classes, one per line; or delete the table of "
                "labels, and sort all images into folders, images/CLASS/..."
            )
        return check_classes(root / "images", [BACKGROUND, *self._check_folders(root, images.files, folders)])

    def _check_folders(self, root: Path, ids: Iterable[str], classes: set[str]) -> list[str]:
        """The folders that are classes, in order; background is none."""
        parts = sorted(name for name in classes if {name.casefold(), mask_of(name.casefold())} & OTHER_FOLDERS)
        if len(parts) > 1:
            raise UserError(
                f"{root / 'images'}: holds folders called {' and '.join(parts)}, which are no classes. Make one folder "
                "per class in images/, or in images/train/ and images/val/; move masks to masks/."
            )
        inside: dict[str, set[str]] = defaultdict(set)
        for image_id in ids:
            folder, *inner = image_id.split("/")[self._class_depth : -1]
            inside[folder].add(inner[0] if inner else "")
        if (outer := _around_classes(inside)) is not None:
            raise UserError(
                f"{root / 'images'}: its folder {outer} holds others, such as {min(inside[outer] - {''})}, "
                "and the outer folders would be the classes. Move the inner ones up; or call the outer ones train, val "
                "and test, if they are splits; or write a classes.txt."
            )
        return sorted(name for name in classes if not is_background(name))

    def labelled_ids(self) -> Collection[str]:
        return self._annotations.keys()

    def _class_indices(self, image_id: str) -> list[int]:
        if image_id in self._annotations:
            label = self._annotations[image_id]
            if self._table_path:
                return label
            return [] if is_background(label) else [self.info.index(label, self.root / "images" / label)]
        if self._table_path is None:
            raise UserError(f"{self.root / 'labels.csv'}: no such file. {REMEDY}")
        raise UserError(f"{self._table_path}: no row for id '{image_id}'. Add one (without classes if it shows none).")

    @functools.cached_property
    def _annotations(self) -> dict[str, list[int]] | dict[str, str]:
        """By id, the mask indices of a row of the table; without a table, the folder of an image, its class."""
        if self._table_path:
            return read_label_table(self._table_path, self.info)
        folders = {image_id: self._class_folder(image_id) for image_id in self.images.files}
        return {image_id: folder for image_id, folder in folders.items() if folder is not None}

    def _class_folder(self, image_id: str) -> str | None:
        """The name of the folder of an image, which is its class; None if it is in no folder."""
        folders = image_id.split("/")[self._class_depth : -1]
        return clean_name(folders[0]) if folders else None


class Photographs(DataSource):
    """Photographs without labels, to be segmented: all are in the only domain, `train`.

    Args:
        place: a folder of photographs, with the folders inside; one photograph; or a text file (.txt) that lists one
            path per line, relative to its own folder.
        classes: of the model that segments them.

    Raises:
        UserError: there is no such place, no photograph in it, or a line that names none; or a name is not UTF-8.
    """

    def __init__(self, place: Path, classes: Sequence[str]) -> None:
        utf8_name(place.resolve().name, place)
        if not place.is_file():
            images = index_images([place])
        elif place.suffix.lower() == ".txt":
            images = listed_images(place)
        else:
            images = FileIndex({clean_id(place.stem): place}, [])
        super().__init__(place, info=DatasetInfo(tuple(classes)), images=images, splits={}, masks_dirs=[])


def split_folders(ids: Iterable[str], *, has_table: bool) -> list[str]:
    """The folders directly below `images/`, if all have names of splits; else none.

    Without a table of labels, a single one that has no folders in it is a class, such as `train` with trains.
    """
    ids = list(ids)
    tops = {image_id.partition("/")[0] if "/" in image_id else "" for image_id in ids}
    if not all(name.casefold() in SPLIT_FOLDERS for name in tops):
        return []
    is_split = has_table or len(tops) > 1 or all(image_id.count("/") > 1 for image_id in ids)
    return sorted(tops) if is_split else []


def _around_classes(inside: dict[str, set[str]]) -> str | None:
    """The first folder that is rather around the folders of classes than of a class; None if there is none.

    Args:
        inside: names of the folders directly in each folder, and "" if photographs are.
    """
    of_folders = [name for name in sorted(inside) if "" not in inside[name]]
    shared = set.intersection(*inside.values()) - {""}
    if len(shared) > 1 and (len(inside) == 1 or len(of_folders) == len(inside)):
        return min(inside)
    return next((name for name in of_folders if name.casefold() in SPLIT_FOLDERS), None)


def _refuse(others: Sequence[Path], remedy: str) -> None:
    """Refuse what looks like a part of the dataset but has another name than the one that is read."""
    if others:
        raise UserError(f"{others[0]}: not read. {remedy} (or remove it, if it is something else).")


def _files_called(root: Path, names: Container[str], suffixes: Container[str]) -> list[Path]:
    """The files in `root` with one of `names` before their first point, and one of `suffixes`, in whatever case."""
    named = (path for path in sorted(root.iterdir()) if path.name.casefold().partition(".")[0] in names)
    return [path for path in named if path.suffix.lower() in suffixes and path.is_file()]


def _folders_called(root: Path, names: Container[str], pattern: str) -> list[Path]:
    """The folders in `root` with one of `names`, in whatever case, and a file of that pattern below them."""
    folders = (path for path in sorted(root.iterdir()) if path.name.casefold() in names and path.is_dir())
    return [folder for folder in folders if any(folder.rglob(pattern))]


def _find_label_table(root: Path) -> Path | None:
    tables = [path for path in (root / "labels.csv", root / "labels.json") if path.exists()]
    if len(tables) == 2:
        raise UserError(f"{tables[0]}: there is a {tables[1].name} too. Remove one of them.")
    if tables:
        return tables[0]
    header = ",".join(LABELS_HEADER)
    _refuse(_files_called(root, ["labels"], TABLE_SUFFIXES), f"Save it as labels.csv, with the header '{header}'")
    return None


def _find_masks(root: Path) -> list[Path]:
    """The folder of masks, or none (UserError: a folder of PNG files with another name that means masks)."""
    if (root / "masks").is_dir():
        return [root / "masks"]
    _refuse(_folders_called(root, MASK_FOLDERS, "[!.]*.[pP][nN][gG]"), "Rename it: masks are read from masks/")
    return []


def _find_splits(root: Path) -> dict[str, Path]:
    """The lists of ids by domain, or none (UserError: lists in another place)."""
    splits = index_splits(root / "splits")
    if not splits:
        others = _files_called(root, SPLIT_FOLDERS, (".txt", ".csv"))
        others += _folders_called(root, LIST_FOLDERS, "[!.]*.[tT][xX][tT]")
        _refuse(others, "Lists of ids are read from splits/: move the lists there, as .txt with one id per line")
    return splits


def is_written(root: Path, domains: Iterable[str]) -> bool:
    """Whether `write_lists` has finished there: the lists of ids are its last files."""
    return all((root / "splits" / f"{domain}.txt").is_file() for domain in domains)


def write_lists(
    root: Path, classes: Sequence[str], labels: dict[str, Sequence[str]], splits: dict[str, Sequence[str]]
) -> None:
    """Write `classes.txt` (background first), `labels.csv` (class names by id), and last the lists of ids by domain.

    The lists mean that the dataset is complete.
    """
    save_text(root / "classes.txt", "".join(f"{name}\n" for name in classes))
    with atomic_write(root / "labels.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LABELS_HEADER)
        writer.writerows([image_id, ";".join(names)] for image_id, names in labels.items())
    for domain, ids in splits.items():
        save_text(root / "splits" / f"{domain}.txt", "".join(f"{image_id}\n" for image_id in ids))


def read_label_table(path: Path, info: DatasetInfo) -> dict[str, list[int]]:
    """Read `labels.csv` or `labels.json`: mask indices (1..K) of the classes of every id.

    Raises:
        UserError: wrong form, unknown class, an id labelled twice.
    """
    table: dict[str, list[int]] = {}
    for place, text, names in _json_rows(path) if path.suffix == ".json" else _csv_rows(path):
        names = [name for name in map(clean_name, names) if name and not is_background(name)]
        image_id, indices = clean_id(text), [info.index(name, f"{path}, {place}") for name in names]
        if image_id in table:
            raise UserError(f"{path}, {place}: id '{image_id}' is labelled already. Merge the two.")
        table[image_id] = indices
    return table


def _csv_rows(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(place in the file, id, class names) of every row below the header that is not empty."""
    with reading(path, "table", REMEDY), io.StringIO(read_text(path), newline="") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if not re.fullmatch(ABOVE_HEADER, line))
        above, header = next(lines, (1, ""))
        delimiter = _delimiter(f"{path}, line {above}", header)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        for row in reader:
            place = f"line {reader.line_num + above}"
            fields = [field.strip() for field in row]
            while fields and not fields[-1]:  # spreadsheets add empty fields and rows
                fields.pop()
            if not fields:
                continue
            image_id, *labels = fields
            if not image_id:
                raise UserError(f"{path}, {place}: no id before '{labels[-1]}'. Write one, or remove the row.")
            if len(labels) > 1 and delimiter != ";":  # which separates the classes of an image too
                raise UserError(f"{path}, {place}: expected 'id,class;class', got {len(fields)} fields.")
            yield place, image_id, [name.strip() for name in ";".join(labels).split(";") if name.strip()]


def _delimiter(place: str, header: str) -> str:
    """What separates the fields of a table with this header (UserError: it is none, or another)."""
    for delimiter in DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if names[:2] == LABELS_HEADER and not any(names[2:]):
            return delimiter
    raise UserError(f"{place}: the header must be '{','.join(LABELS_HEADER)}'.")


def _json_rows(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(place in the file, id, class names) of every entry, also of an id that occurs twice."""
    with reading(path, "table", REMEDY):
        rows = json.loads(read_text(path), object_pairs_hook=list)
    if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
        raise UserError(f'{path}: expected {{"id": ["class", "class"], ...}}.')
    for image_id, names in rows:
        place = f"id '{image_id}'"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}, {place}: expected a list of class names ([] if it shows none).")
        yield place, image_id, names
