"""Stage 3: pseudo masks whose edges follow mask proposals (Segment Anything, or image regions where it is not at hand).

    python refine_sam.py --tag csrm --dataset voc12 --domain train_aug --checkpoint sam_vit_h_4b8939.pth \\
        --pseudo_dir experiments/predictions/csrm@train_aug/pseudos-t0.4-c10

Two steps, together (--stage all) or apart. `propose` needs only the images; `merge` takes seconds, so several modes can
be tried on the same proposals. Both write to experiments/predictions/TAG@DOMAIN/

    proposals-{sam,regions}/ID.json   the masks of one image as COCO RLE (the layout of SA-1B; read with pycocotools)
    sam-{sam,regions}-MODE/ID.png     refined pseudo masks: class indices, 0 background

A settings.json in each folder records what made it. Started again, the script continues with the images that are
missing; several machines or GPUs share the work with --shard 0/4, 1/4, ...
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from datasets import DataSource, build_source
from datasets.base import DatasetInfo
from tools import cli
from tools.errors import UserError
from tools.files import claim_folder, load_image, load_mask, save_mask
from tools.merging import MODES, ORDERS, merge_masks
from tools.proposals import SAM_TYPES, ProposalGenerator, SamGenerator, load_proposals, load_sam, save_proposals
from tools.regions import RegionGenerator

SAM_OPTIONS = ("points_per_side", "points_per_batch", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh")
SAM_OPTIONS += ("crop_n_layers", "min_mask_region_area")
MERGE_OPTIONS = ("mode", "order", "inside_threshold", "recall_threshold", "keep_ignore")


def make_parser() -> cli.Parser:
    """The command line of this script."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--tag", required=True, help="name of the run whose pseudo masks are refined")
    group.add_argument("--stage", choices=["propose", "merge", "all"], default="all", help="which steps to run")
    group.add_argument(
        "--device", default="auto", help="where SAM runs: auto (the GPU if there is one), cpu, cuda or cuda:N"
    )
    group.add_argument(
        "--shard", type=shard, default="0/1", metavar="I/N", help="do every N-th image, from the I-th on (I from 0)"
    )
    cli.add_workers(group)
    data = cli.add_dataset(parser, domain=("train_aug", "split to refine"))
    data.add_argument("--pseudo_dir", type=Path, help="folder of the ID.png pseudo masks (needed to merge)")
    group = parser.add_argument_group("proposals")
    group.add_argument(
        "--proposals", choices=["sam", "regions"], default="sam", help="Segment Anything, or weight-free regions"
    )
    group.add_argument(
        "--region_max_size", type=cli.fraction, default=0.15, help="regions: largest, as a fraction of the image's area"
    )
    group.add_argument(
        "--region_min_contrast",
        type=float,
        default=0.0,
        help="regions: least mean edge strength along the border (grey levels per pixel)",
    )
    add_sam(parser)
    group = parser.add_argument_group("merging")
    group.add_argument("--mode", choices=MODES, default="max_iou_imp2", help="rule by which a class takes masks")
    group.add_argument(
        "--order",
        choices=ORDERS,
        default="class",
        help="masks are offered to all classes in turn, or to one class each",
    )
    group.add_argument(
        "--inside_threshold",
        type=cli.fraction,
        default=0.5,
        help="a class takes a mask with more than this share inside it",
    )
    group.add_argument(
        "--recall_threshold",
        type=cli.fraction,
        default=0.85,
        help="max_iou_imp2: or one covering this share of the class",
    )
    cli.add_switch(group, "--keep_ignore", False, "ignored pixels that no class takes stay 255, not background")
    return parser


