"""Your own images: the `folder` layout, and COCO 2014 in it.

    ROOT/images/ID.jpg       photographs (.jpg .jpeg .png .webp .tif .tiff); in folders too: images/b/a.jpg is `b/a`
    ROOT/classes.txt         one class name per line, background first
    ROOT/labels.csv          header `id,labels`; one row per image, class names joined by `;` (none: only background)
    ROOT/labels.json         instead of it: {"ID": ["class", "class"], ...}
    ROOT/masks/ID.png        optional, for evaluation: class indices, 255 ignored
    ROOT/splits/DOMAIN.txt   optional lists of ids; without them the domain `train` is every image

Without a table of labels, each image is of one class: the folder it lies in, `images/CLASS/...`. Then `classes.txt` may
be left out too; the classes are the folders in alphabetical order. `images/background/` is for images that show none.

Labels and masks are looked at only when asked for, so a test set needs neither.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from datasets.base import DatasetInfo, DataSource, check_classes, index_images, index_splits
from tools.errors import UserError
from tools.files import atomic_write, read_lines

LABELS_HEADER = ["id", "labels"]
BACKGROUND = "background"
COCO14_PARTS = ("train2014", "val2014")


class FolderSource(DataSource):
    """A dataset in the `folder` layout.

    Args:
        root: folder that holds `images/`, `classes.txt` and the rest.
        masks_dir: folder of ID.png masks read instead of `masks/`, such as pseudo masks.
        image_folders: folders of photographs inside `root`.

    Raises:
        UserError: a folder or `classes.txt` is missing or holds nothing usable.
    """

    def __init__(self, root: Path, masks_dir: Path | None = None, image_folders: Sequence[str] = ("images",)) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder. Pass the one that holds '{image_folders[0]}/' with --data_dir.")
        own_masks = root / "masks"
        images = index_images(root / name for name in image_folders)
        self._table_path = _find_label_table(root)
        super().__init__(
            root,
            info=DatasetInfo(self._read_classes(root, images)),
            images=images,
            splits=index_splits(root / "splits"),
            masks_dir=masks_dir or (own_masks if own_masks.is_dir() else None),
        )
        self._class_table: dict[str, list[int]] | None = None

    def _read_classes(self, root: Path, images: Iterable[str]) -> tuple[str, ...]:
        path = root / "classes.txt"
        sorted_by_class = self._table_path is None and all("/" in image_id for image_id in images)
        if path.exists() or not sorted_by_class:
            return check_classes(path, read_lines(path))
        folders = {_class_folder(image_id) for image_id in images} - {BACKGROUND}
        return check_classes(root / "images", [BACKGROUND, *sorted(folders)])

    def has_label(self, image_id: str) -> bool:
        """Whether the table, or the folder the image lies in, gives its label."""
        if self._table_path is None:
            return "/" in image_id
        return image_id in self._read_table(self._table_path)

    def _class_indices(self, image_id: str) -> list[int]:
        if self._table_path is None and "/" in image_id:
            return self._index_of_folder(_class_folder(image_id))
        path = self._table_path or self.root / "labels.csv"
        table = self._read_table(path)
        if image_id not in table:
            raise UserError(f"{path}: no row for id '{image_id}'. Add one (without classes if it shows none).")
        return table[image_id]

    def _read_table(self, path: Path) -> dict[str, list[int]]:
        if self._class_table is None:
            self._class_table = read_label_table(path, self.info.classes)
        return self._class_table

    def _index_of_folder(self, name: str) -> list[int]:
        if name not in self.info.classes:
            raise UserError(
                f"{self.root / 'images' / name}: no class of classes.txt. Rename the folder, or write a labels.csv. "
                f"Known: {', '.join(self.info.classes)}."
            )
        return [index for index in [self.info.classes.index(name)] if index > 0]


class COCO14Source(FolderSource):
    """COCO 2014 in the `folder` layout, with the photographs where COCO keeps them: `train2014/` and `val2014/`."""

    def __init__(self, root: Path, masks_dir: Path | None = None) -> None:
        super().__init__(root, masks_dir, image_folders=COCO14_PARTS)


class Photographs(DataSource):
    """A folder of photographs and nothing else, to be segmented: the only domain is `train`, all of them.

    Args:
        root: the folder; those inside count too.
        classes: of the model that segments them.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        images = index_images([root])
        super().__init__(root, info=DatasetInfo(tuple(classes)), images=images, splits={}, masks_dir=None)

    def has_label(self, image_id: str) -> bool:
        """Never."""
        return False

    def _class_indices(self, image_id: str) -> list[int]:
        raise UserError(f"{self.root}: photographs without labels.")


