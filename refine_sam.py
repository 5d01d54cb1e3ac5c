"""Stage 3: make the edges of pseudo masks follow mask proposals, of Segment Anything or of image regions.

    python refine_sam.py --tag csrm --dataset voc12 --domain train_aug --checkpoint sam_vit_h_4b8939.pth \\
        --pseudo_dir experiments/predictions/csrm@train_aug/pseudos-t0.4-c10

--stage all runs both steps. `propose` needs only the images. `merge` takes seconds, so several modes can be tried on
the same proposals. The steps write to experiments/predictions/TAG@DOMAIN/

    proposals-PROPOSALS/ID.json     the masks of an image as COCO RLE (SA-1B's layout; pycocotools reads it)
    sam-PROPOSALS-MODE/ID.png       refined pseudo masks: class indices, 0 background

A settings.json in each folder records what made it. If the script is started again, it makes only the missing files.
Several processes can share the images: under torchrun (a GPU for each), or with --shard 0/4, --shard 1/4 ... anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from tools import cli, options, parallel
from tools.errors import UserError


def make_parser() -> cli.Parser:
    """The command line of this script."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--tag", type=options.tag, required=True, help="name of the run whose pseudo masks are refined")
    group.add_argument("--stage", choices=["propose", "merge", "all"], default="all", help="which steps to run")
    options.add_shared(group, "device")
    text = "do part I of N of the images, I from 0 to N-1; default: torchrun's rank, else all"
    group.add_argument("--shard", type=shard, metavar="I/N", help=text)
    options.add_shared(group, "num_workers", "overwrite", "on_error")
    data = options.add_dataset(parser, domain=("train_aug", "split to refine"))
    data.add_argument("--pseudo_dir", type=Path, help="folder of the ID.png pseudo masks (needed to merge)")
    add_proposals(parser)
    add_sam(parser)
    add_merging(parser)
    return parser


def add_proposals(parser: cli.Parser) -> None:
    """Where the mask proposals come from."""
    add = parser.add_argument_group("proposals").add_argument
    kinds = "Segment Anything (sam2: 2.1, Apache-2.0; sam3: Meta's SAM License), weight-free regions, or files"
    add("--proposals", choices=[*options.SAMS, "regions", "files"], default="sam", help=kinds)
    add("--proposals_dir", type=Path, help="their folder, if runs share it (default: see above)")
    add("--mask_files", type=Path, help="files: folder of ID/metadata.csv and ID/*.png, or of ID.json")
    add("--region_max_size", type=cli.fraction, default=0.15, help="regions: largest area, as a fraction of the image")
    contrast = "regions: least edge strength at a border (grey levels)"
    add("--region_min_contrast", type=cli.non_negative, default=0.0, help=contrast)


def add_merging(parser: cli.Parser) -> None:
    """The rules by which classes take proposals."""
    group = parser.add_argument_group("merging")
    add = group.add_argument
    add("--mode", choices=options.MERGE_MODES, default="max_iou_imp2", help="rule by which a class takes masks")
    order = "largest_overlap: only the class that a mask overlaps most may take it"
    add("--order", choices=options.MERGE_ORDERS, default="class", help=order)
    inside, recall = "a class takes masks with more than this share inside it", "max_iou_imp2: and masks covering this"
    add("--inside_threshold", type=cli.fraction, default=0.5, help=inside)
    add("--recall_threshold", type=cli.fraction, default=0.85, help=f"{recall} share of it")
    cli.add_switch(group, "--keep_ignore", False, "ignored pixels that no class takes stay 255, not background")


