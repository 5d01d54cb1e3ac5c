"""Score predictions against ground truth: IoU per class, mean IoU, and false positive and false negative rates.

Pseudo masks or segmentations (one PNG of class indices per image):

    python evaluate.py --dataset voc12 --domain train --pred_dir experiments/predictions/TAG@train/masks --mode png

CAM files (one NPZ per image), with every background threshold from --min_th to --max_th in one pass over the files:

    python evaluate.py --dataset voc12 --domain train --pred_dir experiments/predictions/TAG@train/cams --mode cams

The archive for VOC's server. Only this server can score the test split of VOC 2012 (SETUP.md):

    python evaluate.py --domain test --pred_dir experiments/predictions/TAG@test/masks --package voc12-test

The table shows the threshold with the highest mean IoU, or that of --threshold. After a sweep it also shows the best
threshold of each class. FILE.json and FILE.csv hold the scores of every class at every threshold.

Every image of the split must have a readable prediction, as large as its ground truth. A missing or damaged prediction
is an error; it is never skipped. Pixels that are 255 in the ground truth do not count. Pixels predicted as 255
(undecided) are false negatives of their ground-truth class, but false positives of no class. FP and FN are per cent of
the union of ground truth and prediction, so IoU + FP + FN = 100. A class that occurs in neither counts as 0 in the
means; a warning names it.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Sequence
from pathlib import Path

from tools import cli, options, parallel
from tools.errors import UserError

PACKAGES = {"voc12-test": "comp6_test_cls", "voc12-test-comp5": "comp5_test_cls"}
"""Values of --package, and their competitions: comp6 allows any training data, comp5 only VOC's own (no ImageNet
weights, no SBD)."""


def make_parser() -> cli.Parser:
    """The command line of this script."""
    parser = cli.Parser(__doc__)
    group = options.add_dataset(parser, domain=("train", "split whose ids are scored"))
    group.add_argument("--masks_dir", type=Path, help="folder of ground-truth masks (default: the dataset's own)")
    group = parser.add_argument_group("predictions")
    group.add_argument("--pred_dir", type=Path, required=True, help="folder of ID.png masks or ID.npz CAM files")
    group.add_argument("--mode", choices=["png", "cams"], default="png", help="what --pred_dir holds")
    group.add_argument("--cam_format", choices=["npz", "npy"], default="npz", help="npy: other projects' pickled files")
    group = parser.add_argument_group("background threshold (--mode cams)")
    group.add_argument("--min_th", type=cli.fraction, default=0.05, help="lowest threshold")
    group.add_argument("--max_th", type=cli.fraction, default=0.80, help="highest threshold, included")
    group.add_argument("--step_th", type=cli.fraction, default=0.05, help="distance between thresholds")
    group.add_argument("--threshold", type=cli.fraction, help="score this single threshold instead of the sweep")
    group = parser.add_argument_group("run")
    group.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores here, and FILE.csv beside it")
    group.add_argument(
        "--package", choices=list(PACKAGES), help="write the archive for VOC's server, no scores (--output FILE.tar.gz)"
    )
    options.add_shared(group, "num_workers")
    return parser


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import numpy as np

from datasets import build_source
from datasets.base import DatasetInfo, DataSource, read_mask
from datasets.exchange.voc_server import write_package
from tools import identity
from tools.cam_files import read_cams
from tools.files import atomic_write, check_present, check_size, check_writable, file_of, save_json
from tools.metrics import Scores, confusion_counts, scores, sweep_counts, threshold_range

PREDICT = "Finish the stage that writes the predictions, or check --pred_dir, --mode, --cam_format and --domain."
IDS_PER_JOB = 16  # small, so that the progress bar moves; not 1, because every job sends all counts between processes

Thresholds = Sequence[float | None]
"""Background thresholds, ascending; [None] for masks, which have none."""


def main(args: argparse.Namespace) -> None:
    """Score the split. The best threshold is the one with the highest mIoU (of equals, the lowest)."""
    if args.package:
        package(args)
        return
    if parallel.launched():  # only then PyTorch is imported: that takes longer than many an evaluation
        from tools import distributed

        distributed.start(options.EXPERIMENTS)
    if args.output:
        check_writable(args.output.parent)
    thresholds = select_thresholds(args)
    source = build_source(args.dataset, options.data_dir(args), args.masks_dir)
    ids = source.ids(args.domain)
    suffix = f".{args.cam_format}" if args.mode == "cams" else ".png"
    source.check_masks(ids)
    check_present(args.pred_dir, ids, suffix, PREDICT)
    identity.check_classes(args.pred_dir, source.info.classes[1:], source.fingerprints(ids))
    made_by = identity.read_record(args.pred_dir / identity.RECORD)
    origin = identity.sentence(made_by) if made_by else f"{args.pred_dir}, without a record of what made them"
    print(f"Predictions: {origin}")

    counts = count(source, ids, args.pred_dir, suffix, thresholds, parallel.own_workers(args.num_workers))
    curve = [scores(matrix) for matrix in counts]
    best = int(np.argmax([score.miou for score in curve]))

    print_table(source.info, curve[best], peaks(thresholds, curve))
    if args.mode == "cams":
        print_curve(thresholds, curve, best)
    if not counts[0, :, 1:-1].any() and counts[0, :, -1].any():
        print("Warning: the predictions hold only 0 and 255 (undecided). If 255 is the object, save it as 1.")
    print(f"\nmIoU {curve[best].miou:.2f}  foreground mIoU {curve[best].miou_foreground:.2f}  ({len(ids)} images)")
    if args.output and parallel.is_main():
        what = {"dataset": args.dataset, "domain": args.domain, "pred_dir": str(args.pred_dir), "images": len(ids)}
        what |= provenance(args, source, ids, made_by)
        save_json(args.output, summary(source.info, thresholds, curve, best) | what)
        save_csv(args.output.with_suffix(".csv"), source.info, thresholds, curve)
        print(f"Scores are in {args.output} and {args.output.with_suffix('.csv')}")


def package(args: argparse.Namespace) -> None:
    """Write the archive for VOC's server (UserError: flags that contradict each other; and see `write_package`)."""
    path = args.output or args.pred_dir.parent / f"{args.package}.tar.gz"
    if not path.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"--output {path}: the server takes .tar.gz or .tgz. Change the name.")
    if args.mode != "png" or args.domain != "test":
        raise UserError("--package: needs masks of the test split. Pass --domain test and --mode png.")
    source = build_source(args.dataset, options.data_dir(args))
    ids = source.ids(args.domain)
    check_present(args.pred_dir, ids, ".png", PREDICT)
    write_package(path, PACKAGES[args.package], args.pred_dir, source, ids)
    print(f"{len(ids)} masks ({PACKAGES[args.package]}) are in {path}. Send it to http://host.robots.ox.ac.uk:8080/")


