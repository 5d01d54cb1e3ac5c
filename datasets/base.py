"""What a dataset is to the rest of the code: ids, photographs, image labels and (perhaps) masks.

    source = build_source("voc12", "VOCdevkit/VOC2012")
    for image_id in source.ids("train"):
        image, label = source.image(image_id), source.image_label(image_id)

A reader (`folder.py`, `voc12.py`) says where the files are and which class names an image has. All the rest, with the
checks of what it finds, is here (`listing.py` lists the files). Sources are read-only and can be pickled for workers.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.listing import IMAGE_SUFFIXES, MASK_SUFFIXES, FileIndex, clean_id, first_repeated, index_files
from tools import identity
from tools.errors import UserError
from tools.files import check_size, file_orientation, load_image, load_mask, read_lines, upright_size
from tools.options import IGNORE_INDEX
from tools.parallel import READERS, thread_map

if TYPE_CHECKING:
    import torch


def voc_palette() -> np.ndarray:
    """The PASCAL VOC colour map: uint8 [256, 3], RGB. Bit 3 b + c of an index is bit 7 - b of channel c."""
    index, channel = np.arange(256)[:, None], np.arange(3)
    return sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)).astype(np.uint8)


@dataclass(frozen=True)
class DatasetInfo:
    """What the numbers in labels and masks mean. It goes with the data, into checkpoints too."""

    classes: tuple[str, ...]  # class names by mask index, background first
    # uint8 [256, 3], the colours masks are saved with
    palette: np.ndarray = field(default_factory=voc_palette, compare=False, repr=False)

    @property
    def num_classes(self) -> int:
        """C = K + 1: classes of a mask, background included."""
        return len(self.classes)

    @property
    def num_foreground(self) -> int:
        """K: entries of an image label."""
        return len(self.classes) - 1

    def index(self, name: str, place: str | Path) -> int:
        """The mask index, 1..K, of a class that `place` (a file, a line of it) names (UserError: it is unknown)."""
        try:
            return self.classes.index(name, 1)
        except ValueError:
            known = ", ".join(self.classes[1:])
            remedy = "Rename it, or add it to the classes."
            raise UserError(f"{place}: unknown class '{name}'. Known: {known}. {remedy}") from None


@dataclass(eq=False, repr=False)
class DataSource:
    """Photographs with named lists of ids ("domains"), perhaps masks, and image labels if a reader finds them."""

    root: Path  # the dataset's folder; errors name it
    info: DatasetInfo
    images: FileIndex  # photographs by id, and files of other kinds among them
    splits: dict[str, Path]  # the list of each domain, one id per line; none: the domains are `parts`, or else `train`
    masks_dirs: Sequence[Path]  # folders of ID.png masks; of an image with masks in several, the first counts
    parts: Sequence[str] = ()  # names of domains; each has the images in the folder of that name

    def __post_init__(self) -> None:
        for folder in self.masks_dirs:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder of masks (ID.png). Make it first, or pass another.")
        self._labels: dict[str, np.ndarray] = {}

    def domains(self) -> list[str]:
        """Names of the lists of ids, sorted."""
        return sorted(self.splits) or sorted(self.parts) or ["train"]

    def ids(self, domain: str) -> list[str]:
        """The ids of a domain, in the order of its file.

        Raises:
            UserError: unknown or empty domain, an id listed twice, an id without an image.
        """
        ids = self.listed_ids(domain)
        if self.splits:
            self.check_ids(self.splits[domain], ids)
        return ids

    def check_ids(self, path: Path, ids: list[str]) -> None:
        """Check the ids that a file lists (UserError: there are none, one is listed twice, or is of no image)."""
        if not ids:
            raise UserError(f"{path}: an empty list. Write one image id per line.")
        repeated = first_repeated(ids)
        if repeated is not None:
            raise UserError(f"{path}: id '{repeated}' is listed twice. Remove one.")
        missing = [image_id for image_id in ids if image_id not in self.images.files]
        if missing:
            remedy = self.images.advice(missing[0]) or ". Remove them from the list, or add their photographs"
            raise UserError(
                f"{path}: {len(missing)} of {len(ids)} ids have no image in {self.root}, the first is "
                f"'{missing[0]}'{remedy}."
            )

    def listed_ids(self, domain: str) -> list[str]:
        """The ids of a domain, unchecked: for reports on what is wrong with them.

        Raises:
            UserError: unknown domain, or an unreadable file.
        """
        if domain not in self.domains():
            raise UserError(f"{self.root}: no domain '{domain}'. Choose one of: {', '.join(self.domains())}.")
        if not self.splits:
            return sorted(i for i in self.images.files if not self.parts or i.startswith(f"{domain}/"))
        lines = map(clean_id, read_lines(self.splits[domain]))
        return [self._id_of_line(line) for line in lines if line]  # some hold nothing that can be seen

    def image_path(self, image_id: str) -> Path:
        """The photograph of an id (UserError: there is none)."""
        if image_id not in self.images.files:
            raise UserError(f"{self.root}: no image for id '{image_id}'.")
        return self.images.files[image_id]

    def mask_path(self, image_id: str) -> Path | None:
        """The mask of an id, or where one is expected; None if the dataset has no masks."""
        found = (index.files[image_id] for index in self._masks if image_id in index.files)
        return next(found, self.masks_dirs[0] / f"{image_id}.png" if self.masks_dirs else None)

    def has_mask(self, image_id: str) -> bool:
        """Whether there is a mask of that id."""
        return any(image_id in index.files for index in self._masks)

    def stray_masks(self) -> Iterator[tuple[Path, str]]:
        """Each file in the folders of masks that belongs to no photograph, and the sentence on it."""
        for index in self._masks:
            strays = {path: self.images.advice(i) for i, path in index.files.items() if i not in self.images.files}
            strays |= {path: ": masks are PNG" * (path.suffix.lower() in IMAGE_SUFFIXES) for path in index.others}
            yield from ((path, f"{path}: no ID.png of a photograph{advice}") for path, advice in strays.items())

    @functools.cached_property
    def _masks(self) -> list[FileIndex]:
        return [index_files([folder], MASK_SUFFIXES) for folder in self.masks_dirs]

    def image(self, image_id: str) -> np.ndarray:
        """The photograph: uint8 RGB, HxWx3, in [0, 255] (UserError: missing or unreadable)."""
        return load_image(self.image_path(image_id))

    def photograph(self, image_id: str) -> torch.Tensor:
        """The photograph as a batch of one: uint8 RGB [1,3,H,W]."""
        import torch  # takes seconds, and most readers do without

        return torch.tensor(self.image(image_id)).permute(2, 0, 1)[None]

    def orientation(self, image_id: str) -> int:
        """The EXIF orientation of a photograph's file, 1 (upright) to 8 (UserError: missing or unreadable)."""
        return file_orientation(self.image_path(image_id))

    def mask(self, image_id: str) -> np.ndarray:
        """The mask: uint8 HxW, 0 background, 1..K classes, 255 ignored.

        Raises:
            UserError: no mask, an unreadable one, a size other than the image's, or an index that is no class.
        """
        self.check_present([image_id])
        path = self.mask_path(image_id)
        mask = read_mask(path, self.info)
        size = upright_size(self.image_path(image_id))
        if mask.shape != size:
            check_size(path, mask.shape, size, _misfit(mask.shape, size, self.orientation(image_id)))
        return mask

    def check_masks(self, ids: Sequence[str]) -> None:
        """Check, before work that needs masks, that every id has one and that one of them shows a class.

        Raises:
            UserError: the dataset has no masks, some are missing, or none shows a class.
        """
        self.check_present(ids)
        check_shown(map(self.mask_path, ids), self.info)

    def check_present(self, ids: Sequence[str]) -> None:
        """Check that every id has a mask (UserError: the dataset has no masks, or some are missing)."""
        if not self.masks_dirs:
            raise UserError(f"{self.root}: this dataset has no masks. Give a folder of ID.png masks.")
        missing = [image_id for image_id in ids if not self.has_mask(image_id)]
        if missing:
            raise UserError(
                f"{self.mask_path(missing[0])}: no such mask ({len(missing)} of {len(ids)} are missing). Choose "
                "another split, or pass the folder of its masks."
            )

    def image_label(self, image_id: str) -> np.ndarray:
        """Multi-hot float32 [K]: 1 for the foreground classes in the image. Read once, then kept.

        Raises:
            UserError: the id has no annotation, or it names an unknown class.
        """
        if image_id not in self._labels:
            label = np.zeros(self.info.num_foreground, dtype=np.float32)
            label[[index - 1 for index in self._class_indices(image_id)]] = 1
            self._labels[image_id] = label
        return self._labels[image_id]

    def image_labels(self, ids: Sequence[str]) -> np.ndarray:
        """`image_label` of many ids, read in parallel: float32 [N, K]."""
        labels = list(thread_map(self.image_label, ids, READERS))
        return np.stack(labels) if labels else np.zeros((0, self.info.num_foreground), np.float32)

    def fingerprints(self, ids: Sequence[str], *, labels: bool = False, masks: bool = False) -> dict[str, dict]:
        """What is read of these images, by kind and id, as `tools.identity` compares it.

        Of a photograph the size of its file (`identity.photographs`), of a label the class names, of a mask a hash of
        the file ("" without one).

        Raises:
            UserError: an image without a photograph, or without the label asked for.
        """
        inputs: dict[str, dict] = {"photographs": identity.photographs({i: self.image_path(i) for i in ids})}
        if labels:
            names = np.array(self.info.classes[1:], dtype=object)
            rows = zip(ids, self.image_labels(ids), strict=True)
            inputs["labels"] = {i: ";".join(names[row > 0]) for i, row in rows}
        if masks:
            inputs["masks"] = identity.contents({i: self.mask_path(i) for i in ids})
        return inputs

    def has_label(self, image_id: str) -> bool:
        """Whether an id has an image label, valid or not; test images have none (UserError: no readable table)."""
        return image_id in self.labelled_ids()

    def labelled_ids(self) -> Collection[str]:
        """The ids that have an image label, with or without a photograph (UserError: no readable table)."""
        return ()

    def _class_indices(self, image_id: str) -> Iterable[int]:
        """Mask indices (1..K) of the foreground classes of an image."""
        raise UserError(f"{self.root}: photographs without labels.")

    def _id_of_line(self, line: str) -> str:
        return line