def add_sam(parser: cli.Parser) -> None:
    """The flags of SAM and of its automatic mask generator."""
    group = parser.add_argument_group("Segment Anything (--proposals sam)")
    group.add_argument("--checkpoint", type=Path, help="its public weights, such as sam_vit_h_4b8939.pth")
    group.add_argument("--model_type", choices=SAM_TYPES, default="vit_h", help="the network of these weights")
    group.add_argument(
        "--points_per_side", type=cli.positive_int, default=32, help="prompts along each side of the image"
    )
    group.add_argument(
        "--points_per_batch", type=cli.positive_int, default=64, help="prompts at a time; bounds the memory"
    )
    group.add_argument("--pred_iou_thresh", type=cli.fraction, default=0.88, help="least predicted IoU of a mask")
    group.add_argument("--stability_score_thresh", type=cli.fraction, default=0.95, help="least stability of a mask")
    group.add_argument(
        "--box_nms_thresh", type=cli.fraction, default=0.7, help="box IoU above which masks are duplicates"
    )
    group.add_argument(
        "--crop_n_layers", type=cli.count, default=0, help="also look at crops; layer i has 2^i per side"
    )
    group.add_argument(
        "--min_mask_region_area", type=cli.count, default=0, help="fill holes, drop islands below this (pixels)"
    )