def provenance(args: argparse.Namespace, source: DataSource, ids: Sequence[str], made_by: dict) -> dict:
    """The identities of the predictions (`made_by`; {} if unknown) and of this evaluation, for FILE.json."""
    harmless = ("output", "pred_dir")
    ours = identity.describe("evaluate.py", vars(args), inputs=source.fingerprints(ids, masks=True), harmless=harmless)
    return {"made_by": identity.digest(made_by), "identity": identity.digest(ours)}


def select_thresholds(args: argparse.Namespace) -> Thresholds:
    """The thresholds that the flags ask for.

    Raises:
        UserError: the flags contradict each other, or --output does not name a .json file.
    """
    if args.output and args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: must end in .json (the table goes beside it as .csv).")
    if args.mode == "png":
        if args.threshold is not None:
            raise UserError("--threshold: masks have no threshold. Drop it, or pass --mode cams.")
        return [None]
    if args.threshold is not None:
        return [args.threshold]
    if args.step_th == 0 or args.min_th > args.max_th:
        raise UserError(
            f"--min_th {args.min_th} --max_th {args.max_th} --step_th {args.step_th}: an empty sweep. "
            "Choose min_th <= max_th and step_th > 0."
        )
    return threshold_range(args.min_th, args.max_th, args.step_th).tolist()


def count(
    source: DataSource, ids: Sequence[str], pred_dir: Path, suffix: str, thresholds: Thresholds, workers: int
) -> np.ndarray:
    """Counts over all `ids`, int64 [thresholds, C, C+1] (see `tools.metrics`).

    Processes share the images. Each process gets the counts of all images.

    Args:
        suffix: of the prediction files.
        workers: processes; 0: this one only.

    Raises:
        UserError: a file cannot be used; the first one, in the order of the ids.
    """
    work = functools.partial(count_part, source, pred_dir, suffix, thresholds)
    mine = parallel.share(ids)
    parts = [mine[start : start + IDS_PER_JOB] for start in range(0, len(mine), IDS_PER_JOB)]
    classes = source.info.num_classes
    none = np.zeros((len(thresholds), classes, classes + 1), np.int64)
    counts = sum(parallel.run_jobs(work, parts, workers, "evaluating", f"x{IDS_PER_JOB} images"), start=none)
    if not parallel.launched():
        return counts
    from tools import distributed

    return distributed.sum_of_shares(counts)


