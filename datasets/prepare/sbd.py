"""SBD, the Semantic Boundaries Dataset: the list `train_aug` of VOC 2012, and masks of its images.

    convert(Path("benchmark_RELEASE/dataset"), Path("VOCdevkit/VOC2012"), workers=8)

    SBD/train.txt  SBD/val.txt  SBD/cls/ID.mat                    SBD as its archive unpacks; read
    VOC2012/ImageSets/Segmentation/train_aug.txt                  SBD train + SBD val + VOC train, minus VOC val
    VOC2012/SegmentationClassAug/ID.png                           VOC's own mask where there is one, else SBD's

Learning from image labels needs the list only; the masks are for scores on `train_aug` and for supervised training.
"""

import functools
import shutil
from pathlib import Path

import numpy as np
import scipy.io

from datasets.base import voc_palette
from datasets.voc12 import AUGMENTED_MASKS, VOC_CLASSES
from tools.errors import UserError
from tools.files import atomic_write, check_present, read_lines, reading, save_mask, save_text
from tools.parallel import run_jobs


def convert(sbd: Path, devkit: Path, workers: int) -> None:
    """Write the masks that are not there yet, then `train_aug.txt`.

    Raises:
        UserError: a list, a mask or an image is missing, or a .mat file is damaged.
    """
    lists = devkit / "ImageSets" / "Segmentation"
    train = {*read_lines(sbd / "train.txt"), *read_lines(sbd / "val.txt"), *read_lines(lists / "train.txt")}
    ids = sorted(train - set(read_lines(lists / "val.txt")))
    check_present(devkit / "JPEGImages", ids, ".jpg", "It is an image of SBD: unpack VOC 2012 again.")
    for _ in run_jobs(functools.partial(_write_mask, sbd, devkit), ids, workers, "masks of train_aug", "image"):
        pass
    save_text(list_path(devkit), "".join(f"{image_id}\n" for image_id in ids))


def read_mat(path: Path) -> np.ndarray:
    """The class mask of an SBD `cls/*.mat` file: uint8 HxW, 0 background, 1..20 in VOC's order.

    Raises:
        UserError: missing, damaged, or not such a file.
    """
    with reading(path, "mask of SBD", "Unpack SBD's benchmark.tgz again."), path.open("rb") as file:
        mask = scipy.io.loadmat(file)["GTcls"]["Segmentation"][0, 0]
    if mask.ndim != 2 or mask.max(initial=0) >= len(VOC_CLASSES):
        raise UserError(f"{path}: not a mask of the 20 VOC classes. Unpack benchmark.tgz again.")
    return mask.astype(np.uint8)


def list_path(devkit: Path) -> Path:
    """Where `train_aug` is: written by `convert` as the last file, or from elsewhere."""
    return devkit / "ImageSets" / "Segmentation" / "train_aug.txt"


def _write_mask(sbd: Path, devkit: Path, image_id: str) -> None:
    path = devkit / AUGMENTED_MASKS / f"{image_id}.png"
    own = devkit / "SegmentationClass" / path.name
    if path.exists():
        return
    if own.is_file():
        with atomic_write(path, durable=False) as temporary:
            shutil.copyfile(own, temporary)
    else:
        save_mask(path, read_mat(sbd / "cls" / f"{image_id}.mat"), voc_palette())
