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

import numpy as np

from datasets.base import DatasetInfo, DataSource, nothing_shown
from tools.files import mask_colours

SEVERAL = 3  # labels that name a class no mask shows; of fewer, the objects may just be too small to be drawn
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
    """

    path: Path
    image: Path
    pixels: np.ndarray
    colours: dict[Colour, int]
    turned: int


def look_at_mask(source: DataSource, image_id: str) -> MaskLook:
    """Read the mask of an id.

    Raises:
        UserError: see `DataSource.mask`.
    """
    mask, path = source.mask(image_id), source.mask_path(image_id)
    pixels = np.bincount(mask.ravel(), minlength=256)
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
    )


@dataclass
class Masks:
    """Adds up masks, and says what is wrong with all of them.

    Attributes:
        info: classes.
        count: masks added; `ignored` of them have ignored pixels.
        named, shown: int64 [C], masks whose image label names a class, and masks that show it.
        turned: photographs that EXIF turns, without the size of the mask telling whether it follows.
        places: of each colour, the indices it is shown for, and a mask for each.
    """

    info: DatasetInfo
    count: int = 0
    ignored: int = 0
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
        self.shown += look.pixels[: self.info.num_classes] > 0
        if label is not None:
            self.named[1:] += label > 0
        if look.turned != 1:
            self.turned.append(look.image)
        for colour, index in look.colours.items():
            self.places[colour].setdefault(index, look.path)

    def findings(self) -> Iterator[tuple[str, str]]:
        """Kind (a key of `verify.ERRORS` or `WARNINGS`) and text of what is wrong."""
        if self.count and not self.shown[1:].any() and (self.ignored or self.named.any()):
            yield "mask", nothing_shown(self.folder, self.count, ignored=bool(self.ignored))
        else:
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


def _sorted_palettes(path: Path, index: int, other: Path, other_index: int) -> str:
    return (
        f"{path}: index {index} has the colour that index {other_index} has in {other.name}. An optimiser or editor "
        "sorted the palettes: save the masks anew from their colours, or without palettes if the indices are right."
    )
