"""What the annotation tools call the values of a mask, and what is handed to them of an image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.base import DatasetInfo
from tools.errors import UserError
from tools.options import IGNORE_INDEX

IGNORED = "ignored"
"""The tools' name of pixels that are neither trained on nor evaluated."""


@dataclass(frozen=True)
class Item:
    """One image on its way out: its id, the photograph's file name (with folders), its mask uint8 [H, W]."""

    image_id: str
    file: str
    mask: np.ndarray


class Labels:
    """Class names and colours without gaps: background, the classes, and `ignored` last.

    To a tool, 255 would be an undeclared label: in its files, ignored pixels have the index after the classes.

    Raises:
        UserError: a class is called `ignored`.
    """

    def __init__(self, info: DatasetInfo) -> None:
        if IGNORED in info.classes:
            raise UserError(f"class '{IGNORED}': the tools' name of pixels that do not count. Rename the class.")
        self.names = (*info.classes, IGNORED)
        colours = [*range(info.num_classes), IGNORE_INDEX]
        self.colours = [tuple(map(int, info.palette[value])) for value in colours]
        self._values = np.array(colours, dtype=np.uint8)
        self._indices = np.zeros(256, dtype=np.uint8)
        self._indices[colours] = np.arange(len(colours))

    def indices(self, mask: np.ndarray) -> np.ndarray:
        """A mask's values as indices into `names`, uint8 [H, W]."""
        return self._indices[mask]

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The opposite."""
        return self._values[indices]

    def index(self, name: str, path: Path) -> int:
        """The index of a label that a tool's file `path` names.

        Raises:
            UserError: there is no such class.
        """
        if name not in self.names:
            raise UserError(f"{path}: label '{name}' is no class of the dataset. Known: {', '.join(self.names)}.")
        return self.names.index(name)


def hexadecimal(colour: tuple[int, int, int]) -> str:
    """#rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
