"""How good a segmentation is: confusion matrix, IoU, error rates, the sweep over background thresholds of CAMs; and how
well images are classified.

    counts = sum(confusion_counts(mask, prediction, num_classes=21) for mask, prediction in masks)
    print(scores(counts).miou)

    curve = sum(sweep_counts(mask, keys, cams, 21, threshold_range(0.05, 0.80, 0.05)) for mask, keys, cams in files)
    best = max(map(scores, curve), key=lambda s: s.miou)

Counts have one row per ground-truth class and one column per predicted class, plus a last column for pixels predicted
as `IGNORE_INDEX`: pseudo masks may leave pixels undecided. Such a pixel is a miss of its ground-truth class and a false
positive of none. Pixels whose ground truth is `IGNORE_INDEX` are not counted at all.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from tools.errors import UserError
from tools.files import read_json
from tools.options import IGNORE_INDEX


@dataclasses.dataclass(frozen=True)
class Scores:
    """The figures of one confusion matrix, in per cent; arrays are float64 [C], background first.

    For class i with TP = true positives, T = its ground-truth pixels, P = pixels predicted as i, U = T + P - TP:

        iou[i] = TP / U     false_positive[i] = (P - TP) / U     false_negative[i] = (T - TP) / U

    The error rates are over the union, as in SEAM, IRN (CVPR 2019) and Puzzle-CAM, so the three add up to 100: a class
    with many false positives is over-segmented, one with many false negatives under-segmented. A class with U = 0
    (`absent`) gets 0 in all three and stays in the means, as in the public tables.
    """

    iou: np.ndarray
    false_positive: np.ndarray
    false_negative: np.ndarray
    absent: tuple[int, ...]

    @property
    def miou(self) -> float:
        """Mean IoU over all classes, background included."""
        return float(self.iou.mean())

    @property
    def miou_foreground(self) -> float:
        """Mean IoU over the foreground classes; 0 if there are none."""
        return float(self.iou[1:].mean()) if len(self.iou) > 1 else 0.0


def scores(counts: np.ndarray) -> Scores:
    """Turn counts (int [C, C+1], see the module's docstring) into `Scores`."""
    hits = np.diagonal(counts).astype(np.float64)
    truth = counts.sum(axis=1)
    predicted = counts[:, :-1].sum(axis=0)
    union = truth + predicted - hits
    divisor = np.maximum(union, 1)
    return Scores(
        iou=100 * hits / divisor,
        false_positive=100 * (predicted - hits) / divisor,
        false_negative=100 * (truth - hits) / divisor,
        absent=tuple(np.flatnonzero(union == 0).tolist()),
    )


def load_scores(path: Path) -> dict[str, Any]:
    """Read a file written by `evaluate.py --output` (UserError: missing, or not such a file)."""
    content = read_json(path, "Write it with evaluate.py --output.")
    if not isinstance(content, dict) or not {"miou", "miou_foreground", "threshold", "iou"} <= content.keys():
        raise UserError(f"{path}: not a file of scores. Write it with evaluate.py --output.")
    return content


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of two masks of equal shape, integers 0..C-1 or 255: int64 [C, C+1] (see the module's docstring)."""
    assert truth.shape == predicted.shape, f"ground truth {truth.shape}, predictions {predicted.shape}"
    valid = truth != IGNORE_INDEX
    columns = np.where(predicted[valid] == IGNORE_INDEX, num_classes, predicted[valid].astype(np.int64))
    pairs = truth[valid].astype(np.int64) * (num_classes + 1) + columns
    return np.bincount(pairs, minlength=num_classes * (num_classes + 1)).reshape(num_classes, num_classes + 1)


def threshold_range(minimum: float, maximum: float, step: float) -> np.ndarray:
    """Thresholds minimum, minimum + step, ... up to and including `maximum`; float64, ascending, free of drift."""
    assert step > 0 and minimum <= maximum, f"minimum {minimum}, maximum {maximum}, step {step}"
    count = int(np.floor((maximum - minimum) / step + 1e-6)) + 1
    return np.round(minimum + step * np.arange(count), 10)


def sweep_counts(
    truth: np.ndarray, keys: np.ndarray, cams: np.ndarray, num_classes: int, thresholds: np.ndarray
) -> np.ndarray:
    """Counts of argmax[t; CAMs] for many background thresholds t, from one look at every pixel: int64 [T, C, C+1].

    Whatever t is, a pixel is either background or the class of its strongest CAM, and it is that class exactly where
    this CAM is greater than t (at equality argmax takes the first channel, the background). So a histogram over (ground
    truth, strongest class, number of thresholds below the CAM's value) holds every one of the matrices.

    Args:
        truth: integer [H, W]; 0..C-1 or 255.
        keys: int [n+1], 0 and then the class index (1..C-1) of every CAM.
        cams: float [n, H, W]; n may be 0: everything is background.
        thresholds: float [T], ascending.
    """
    assert len(thresholds) > 0 and np.all(np.diff(thresholds) > 0), f"thresholds must ascend, got {thresholds}"
    assert cams.shape == (len(keys) - 1, *truth.shape), f"{len(keys)} keys, CAMs {cams.shape}, mask {truth.shape}"
    valid = truth != IGNORE_INDEX
    truth = truth[valid].astype(np.int64)
    strongest, bins = np.zeros_like(truth), np.zeros_like(truth)
    if len(cams):
        cams = cams[:, valid].astype(np.float32)
        strongest = np.asarray(keys, dtype=np.int64)[1:][cams.argmax(axis=0)]
        # Single precision, as a threshold channel stacked on float32 CAMs would be: decides the ties.
        bins = np.searchsorted(thresholds.astype(np.float32), cams.max(axis=0), side="left")
    shape = (num_classes, num_classes, len(thresholds) + 1)
    index = np.ravel_multi_index((truth, strongest, bins), shape)
    histogram = np.bincount(index, minlength=math.prod(shape)).reshape(shape)
    up_to = histogram.cumsum(axis=2)[..., :-1]  # pixels whose strongest CAM is <= threshold j
    above = histogram.sum(axis=2, keepdims=True) - up_to
    matrices = np.concatenate((above, np.zeros_like(above[:, :1])), axis=1).transpose(2, 0, 1)
    matrices[:, :, 0] += up_to.sum(axis=1).T
    return matrices


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well classes are recognised in images, in per cent: means over the classes that some image has (0 without).

    "precision" and "recall" take a class for present where its probability is above one half; a class never taken so
    has precision 0. "average_precision" is the area under precision over recall as the decision threshold varies.

    Args:
        logits: float [N, K].
        labels: multi-hot [N, K].
    """
    assert logits.shape == labels.shape, f"logits {logits.shape}, labels {labels.shape}"
    truth, predicted = labels > 0, logits > 0
    hits = (truth & predicted).sum(axis=0)
    per_class = {
        "average_precision": np.array([100 * average_precision(*pair) for pair in zip(logits.T, truth.T, strict=True)]),
        "precision": 100 * hits / np.maximum(predicted.sum(axis=0), 1),
        "recall": 100 * hits / np.maximum(truth.sum(axis=0), 1),
    }
    occurs = truth.any(axis=0)
    return {name: float(values[occurs].mean()) if occurs.any() else 0.0 for name, values in per_class.items()}


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Sum of (rise in recall) * precision over the thresholds at the distinct scores; 0 if nothing is true."""
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], truth[order].cumsum()
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # equal scores are accepted together
    hits, accepted = hits[last], np.flatnonzero(last) + 1
    rises = np.diff(hits, prepend=0)
    return float((rises * hits / accepted).sum() / max(truth.sum(), 1))
