"""Datasets: what an image, its labels and its mask are; how they are augmented, mixed and batched.

    from datasets import build_source
    from datasets.dataset import ImageDataset
    from datasets.loaders import build_loader
    from datasets.transforms import train_geometry

    source = build_source("folder", "data/animals")
    dataset = ImageDataset(source, source.ids("train"), train_geometry(512, 320, 640))
    loader = build_loader(dataset, 32, num_workers=8, seed=0)

`listing` finds files, `class_names` checks names, `base`, `folder` and `voc12` read, `prepare` makes public datasets
from their official files, `verify` looks a dataset over (`verify_files`, `verify_masks`: what single images do not
tell), `transforms` and `mixing` augment, `dataset` and `loaders` make batches. Only the last four import PyTorch.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from datasets.base import DatasetInfo, DataSource
from datasets.folder import COCO14_PARTS, FolderSource, Photographs
from datasets.voc12 import SHAPES_CLASSES, VOC12Source
from tools.errors import UserError
from tools.identity import check_classes

__all__ = ["DataSource", "DatasetInfo", "Photographs", "build_source"]

SOURCES: dict[str, Callable[..., DataSource]] = {
    "voc12": VOC12Source,
    "coco14": functools.partial(FolderSource, image_folders=COCO14_PARTS),
    "folder": FolderSource,
    "shapes": functools.partial(VOC12Source, classes=SHAPES_CLASSES),  # drawn in that layout
    "deepglobe": FolderSource,  # converted to that layout
}


def build_source(dataset: str, data_dir: str | Path, masks_dir: str | Path | None = None) -> DataSource:
    """Open a dataset.

    Args:
        dataset: a key of `SOURCES`.
        masks_dir: folder of ID.png masks to read instead of the dataset's own, such as pseudo masks.

    Raises:
        UserError: unknown dataset, or the folder does not hold it; or the masks in `masks_dir` are of other classes.
    """
    if dataset not in SOURCES:
        raise UserError(f"--dataset {dataset}: unknown. Choose one of: {', '.join(SOURCES)}.")
    data_dir = Path(data_dir)
    masks_dir = None if masks_dir is None else Path(masks_dir)
    if dataset in ("coco14", "deepglobe") and data_dir.is_dir() and not (data_dir / "classes.txt").exists():
        raise UserError(
            f"{data_dir}: not converted. Run python -m datasets.prepare --dataset {dataset} --data_dir {data_dir}."
        )
    source = SOURCES[dataset](data_dir, masks_dir)
    if masks_dir is not None:
        check_classes(masks_dir, source.info.classes[1:])
    return source
