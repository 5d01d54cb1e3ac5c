"""Stage 3: pseudo masks whose edges follow mask proposals (Segment Anything, or image regions where it is not at hand).

    python refine_sam.py --tag csrm --dataset voc12 --domain train_aug --checkpoint sam_vit_h_4b8939.pth \\
        --pseudo_dir experiments/predictions/csrm@train_aug/pseudos-t0.4-c10

Two steps, together (--stage all) or apart. `propose` needs only the images; `merge` takes seconds, so several modes can
be tried on the same proposals. Both write to experiments/predictions/TAG@DOMAIN/

    proposals-{sam,regions,files}/ID.json   the masks of an image as COCO RLE (SA-1B's layout; pycocotools reads it)
    sam-{sam,regions,files}-MODE/ID.png     refined pseudo masks: class indices, 0 background

A settings.json in each folder records what made it. Started again, the script continues with the images that are
missing. Several processes may work at one folder: each image is made by the one that comes first. To divide the images
beforehand, launch with torchrun (a GPU for each process) or give machines --shard 0/4, 1/4, ...
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from tools import cli, options, parallel
from tools.errors import UserError
from tools.parallel import process_pool


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
        "--shard",
        type=shard,
        metavar="I/N",
        help="do every N-th image, from the I-th on (I from 0); default: torchrun's rank, else all",
    )
    options.add_workers(group)
    data = options.add_dataset(parser, domain=("train_aug", "split to refine"))
    data.add_argument("--pseudo_dir", type=Path, help="folder of the ID.png pseudo masks (needed to merge)")
    group = parser.add_argument_group("proposals")
    group.add_argument(
        "--proposals",
        choices=["sam", "regions", "files"],
        default="sam",
        help="Segment Anything, weight-free regions, or masks that another program made",
    )
    group.add_argument("--proposals_dir", type=Path, help="where they are kept, to share them (default: see above)")
    group.add_argument("--mask_files", type=Path, help="files: folder of ID/metadata.csv and ID/*.png, or of ID.json")
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
    group.add_argument(
        "--mode", choices=options.MERGE_MODES, default="max_iou_imp2", help="rule by which a class takes masks"
    )
    group.add_argument(
        "--order",
        choices=options.MERGE_ORDERS,
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
    group.add_argument("--model_type", choices=options.SAM_TYPES, default="vit_h", help="the network of these weights")
    group.add_argument(
        "--points_per_side", type=cli.positive_int, default=32, help="prompts along each side of the image"
    )
    group.add_argument(
        "--points_per_batch", type=cli.positive_int, default=128, help="prompts at a time; bounds the memory"
    )
    group.add_argument(
        "--images_per_batch", type=cli.positive_int, default=2, help="images the encoder sees at a time; likewise"
    )
    group.add_argument(
        "--mixed_precision",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="auto: bf16 on GPUs, off on CPUs",
    )
    cli.add_switch(group, "--compile", False, "compile the networks: slower to start, then faster")
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


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import numpy as np

from datasets import DataSource, build_source
from datasets.base import DatasetInfo, check_shown, read_mask
from tools import devices
from tools.claims import claim, share_folder
from tools.files import load_image, save_mask
from tools.merging import merge_masks
from tools.proposals import ProposalGenerator, SamGenerator, load_proposals, load_sam, save_proposals
from tools.proposals.files import MaskFiles
from tools.proposals.regions import RegionGenerator

SAM_OPTIONS = ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh")
SAM_OPTIONS += ("crop_n_layers", "min_mask_region_area")
MERGE_OPTIONS = ("mode", "order", "inside_threshold", "recall_threshold", "keep_ignore")


def main(args: argparse.Namespace) -> None:
    """Run the steps asked for on this process's share of the images."""
    check_flags(args)
    source = build_source(args.dataset, options.data_dir(args))
    index, number = args.shard or (parallel.rank(), parallel.world_size())
    listed = source.ids(args.domain)
    ids = listed[index::number]
    if args.stage != "propose":
        check_present(args.pseudo_dir, ids, ".png", "the pseudo masks of inference.py with --pseudo_dir")
        check_shown(filter(Path.is_file, (args.pseudo_dir / f"{image_id}.png" for image_id in listed)), source.info)
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
    if args.stage != "merge" and args.proposals == "files" and args.mask_files is None:
        raise UserError("--mask_files: missing. Pass the folder that holds the masks of --proposals files.")


