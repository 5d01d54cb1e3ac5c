"""Is a dataset complete, readable and free of contradictions? Reads every photograph and every mask.

    python -m datasets.verify --dataset voc12 --data_dir data/voc12
    python -m datasets.verify train val --dataset folder --data_dir data/birds
    python -m datasets.verify train val --scored val ...     images of val without a mask are errors, too

Prints a row per split, then what is wrong with which image. All of it goes to OUTPUT_DIR/verify.json; a chart of how
often each class occurs to OUTPUT_DIR/classes.png. Columns of the table:

    images      ids in the list                    known       how many the published list has
    missing     ids without a photograph           unreadable  photographs that cannot be decoded to their end
    labels      images with an image label         masks       images with a mask
    bad         unreadable labels; masks that are unreadable, of another size than the image, or with a value that is no
                class
    unlabelled  masks that show a class which the image label lacks, or no class although the label names some
    copies      photographs with the same bytes as the photograph of another id, in any split

Exit code 2 if there is an error: a photograph, label or mask is missing, unreadable or bad; a list is empty, repeats an
id, or is not as long as the published one; a photograph is called like a mask; no file of masks belongs to a
photograph; a third of the masks contradict their labels, or a third of the photographs are nearly black. The last two
columns are warnings. Warnings, too: label rows without a photograph, photographs in no list, files that are not read,
splits with masks of some images, masks that EXIF may turn, classes that no training label names, or that all name, and
lists that share ids (not train and trainval, whose names say so).
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets import build_source
from datasets.base import DatasetInfo, DataSource
from datasets.listing import first_repeated
from datasets.verify_files import leftovers
from datasets.verify_masks import MaskLook, is_systematic, look_at_mask, shared_faults
from tools import cli, options
from tools.errors import UserError
from tools.files import atomic_write, check_writable, save_json
from tools.identity import file_fingerprint
from tools.parallel import run_jobs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Published:
    """What a split of a public dataset must have."""

    images: int
    labels: bool = True
    masks: bool = True


PUBLISHED = {
    "voc12": {
        "train_aug": Published(10_582, masks=False),  # SBD's masks are an extra
        "train": Published(1_464),
        "val": Published(1_449),
        "test": Published(1_456, labels=False, masks=False),
    },
    "coco14": {"train2014": Published(82_783), "val2014": Published(40_504)},
}

ERRORS = {
    "list": "lists",
    "disguised": "masks among the photographs",
    "missing": "photographs that are missing",
    "unreadable": "photographs that cannot be read",
    "label": "labels that are missing or cannot be read",
    "mask": "masks that are missing, cannot be read, or do not fit",
}
WARNINGS = {
    "unlabelled": "masks against labels",
    "turned": "masks that may lie on their head",
    "copies": "the same photograph under several ids",
    "dark": "photographs that are nearly black",
    "partial": "splits with masks of some images",
    "overlap": "lists that share photographs",
    "rows": "labels that belong to no photograph",
    "unread": "files among the photographs that are not read",
    "unlisted": "photographs in no list",
    "stray": "files among the masks that are no photograph's mask",
    "unused": "classes",
}
DARKEST = 16  # of 255: what 12 bits in 16, or nothing at all, look like
Found = Iterable[tuple[str, str]]  # kind (a key of ERRORS or WARNINGS) and text of what is wrong
SHOWN, WIDEST = 5, 400  # findings printed of each kind, characters of each


@dataclass
class Split:
    """What was found in one list of ids."""

    images: int  # ids in the list
    classes: int  # C
    counts: Counter = field(default_factory=Counter)  # images with "labels", with "masks", with each kind of finding
    # ids of photographs without "labels", without "masks"
    without: dict[str, list[str]] = field(default_factory=lambda: {"labels": [], "masks": []})

    def __post_init__(self) -> None:
        # int64 [C], images by class in their label (index 0: 0); mask pixels by class, without the ignored ones
        self.label_counts, self.pixel_counts = np.zeros((2, self.classes), np.int64)

    def add(self, image_id: str, look: Look) -> None:
        """Count one of its images."""
        self.counts.update(kind for kind, _ in look.findings)
        self.counts.update({what: int(there) for what, there in look.has.items()})
        for what, there in look.has.items():
            if look.found and not there:
                self.without[what].append(image_id)
        if look.label is not None:
            self.label_counts[1:] += look.label.astype(np.int64)
        if look.mask is not None:
            self.pixel_counts += look.mask.pixels

    def incomplete(self, domain: str, what: str, use: str) -> str:
        """The sentence on a split in which some images have no labels (or masks)."""
        without, found = self.without[what], self.images - self.counts["missing"]
        have = f"{found - len(without)} of {found} images have {what}"
        return f"split '{domain}': {have}, so it cannot be {use}; the first without is '{without[0]}'"

    def partly(self) -> dict[str, list[str]]:
        """The ids without labels (masks), if others have them: usually a mistake."""
        return {what: ids for what, ids in self.without.items() if ids and self.counts[what]}


@dataclass
class Look:
    """What `look_at` found out about one image."""

    found: bool  # there is a photograph
    findings: list[tuple[str, str]] = field(default_factory=list)  # kind and text of what is wrong
    digest: str = ""  # hash of the photograph's file; empty if it is unreadable
    label: np.ndarray | None = None  # image label, f32 [K]; None if absent or bad
    mask: MaskLook | None = None  # None if absent or bad
    # whether there are labels, masks, good or bad
    has: dict[str, bool] = field(default_factory=lambda: {"labels": False, "masks": False})


def make_parser() -> cli.Parser:
    """The command line of this module."""
    parser = cli.Parser(__doc__)
    parser.add_argument("domains", nargs="*", help="splits that must be there; all that are there are looked at")
    group = options.add_dataset(parser)
    group.add_argument(
        "--scored", nargs="*", action="extend", default=[], metavar="DOMAIN", help="splits that must have all masks"
    )
    group.add_argument("--output_dir", type=Path, help="folder of the report (default: experiments/data/DATASET)")
    options.add_shared(group, "num_workers")
    return parser


def main(args: argparse.Namespace) -> None:
    """Look at everything, print the table and the findings, write the report."""
    output_dir = check_writable(args.output_dir or options.EXPERIMENTS / "data" / args.dataset)
    source = build_source(args.dataset, options.data_dir(args))
    for domain in [*args.domains, *args.scored]:
        source.listed_ids(domain)
    splits, findings = verify(source, PUBLISHED.get(args.dataset, {}), args.num_workers, args.scored)
    print(f"\n{source.root}: {source.info.num_foreground} classes: {', '.join(source.info.classes[1:])}\n")
    print(table(splits, PUBLISHED.get(args.dataset, {})))
    print_findings(findings)
    write_report(output_dir, source.info, splits, findings)
    print(f"\nReport: {output_dir / 'verify.json'}, {output_dir / 'classes.png'}")
    errors = sum(len(findings[kind]) for kind in ERRORS)
    if errors:
        raise UserError(f"{source.root}: {errors} errors, listed in {output_dir / 'verify.json'}. Correct these files.")


def verify(
    source: DataSource, published: dict[str, Published], workers: int, scored: Sequence[str] = ()
) -> tuple[dict[str, Split], dict[str, list[str]]]:
    """Look at every image of every split once.

    Args:
        published: what its splits must have, as far as that is known.
        workers: processes; 0: this one only.
        scored: domains in which every image must have a mask.

    Returns:
        What was found in each split; and what is wrong, by kind (keys of `ERRORS` and `WARNINGS`).

    Raises:
        UserError: a list or a table of labels cannot be read at all.
    """
    findings: dict[str, list[str]] = {kind: [] for kind in (*ERRORS, *WARNINGS)}

    def report(found: Found) -> None:
        for kind, text in found:
            findings[kind].append(text)

    lists = {domain: source.listed_ids(domain) for domain in source.domains()}
    splits = {domain: Split(len(set(ids)), source.info.num_classes) for domain, ids in lists.items()}
    domains_of: dict[str, list[str]] = defaultdict(list)
    for domain, ids in lists.items():
        report(list_faults(domain, ids, published.get(domain)))
        for image_id in dict.fromkeys(ids):
            domains_of[image_id].append(domain)
    report(leftovers(source, lists, published=bool(published)))  # before the workers start: what it reads, they inherit
    copies: dict[str, dict[str, bytes]] = defaultdict(dict)  # by hash of the photograph: the labels by id
    masks: list[tuple[MaskLook, np.ndarray | None]] = []  # with the image labels
    looks = run_jobs(functools.partial(look_at, source), list(domains_of), workers, "verifying", "image")
    for (image_id, domains), look in zip(domains_of.items(), looks, strict=True):
        report(look.findings)
        for domain in domains:
            splits[domain].add(image_id, look)
        if look.mask is not None:
            masks.append((look.mask, look.label))
        if look.digest:
            copies[look.digest][image_id] = b"" if look.label is None else look.label.tobytes()
    report(shared_faults(source.info, masks))
    if is_systematic(len(dark := findings["dark"]), len(domains_of)):
        report([("unreadable", f"{dark[0]} (one of {len(dark)} photographs)")])
    report(count_copies(splits, copies.values(), domains_of))
    for domain, split in splits.items():
        report(incomplete(domain, split, published.get(domain), scored=domain in scored))
    learnt = [split for domain, split in splits.items() if "train" in domain] or list(splits.values())
    report(unlearnable(source.info, learnt, published=bool(published)))
    return splits, findings


def count_copies(
    splits: dict[str, Split], photographs: Iterable[dict[str, bytes]], domains_of: dict[str, list[str]]
) -> Found:
    """Count the photographs that several ids have, in their splits; `photographs` are labels (empty: none) by id."""
    for labels in (labels for labels in photographs if len(labels) > 1):
        for domain in (domain for image_id in labels for domain in domains_of[image_id]):
            splits[domain].counts["copies"] += 1
        told = ": with different labels" if len({*labels.values()} - {b""}) > 1 else ""
        yield "copies", " = ".join(f"{i} ({', '.join(domains_of[i])})" for i in labels) + told


def incomplete(domain: str, split: Split, published: Published | None, *, scored: bool) -> Found:
    """Labels and masks that a split lacks: those that it was published with or is scored with, or other images have."""
    must_have = published or Published(split.images, labels=split.counts["labels"] > 0, masks=False)
    if split.without["labels"] and must_have.labels:
        yield "label", split.incomplete(domain, "labels", "learnt from")
    if split.without["masks"] and (must_have.masks or scored):
        yield "mask", split.incomplete(domain, "masks", "scored")
    elif "masks" in split.partly() and not published:
        yield "partial", split.incomplete(domain, "masks", "scored")


def unlearnable(info: DatasetInfo, learnt: Sequence[Split], *, published: bool) -> Found:
    """Training splits without any label; or, if they are not published, classes that no label names, or that all do."""
    counts = sum(split.label_counts for split in learnt)
    labelled = sum(split.counts["labels"] for split in learnt)
    if not labelled:
        yield "label", "no training image has a label, so nothing can be learnt"
    elif not counts.any():
        yield "label", "no training label names a class, so nothing can be learnt"
    elif not published:
        for name, count in zip(info.classes[1:], counts[1:], strict=True):
            if count == 0:
                yield "unused", f"class '{name}' is in no training label"
            elif count == labelled:
                remedy = "so labels cannot tell where it is. Add images without it"
                yield "unused", f"class '{name}' is in every training label, {remedy}"


def list_faults(domain: str, ids: Sequence[str], published: Published | None) -> Found:
    """What is wrong with a list of ids."""
    if not ids:
        yield "list", f"split '{domain}' is empty"
    repeated = first_repeated(ids)
    if repeated is not None:
        yield "list", f"split '{domain}' lists '{repeated}' twice"
    if published and len(ids) != published.images:
        yield "list", f"split '{domain}' lists {len(ids)} images, the published list {published.images}"


def look_at(source: DataSource, image_id: str) -> Look:
    """Read the photograph, label and mask of one id."""
    look = Look(found=image_id in source.images.files)
    if not look.found:
        look.findings.append(("missing", f"{image_id}: no photograph{source.images.advice(image_id)}"))
        return look
    path = source.image_path(image_id)
    image = _try(look, "unreadable", lambda: source.image(image_id))
    if image is not None:
        look.digest = file_fingerprint(path)
        if image.max() <= DARKEST:
            remedy = "If it holds 12 bits in 16, stretch them; if it is black, replace it"
            look.findings.append(("dark", f"{path}: no value above {image.max()} of 255. {remedy}"))
    look.has = {"labels": source.has_label(image_id), "masks": source.has_mask(image_id)}
    if look.has["labels"]:
        look.label = _try(look, "label", lambda: source.image_label(image_id))
    if look.has["masks"] and look.digest:  # a mask is compared with its image
        look.mask = _try(look, "mask", lambda: look_at_mask(source, image_id, look.label))
    if look.label is not None and look.mask is not None:
        look.findings += contradictions(source.info, look)
    return look


def contradictions(info: DatasetInfo, look: Look) -> Found:
    """How a mask contradicts its image label. A mask may lack some of the label's classes: they may be tiny."""
    named, shown = look.label > 0, look.mask.pixels[1:] > 0
    extra = [info.classes[i + 1] for i in np.flatnonzero(shown & ~named)]
    if extra:
        yield "unlabelled", f"{look.mask.path}: shows {', '.join(extra)}, unlike the image label"
    if named.any() and not shown.any():
        values = "0 and 255" if look.mask.ignored else "0"
        yield "unlabelled", f"{look.mask.path}: holds only {values}, unlike the image label"


