"""Faults of masks that a single mask does not tell, but all masks of a dataset together do. `verify` reports them.

masks = Masks(source.info)
for image_id in ids:
    masks.add(look_at_mask(source, image_id), source.image_label(image_id))
for kind, text in masks.findings():
    ...                              "mask", "data/masks: none of 12 masks shows a class, they hold 0 and 255 ..."
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from datasets.base import DatasetInfo, DataSource, nothing_shown
from tools.files import count_values, mask_colours
from tools.options import IGNORE_INDEX

SEVERAL = 3  # with fewer masks there is no finding: their objects may be too small to be drawn
THIN = 5  # pixels; a region in which no square of this side fits is an edge
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskLook:
    """What one mask is like."""

    path: Path  # of the mask
    pixels: np.ndarray  # int64 [256], how many have each value
    # colour -> index, for the indices in use; empty for grey masks, for masks in the dataset's own colours, and where
    # two indices share a colour
    colours: dict[Colour, int]
    turned: Path | None  # the photograph, if EXIF turns it and the size of the mask does not tell whether it follows
    blended: bool = False  # shows classes that the image label lacks, but along edges only


def is_systematic(count: int, total: int) -> bool:
    """Whether `count` of `total` images share a fault that so many do not have by chance: several, and a third."""
    return count >= SEVERAL and 3 * count >= total


def look_at_mask(source: DataSource, image_id: str, label: np.ndarray | None = None) -> MaskLook:
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
        pixels=pixels,
        colours=colours if len(colours) == len(used) else {},
        turned=None if orientation == 1 or told_apart else source.image_path(image_id),
        blended=label is not None and _only_edges(mask, used[(used > 0) & (used <= len(label))], label),
    )


def _only_edges(mask: np.ndarray, shown: np.ndarray, label: np.ndarray) -> bool:
    extra = shown[label[shown - 1] == 0]
    inside = cv2.erode(np.isin(mask, extra).astype(np.uint8), np.ones((THIN, THIN), np.uint8)) if len(extra) else None
    return inside is not None and not inside.any()


@dataclass
class Masks:
    """Collects what masks are like, and says what is wrong with all of them."""

    info: DatasetInfo
    count: int = 0  # masks added
    ignored: int = 0  # masks with ignored pixels
    labelled: int = 0  # masks whose image label names a class
    strange: list[Path] = field(default_factory=list)  # of the labelled masks, those that show none of these classes
    blended: list[Path] = field(default_factory=list)  # of the labelled masks, those that show others along edges
    turned: list[Path] = field(default_factory=list)  # photographs of masks that are `MaskLook.turned`
    # colour -> the indices that it stands for, and a mask for each
    places: dict[Colour, dict[int, Path]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.named, self.shown = np.zeros((2, self.info.num_classes), np.int64)  # masks whose label names, that show c

    def add(self, look: MaskLook, label: np.ndarray | None) -> None:
        """Count a mask, and its image label (f32 [K]; None if there is none)."""
        self.count += 1
        self.folder = look.path.parent
        self.ignored += bool(look.pixels[IGNORE_INDEX])
        shown = look.pixels[: self.info.num_classes] > 0
        self.shown += shown
        if label is not None and label.any():
            self.named[1:] += label > 0
            self.labelled += 1
            self.strange += [look.path] * (not (shown[1:] & (label > 0)).any())
            self.blended += [look.path] * look.blended
        self.turned += [look.turned] * (look.turned is not None)
        for colour, index in look.colours.items():
            self.places[colour].setdefault(index, look.path)

    def findings(self) -> Iterator[tuple[str, str]]:
        """Kind (a key of `verify.ERRORS` or `WARNINGS`) and text of what is wrong."""
        if self.count and not self.shown[1:].any() and (self.ignored or self.named.any()):
            yield "mask", nothing_shown(self.folder, self.count, ignored=bool(self.ignored))
        else:
            yield from (("mask", text) for text in self._contradictions())
            for index in np.flatnonzero((self.named >= SEVERAL) & (self.shown == 0)):
                text = f"no mask shows '{self.info.classes[index]}', but {self.named[index]} image labels name it"
                yield "unlabelled", text
        for places in self.places.values():
            if len(places) > 1:
                (first, there), (second, here) = itertools.islice(places.items(), 2)
                yield (
                    "mask",
                    f"{here}: index {second} has the colour that index {first} has in {there.name}. An optimiser or "
                    "editor sorted the palettes: save the masks again from their colours, or without palettes if the "
                    "indices are right.",
                )
                break
        if self.turned:
            yield (
                "turned",
                f"{self.turned[0]}: one of {len(self.turned)} photographs that EXIF turns. Photographs are read "
                "upright. Check that their masks are upright: many tools draw on the unturned photograph",
            )

    def _contradictions(self) -> Iterator[str]:
        """Sentences on faults that a third of the masks does not have by chance."""
        strange = "show none of the classes that their image labels name. A pixel's value is the place of its class in "
        strange += "the list of classes, background 0: change the order of the list, or the masks"
        blended = "show, along edges only, classes that their image labels lack. They were resized with blending, or "
        blended += "saved as JPEG: make them again, with nearest neighbour"
        for masks, fault in ((self.strange, strange), (self.blended, blended)):
            if is_systematic(len(masks), self.labelled):
                yield f"{masks[0]}: one of {len(masks)} masks (of {self.labelled}) that {fault}"
