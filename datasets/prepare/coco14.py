"""COCO 2014: the official `instances_*.json` turned into class masks, image labels and lists of ids.

    convert(Path("data/coco14"), workers=8)

    ROOT/train2014/COCO_train2014_000000000009.jpg  ROOT/val2014/...         photographs, as COCO ships them
    ROOT/annotations/instances_train2014.json  .../instances_val2014.json    read
    ROOT/classes.txt  labels.csv  masks/ID.png  splits/train2014.txt  splits/val2014.txt    written

* Classes: the categories by ascending id (ids have gaps), so category 1 is class 1 and category 90 is class 80.
* Masks: objects are painted from the largest to the smallest area, so the smaller object is on top; of equals, the
  later one. Crowd regions ("a group of people") are painted as their class too, below all single objects. Nothing is
  ignored.
* Image labels: the classes of all annotations, crowds included; also of an object the mask hides entirely.

A json is streamed into a temporary database beside its output, so its size does not matter to memory; only the labels
are held, a short list per image.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ijson
import numpy as np
from pycocotools import mask as coco_mask

from datasets.base import voc_palette
from datasets.folder import BACKGROUND, COCO14_PARTS, write_lists
from tools.errors import UserError
from tools.files import check_writable, save_mask
from tools.parallel import run_jobs

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE categories (id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE images (id INTEGER PRIMARY KEY, file TEXT NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL);
CREATE TABLE objects (image INTEGER NOT NULL, category INTEGER NOT NULL, crowd INTEGER NOT NULL, shape BLOB NOT NULL);
"""


def is_converted(root: Path) -> bool:
    """Whether `convert` has finished there: the lists of ids are the last files it writes."""
    return all((root / "splits" / f"{part}.txt").is_file() for part in COCO14_PARTS)


def convert(root: Path, workers: int) -> None:
    """Write everything the reader needs besides the photographs. Masks that are there already are kept.

    Args:
        root: the folder with `annotations/`.
        workers: processes; 0: this one only.

    Raises:
        UserError: an annotation file is missing, damaged or contradicts itself or the other; a full disk.
    """
    check_writable(root / "masks")
    classes: list[list[str]] = []
    labels: dict[str, dict[str, list[str]]] = {}
    for part in COCO14_PARTS:
        path = root / "annotations" / f"instances_{part}.json"
        with _database(path, root) as database:
            classes.append(_class_names(database))
            if classes[0] != classes[-1]:
                raise UserError(
                    f"{path}: other categories than in instances_{COCO14_PARTS[0]}.json. Use files of one release."
                )
            work = functools.partial(_convert_image, database, root / "masks", _class_index(database))
            rows = run_jobs(work, _image_ids(database), workers, f"masks of {part}", "image")
            labels[part] = {image: [classes[0][index] for index in indices] for image, indices in rows}
    everything = {image: names for part in COCO14_PARTS for image, names in labels[part].items()}
    write_lists(root, classes[0], everything, {part: list(labels[part]) for part in COCO14_PARTS})


def paint(objects: Sequence[tuple[int, bool, Any]], height: int, width: int) -> np.ndarray:
    """The class mask of one image: uint8 [height, width], 0 where there is no object.

    Args:
        objects: class index, whether it is a crowd, and COCO's `segmentation` (polygons or RLE) of each.
        height, width: of the image, pixels.

    Raises:
        ValueError: a segmentation pycocotools does not take, or one of another size.
    """
    codes = [_run_lengths(shape, height, width) for _, _, shape in objects]
    areas = coco_mask.area(codes) if codes else []
    order = sorted(range(len(objects)), key=lambda i: (not objects[i][1], -int(areas[i])))
    mask = np.zeros((height, width), np.uint8, order="F")  # as pycocotools lays out what it decodes
    for i in order:
        np.copyto(mask, objects[i][0], where=coco_mask.decode(codes[i]).view(bool))
    return np.ascontiguousarray(mask)


