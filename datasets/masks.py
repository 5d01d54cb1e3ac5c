"""What the masks of a dataset show, all of them together: faults that no single one tells.

    masks = Masks(source.info)
    for image_id in ids:
        masks.add(look_at_mask(source, image_id), source.image_label(image_id))
    for kind, text in masks.findings():
        ...                              "mask", "data/masks: none of 12 masks shows a class, they hold 0 and 255 ..."

`verify` reports it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from datasets.base import DatasetInfo, DataSource, nothing_shown
from tools.files import count_values, mask_colours

SEVERAL = 3  # of fewer than that, nothing is said of all: the objects may just be too small to be drawn
THIN = 5  # pixels; what fills no square of that side is an edge
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskLook:
    """What one mask turned out to be.

    Attributes:
        path, image: of the mask and of its photograph.
        pixels: int64 [256], how many have each value.
        colours: index by the colour it is shown in, of those in use; empty for grey masks, those in the dataset's own
            colours, and where two indices share a colour.
        turned: EXIF orientation of the photograph, if the mask would have the same size without it; else 1.
        blended: it shows classes that the image label lacks, but along edges only.
    """

    path: Path
    image: Path
    pixels: np.ndarray
    colours: dict[Colour, int]
    turned: int
    blended: bool = False


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
        image=source.image_path(image_id),
        pixels=pixels,
        colours=colours if len(colours) == len(used) else {},
        turned=1 if told_apart else orientation,
        blended=label is not None and _only_edges(mask, used[(used > 0) & (used <= len(label))], label),
    )


def _only_edges(mask: np.ndarray, shown: np.ndarray, label: np.ndarray) -> bool:
    extra = shown[label[shown - 1] == 0]
    inside = cv2.erode(np.isin(mask, extra).astype(np.uint8), np.ones((THIN, THIN), np.uint8)) if len(extra) else None
    return inside is not None and not inside.any()


@dataclass
class Masks:
    """Adds up masks, and says what is wrong with all of them.

    Attributes:
        info: classes.
        count: masks added; `ignored` of them have ignored pixels.
        named, shown: int64 [C], masks whose image label names a class, and masks that show it.
        labelled: masks whose image label names any class; `strange` ones show none of these classes, `blended` ones
            others along edges.
        turned: photographs that EXIF turns, without the size of the mask telling whether it follows.
        places: of each colour, the indices it is shown for, and a mask for each.
    """

    info: DatasetInfo
    count: int = 0
    ignored: int = 0
    labelled: int = 0
    strange: list[Path] = field(default_factory=list)
    blended: list[Path] = field(default_factory=list)
    named: np.ndarray = field(init=False)
    shown: np.ndarray = field(init=False)
    turned: list[Path] = field(default_factory=list)
    places: dict[Colour, dict[int, Path]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        self.named = np.zeros(self.info.num_classes, np.int64)
        self.shown = np.zeros(self.info.num_classes, np.int64)

    def add(self, look: MaskLook, label: np.ndarray | None) -> None:
        """Count a mask, and its image label (f32 [K]; None if there is none)."""
        self.count += 1
        self.folder = look.path.parent
        self.ignored += bool(look.pixels[self.info.ignore_index])
        shown = look.pixels[: self.info.num_classes] > 0
        self.shown += shown
        if label is not None and label.any():
            self.named[1:] += label > 0
            self.labelled += 1
            self.strange += [look.path] * (not (shown[1:] & (label > 0)).any())
            self.blended += [look.path] * look.blended
        if look.turned != 1:
            self.turned.append(look.image)
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
                yield "mask", _sorted_palettes(here, second, there, first)
                break
        if self.turned:
            yield (
                "turned",
                f"{self.turned[0]}: one of {len(self.turned)} photographs with masks that EXIF turns. They are read "
                "upright: look whether their masks are, as many tools draw on the unturned photograph",
            )

    def _contradictions(self) -> Iterator[str]:
        """Sentences on what a third of the masks cannot be by chance."""
        for masks, fault in (
            (
                self.strange,
                "show none of the classes that their image labels name. A pixel's value is the place of its class in "
                "the list of classes, background 0: change the list's order or the masks",
            ),
            (
                self.blended,
                "show classes that their image labels lack along edges only. They were resized with blending, or saved "
                "as JPEG: make them anew, by nearest neighbour",
            ),
        ):
            if len(masks) >= SEVERAL and 3 * len(masks) >= self.labelled:
                yield f"{masks[0]}: one of {len(masks)} masks (of {self.labelled}) that {fault}"


def _sorted_palettes(path: Path, index: int, other: Path, other_index: int) -> str:
    return (
        f"{path}: index {index} has the colour that index {other_index} has in {other.name}. An optimiser or editor "
        "sorted the palettes: save the masks anew from their colours, or without palettes if the indices are right."
    )