def _class_folder(image_id: str) -> str:
    return image_id.partition("/")[0]


def _find_label_table(root: Path) -> Path | None:
    tables = [path for path in (root / "labels.csv", root / "labels.json") if path.exists()]
    if len(tables) == 2:
        raise UserError(f"{tables[0]}: there is a {tables[1].name} too. Remove one of them.")
    return tables[0] if tables else None


def write_lists(
    root: Path, classes: Sequence[str], labels: dict[str, Sequence[str]], splits: dict[str, Sequence[str]]
) -> None:
    """Write `classes.txt`, `labels.csv` and, last because they say that all is done, the lists of ids.

    Args:
        root: the dataset's folder.
        classes: names, background first.
        labels: class names by id.
        splits: ids by domain.
    """
    with atomic_write(root / "classes.txt") as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    with atomic_write(root / "labels.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LABELS_HEADER)
        writer.writerows([image_id, ";".join(names)] for image_id, names in labels.items())
    for domain, ids in splits.items():
        with atomic_write(root / "splits" / f"{domain}.txt") as temporary:
            temporary.write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")


def read_label_table(path: Path, classes: Sequence[str]) -> dict[str, list[int]]:
    """Read `labels.csv` or `labels.json`: mask indices (1..K) of the classes of every id.

    Raises:
        UserError: missing file, wrong form, unknown class, an id labelled twice.
    """
    index_of = {name: index for index, name in enumerate(classes) if index > 0}
    table: dict[str, list[int]] = {}
    for place, image_id, names in _json_rows(path) if path.suffix == ".json" else _csv_rows(path):
        unknown = [name for name in names if name not in index_of]
        if unknown:
            raise UserError(f"{path}, {place}: unknown class '{unknown[0]}'. Known: {', '.join(index_of)}.")
        if image_id in table:
            raise UserError(f"{path}, {place}: id '{image_id}' is labelled already. Merge the two.")
        table[image_id] = [index_of[name] for name in names]
    return table


def _csv_rows(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(place in the file, id, class names) of every row below the header."""
    with _open_table(path) as file:
        reader = csv.reader(file)
        if [name.strip() for name in next(reader, [])] != LABELS_HEADER:
            raise UserError(f"{path}, line 1: the header must be '{','.join(LABELS_HEADER)}'.")
        for row in filter(None, reader):
            place = f"line {reader.line_num}"
            if len(row) != 2:
                raise UserError(f"{path}, {place}: expected 'id,class;class', got {len(row)} fields.")
            image_id, labels = (field.strip() for field in row)
            yield place, image_id, [name.strip() for name in labels.split(";") if name.strip()]


def _json_rows(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(place in the file, id, class names) of every entry, an id given twice included."""
    with _open_table(path) as file:
        rows = json.load(file, object_pairs_hook=list)
    if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
        raise UserError(f'{path}: expected {{"id": ["class", "class"], ...}}.')
    for image_id, names in rows:
        place = f"id '{image_id}'"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}, {place}: expected a list of class names ([] if it shows none).")
        yield place, image_id, names


@contextlib.contextmanager
def _open_table(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Write one row per image: 'id,labels'.") from error
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a UTF-8 table ({error}). Save it as UTF-8 CSV or JSON.") from error