def add_sam(parser: cli.Parser) -> None:
    """The flags of SAM and of its automatic mask generator."""
    group = parser.add_argument_group("Segment Anything (--proposals sam, sam2, sam3)")
    add = group.add_argument
    weights = "sam: its public weights, such as sam_vit_h_4b8939.pth; sam2, sam3: a folder as transformers saves it, "
    weights += "or a name on the Hugging Face hub, such as facebook/sam2.1-hiera-large"
    add("--checkpoint", type=Path, help=weights)
    add("--model_type", choices=options.SAM_TYPES, default="vit_h", help="sam: network of these weights")
    add("--points_per_side", type=cli.positive_int, default=32, help="prompts along each side of the image")
    add("--points_per_batch", type=cli.positive_int, default=128, help="prompts at a time; fewer need less memory")
    add("--images_per_batch", type=cli.positive_int, default=2, help="images encoded at a time; likewise")
    options.add_shared(group, "mixed_precision")
    cli.add_switch(group, "--compile", False, "sam: compile the networks: slower to start, then faster")
    add("--pred_iou_thresh", type=cli.fraction, default=0.88, help="lowest predicted IoU of a mask")
    add("--stability_score_thresh", type=cli.fraction, default=0.95, help="lowest stability of a mask")
    add("--box_nms_thresh", type=cli.fraction, default=0.7, help="box IoU above which masks are duplicates")
    add("--crop_n_layers", type=cli.count, default=0, help="layers of crops to search, too; layer i has 2^i per side")
    add("--min_mask_region_area", type=cli.count, default=0, help="fill holes, drop islands smaller than this (pixels)")


