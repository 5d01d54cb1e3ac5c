"""Report on a whole run: a page, `report.html`; a table of mIoU per stage, `summary.json`; a picture sheet,
`gallery.png`; and a list of masks, the most doubtful first, `review.csv`.

    python report.py --dataset shapes --domain train val --output_dir experiments/demo \\
        --summary prior_cam=prior.json csrm_cam=csrm.json segmentation_val=val.json \\
        --columns "CAM prior=experiments/predictions/prior@train/cams:0.25" \\
                  "Refined=experiments/predictions/csrm@train/sam-regions-max_iou_imp2" \\
                  "DeepLabV3+=experiments/predictions/seg@train/masks" \\
                  "DeepLabV3+=experiments/predictions/seg@val/masks" \\
        --review Refined --tags prior csrm seg

--summary takes the files `evaluate.py --output` wrote; the table has one row for each, in that order. Scores of
predictions that are gone, or have changed since, are left out; so are columns of other classes or photographs, and
scores and columns of what was made from a checkpoint or folder that has been made anew since.

The sheet has one block per domain, one row per image: the photograph, its ground truth (unless no image has any), then
the columns. A column is a folder of masks (ID.png) or of CAM files (ID.npz; shown as argmax[THRESHOLD; CAMs]). A title
given twice is one column that looks for an image in both folders. Images that every column has are preferred; where a
column has no prediction for an image its cell stays grey.

The page has the same images and more, CAM files as heat maps, the curves of the trainings --tags, and the commands of
the runners (`commands.tsv` in --output_dir). It is one file that opens in any browser, without a network. The order of
its images, and `review.csv`, are about the masks of the column --review: in the list the most doubtful ones first
(docs/review.md), on the page those of the lowest IoU, if there is ground truth. A page of fewer images than there are
shows the first ones, and as many from all over the rest.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools import cli, options, parallel
from tools.errors import UserError


def make_parser() -> cli.Parser:
    """The command line of this module."""
    parser = cli.Parser(__doc__)
    group = options.add_dataset(parser)
    group.add_argument("--domain", nargs="+", default=["train"], help="splits the pictures are from, a block for each")
    group.add_argument("--num_images", type=cli.positive_int, default=6, help="pictures per split")
    group = parser.add_argument_group("report")
    add, cut = group.add_argument, f"CAMs without a threshold are cut at {options.PSEUDO_MASK_THRESHOLD}"
    add("--output_dir", type=Path, required=True, help="folder of report.html and the other files")
    lists = {"nargs": "*", "action": "extend", "default": []}
    add("--summary", **lists, metavar="STAGE=FILE", help="scores written by evaluate.py")
    add("--columns", **lists, metavar="TITLE=DIR[:THRESHOLD]", help=f"masks or CAM files to show; {cut}")
    add("--review", metavar="TITLE", help="column whose masks are to be looked over (default: the last)")
    add("--page_images", type=cli.positive_int, default=200, help="pictures per split on the page")
    add("--tags", **lists, metavar="TAG", help="trainings whose curves the page shows")
    options.add_shared(group, "num_workers")
    return parser


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from datasets import build_source
from datasets.base import DatasetInfo, DataSource, read_mask
from tools import identity
from tools.cam_files import cam_labels, load_cams, read_cams
from tools.drawing import overlay, with_legend
from tools.files import check_size, check_writable, file_of, save_json, save_png, save_text, upright_size
from tools.history import read_commands, read_run
from tools.metrics import load_scores
from tools.page import Card, Layer, Page, heat_uri, mask_uri, photograph_uri, render, shares_text
from tools.review import Row, doubt, image_iou, queue, save_queue

CELL, DPI = 224, 100  # pixels: width of a picture, and the greatest height of one; pixels per inch
EMPTY = 226  # grey of a cell without a prediction


def main(args: argparse.Namespace) -> None:
    """Print the table; write summary.json if there are stages and gallery.png if there are columns."""
    check_writable(args.output_dir)
    stages = read_stages(args.summary)
    columns = parse_columns(args.columns)
    reviewed = reviewed_column(columns, args.review)
    page = Page(
        title=args.output_dir.resolve().name,
        made=f"{args.dataset} in {options.data_dir(args)}, {time.strftime('%Y-%m-%d %H:%M')}",
        stages=stages,
        runs=[read_run(tag) for tag in args.tags],
        commands=read_commands(args.output_dir / "commands.tsv"),
    )
    if args.summary:
        print(stage_table(stages))
        save_json(args.output_dir / "summary.json", {name: round(s["miou"], 2) for name, s in stages.items()})
        print(f"\nSummary: {args.output_dir / 'summary.json'}")
    if columns:
        source = build_source(args.dataset, options.data_dir(args))
        columns = fitting(columns, source, args.domain)
    if columns:
        reviewed = next((column for column in columns if column.title == reviewed.title), columns[-1])
        for column in columns:
            if not any(column.file(image_id) for domain in args.domain for image_id in source.ids(domain)):
                print(f"Warning: column '{column.title}': no image's ID.png or ID.npz is in {column.folders[0][0]}.")
        shown = {domain: complete(source.ids(domain), columns) for domain in args.domain}
        blocks = {domain: pick_images(source, ids, args.num_images) for domain, ids in shown.items()}
        save_png(args.output_dir / "gallery.png", gallery(source, blocks, columns))
        print(f"Picture sheet: {args.output_dir / 'gallery.png'}")
        page = add_images(page, source, args, columns, reviewed)
    save_text(args.output_dir / "report.html", render(page))
    print(f"Page: {args.output_dir / 'report.html'}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"'{text}': not of the form NAME=PATH. Quote names that have spaces.")
    return name, value


def read_stages(texts: Sequence[str]) -> dict[str, dict]:
    """Read `STAGE=FILE`; prints which scores are left out, and why (UserError: a file that does not hold scores)."""
    stages = {}
    for name, file in map(_pair, texts):
        score = load_scores(Path(file))
        if fault := predictions_fault(score):
            fault = f"its predictions, {score['pred_dir']}, {fault}"
            print(f"{file}: {fault}. Left out; run its stage and evaluate.py again.")
        else:
            stages[name] = score
    warn_unlike(stages)
    return stages


def warn_unlike(stages: Mapping[str, dict]) -> None:
    """Name the scores that cannot be compared with the last ones of their split: of other photographs or masks."""
    last: dict[tuple, tuple[str, dict]] = {}
    for name, score in reversed(stages.items()):
        if "identity" not in score:  # of a version that did not note it
            continue
        inputs = score["identity"]["inputs"]
        other, of_other = last.setdefault((score["dataset"], score["domain"]), (name, inputs))
        if inputs != of_other:
            split = f"of '{score['domain']}', but of other photographs or true masks than {other}"
            print(f"Warning: {name}: {split}, so not to be compared. Run evaluate.py again.")


def predictions_fault(score: Mapping) -> str:
    """Why the predictions are not those that were scored; "" if they are, or if the scores do not say which."""
    if "pred_dir" not in score:
        return ""
    folder = Path(score["pred_dir"])
    if not folder.is_dir():
        return "no longer exist"
    record = identity.read_record(folder / identity.RECORD)
    now = {**identity.digest(record), "lineage": None}
    return "have changed since" if {**score.get("made_by", now), "lineage": None} != now else identity.outdated(record)


def stage_table(stages: dict[str, dict]) -> str:
    """A Markdown table of `evaluate.py --output` files: split, mIoU, foreground mIoU (%), threshold of each stage."""
    rows = [("stage", "split", "images", "mIoU", "foreground", "threshold")]
    for name, score in stages.items():
        threshold = "-" if score["threshold"] is None else f"{score['threshold']:.3g}"
        means = f"{score['miou']:.2f}", f"{score['miou_foreground']:.2f}"
        rows.append((name, score.get("domain", "-"), str(score.get("images", "-")), *means, threshold))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<>>>>"  # words to the left, numbers to the right
    rule = [":" + "-" * (w - 1) if side == "<" else "-" * (w - 1) + ":" for side, w in zip(sides, widths, strict=True)]
    cells = [[f"{v:{side}{w}}" for v, side, w in zip(row, sides, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]])


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the sheet: a title, and the folders (with the threshold of their CAMs) it takes masks from."""

    title: str
    folders: tuple[tuple[Path, float], ...]

    def file(self, image_id: str) -> tuple[Path, float] | None:
        """The file that holds this image's mask or CAMs, and the folder's threshold; None if no folder has it."""
        for folder, threshold in self.folders:
            for path in (file_of(folder, image_id, suffix) for suffix in (".png", ".npz")):
                if path.is_file():
                    return path, threshold
        return None

    def mask(self, image_id: str, size: tuple[int, int], info: DatasetInfo) -> np.ndarray | None:
        """The column's mask of this image, uint8 [H, W]; None if there is none.

        Raises:
            UserError: it is of another `size` than the image, or holds indices that are no classes.
        """
        found = self.file(image_id)
        if found is None:
            return None
        path, threshold = found
        if path.suffix == ".png":
            mask = read_mask(path, info)
            check_size(path, mask.shape, size)
            return mask
        keys, hr_cam = read_cams(path, size, info.num_classes)
        return keys[cam_labels(hr_cam, threshold)].astype(np.uint8)