def _try(look: Look, kind: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
        return read()
    except UserError as error:
        look.findings.append((kind, str(error)))
        return None


def table(splits: dict[str, Split], published: dict[str, Published]) -> str:
    """The table that the module docstring explains, a row per split."""
    counted = ("missing", "unreadable", "labels", "masks", "bad", "unlabelled", "copies")
    rows = [("split", "images", "known", *counted)]
    for domain, split in splits.items():
        known = published[domain].images if domain in published else "-"
        n = {**split.counts, "bad": split.counts["label"] + split.counts["mask"]}
        rows.append((domain, split.images, known, *(n.get(name, 0) for name in counted)))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)  # names to the left, numbers to the right
    return "\n".join("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in rows)


def print_findings(findings: dict[str, list[str]]) -> None:
    """The first few of each kind."""
    for kinds, title in ((ERRORS, "Errors"), (WARNINGS, "Warnings")):
        for kind, name in kinds.items():
            if findings[kind]:
                print(f"\n{title}: {name} ({len(findings[kind])})")
                for text in (" ".join(text.splitlines()) for text in findings[kind][:SHOWN]):
                    print(f"  {text[:WIDEST]}{' ...' if len(text) > WIDEST else ''}")
                if len(findings[kind]) > SHOWN:
                    print(f"  ... and {len(findings[kind]) - SHOWN} more")


def write_report(folder: Path, info: DatasetInfo, splits: dict[str, Split], findings: dict[str, list[str]]) -> None:
    """`verify.json`: everything that was printed or counted; `classes.png`: the histogram."""
    summary = {
        domain: {
            "images": split.images,
            **split.counts,
            **{f"without_{what}": ids for what, ids in split.partly().items()},
            "images_by_class": dict(zip(info.classes[1:], split.label_counts[1:].tolist(), strict=True)),
            "pixels_by_class": dict(zip(info.classes, split.pixel_counts.tolist(), strict=True)),
        }
        for domain, split in splits.items()
    }
    save_json(folder / "verify.json", {"splits": summary, "findings": findings})
    with atomic_write(folder / "classes.png") as temporary:
        histogram(info, splits).savefig(temporary, format="png", dpi=120)


def histogram(info: DatasetInfo, splits: dict[str, Split]) -> Figure:
    """How often each class occurs, per cent of a split's images (left) and of its mask pixels (right): a bar per split.

    The bars of the first split show their numbers.
    """
    from matplotlib.figure import Figure

    figure = Figure((9, 1.2 + info.num_classes * (0.1 + 0.12 * len(splits))), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    height = 0.8 / max(len(splits), 1)
    for number, (domain, split) in enumerate(splits.items()):
        places = np.arange(info.num_classes) + height * (number + 0.5) - 0.4
        images = split.label_counts / max(split.counts["labels"], 1)
        pixels = split.pixel_counts / max(split.pixel_counts.sum(), 1)
        images[0] = np.nan  # labels do not name the background
        for axis, share in zip(axes, (images, pixels), strict=True):
            bars = axis.barh(places, 100 * share, height, label=domain, color=f"C{number}")
            if number == 0:
                axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    for axis, title in zip(axes, ("images with the class, %", "pixels of the masks, %"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.12, y=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(info.num_classes), info.classes, fontsize=9)
    axes[0].invert_yaxis()  # the background on top
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6, frameon=False)
    return figure


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