def shard(text: str) -> tuple[int, int]:
    """`I/N` as (I, N), 0 <= I < N."""
    index, slash, number = text.partition("/")
    if not (slash and index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 0 <= I < N, such as 0/4")
    return int(index), int(number)


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import numpy as np

from datasets import DataSource, build_source
from datasets.base import DatasetInfo, check_shown, read_mask
from tools import devices, distributed, identity
from tools.files import check_present, file_of, load_image, save_mask
from tools.left_out import LeftOut
from tools.merging import merge_masks
from tools.proposals import Propose, load_proposals, save_proposals
from tools.proposals.files import fingerprints, read_masks
from tools.proposals.generator import MaskGenerator, MaskOptions, load_sam
from tools.proposals.later_sams import LaterMaskGenerator, load_later_sam, weights_file
from tools.proposals.regions import RegionGenerator


@dataclasses.dataclass(frozen=True)
class Backend:
    """What makes the proposals."""

    settings: dict[str, object]  # flags that change its masks
    build: Callable[[], Propose]  # loads what makes them, if an image needs it
    images_per_call: int = 1  # how many images that takes at a time
    threads: int = 0  # of this process; 0: helper processes are used instead


@dataclasses.dataclass(frozen=True)
class Rule:
    """How masks are merged: keyword arguments of `tools.merging.merge_masks`."""

    mode: str
    order: str
    inside_threshold: float
    recall_threshold: float
    keep_ignore: bool


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the files of an image lie: proposals/ID.json, pseudo_masks/ID.png, refined/ID.png."""

    proposals: Path
    pseudo_masks: Path | None
    refined: Path


def main(args: argparse.Namespace) -> None:
    """Run the steps asked for on this process's share of the images."""
    check_flags(args)
    if not args.shard:
        distributed.start(options.EXPERIMENTS)
    source = build_source(args.dataset, options.data_dir(args))
    listed = source.ids(args.domain)
    photographs = source.fingerprints(listed)["photographs"]
    ids = parallel.share(listed, shard=args.shard)
    folders = select_folders(args)
    workers = parallel.own_workers(args.num_workers)
    left_out = LeftOut(folders.refined.parent, "refine_sam", skip=args.on_error == "skip")
    if args.stage != "propose":
        remedy = "Make them by inference.py (stage 1 of the runners), or pass others with --pseudo_dir."
        own = source.fingerprints(ids, labels=all(map(source.has_label, ids)))
        identity.check_classes(args.pseudo_dir, source.info.classes[1:], own)
        check_present(args.pseudo_dir, ids, ".png", remedy, some=left_out.skip)
        paths = (file_of(args.pseudo_dir, image_id, ".png") for image_id in listed)
        check_shown(filter(Path.is_file, paths), source.info)
    if args.stage != "merge":
        backend = select_backend(args)
        made_by = proposals_identity(backend, source, photographs)
        if args.overwrite or not all((folders.proposals / f"{image_id}.json").exists() for image_id in ids):
            backend.build()  # before anything is recorded or deleted: wrong weights are refused here
        taken = "--proposals_dir (or --stage merge --proposals files, to take what it holds)"
        another = taken if args.proposals_dir else "--tag"
        identity.claim_folder(folders.proposals, made_by, another=another, overwrite=args.overwrite)
        propose(backend, source, ids, folders.proposals, workers, left_out)
        distributed.wait_for_shares()
    if args.stage == "propose":
        print("Next: the same command with --stage merge --pseudo_dir FOLDER")
        left_out.finish(listed, ids)
        return
    rule = options.from_flags(Rule, args)
    if args.stage == "merge" and args.proposals != "files":
        check_made_by(args, folders.proposals, photographs)
    check_present(folders.proposals, ids, ".json", "Run the same flags with --stage propose first.", some=left_out.skip)
    made_by = merged_identity(rule, folders, source.info, photographs)
    another = f"--tag (with --proposals_dir {folders.proposals})"
    identity.claim_folder(folders.refined, made_by, another=another, overwrite=args.overwrite)
    merge(rule, source.info, ids, folders, workers, left_out)
    flags = ["--tag", f"{args.tag}-deeplab", "--domain_train", args.domain, "--masks_dir", folders.refined]
    print(options.next_step(args, "train_segmentation.py", *flags, note="and the flags of network and images"))
    left_out.finish(listed, ids)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse combinations of flags that cannot work (UserError), before anything is computed."""
    if args.stage != "propose" and args.pseudo_dir is None:
        raise UserError("--pseudo_dir: missing. Pass the folder of pseudo masks, or --stage propose.")
    if args.stage != "merge" and args.proposals in options.SAMS and args.checkpoint is None:
        raise UserError("--checkpoint: missing. Pass SAM's weights, or --proposals regions to do without.")
    if args.compile and args.proposals in ("sam2", "sam3"):
        raise UserError(f"--compile: not with --proposals {args.proposals}. Drop it.")
    if args.stage != "merge" and args.proposals == "files" and args.mask_files is None:
        raise UserError("--mask_files: missing. Pass the folder that holds the masks of --proposals files.")


def select_folders(args: argparse.Namespace) -> Folders:
    """Where files are read and written; the refined masks' folder is named after what makes them."""
    folder = options.predictions_dir(args.tag, args.domain)
    order = "" if args.order == "class" else f"-{args.order}"
    return Folders(
        proposals=args.proposals_dir or folder / f"proposals-{args.proposals}",
        pseudo_masks=args.pseudo_dir,
        refined=folder / f"sam-{args.proposals}-{args.mode}{order}",
    )


def region_generator(args: argparse.Namespace) -> RegionGenerator:
    """What --proposals regions is."""
    return RegionGenerator(max_size=args.region_max_size, min_contrast=args.region_min_contrast)


def proposal_settings(args: argparse.Namespace) -> dict[str, object]:
    """The flags that change the proposals, on any machine."""
    name = {"proposals": args.proposals}
    if args.proposals == "regions":
        return name | {f"region_{key}": value for key, value in dataclasses.asdict(region_generator(args)).items()}
    if args.proposals == "files":
        return name | {"mask_files": args.mask_files}
    weights = {"checkpoint": args.checkpoint, "model_type": args.model_type}
    if args.proposals != "sam":
        weights = {"checkpoint": args.checkpoint and weights_file(args.checkpoint)}
    return name | weights | dataclasses.asdict(options.from_flags(MaskOptions, args))


def check_made_by(args: argparse.Namespace, folder: Path, photographs: dict[str, int]) -> None:
    """Refuse to merge proposals of other flags or photographs (UserError), if their record says so.

    They may come from another machine: their precision is not compared, nor weights that are not on this one.
    """
    if not (stored := identity.read_record(folder / identity.RECORD)):
        return
    flags = proposal_settings(args)
    weights = flags.get("checkpoint")
    if weights is None or ("checkpoint" in stored.get("files", {}) and not weights.is_file()):
        flags.pop("checkpoint", None)
    made = {i: size for i, size in photographs.items() if file_of(folder, i, ".json").is_file()}
    made_by = identity.describe("refine_sam.py", flags, inputs={"photographs": made})
    if other := identity.difference(stored, made_by):
        raise UserError(
            f"{folder}: made with {other}. Pass the flags that made them, make them again (--stage all --overwrite), "
            f"or take them as they are (--proposals files --proposals_dir {folder})."
        )


def select_backend(args: argparse.Namespace) -> Backend:
    """The backend that --proposals names."""
    settings = proposal_settings(args)
    if args.proposals == "regions":
        return Backend(settings, lambda: region_generator(args))
    if args.proposals == "files":
        return Backend(settings, lambda: functools.partial(read_masks, args.mask_files))
    sought = options.from_flags(MaskOptions, args)
    device = devices.select_device(args.device)
    dtype = devices.autocast_dtype(args.mixed_precision, device)
    running = {"images_per_batch": args.images_per_batch, "points_per_batch": args.points_per_batch, "dtype": dtype}

    @functools.cache
    def build() -> Propose:
        if args.proposals == "sam":
            sam = load_sam(args.checkpoint, args.model_type, device)
            generator = MaskGenerator(sam, sought, **running, compile=args.compile)
        else:
            later = load_later_sam(str(args.checkpoint), args.proposals, device)
            generator = LaterMaskGenerator(*later, sought, **running)
        return lambda image_ids, images: generator(images)

    return Backend(
        settings | {"mixed_precision": args.mixed_precision},
        build,
        images_per_call=args.images_per_batch,
        # While one thread uses the GPU, another reads and writes files.
        threads=2 if device.type == "cuda" and args.num_workers else 1,
    )


def propose(
    backend: Backend, source: DataSource, ids: Sequence[str], folder: Path, workers: int, left_out: LeftOut
) -> None:
    """Write the proposals of the images that have none yet."""
    what = f"Proposals: {len(ids)} images"
    if pending := parallel.pending(ids, lambda i: (folder / f"{i}.json").exists(), what, folder):
        size = backend.images_per_call
        jobs = [pending[start : start + size] for start in range(0, len(pending), size)]
        unit = "image" if size == 1 else f"x{size} images"
        work = functools.partial(propose_batch, backend.build(), source, folder)
        for _ in left_out.results(work, jobs, "proposals", unit=unit, workers=workers, threads=backend.threads):
            pass
    print(f"Proposals are in {folder}")


def propose_batch(make: Propose, source: DataSource, folder: Path, ids: Sequence[str]) -> None:
    """Write the proposals of some images."""
    images = [load_image(source.image_path(image_id)) for image_id in ids]
    for image_id, image, masks in zip(ids, images, make(ids, images), strict=True):
        save_proposals(folder / f"{image_id}.json", masks, image.shape[:2])


def proposals_identity(backend: Backend, source: DataSource, photographs: dict[str, int | str]) -> dict:
    """The identity of the proposals of these photographs (`tools.identity.photographs`).

    Raises:
        UserError: the file of an image would be that of the identity.
    """
    if "settings" in photographs:
        raise UserError(
            f"{source.image_path('settings')}: settings.json is taken in each folder. Rename the photograph."
        )
    inputs, mask_files = {"photographs": photographs}, backend.settings.get("mask_files")
    if mask_files:
        inputs["mask files"] = fingerprints(mask_files, [*photographs])
    flags = {**backend.settings, "mask_files": mask_files}
    return identity.describe("refine_sam.py", flags, inputs=inputs)


def merged_identity(rule: Rule, folders: Folders, info: DatasetInfo, photographs: dict[str, int | str]) -> dict:
    """The identity of the refined masks of these photographs (`tools.identity.photographs`).

    Proposals are compared by the size of their files. The photographs are not read here, but who reads the masks
    compares them (`tools.identity.check_classes`).
    """
    inputs = {
        "photographs": photographs,
        "pseudo masks": identity.contents({i: file_of(folders.pseudo_masks, i, ".png") for i in photographs}),
        "proposals": identity.sizes({i: file_of(folders.proposals, i, ".json") for i in photographs}),
    }
    flags = {**dataclasses.asdict(rule), "pseudo_dir": folders.pseudo_masks, "proposals_dir": folders.proposals}
    flags["classes"] = info.classes[1:]
    return identity.describe("refine_sam.py", flags, inputs=inputs)


def merge(rule: Rule, info: DatasetInfo, ids: Sequence[str], folders: Folders, workers: int, left_out: LeftOut) -> None:
    """Write the refined masks that are not there yet, and report what changed over all of them."""
    folder = folders.refined
    parallel.pending(ids, lambda i: (folder / f"{i}.png").exists(), f"Merging: {len(ids)} images", folder)
    changes = left_out.results(functools.partial(merge_file, rule, info, folders), ids, "merging", workers=workers)
    changes = sum(changes, start=np.zeros((info.num_classes + 1,) * 2, np.int64))
    print_changes(info, distributed.sum_of_shares(changes))
    print(f"Refined masks are in {folder}")


def merge_file(rule: Rule, info: DatasetInfo, folders: Folders, image_id: str) -> np.ndarray:
    """Refine one pseudo mask, if that is not done yet.

    Returns:
        int64 [C+1, C+1], pixels by class before (rows) and after (columns); the last row and column are of 255.

    Raises:
        UserError: a file cannot be used, the two differ in size, or the mask has a class that the dataset lacks.
    """
    pseudo_mask = read_mask(file_of(folders.pseudo_masks, image_id, ".png"), info)
    path = folders.refined / f"{image_id}.png"
    if not path.exists():
        masks = load_proposals(file_of(folders.proposals, image_id, ".json"), pseudo_mask.shape)
        save_mask(path, merge_masks(pseudo_mask, masks, **dataclasses.asdict(rule)), info.palette)
    side, masks = info.num_classes + 1, (pseudo_mask, read_mask(path, info))
    before, after = (np.where(mask == options.IGNORE_INDEX, side - 1, mask.astype(np.int64)) for mask in masks)
    return np.bincount((before * side + after).ravel(), minlength=side**2).reshape(side, side)


def print_changes(info: DatasetInfo, changes: np.ndarray) -> None:
    """For each class: per cent of all pixels before and after, and what it gained and lost in per cent of before."""
    total = max(changes.sum(), 1)
    width = max(len(name) for name in (*info.classes, "ignore"))
    print(f"{'class':<{width}}  {'before':>7}  {'after':>7}   (% of all)  {'gained':>7}  {'lost':>7}   (% of before)")
    for index, name in enumerate((*info.classes, "ignore")):
        before, after, kept = changes[index].sum(), changes[:, index].sum(), changes[index, index]
        if before or after:
            gained, lost = (100 * (n - kept) / max(before, 1) for n in (after, before))
            shares = f"{100 * before / total:7.2f}  {100 * after / total:7.2f}"
            print(f"{name:<{width}}  {shares}              {gained:7.2f}  {lost:7.2f}")
    print(f"{100 * (1 - np.trace(changes) / total):.2f} % of the pixels changed")


if __name__ == "__main__":
    cli.run(main, ARGS)
