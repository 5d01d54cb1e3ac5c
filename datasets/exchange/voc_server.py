"""The archive that PASCAL VOC's evaluation server takes, of the segmentation of VOC 2012's test photographs.

    masks = Path("experiments/predictions/deeplab@test/masks")
    write_package(Path("voc12-test.tar.gz"), "comp6_test_cls", masks, source, ids)

    results/VOC2012/Segmentation/comp6_test_cls/ID.png      palette PNG of indices 0 to 20, of the photograph's size

The development kit (section 5) has two competitions: comp5 for what was trained on VOC's own training data only, comp6
for any other data too. ImageNet weights and SBD are other data. The server wants a compressed archive, and no 255.
"""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.base import DataSource, read_mask
from datasets.voc12 import VOC_CLASSES
from tools import parallel
from tools.errors import UserError
from tools.files import atomic_write, check_size, mask_image, upright_size
from tools.options import IGNORE_INDEX

TEST_IMAGES = 1456
"""In ImageSets/Segmentation/test.txt."""


def write_package(path: Path, competition: str, pred_dir: Path, source: DataSource, ids: Sequence[str]) -> None:
    """Write the archive (.tar.gz). Equal masks give equal bytes.

    Args:
        competition: comp5_test_cls or comp6_test_cls.
        pred_dir: folder with ID.png of all `ids`, and of no other images.
        ids: the test list. If it has another length than the server's, there is a warning.

    Raises:
        UserError: another data set's classes, surplus masks, or a mask that is missing, unreadable, of another size
            than its photograph, or undecided (255) somewhere.
    """
    if source.info.classes != VOC_CLASSES:
        raise UserError("--package: the server scores VOC's 20 classes. Pass --dataset voc12.")
    surplus = sorted({mask.stem for mask in pred_dir.glob("*.png")} - set(ids))
    if surplus:
        raise UserError(
            f"{pred_dir / surplus[0]}.png: not on the list ({len(surplus)} such masks). Pass the folder of this split."
        )
    if len(ids) != TEST_IMAGES:
        print(f"Warning: {len(ids)} images, but the server scores the {TEST_IMAGES:,} of VOC 2012's test list.")
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for image_id in parallel.progress(ids, desc="packing", unit="image"):
            content = io.BytesIO()
            mask_image(_mask(pred_dir, source, image_id), source.info.palette).save(content, format="PNG")
            entry = tarfile.TarInfo(f"results/VOC2012/Segmentation/{competition}/{image_id}.png")
            entry.size = content.tell()
            content.seek(0)
            archive.addfile(entry, content)


def _mask(pred_dir: Path, source: DataSource, image_id: str) -> np.ndarray:
    path = pred_dir / f"{image_id}.png"
    mask = read_mask(path, source.info)
    check_size(path, mask.shape, upright_size(source.image_path(image_id)))
    if (mask == IGNORE_INDEX).any():
        raise UserError(f"{path}: holds 255 (undecided), which the server does not take. Predict it again.")
    return mask
