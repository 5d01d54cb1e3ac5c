"""Your own images: the `folder` layout, and COCO 2014 in it.

    ROOT/images/ID.jpg       photographs (.jpg .jpeg .png .webp)
    ROOT/classes.txt         one class name per line, background first
    ROOT/labels.csv          header `id,labels`; one row per image, class names joined by `;` (none: only background)
    ROOT/masks/ID.png        optional, for evaluation: class indices, 255 ignored
    ROOT/splits/DOMAIN.txt   optional lists of ids; without them the domain `train` is every image

Labels and masks are looked at only when asked for, so a test set needs neither.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from datasets.base import DatasetInfo, DataSource, check_classes, index_images, index_splits
from tools.errors import UserError
from tools.files import read_lines

LABELS_HEADER = ["id", "labels"]


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
        super().__init__(
            root,
            info=DatasetInfo(check_classes(root / "classes.txt", read_lines(root / "classes.txt"))),
            images=index_images(root / name for name in image_folders),
            splits=index_splits(root / "splits"),
            masks_dir=masks_dir or (own_masks if own_masks.is_dir() else None),
        )
        self._class_table: dict[str, list[int]] | None = None

    def _class_indices(self, image_id: str) -> list[int]:
        path = self.root / "labels.csv"
        if self._class_table is None:
            self._class_table = read_label_table(path, self.info.classes)
        if image_id not in self._class_table:
            raise UserError(f"{path}: no row for id '{image_id}'. Add one ('{image_id},' if it shows no class).")
        return self._class_table[image_id]


class COCO14Source(FolderSource):
    """COCO 2014 in the `folder` layout, with the photographs where COCO keeps them: `train2014/` and `val2014/`."""

    def __init__(self, root: Path, masks_dir: Path | None = None) -> None:
        super().__init__(root, masks_dir, image_folders=("train2014", "val2014"))


def read_label_table(path: Path, classes: Sequence[str]) -> dict[str, list[int]]:
    """Read `labels.csv`: mask indices (1..K) of the classes of every id.

    Raises:
        UserError: missing file, wrong header or row, unknown class, an id with two rows.
    """
    index_of = {name: index for index, name in enumerate(classes) if index > 0}
    table: dict[str, list[int]] = {}
    for line, image_id, names in _rows(path):
        unknown = [name for name in names if name not in index_of]
        if unknown:
            raise UserError(f"{path}, line {line}: unknown class '{unknown[0]}'. Known: {', '.join(index_of)}.")
        if image_id in table:
            raise UserError(f"{path}, line {line}: id '{image_id}' has a row already. Merge the two.")
        table[image_id] = [index_of[name] for name in names]
    return table


def _rows(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(line number, id, class names) of every row below the header."""
    with _open_table(path) as file:
        reader = csv.reader(file)
        if [name.strip() for name in next(reader, [])] != LABELS_HEADER:
            raise UserError(f"{path}, line 1: the header must be '{','.join(LABELS_HEADER)}'.")
        for row in filter(None, reader):
            if len(row) != 2:
                raise UserError(f"{path}, line {reader.line_num}: expected 'id,class;class', got {len(row)} fields.")
            image_id, labels = (field.strip() for field in row)
            yield reader.line_num, image_id, [name.strip() for name in labels.split(";") if name.strip()]


@contextlib.contextmanager
def _open_table(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Write one row per image: 'id,labels'.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 table ({error}). Save it as CSV in UTF-8.") from error