def check_present(folder: Path, ids: Sequence[str], suffix: str, remedy: str) -> None:
    """Raise UserError unless `folder` has a file of every id."""
    missing = [image_id for image_id in ids if not (folder / f"{image_id}{suffix}").is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]}{suffix} is missing ({len(missing)} of {len(ids)} are). Pass {remedy}.")


def proposals_dir(args: argparse.Namespace) -> Path:
    """Where the proposals lie."""
    return args.proposals_dir or options.predictions_dir(args.tag, args.domain) / f"proposals-{args.proposals}"


def refined_dir(args: argparse.Namespace) -> Path:
    """Where the refined masks lie, named after what made them."""
    order = "" if args.order == "class" else f"-{args.order}"
    return options.predictions_dir(args.tag, args.domain) / f"sam-{args.proposals}-{args.mode}{order}"


class ImageJob(NamedTuple):
    """An image that needs proposals."""

    image_id: str
    image: Path
    proposals: Path


class MaskJob(NamedTuple):
    """A pseudo mask that is to be refined."""

    pseudo_mask: Path
    proposals: Path
    refined: Path


def propose(args: argparse.Namespace, source: DataSource, ids: Sequence[str]) -> None:
    """Write the proposals of the images that have none yet."""
    folder = proposals_dir(args)
    jobs = [ImageJob(image_id, source.image_path(image_id), folder / f"{image_id}.json") for image_id in ids]
    share_folder(folder, proposal_settings(args), [job.proposals for job in jobs])
    pending = [job for job in jobs if not job.proposals.exists()]
    print(f"Proposals: {len(ids)} images, {len(ids) - len(pending)} done already; writing to {folder}")
    if pending:
        generator = build_generator(args)
        done = work_through(
            functools.partial(propose_batch, generator, folder),
            pending,
            name="proposals",
            batch_size=generator.images_per_call,
            processes=args.num_workers,
            # SAM has one device: while a thread uses it, another reads and writes files.
            threads=2 if args.proposals == "sam" and args.num_workers else 0,
        )
        collections.deque(done, maxlen=0)
    print(f"Proposals are in {folder}")
    if args.stage == "propose":
        print("Next: the same command with --stage merge --pseudo_dir FOLDER")


def proposal_settings(args: argparse.Namespace) -> dict[str, object]:
    """What the proposals depend on."""
    if args.proposals == "regions":
        return {"proposals": "regions"} | vars(build_generator(args))
    if args.proposals == "files":
        return {"proposals": "files", "mask_files": str(args.mask_files)}
    options = {name: getattr(args, name) for name in SAM_OPTIONS}
    options["precision"] = str(devices.autocast_dtype(args.mixed_precision, devices.select_device(args.device)))
    return {"proposals": "sam", "checkpoint": args.checkpoint.name, "model_type": args.model_type} | options


def build_generator(args: argparse.Namespace) -> ProposalGenerator:
    """The backend that --proposals names."""
    if args.proposals == "regions":
        return RegionGenerator(max_size=args.region_max_size, min_contrast=args.region_min_contrast)
    if args.proposals == "files":
        return MaskFiles(args.mask_files)
    device = devices.select_device(args.device)
    return SamGenerator(
        load_sam(args.checkpoint, args.model_type, device),
        dtype=devices.autocast_dtype(args.mixed_precision, device),
        compile=args.compile,
        images_per_call=args.images_per_batch,
        points_per_batch=args.points_per_batch,
        **{name: getattr(args, name) for name in SAM_OPTIONS},
    )


def propose_batch(generator: ProposalGenerator, folder: Path, jobs: Sequence[ImageJob]) -> list[bool | None]:
    """Write the proposals of some images below `folder`; for each True, or None if another process is at it."""
    with contextlib.ExitStack() as claims:
        mine = [claims.enter_context(claim(folder, job.proposals)) for job in jobs]
        todo = [job for job, is_mine in zip(jobs, mine, strict=True) if is_mine and not job.proposals.exists()]
        if todo:
            images = [load_image(job.image) for job in todo]
            found = generator([job.image_id for job in todo], images)
            for job, image, masks in zip(todo, images, found, strict=True):
                save_proposals(job.proposals, masks, image.shape[:2])
    return [True if is_mine or job.proposals.exists() else None for job, is_mine in zip(jobs, mine, strict=True)]