def read_mask(path: Path, info: DatasetInfo) -> np.ndarray:
    """A mask of these classes, ground truth or not: uint8 HxW, 0 background, 1..K classes, 255 ignored.

    Raises:
        UserError: the file is missing or unreadable, its palette was sorted, or an index is no class.
    """
    mask = load_mask(path, info.palette, info.num_classes)
    wrong = (mask >= info.num_classes) & (mask != IGNORE_INDEX)
    if wrong.any():
        raise UserError(
            f"{path}: holds the value {mask[wrong][0]}, but masks of this dataset hold 0..{info.num_classes - 1} "
            f"or {IGNORE_INDEX} (ignore). Save class indices, and check --dataset."
        )
    return mask


def check_shown(paths: Iterable[Path], info: DatasetInfo) -> None:
    """Check that masks show a class, before they are learnt. Reads until one does, usually the first only.

    Raises:
        UserError: none of them shows a class; or one cannot be read.
    """
    count, ignored = 0, False
    for path in paths:
        mask = read_mask(path, info)
        if ((mask > 0) & (mask != IGNORE_INDEX)).any():
            return
        count, ignored = count + 1, ignored or bool(mask.any())
    if count:
        raise UserError(nothing_shown(path.parent, count, ignored=ignored))


def nothing_shown(folder: Path, count: int, *, ignored: bool) -> str:
    """The sentence on masks without any class."""
    fault = f"{folder}: none of {count} masks shows a class, they hold"
    if ignored:
        return f"{fault} 0 and 255. 255 is ignored: if it is the object, save it as the index of its class (1)."
    return f"{fault} only 0. Save the index of each pixel's class."


def _misfit(mask: tuple[int, ...], size: tuple[int, int], orientation: int) -> str:
    """What to do with a mask, (height, width), whose size is not that of its photograph."""
    if tuple(mask) != size[::-1]:
        return "Save both at one size."
    if orientation < 5:
        return "It lies on its side: turn it."
    return f"EXIF orientation {orientation} turns the photograph, but not the mask: turn the mask, too."
