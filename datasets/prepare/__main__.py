"""A public dataset from its official files: download, check, unpack and convert what is missing.

    python -m datasets.prepare --dataset voc12                             # data/voc12, from the internet
    python -m datasets.prepare --dataset coco14 --data_dir /data/coco14 --mirror http://10.0.0.2/coco
    python -m datasets.prepare --dataset deepglobe --download_dir ~/Downloads/deepglobe

Archives are kept in --download_dir and can be deleted afterwards. On a machine without internet, put them there under
their official names first. Given again, the command goes on where it stopped, and skips what is done.
"""

import argparse
from pathlib import Path

from datasets.folder import COCO14_PARTS, is_written
from datasets.prepare import coco14, deepglobe, sbd
from datasets.prepare.download import Archive, fetch, unpack
from datasets.voc12 import find_devkit
from tools import cli, options
from tools.errors import UserError
from tools.files import check_writable, locked

VOC12 = Archive(
    name="VOCtrainval_11-May-2012.tar",
    url="https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    size=1_999_639_040,
    strip="VOCdevkit/VOC2012/",
    yields="ImageSets/Segmentation/train.txt",
)
VOC12_TEST = Archive(
    name="VOC2012test.tar",
    url="",  # the official server asks for a login
    md5="9065beb292b6c291fad82b2725749fda",
    strip="VOCdevkit/VOC2012/",
    yields="ImageSets/Segmentation/test.txt",
)
SBD = Archive(
    name="benchmark.tgz",
    url="https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    size=1_419_539_633,
    strip="benchmark_RELEASE/dataset/",
    wanted=("cls/", "train.txt", "val.txt"),
    yields="train.txt",
)
COCO14 = (
    Archive(
        name="annotations_trainval2014.zip",
        url="http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        md5="0a379cfc70b0e71301e0f377548639bd",
        size=252_872_794,
        wanted=("annotations/instances_",),
        yields="annotations/instances_train2014.json",
    ),
    Archive(
        name="train2014.zip",
        url="http://images.cocodataset.org/zips/train2014.zip",
        md5="0da8c0bd3d6becc4dcb32757491aca88",
        size=13_510_573_713,
        yields="train2014",
    ),
    Archive(
        name="val2014.zip",
        url="http://images.cocodataset.org/zips/val2014.zip",
        md5="a3d79f5ed8d289b7a7554ce06a5782b3",
        size=6_645_013_297,
        yields="val2014",
    ),
)
"""Addresses and checksums of VOC and SBD are torchvision's; other checksums, and the sizes, are those that public
repositories state (none does for the test images' size)."""


def make_parser() -> cli.Parser:
    """The command line of this module."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--dataset", required=True, choices=list(PREPARE), help="which one")
    parser.add_argument("--data_dir", type=Path, help="where to (default: data/DATASET)")
    parser.add_argument("--download_dir", type=Path, help="folder of the archives (default: DATA_DIR/downloads)")
    parser.add_argument("--mirror", metavar="URL", help="address that serves files of the same names")
    options.add_shared(parser, "num_workers")
    return parser


def main(args: argparse.Namespace) -> None:
    """Make the dataset complete and say where it is.

    Raises:
        UserError: another process is at it; or see what is called here.
    """
    data_dir = options.data_dir(args)
    downloads = args.download_dir or data_dir / "downloads"
    if not data_dir.is_dir():  # one that is complete need not be writable
        check_writable(data_dir)
    with locked(data_dir, seconds=0) as mine:
        if not mine:
            raise UserError(f"{data_dir}: another process prepares it. Wait for it, then run this again.")
        PREPARE[args.dataset](data_dir, downloads, args.mirror, args.num_workers)
    print(f"{data_dir}: ready.")
    print(options.next_step(args, "-m", "datasets.verify"))


def prepare_voc12(data_dir: Path, downloads: Path, mirror: str | None, workers: int) -> None:
    """The devkit, the test images if there is an archive of them, SBD's list and masks."""
    devkit = find_devkit(data_dir)
    if devkit is None:
        refuse_own(data_dir)
        devkit = data_dir / "VOCdevkit" / "VOC2012"
    provide(VOC12, devkit, downloads, mirror)
    if VOC12_TEST.is_unpacked(devkit) or (downloads / VOC12_TEST.name).is_file():
        provide(VOC12_TEST, devkit, downloads, mirror)
    else:
        print(
            f"No test images: they need a free account at http://host.robots.ox.ac.uk:8080/. Put {VOC12_TEST.name} in "
            f"{downloads} and run this again, if you want them."
        )
    if sbd.list_path(devkit).is_file():
        print(f"{devkit}: has train_aug.txt")
    else:
        provide(SBD, data_dir / "sbd", downloads, mirror)
        sbd.convert(data_dir / "sbd", devkit, workers)


def prepare_coco14(data_dir: Path, downloads: Path, mirror: str | None, workers: int) -> None:
    """Photographs, then masks, labels and lists from the annotations."""
    annotations, *photographs = COCO14
    if not any((data_dir / place / part).is_dir() for place in ("", "images") for part in COCO14_PARTS):
        refuse_own(data_dir)
    for archive in photographs:
        inside = data_dir / "images" / archive.yields  # many projects keep them there
        if inside.is_dir() and not archive.is_unpacked(data_dir):
            raise UserError(f"{inside}: photographs are read from {data_dir / archive.yields}. Move the folder there.")
        provide(archive, data_dir, downloads, mirror)
    if is_written(data_dir, COCO14_PARTS):
        print(f"{data_dir}: is converted")
    else:
        provide(annotations, data_dir, downloads, mirror)
        coco14.convert(data_dir, workers)


def prepare_deepglobe(data_dir: Path, downloads: Path, mirror: str | None, workers: int) -> None:
    """Convert what lies in `downloads`, folders and zip files; nobody serves DeepGlobe without a login."""
    if is_written(data_dir, ("train", "val")):
        print(f"{data_dir}: is converted")
        return
    unpacked = data_dir / "raw"
    for path in sorted(downloads.glob("*.zip")):
        unpack(Archive(path.name, url="", md5="", yields="."), path, unpacked)
    deepglobe.convert([downloads, unpacked], data_dir, workers)


def refuse_own(data_dir: Path) -> None:
    """Before gigabytes are downloaded into somebody's own data set (UserError: it is one)."""
    found = [name for name in ("images", "labels.csv", "labels.json") if (data_dir / name).exists()]
    if found:
        raise UserError(
            f"{data_dir}: holds {found[0]}, so it is a data set of your own, which needs no preparation. Set "
            "DATASET=folder (of a script: --dataset folder), or choose another folder."
        )


def provide(archive: Archive, target: Path, downloads: Path, mirror: str | None) -> None:
    """Have `archive` unpacked in `target`."""
    if archive.is_unpacked(target):
        print(f"{target}: has the files of {archive.name}")
    else:
        unpack(archive, fetch(archive, downloads, mirror), target)


PREPARE = {"voc12": prepare_voc12, "coco14": prepare_coco14, "deepglobe": prepare_deepglobe}

if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