def merge(args: argparse.Namespace, info: DatasetInfo, ids: Sequence[str]) -> None:
    """Write the refined masks that are not there yet, and report what changed over all of them."""
    proposals, folder = proposals_dir(args), refined_dir(args)
    check_present(proposals, ids, ".json", "the same flags with --stage propose first")
    options = {name: getattr(args, name) for name in MERGE_OPTIONS}
    settings = {"proposals": str(args.proposals_dir or args.proposals), "pseudo_dir": str(args.pseudo_dir)}
    jobs = [
        MaskJob(args.pseudo_dir / f"{image_id}.png", proposals / f"{image_id}.json", folder / f"{image_id}.png")
        for image_id in ids
    ]
    share_folder(folder, options | settings, [job.refined for job in jobs])
    done = sum(job.refined.exists() for job in jobs)
    print(f"Merging: {len(ids)} images, {done} done already; writing to {folder}")
    work = functools.partial(merge_batch, info, options, folder)
    changes = sum(work_through(work, jobs, name="merging", batch_size=4, processes=args.num_workers))
    print_changes(info, changes)
    print(f"Refined masks are in {folder}")
    print(f"Next: python train_segmentation.py --tag TAG --masks_dir {folder}   (plus the data flags)")


def merge_batch(info: DatasetInfo, options: dict, folder: Path, jobs: Sequence[MaskJob]) -> list[np.ndarray | None]:
    """`merge_file` for several."""
    return [merge_file(info, options, folder, job) for job in jobs]


def merge_file(info: DatasetInfo, options: dict[str, object], folder: Path, job: MaskJob) -> np.ndarray | None:
    """Refine one pseudo mask, into `folder`, unless that is done.

    Returns:
        int64 [C+1, C+1], pixels by class before (rows) and after (columns); the last of both is ignore. None if another
        process is at this mask.

    Raises:
        UserError: a file cannot be used, the two differ in size, or the mask has a class that the dataset has not.
    """
    pseudo_mask = read_mask(job.pseudo_mask, info)
    before = with_ignore_last(info, pseudo_mask)
    if not job.refined.exists():
        with claim(folder, job.refined) as mine:
            if mine and not job.refined.exists():
                masks = load_proposals(job.proposals, pseudo_mask.shape)
                save_mask(job.refined, merge_masks(pseudo_mask, masks, **options), info.palette)
            elif not mine:
                return None
    after = with_ignore_last(info, read_mask(job.refined, info))
    side = info.num_classes + 1
    return np.bincount((before * side + after).ravel(), minlength=side**2).reshape(side, side)


def with_ignore_last(info: DatasetInfo, mask: np.ndarray) -> np.ndarray:
    """The mask as int64 with C in place of the ignore index."""
    return np.where(mask == info.ignore_index, info.num_classes, mask.astype(np.int64))


@contextlib.contextmanager
def mapper(processes: int, threads: int) -> Iterator[Callable]:
    """Yield a function like `map` that uses `threads` if there are any, else `processes`, else only this thread."""
    if threads:
        with ThreadPool(threads) as pool:
            yield pool.imap
    elif processes:
        with process_pool(processes, start_worker) as pool:
            yield pool.imap
    else:
        yield map


def start_worker() -> None:
    """A worker ends when the script is killed."""
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work_through(
    work: Callable, jobs: Sequence, *, name: str, batch_size: int, processes: int, threads: int = 0
) -> Iterator:
    """Yield a result for every job, with a progress bar called `name`.

    Args:
        work: takes up to `batch_size` jobs and returns as many results; None for a job that another process is at. Such
            a job comes up again until that process has finished it, or has died.
    """
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    postponed = []
    with mapper(min(processes, len(batches)), threads) as map_batches:
        results = itertools.chain.from_iterable(map_batches(work, batches))
        for job, result in zip(jobs, parallel.progress(results, total=len(jobs), desc=name, unit="image"), strict=True):
            if result is None:
                postponed.append(job)
            else:
                yield result
    while postponed:
        waiting = []
        for job in postponed:
            (result,) = work([job])
            if result is None:
                waiting.append(job)
            else:
                yield result
        if len(waiting) == len(postponed):
            time.sleep(0.5)
        postponed = waiting


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
    cli.run(main, ARGS)
