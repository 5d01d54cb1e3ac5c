"""Faults of masks that a single mask does not tell, but all masks of a dataset together do. `verify` reports them.

looks = [(look_at_mask(source, image_id, label), label) for image_id, label in labels.items()]
for kind, text in shared_faults(source.info, looks):
    ...                              "mask", "data/masks: none of 12 masks shows a class, they hold 0 and 255 ..."
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from datasets.base import DatasetInfo, DataSource, nothing_shown
from tools.errors import UserError
from tools.files import count_values, mask_colours
from tools.options import IGNORE_INDEX
from tools.parallel import sample

SEVERAL = 3  # with fewer masks there is no finding: their objects may be too small to be drawn
THIN = 5  # pixels; a region in which no square of this side fits is an edge
STRANGE = (
    "show none of the classes that their image labels name. A pixel's value is the place of its class in the list of "
    "classes, background 0: change the order of the list, or the masks"
)
BLENDED = (
    "show, along edges only, classes that their image labels lack. They were resized with blending, or saved as JPEG: "
    "make them again, with nearest neighbour"
)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskLook:
    """What one mask is like."""

    path: Path  # of the mask
    pixels: np.ndarray  # int64 [C], how many show each class
    ignored: bool  # some pixels are 255
    # colour -> index, for the indices in use; empty for grey masks, for masks in the dataset's own colours, and where
    # two indices share a colour
    colours: dict[Colour, int]
    turned: Path | None  # the photograph, if EXIF turns it and the size of the mask does not tell whether it follows
    blended: bool  # shows classes that the image label lacks, but along edges only


def is_systematic(count: int, total: int) -> bool:
    """Whether `count` of `total` images share a fault that so many do not have by chance: several, and a third."""
    return count >= SEVERAL and 3 * count >= total


def shared_fault(paths: Sequence[Path], total: int, fault: str) -> str:
    """The line about the masks that have a fault, of `total` masks; "" if they may have it by chance."""
    if not is_systematic(len(paths), total):
        return ""
    return f"{paths[0]}: one of {len(paths)} masks (of {total}) that {fault}"


def check_agreement(source: DataSource, ids: Sequence[str]) -> None:
    """Compare masks that are to be learnt with the image labels: those of a sample of the images.

    Images without a label, and masks without any class, are passed over.

    Raises:
        UserError: a third show none of the classes of their labels; or a mask cannot be used.
    """
    strange, count = [], 0
    for image_id in sample(ids):
        try:
            label = source.image_label(image_id) > 0
        except UserError:  # refused where labels are needed
            continue
        shown = count_values(source.mask(image_id))[1 : source.info.num_classes] > 0
        if label.any() and shown.any():
            count += 1
            strange += [source.mask_path(image_id)] * (not shown[label].any())
    if text := shared_fault(strange, count, STRANGE):
        raise UserError(f"{text}.")


def look_at_mask(source: DataSource, image_id: str, label: np.ndarray | None) -> MaskLook:
    """Read the mask of an id, and compare it with the image label, f32 [K], if there is one.

    Raises:
        UserError: see `DataSource.mask`.
    """
    mask, path = source.mask(image_id), source.mask_path(image_id)
    pixels = count_values(mask)
    used, palette = np.flatnonzero(pixels), mask_colours(path)
    colours: dict[Colour, int] = {}
    if palette is not None and not np.array_equal(palette[used], source.info.palette[used]):
        colours = {tuple(palette[index].tolist()): index for index in used.tolist()}
    orientation = source.orientation(image_id)
    told_apart = orientation >= 5 and mask.shape[0] != mask.shape[1]
    return MaskLook(
        path=path,
        pixels=pixels[: source.info.num_classes],
        ignored=bool(pixels[IGNORE_INDEX]),
        colours=colours if len(colours) == len(used) else {},
        turned=None if orientation == 1 or told_apart else source.image_path(image_id),
        blended=label is not None and _only_edges(mask, used[(used > 0) & (used <= len(label))], label),
    )


def _only_edges(mask: np.ndarray, shown: np.ndarray, label: np.ndarray) -> bool:
    extra = shown[label[shown - 1] == 0]
    if not len(extra):
        return False
    return not cv2.erode(np.isin(mask, extra).astype(np.uint8), np.ones((THIN, THIN), np.uint8)).any()


def shared_faults(info: DatasetInfo, looks: Sequence[tuple[MaskLook, np.ndarray | None]]) -> Iterator[tuple[str, str]]:
    """Kind (a key of `verify.ERRORS` or `WARNINGS`) and text of what is wrong with masks.

    Args:
        looks: what each mask is like, and its image label (f32 [K]; None if there is none).
    """
    labelled = [(look, label > 0) for look, label in looks if label is not None and label.any()]
    ignored = any(look.ignored for look, _ in looks)
    shown = sum((look.pixels[1:] > 0 for look, _ in looks), np.zeros(info.num_foreground, int))  # masks, by class
    named = sum((classes for _, classes in labelled), np.zeros(info.num_foreground, int))  # labels, by class
    if not shown.any() and (ignored or labelled):
        yield "mask", nothing_shown(looks[-1][0].path.parent, len(looks), ignored=ignored)
    else:
        strange = [look.path for look, classes in labelled if not look.pixels[1:][classes].any()]
        blended = [look.path for look, _ in labelled if look.blended]
        for paths, fault in ((strange, STRANGE), (blended, BLENDED)):
            if text := shared_fault(paths, len(labelled), fault):
                yield "mask", text
        for name, labels, masks in zip(info.classes[1:], named, shown, strict=True):
            if labels >= SEVERAL and not masks:
                yield "unlabelled", f"no mask shows '{name}', but {labels} image labels name it"
    places: dict[Colour, dict[int, Path]] = defaultdict(dict)  # the indices that a colour stands for; a mask of each
    for look, _ in looks:
        for colour, index in look.colours.items():
            places[colour].setdefault(index, look.path)
    if several := next((indices for indices in places.values() if len(indices) > 1), None):
        (first, there), (second, here), *_ = several.items()
        yield (
            "mask",
            f"{here}: index {second} has the colour that index {first} has in {there.name}. An optimiser or editor "
            "sorted the palettes: save the masks again from their colours, or without palettes if the indices are "
            "right.",
        )
    turned = [look.turned for look, _ in looks if look.turned is not None]
    if turned:
        yield (
            "turned",
            f"{turned[0]}: one of {len(turned)} photographs that EXIF turns. Photographs are read upright. Check that "
            "their masks are upright: many tools draw on the unturned photograph",
        )