def _run_lengths(shape: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO `segmentation` as compressed RLE, by pycocotools' own rules."""
    try:
        if isinstance(shape, list):
            return coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
        code = coco_mask.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
    except Exception as error:  # pycocotools raises nothing more specific
        raise ValueError(f"pycocotools cannot read its segmentation: {error}") from error
    if list(code["size"]) != [height, width]:
        raise ValueError(f"its segmentation is for {code['size'][1]}x{code['size'][0]} pixels, not {width}x{height}")
    return code


@contextlib.contextmanager
def _database(path: Path, folder: Path) -> Iterator[Path]:
    """The annotations of `path` by image, in a temporary database in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{path.stem}.") as temporary:
        database = Path(temporary) / "annotations.sqlite"
        print(f"{path}: reading")
        try:
            with contextlib.closing(sqlite3.connect(database)) as connection:
                _fill(connection, path)
        except sqlite3.IntegrityError as error:
            raise UserError(f"{path}: {error}. Use COCO's own file, unpacked again.") from error
        except sqlite3.OperationalError as error:
            raise UserError(f"{folder}: no room to sort the annotations ({error}). Free some space.") from error
        yield database


def _fill(connection: sqlite3.Connection, path: Path) -> None:
    connection.executescript(_TABLES)
    columns = ("id", "file_name", "height", "width")
    connection.executemany("INSERT INTO categories VALUES (?, ?)", _rows(path, "categories", ("id", "name")))
    connection.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", _rows(path, "images", columns))
    objects = _rows(path, "annotations", ("image_id", "category_id", "iscrowd", "segmentation"))
    packed = ((*row, pickle.dumps(shape, pickle.HIGHEST_PROTOCOL)) for *row, shape in objects)
    connection.executemany("INSERT INTO objects VALUES (?, ?, ?, ?)", packed)
    connection.execute("CREATE INDEX objects_of_image ON objects (image)")
    connection.commit()
    for table, column in (("images", "image"), ("categories", "category")):
        query = f"SELECT {column} FROM objects WHERE {column} NOT IN (SELECT id FROM {table}) LIMIT 1"
        unknown = connection.execute(query).fetchone()
        if unknown:
            raise UserError(
                f"{path}: an annotation of {column} {unknown[0]}, which is not in '{table}'. Unpack it again."
            )


def _rows(path: Path, key: str, fields: Sequence[str]) -> Iterator[tuple]:
    """The `fields` of every element of the list `key`, read as the file goes by.

    Raises:
        UserError: no such file, damaged JSON, a list that is missing or empty, an element without one of the fields.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for item in ijson.items(file, f"{key}.item", use_float=True):
                number += 1
                yield tuple(item[field] for field in fields)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Unpack COCO's annotations_trainval2014.zip there.") from error
    except ijson.JSONError as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}). Unpack it again.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: element {number} of '{key}' lacks {error}. Use COCO's instances_*.json.") from error
    if number == 0:
        raise UserError(f"{path}: no '{key}' in it. Use COCO's instances_*.json.")


def _class_names(database: Path) -> list[str]:
    return [BACKGROUND, *(name for (name,) in _select(database, "SELECT name FROM categories ORDER BY id"))]


def _class_index(database: Path) -> dict[int, int]:
    """Category id -> class index 1..K."""
    return {key: index for index, (key,) in enumerate(_select(database, "SELECT id FROM categories ORDER BY id"), 1)}


def _image_ids(database: Path) -> list[int]:
    return [key for (key,) in _select(database, "SELECT id FROM images ORDER BY id")]


def _select(database: Path, query: str, *values: int) -> list[tuple]:
    return _connection(database, os.getpid()).execute(query, values).fetchall()


@functools.lru_cache(maxsize=1)
def _connection(database: Path, process: int) -> sqlite3.Connection:
    """The connection of one process: a forked worker must not go on with its parent's."""
    return sqlite3.connect(database)


def _convert_image(database: Path, masks: Path, class_index: dict[int, int], image: int) -> tuple[str, list[int]]:
    """Write one mask unless it is there; return the image's id and its class indices, ascending."""
    [(file, height, width)] = _select(database, "SELECT file, height, width FROM images WHERE id = ?", image)
    rows = _select(database, "SELECT category, crowd, shape FROM objects WHERE image = ? ORDER BY rowid", image)
    image_id = Path(file).stem
    path = masks / f"{image_id}.png"
    if not path.exists():
        objects = [(class_index[category], bool(crowd), pickle.loads(shape)) for category, crowd, shape in rows]
        try:
            mask = paint(objects, height, width)
        except ValueError as error:
            raise UserError(
                f"{file}: an object of this image is damaged ({error}). Unpack COCO's json again."
            ) from error
        save_mask(path, mask, voc_palette())
    return image_id, sorted({class_index[category] for category, _, _ in rows})
