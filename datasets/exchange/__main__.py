"""Masks to an annotation tool, and corrected ones back.

    python -m datasets.exchange export --format cvat --dataset folder --data_dir birds \\
        --masks_dir experiments/predictions/folder-deeplab-round1@train/pseudos-masks-c10 \\
        --review experiments/reports/folder/review.csv --first 20 --output_dir worst
    python -m datasets.exchange import --format cvat --dataset folder --data_dir birds \\
        --masks_dir experiments/predictions/folder-deeplab-round1@train/pseudos-masks-c10 \\
        --input corrected.zip --output_dir corrected

`export` writes the photographs, upright, to OUTPUT_DIR/images, and beside them

    cvat          masks.zip ("Segmentation mask 1.1"), labels.json (the labels of the task)
    coco          instances.json (one object per class, RLE)
    labelstudio   tasks.json (pre-annotations), config.xml (the labels); needs `pip install label-studio-sdk`

`import` reads what the tool exports in the same format, and writes ID.png of every mask that is not as it was.
docs/review.md goes through it step by step.
"""

import argparse
import shlex
import shutil
from collections.abc import Container, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import build_source
from datasets.base import DataSource
from datasets.exchange import coco, cvat, label_studio
from datasets.exchange.labels import Item, Labels
from datasets.listing import IMAGE_SUFFIXES, clean_id, index_files
from tools import cli, options
from tools.errors import UserError, require
from tools.files import atomic_write, check_size, check_writable, load_mask, save_mask, save_png
from tools.identity import RECORD
from tools.review import load_queue

FORMATS = {"cvat": cvat, "coco": coco, "labelstudio": label_studio}
SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp")


def make_parser() -> cli.Parser:
    """The command line of this module."""
    parser = cli.Parser(__doc__)
    parser.add_argument("direction", choices=["export", "import"], help="to the tool, or back from it")
    group = options.add_dataset(parser, domain=("train", "split to export"))
    group.add_argument("--masks_dir", type=Path, required=True, help="folder of the masks, ID.png")
    group = parser.add_argument_group("exchange")
    group.add_argument("--format", required=True, choices=list(FORMATS), help="of which tool")
    group.add_argument("--review", type=Path, metavar="FILE", help="export in the order of this review.csv (report.py)")
    group.add_argument("--first", type=cli.positive_int, metavar="N", help="export only the first N")
    group.add_argument("--input", type=Path, metavar="FILE", help="import: what the tool exported, a zip or a json")
    group.add_argument("--output_dir", type=Path, required=True, help="where to; import: folder of the corrected masks")
    return parser


def main(args: argparse.Namespace) -> None:
    """Export or import."""
    source = build_source(args.dataset, options.data_dir(args), args.masks_dir)
    check_writable(args.output_dir)
    if args.format == "labelstudio":
        require(*label_studio.CODEC)  # before any photograph is copied
    if args.direction == "export":
        export_masks(source, chosen_ids(source, args), args.format, args.output_dir)
    elif args.input is None:
        raise UserError("--input: the file to import. Pass what the tool exported.")
    else:
        import_masks(source, args.input, args.format, args.output_dir)


def chosen_ids(source: DataSource, args: argparse.Namespace) -> list[str]:
    """The ids to export (UserError: the queue names an image twice, or one that is not in the dataset)."""
    if not args.review:
        return source.ids(args.domain)[: args.first]
    ids = load_queue(args.review)
    source.check_ids(args.review, ids)
    return ids[: args.first]


