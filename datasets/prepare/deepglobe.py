"""DeepGlobe land cover: satellite photographs with colour-coded masks, turned into the `folder` layout.

    convert([Path("downloads")], Path("data/deepglobe"), workers=8)

    SOURCE/**/ID_sat.jpg  SOURCE/**/ID_mask.png         read, in any folders below SOURCE
    ROOT/images/ID.jpg  ROOT/masks/ID.png  ROOT/classes.txt  ROOT/labels.csv  ROOT/splits/{train,val,test}.txt

Colours are cut at 128, as the challenge asks: compression has blurred them. "Unknown" (black) and colours of no class
become 255 (ignored), so no pixel is background. The image label is the set of classes in the mask. Of the images with a
mask, by ascending id, every fifth is `val` and the others are `train` (our choice; there is no official one).
"""

import filecmp
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.base import voc_palette
from datasets.class_names import BACKGROUND
from datasets.folder import write_lists
from tools.errors import UserError
from tools.files import atomic_write, check_writable, load_image, save_mask
from tools.options import IGNORE_INDEX
from tools.parallel import run_jobs

COLOURS = {
    "urban": (0, 255, 255),
    "agriculture": (255, 255, 0),
    "rangeland": (255, 0, 255),
    "forest": (0, 255, 0),
    "water": (0, 0, 255),
    "barren": (255, 255, 255),
}
VAL_EVERY = 5  # the fifth, tenth, ... image with a mask is for validation


def convert(sources: Sequence[Path], root: Path, workers: int) -> None:
    """Write the dataset; files that are there already are kept. Photographs are linked where the file system allows.

    Raises:
        UserError: hardly any photograph with a mask below `sources`, two different ones of an id, an unreadable one.
    """
    images, masks = _by_id(sources, "_sat.jpg"), _by_id(sources, "_mask.png")
    labelled = sorted(images.keys() & masks.keys(), key=_number)
    if len(labelled) < VAL_EVERY:
        raise UserError(
            f"{sources[0]}: {len(labelled)} photographs with a mask (ID_sat.jpg, ID_mask.png) below it. Put "
            "DeepGlobe's land-cover files there, zipped or not."
        )
    check_writable(root / "images")
    jobs = [(path, masks.get(image_id), root, image_id) for image_id, path in images.items()]
    names = dict(zip(images, run_jobs(_convert_image, jobs, workers, "masks", "image"), strict=True))
    labels = {image_id: names[image_id] for image_id in labelled}
    val = labelled[VAL_EVERY - 1 :: VAL_EVERY]
    train, test = (sorted(ids, key=_number) for ids in (set(labelled) - set(val), set(images) - set(labelled)))
    splits = {"train": train, "val": val} | ({"test": test} if test else {})
    write_lists(root, (BACKGROUND, *COLOURS), labels, splits)


def class_indices(colours: np.ndarray) -> np.ndarray:
    """The class mask, uint8 [H, W], of colours uint8 RGB [H, W, 3]: 1..6 in the order of `COLOURS`, 255 for others."""
    table = np.full(8, IGNORE_INDEX, np.uint8)  # by which of red, green and blue are on
    for index, colour in enumerate(COLOURS.values(), 1):
        table[np.dot(np.greater(colour, 127), (4, 2, 1))] = index
    on = colours >= 128
    return table[4 * on[..., 0] + 2 * on[..., 1] + on[..., 2]]


def _convert_image(job: tuple[Path, Path | None, Path, str]) -> list[str]:
    """Place one photograph and write its mask; `job` is (photograph, colour-coded mask if any, root, id).

    Returns:
        The names of the classes in the mask.
    """
    photograph, coloured, root, image_id = job
    _place(photograph, root / "images" / f"{image_id}.jpg")
    if coloured is None:
        return []
    mask = class_indices(load_image(coloured))
    if not (root / "masks" / f"{image_id}.png").exists():
        save_mask(root / "masks" / f"{image_id}.png", mask, voc_palette())
    present = set(np.unique(mask).tolist())
    return [name for index, name in enumerate(COLOURS, 1) if index in present]


def _place(source: Path, path: Path) -> None:
    """Make `path` the same file as `source`, or a copy."""
    if path.exists():
        return
    try:
        os.link(source, path)
    except OSError:  # another disk, or a file system without links
        with atomic_write(path, durable=False) as temporary:
            shutil.copyfile(source, temporary)


def _by_id(sources: Sequence[Path], ending: str) -> dict[str, Path]:
    """The files below `sources` with such names, by id. A file may be there twice, also in a zip file and beside it."""
    files: dict[str, Path] = {}
    for path in sorted(path for source in sources for path in source.rglob(f"[!.]*{ending}")):
        other = files.setdefault(path.name.removesuffix(ending), path)
        if path != other and not filecmp.cmp(path, other, shallow=False):
            raise UserError(f"{path}: there is {other} too, another file. Remove one of them.")
    return files


def _number(image_id: str) -> tuple[int, str]:
    """Sorts ids as the numbers they are."""
    return (int(image_id) if image_id.isdigit() else 0, image_id)