def parse_columns(texts: Sequence[str]) -> list[Column]:
    """Read `TITLE=DIR[:THRESHOLD]`, joining equal titles (UserError: another form, or a folder that does not exist)."""
    folders: dict[str, list[tuple[Path, float]]] = {}
    for title, place in map(_pair, texts):
        name, threshold = re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", place).groups()
        if not Path(name).is_dir():
            raise UserError(f"{name}: no such folder (column '{title}').")
        threshold = float(threshold or options.PSEUDO_MASK_THRESHOLD)
        if threshold > 1:
            raise UserError(f"--columns {title}={place}: the threshold must be between 0 and 1.")
        folders.setdefault(title, []).append((Path(name), threshold))
    return [Column(title, tuple(places)) for title, places in folders.items()]


def fitting(columns: Sequence[Column], source: DataSource, domains: Sequence[str]) -> list[Column]:
    """The columns without the folders that are outdated, or of other classes or photographs; a line names each."""
    fit: dict[str, list[tuple[Path, float]]] = {}
    ids = [image_id for domain in domains for image_id in source.ids(domain)]
    inputs = source.fingerprints(ids)
    for column in columns:
        for folder, threshold in column.folders:
            if fault := identity.outdated(identity.known_record(folder)):
                print(f"Column '{column.title}' is left out. The files of {folder} {fault}.")
                continue
            try:
                identity.check_classes(folder, source.info.classes[1:], inputs)
                fit.setdefault(column.title, []).append((folder, threshold))
            except UserError as error:
                print(f"Column '{column.title}' is left out. {error}")
    return [Column(title, tuple(places)) for title, places in fit.items()]


