"""PASCAL VOC 2012 as its devkit unpacks it, and any other data in that layout.

    ROOT/JPEGImages/ID.jpg  ROOT/Annotations/ID.xml  ROOT/SegmentationClass/ID.png
    ROOT/SegmentationClassAug/ID.png                         optional: masks of images that have none above (SBD's)
    ROOT/ImageSets/Segmentation/DOMAIN.txt

The image label is the set of object names in the annotation (difficult objects included, as is usual for this task).
`train_aug` and `SegmentationClassAug/` are made by `sbd.py`. A list from elsewhere does too; its lines may be ids or
the "image mask" paths that many repositories of this field ship.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree import ElementTree

from datasets.base import DatasetInfo, DataSource
from datasets.listing import index_files, index_images, index_splits
from tools.errors import UserError
from tools.files import reading

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SHAPES_CLASSES = ("background", "bird", "boat", "car", "fish", "house", "sheep")
"""Of the set that `datasets.prepare.shapes` draws in this layout."""

AUGMENTED_MASKS = "SegmentationClassAug"


class VOC12Source(DataSource):
    """A dataset in the layout of the VOC devkit.

    Args:
        data_dir: the folder that holds `JPEGImages/`, or one that holds it as `VOC2012/` or `VOCdevkit/VOC2012/`.
        masks_dir: folder of ID.png masks read instead of `SegmentationClass/`, such as pseudo masks.
        classes: class names, background first.

    Raises:
        UserError: a folder or every list of ids is missing.
    """

    def __init__(self, data_dir: Path, masks_dir: Path | None = None, classes: Sequence[str] = VOC_CLASSES) -> None:
        root = find_devkit(data_dir)
        if root is None:
            places = "in it, in VOC2012/ or in VOCdevkit/VOC2012/"
            remedy = "Set --data_dir to the folder that holds it; for photographs of your own, --dataset folder."
            raise UserError(f"{data_dir}: no JPEGImages/ {places}. {remedy}")
        splits = index_splits(root / "ImageSets" / "Segmentation")
        if not splits:
            raise UserError(f"{root / 'ImageSets' / 'Segmentation'}: no lists of ids (train.txt, val.txt, ...) there.")
        own_masks = [root / "SegmentationClass", root / AUGMENTED_MASKS] if masks_dir is None else [masks_dir]
        super().__init__(
            root,
            info=DatasetInfo(tuple(classes)),
            images=index_images([root / "JPEGImages"]),
            splits=splits,
            masks_dirs=[folder for folder in own_masks if folder.is_dir() or folder == masks_dir],
        )
        annotations = root / "Annotations"
        self._annotations = index_files([annotations] if annotations.is_dir() else [], (".xml",)).files

    def labelled_ids(self) -> Collection[str]:
        return self._annotations.keys()

    def _id_of_line(self, line: str) -> str:
        first = line.split()[0]
        return Path(first).stem if "/" in first else first

    def _class_indices(self, image_id: str) -> list[int]:
        path = self._annotations.get(image_id, self.root / "Annotations" / f"{image_id}.xml")
        with reading(path, "annotation", "It holds the labels of the image: unpack the dataset again."):
            # An object's parts, such as heads and hands, are inside it and are not objects.
            objects = ElementTree.fromstring(path.read_bytes()).iterfind("object")
        names = {item.findtext("name", default="").strip() for item in objects}
        return [self.info.index(name, path) for name in sorted(names)]


def find_devkit(data_dir: Path) -> Path | None:
    """The folder in or below `data_dir` that holds `JPEGImages/`."""
    places = (data_dir, data_dir / "VOC2012", data_dir / "VOCdevkit" / "VOC2012")
    return next((root for root in places if (root / "JPEGImages").is_dir()), None)