def count_part(
    source: DataSource, pred_dir: Path, suffix: str, thresholds: Thresholds, ids: Sequence[str]
) -> np.ndarray:
    """`count` of some images, in this process."""
    counts, classes = 0, source.info.num_classes
    for image_id in ids:
        truth, path = source.mask(image_id), file_of(pred_dir, image_id, suffix)
        if suffix == ".png":
            prediction = read_mask(path, source.info)
            check_size(path, prediction.shape, truth.shape)
            counts = counts + confusion_counts(truth, prediction, classes)[None]
        else:
            cams = read_cams(path, truth.shape, classes)
            counts = counts + sweep_counts(truth, *cams, classes, np.array(thresholds))
    return counts


def peaks(thresholds: Thresholds, curve: Sequence[Scores]) -> list[tuple[float, float]]:
    """For each class, its best threshold (of equals, the lowest) and the IoU there; empty without a sweep."""
    if len(curve) == 1:
        return []
    ious = np.stack([score.iou for score in curve])
    return [(thresholds[best], iou) for best, iou in zip(ious.argmax(axis=0), ious.max(axis=0).tolist(), strict=True)]


def print_table(info: DatasetInfo, score: Scores, best: Sequence[tuple[float, float]]) -> None:
    """Print one line per class, the means, and a warning with the classes that never occur."""
    width = max(len("class"), *(len(name) for name in info.classes))
    print(f"{'class':<{width}}  {'IoU':>6}  {'FP':>6}  {'FN':>6}   (%){'  best IoU, at threshold' if best else ''}")
    notes = [f"       {iou:8.2f}  {threshold:12.3g}" for threshold, iou in best] or [""] * info.num_classes
    for *row, note in zip(info.classes, score.iou, score.false_positive, score.false_negative, notes, strict=True):
        print("{:<{width}}  {:6.2f}  {:6.2f}  {:6.2f}".format(*row, width=width) + note)
    means = score.miou, score.false_positive.mean(), score.false_negative.mean()
    print("{:<{width}}  {:6.2f}  {:6.2f}  {:6.2f}".format("mean", *means, width=width))
    if score.absent:
        names = ", ".join(info.classes[i] for i in score.absent)
        print(f"Warning: neither in ground truth nor predicted, counted as 0 in the means: {names}.")


def print_curve(thresholds: Thresholds, curve: Sequence[Scores], best: int) -> None:
    """Print the means at every threshold, and mark the best."""
    print("\nthreshold    mIoU      FP      FN   (%)")
    for index, (threshold, score) in enumerate(zip(thresholds, curve, strict=True)):
        means = f"{score.miou:6.2f}  {score.false_positive.mean():6.2f}  {score.false_negative.mean():6.2f}"
        mark = "  <- best" if index == best and len(curve) > 1 else ""
        if threshold == options.PSEUDO_MASK_THRESHOLD:
            mark += "  <- default of inference.py"
        print(f"{threshold:9.3g}  {means}{mark}")
    if len(curve) > 1 and best in (0, len(curve) - 1):
        print("Warning: the best threshold is at the edge of the sweep. Widen it with --min_th or --max_th.")


def summary(info: DatasetInfo, thresholds: Thresholds, curve: Sequence[Scores], best: int) -> dict:
    """The content of --output, in per cent. For masks, `threshold` is None and `curve` is empty.

    `best_per_class` is empty without a sweep.
    """

    def per_class(values: np.ndarray) -> dict[str, float]:
        return dict(zip(info.classes, values.tolist(), strict=True))

    score, highest = curve[best], peaks(thresholds, curve)
    return {
        "miou": score.miou,
        "miou_foreground": score.miou_foreground,
        "threshold": thresholds[best],
        "iou": per_class(score.iou),
        "false_positive": per_class(score.false_positive),
        "false_negative": per_class(score.false_negative),
        "absent": [info.classes[i] for i in score.absent],
        "best_per_class": {
            name: {"threshold": t, "iou": iou} for name, (t, iou) in zip(info.classes, highest, strict=False)
        },
        "curve": [
            {"threshold": t, "miou": s.miou, "miou_foreground": s.miou_foreground, "iou": per_class(s.iou)}
            for t, s in zip(thresholds, curve, strict=True)
            if t is not None
        ],
    }


def save_csv(path: Path, info: DatasetInfo, thresholds: Thresholds, curve: Sequence[Scores]) -> None:
    """Write one row per threshold and class, in per cent; for masks, the threshold is empty."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["threshold", "class", "iou", "false_positive", "false_negative"])
        for threshold, score in zip(thresholds, curve, strict=True):
            columns = zip(info.classes, score.iou, score.false_positive, score.false_negative, strict=True)
            writer.writerows([threshold, name, *(f"{value:.4f}" for value in values)] for name, *values in columns)


if __name__ == "__main__":
    cli.run(main, ARGS)