def complete(ids: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """The ids that every column has a prediction for; all of them if there is none."""
    return [image_id for image_id in ids if all(column.file(image_id) for column in columns)] or list(ids)


def pick_images(source: DataSource, ids: Sequence[str], number: int) -> list[str]:
    """Choose up to `number` ids that show as many classes as possible; the same ones every time.

    One after the other, the image whose classes were shown least so far; the earliest id among equals.
    """
    labels = np.stack([known_label(source, image_id) for image_id in ids])
    shown = np.zeros(labels.shape[1])
    chosen: list[int] = []
    for _ in range(min(number, len(ids))):
        gain = labels @ (0.2**shown)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        shown += labels[chosen[-1]]
    return [ids[i] for i in chosen]


def known_label(source: DataSource, image_id: str) -> np.ndarray:
    """The image label, float32 [K]; zeros if there is none, as of images of a test split."""
    return (
        source.image_label(image_id) if source.has_label(image_id) else np.zeros(source.info.num_foreground, np.float32)
    )


def gallery(source: DataSource, blocks: dict[str, Sequence[str]], columns: Sequence[Column]) -> Image.Image:
    """Draw the picture sheet, RGB: a block per heading, a row per id, and the legend of the classes that occur.

    Args:
        blocks: heading -> ids of its rows.
    """
    ids = [image_id for block in blocks.values() for image_id in block]
    images, masks = [source.image(i) for i in ids], [row_masks(source, columns, i) for i in ids]
    first = int(all(row[0] is None for row in masks))  # 1: nobody drew masks, so no column for them
    titles = ["Image", *["Ground truth", *(column.title for column in columns)][first:]]
    heights = [min(1.0, image.shape[0] / image.shape[1]) for image in images]  # of a cell that is one wide
    figure = Figure((len(titles) * CELL / DPI, (sum(heights) * CELL + 30) / DPI), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    cells = figure.subplots(len(ids), len(titles), squeeze=False, height_ratios=heights)
    for row, image, shown in zip(cells, images, masks, strict=True):
        pictures = [mask if mask is None else overlay(image, mask, source.info.palette) for mask in shown[first:]]
        for cell, picture in zip(row, [image, *pictures], strict=True):
            cell.set(xticks=[], yticks=[], frame_on=False)
            cell.imshow(np.full_like(image, EMPTY) if picture is None else picture)
    for cell, title in zip(cells[0], titles, strict=True):
        cell.set_title(title, fontsize=11, parse_math=False)
    starts = itertools.accumulate(map(len, blocks.values()), initial=0)
    for heading, start in zip(blocks, starts, strict=False) if len(blocks) > 1 else ():
        cells[start, 0].set_ylabel(heading, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    seen = {int(value) for row in masks for mask in row if mask is not None for value in np.unique(mask)}
    return with_legend(drawn, source.info, sorted(seen))


def row_masks(source: DataSource, columns: Sequence[Column], image_id: str) -> list[np.ndarray | None]:
    """Ground truth and the columns' masks of one image, uint8 [H, W] each; None where there is none."""
    truth = source.mask(image_id) if source.has_mask(image_id) else None
    size = upright_size(source.image_path(image_id))
    return [truth, *(column.mask(image_id, size, source.info) for column in columns)]


# -- the page and the review queue ------------------------------------------------------------------------------------
def reviewed_column(columns: Sequence[Column], title: str | None) -> Column | None:
    """The column called `title`, or the last one; None if there are no columns (UserError: no column is called so)."""
    if title is None or not columns:
        return columns[-1] if columns else None
    named = [column for column in columns if column.title == title]
    if not named:
        titles = ", ".join(column.title for column in columns)
        raise UserError(f"--review {title}: no such column. Choose one of: {titles}.")
    return named[0]


def add_images(
    page: Page, source: DataSource, args: argparse.Namespace, columns: Sequence[Column], reviewed: Column
) -> Page:
    """Write `review.csv` of the images that have a mask to review, and put them, or some of them, on the page."""
    domain_of = {i: domain for domain in args.domain for i in source.ids(domain) if reviewed.file(i)}
    jobs = functools.partial(review_row, source, columns, reviewed)
    rows = queue(list(parallel.run_jobs(jobs, list(domain_of), args.num_workers, "reviewing", "image")))
    save_queue(args.output_dir / "review.csv", rows, [column.title for column in columns])
    print(f"Review queue of '{reviewed.title}': {args.output_dir / 'review.csv'}")
    scored = any(row.ious for row in rows)
    if scored:
        rows.sort(key=lambda row: row.ious.get(reviewed.title, math.inf))
    preferred = {i for domain in args.domain for i in complete(source.ids(domain), columns)}
    shown = thin_out([row for row in rows if row.image_id in preferred], args.page_images)
    make = functools.partial(card, source, columns, domain_of)
    return dataclasses.replace(
        page,
        cards=list(parallel.run_jobs(make, shown, args.num_workers, "page", "image")),
        classes=source.info.classes,
        palette=source.info.palette,
        order=f"{'lowest IoU' if scored else 'most doubtful'} of '{reviewed.title}' first",
        total=len(rows),
        reviewed=reviewed.title,
    )


def review_row(source: DataSource, columns: Sequence[Column], reviewed: Column, image_id: str) -> Row:
    """The doubt about an image, and the IoU of its masks if it has ground truth."""
    truth, *masks = row_masks(source, columns, image_id)
    found = {column.title: mask for column, mask in zip(columns, masks, strict=True) if mask is not None}
    others = [mask for title, mask in found.items() if title != reviewed.title]
    ious = {} if truth is None else {title: image_iou(truth, mask) for title, mask in found.items()}
    return Row(image_id, doubt(found[reviewed.title], others, known_label(source, image_id)), ious)


def thin_out(rows: Sequence[Row], number: int) -> list[Row]:
    """At most `number` rows in their order: half of them the first ones, half spread evenly over the others."""
    if len(rows) <= number:
        return list(rows)
    first = -(-number // 2)
    places = np.linspace(first, len(rows) - 1, number - first).round().astype(int)
    return [*rows[:first], *(rows[i] for i in places)]


def card(source: DataSource, columns: Sequence[Column], domain_of: Mapping[str, str], row: Row) -> Card:
    """The pictures of one image for the page."""
    info = source.info
    truth, *masks = row_masks(source, columns, row.image_id)
    photograph, size = photograph_uri(source.image(row.image_id))
    layers: dict[str, Layer] = {}
    if truth is not None:
        layers["Ground truth"] = Layer(mask_uri(truth, size, info.palette), shares_text(truth, info.classes))
    for column, mask in zip(columns, masks, strict=True):
        if mask is not None:
            path, _ = column.file(row.image_id)
            uri = heat_uri(load_cams(path)[2]) if path.suffix == ".npz" else mask_uri(mask, size, info.palette)
            layers[column.title] = Layer(uri, shares_text(mask, info.classes), row.ious.get(column.title))
    label = known_label(source, row.image_id)
    values = {int(value) for mask in (truth, *masks) if mask is not None for value in np.unique(mask)}
    return Card(
        image_id=row.image_id,
        domain=domain_of[row.image_id],
        labels=tuple(info.classes[i + 1] for i in np.flatnonzero(label)),
        size=size,
        photograph=photograph,
        layers=layers,
        shown=frozenset(values - {0, options.IGNORE_INDEX}),
        doubt=row.doubt.score,
    )


if __name__ == "__main__":
    cli.run(main, ARGS)