def shard(text: str) -> tuple[int, int]:
    """`I/N` as (I, N), 0 <= I < N."""
    index, slash, number = text.partition("/")
    if not (slash and index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 0 <= I < N, such as 0/4")
    return int(index), int(number)


def main(args: argparse.Namespace) -> None:
    """Run the steps asked for on this shard's images."""
    check_flags(args)
    source = build_source(args.dataset, cli.data_dir(args))
    ids = source.ids(args.domain)[args.shard[0] :: args.shard[1]]
    if args.stage != "propose":
        check_present(args.pseudo_dir, ids, ".png", "the pseudo masks of inference.py with --pseudo_dir")
    if args.stage != "merge":
        propose(args, source, ids)
    if args.stage != "propose":
        merge(args, source.info, ids)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse combinations that cannot work, before anything is computed.

    Raises:
        UserError: a flag is missing.
    """
    if args.stage != "propose" and args.pseudo_dir is None:
        raise UserError("--pseudo_dir: missing. Pass the folder of pseudo masks, or --stage propose.")
    if args.stage != "merge" and args.proposals == "sam" and args.checkpoint is None:
        raise UserError("--checkpoint: missing. Pass SAM's weights, or --proposals regions to do without.")


def check_present(folder: Path, ids: Sequence[str], suffix: str, remedy: str) -> None:
    """Raise UserError unless `folder` has a file of every id."""
    missing = [image_id for image_id in ids if not (folder / f"{image_id}{suffix}").is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]}{suffix} is missing ({len(missing)} of {len(ids)} are). Pass {remedy}.")


def proposals_dir(args: argparse.Namespace) -> Path:
    """Where the proposals lie."""
    return cli.predictions_dir(args.tag, args.domain) / f"proposals-{args.proposals}"


def refined_dir(args: argparse.Namespace) -> Path:
    """Where the refined masks lie, named after what made them."""
    order = "" if args.order == "class" else f"-{args.order}"
    return cli.predictions_dir(args.tag, args.domain) / f"sam-{args.proposals}-{args.mode}{order}"


def propose(args: argparse.Namespace, source: DataSource, ids: Sequence[str]) -> None:
    """Write the proposals of the images that have none yet."""
    folder = claim_folder(proposals_dir(args), proposal_settings(args))
    pending = [image_id for image_id in ids if not (folder / f"{image_id}.json").exists()]
    print(f"Proposals: {len(ids)} images, {len(ids) - len(pending)} done already; writing to {folder}")
    if pending:
        # Regions use the processor's cores; SAM has its device to itself.
        workers = args.num_workers if args.proposals == "regions" else 0
        jobs = [(source.image_path(image_id), folder / f"{image_id}.json") for image_id in pending]
        for _ in run_jobs(functools.partial(propose_file, build_generator(args)), jobs, workers, "proposals"):
            pass
    print(f"Proposals are in {folder}")
    if args.stage == "propose":
        print("Next: the same command with --stage merge --pseudo_dir FOLDER")


def proposal_settings(args: argparse.Namespace) -> dict[str, object]:
    """What the proposals depend on."""
    if args.proposals == "regions":
        return {"proposals": "regions"} | vars(build_generator(args))
    options = {name: getattr(args, name) for name in SAM_OPTIONS if name != "points_per_batch"}
    return {"proposals": "sam", "checkpoint": args.checkpoint.name, "model_type": args.model_type} | options


def build_generator(args: argparse.Namespace) -> ProposalGenerator:
    """The backend that --proposals names."""
    if args.proposals == "regions":
        return RegionGenerator(max_size=args.region_max_size, min_contrast=args.region_min_contrast)
    model = load_sam(args.checkpoint, args.model_type, cli.select_device(args.device))
    return SamGenerator(model, **{name: getattr(args, name) for name in SAM_OPTIONS})


def propose_file(generator: ProposalGenerator, job: tuple[Path, Path]) -> None:
    """Write the proposals of one image; `job` is (image, proposals)."""
    image_path, path = job
    save_proposals(path, generator(load_image(image_path)))


def merge(args: argparse.Namespace, info: DatasetInfo, ids: Sequence[str]) -> None:
    """Write the refined masks that are not there yet, and report what changed over all of them."""
    check_present(proposals_dir(args), ids, ".json", "the same flags with --stage propose first")
    options = {name: getattr(args, name) for name in MERGE_OPTIONS}
    settings = options | {"proposals": args.proposals, "pseudo_dir": str(args.pseudo_dir)}
    folder = claim_folder(refined_dir(args), settings)
    done = sum((folder / f"{image_id}.png").exists() for image_id in ids)
    print(f"Merging: {len(ids)} images, {done} done already; writing to {folder}")
    jobs = [
        (args.pseudo_dir / f"{image_id}.png", proposals_dir(args) / f"{image_id}.json", folder / f"{image_id}.png")
        for image_id in ids
    ]
    changes = sum(run_jobs(functools.partial(merge_file, info, options), jobs, args.num_workers, "merging"))
    print_changes(info, changes)
    print(f"Refined masks are in {folder}")
    print(f"Next: python train_segmentation.py --tag TAG --masks_dir {folder}   (plus the data flags)")


def merge_file(info: DatasetInfo, options: dict[str, object], job: tuple[Path, Path, Path]) -> np.ndarray:
    """Refine one pseudo mask unless that is done; `job` is (pseudo mask, proposals, refined mask).

    Returns:
        int64 [C+1, C+1], pixels by class before (rows) and after (columns); the last of both is ignore.

    Raises:
        UserError: mask and proposals differ in size, or the mask has a class that the dataset has not.
    """
    pseudo_path, proposals_path, path = job
    pseudo_mask = load_mask(pseudo_path)
    before = with_ignore_last(info, pseudo_mask, pseudo_path)
    if not path.exists():
        masks = load_proposals(proposals_path)
        if masks.shape[1:] != pseudo_mask.shape:
            raise UserError(
                f"{pseudo_path}: {pseudo_mask.shape[1]}x{pseudo_mask.shape[0]} pixels, but its proposals have "
                f"{masks.shape[2]}x{masks.shape[1]}. Make both from the same images."
            )
        save_mask(path, merge_masks(pseudo_mask, masks, **options), info.palette)
    after = with_ignore_last(info, load_mask(path), path)
    side = info.num_classes + 1
    return np.bincount((before * side + after).ravel(), minlength=side**2).reshape(side, side)


def with_ignore_last(info: DatasetInfo, mask: np.ndarray, path: Path) -> np.ndarray:
    """The mask as int64 with C in place of the ignore index."""
    mask = np.where(mask == info.ignore_index, info.num_classes, mask.astype(np.int64))
    if mask.max() > info.num_classes:
        raise UserError(f"{path}: class {mask.max()}, but the dataset has {info.num_classes} classes. Check --dataset.")
    return mask


def run_jobs(work: Callable, jobs: Sequence[tuple], workers: int, name: str) -> Iterator:
    """Yield work(job) for every job, in any order, in `workers` processes (0: in this one), with a progress bar."""
    progress = functools.partial(cli.progress, total=len(jobs), desc=name, unit="image")
    if workers == 0:
        yield from progress(map(work, jobs))
        return
    # A worker keeps to its core: the workers already use them all.
    with multiprocessing.Pool(min(workers, len(jobs)), initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from progress(pool.imap_unordered(work, jobs, chunksize=4))


def print_changes(info: DatasetInfo, changes: np.ndarray) -> None:
    """Per class: its share of all pixels before and after, and what it gained and lost, in per cent of before."""
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
    cli.run(main, make_parser())