def export_masks(source: DataSource, ids: list[str], tool: str, folder: Path) -> None:
    """Write photographs and masks for a tool.

    Raises:
        UserError: `folder` has photographs of another export, whose masks the tool would lack, and give back as empty;
            or a mask is missing or does not fit.
    """
    labels = Labels(source.info)
    images = folder / "images"
    there = index_files([images] if images.is_dir() else [], IMAGE_SUFFIXES).files
    if others := sorted(there.keys() - set(ids)):
        raise UserError(f"{there[others[0]]}: of another export. Choose another --output_dir.")
    masks = {image_id: source.mask(image_id) for image_id in ids}
    items = [Item(image_id, save_photograph(source, image_id, images), masks[image_id]) for image_id in ids]
    written = FORMATS[tool].write(folder, items, labels)
    print(f"{len(items)} photographs: {images}")
    print(f"Their masks: {', '.join(map(str, written))}")
    print("Next: correct them in the tool (docs/review.md), and import what it exports")


def save_photograph(source: DataSource, image_id: str, folder: Path) -> str:
    """Copy a photograph, upright and in a format browsers show; returns its file name below `folder`."""
    path = source.image_path(image_id)
    if path.suffix.lower() in SHOWN_BY_BROWSERS and source.orientation(image_id) == 1:
        name = image_id + path.suffix.lower()
        with atomic_write(folder / name) as temporary:
            shutil.copyfile(path, temporary)
        return name
    save_png(folder / f"{image_id}.png", Image.fromarray(source.image(image_id)))
    return f"{image_id}.png"


def import_masks(source: DataSource, path: Path, tool: str, folder: Path) -> None:
    """Write the masks that differ from those in `folder`, or else from the exported ones.

    Raises:
        UserError: a mask of another size, or of an image that is not in the dataset, has another mask, or may be meant
            for another (`check_folders`); or there is none; or `folder` is a stage's. Nothing is written then.
    """
    if (folder / RECORD).exists():  # its masks would pass for those of the stage
        raise UserError(f"{folder}: holds what a stage made. Choose another --output_dir for corrected masks.")
    seen, changed = set(), {}
    for name, mask in FORMATS[tool].read(path, Labels(source.info)):
        image_id = find_id(source, name, path)
        if image_id in seen:
            raise UserError(f"{path}: '{image_id}' occurs twice. Import one export at a time.")
        seen.add(image_id)
        before = folder / f"{image_id}.png"
        old = load_mask(before) if before.is_file() else source.mask(image_id)
        mask = np.zeros_like(old) if mask is None else mask
        check_size(path / name, mask.shape, old.shape)
        if not np.array_equal(mask, old):
            changed[image_id] = mask
    if not seen:
        raise UserError(f"{path}: no finished mask in it. Finish one in the tool, and export again.")
    check_folders(source, changed, seen, path)
    for image_id, mask in changed.items():
        save_mask(folder / f"{image_id}.png", mask, source.info.palette)
    emptied = sum(not mask.any() for mask in changed.values())
    told = f", {emptied} of them show nothing now" if emptied else ""
    print(f"{path}: {len(changed)} of {len(seen)} masks differ{told}; written to {folder}")
    if changed:
        print(f"Next: CORRECTED={shlex.quote(str(folder))} ./runners/4-segmentation.sh   # with DATASET and DATA_DIR")


def find_id(source: DataSource, name: str, path: Path) -> str:
    """The id of a picture that a tool calls `name`; it may have put folders before it (UserError: there is none)."""
    parts = clean_id(name).split("/")
    for start in range(len(parts)):
        image_id = "/".join(parts[start:])
        if image_id in source.images.files:
            return image_id
    raise UserError(f"{path}: no image '{name}' in {source.root}. Check --data_dir.")


def check_folders(source: DataSource, changed: Iterable[str], seen: Container[str], path: Path) -> None:
    """Make sure that the tool did not drop the folder of a name (UserError: a photograph there is called the same).

    If that photograph was `seen` too, the tool keeps folders.
    """
    for image_id in changed:
        for other in source.images.files:
            if other.endswith(f"/{image_id}") and other not in seen:
                remedy = "Export both, or rename one of them."
                raise UserError(f"{path}: '{image_id}' may be '{other}' without its folder. {remedy}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
