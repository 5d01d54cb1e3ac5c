"""Which masks to look at first: how far the stages of a run disagree on an image. Needs no ground truth.

    reasons = doubt(refined, [cam_cut, pseudo_mask, prediction], label)
    reasons.score, reasons.disagreement, reasons.missing
    save_queue("review.csv", rows, titles)         # the most doubtful image first

Where a mask is right, the stages that came after it agree with it; where one of them is wrong, another often says so.
docs/review.md has what the score is worth on photographs.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.errors import UserError
from tools.files import DELIMITERS, atomic_write, read_text, reading
from tools.metrics import confusion_counts
from tools.options import IGNORE_INDEX

SMALLEST_SHARE = 0.002
"""A labelled class that covers less of the image than this counts as missing."""


@dataclass(frozen=True)
class Doubt:
    """Reasons to look at an image, each in [0, 1]."""

    disagreement: float  # 1 - IoU (`image_iou`) of the mask and another stage's, mean over those; 0 if there is none
    missing: float  # the share of the image's labelled classes that the mask does not show; 0 if none is labelled

    @property
    def score(self) -> float:
        """Mean of the reasons."""
        return (self.disagreement + self.missing) / 2


@dataclass(frozen=True)
class Row:
    """One image of the review queue: its doubt, and the IoU of its masks by title (empty without ground truth)."""

    image_id: str
    doubt: Doubt
    ious: dict[str, float] = field(default_factory=dict)


def doubt(mask: np.ndarray, others: Sequence[np.ndarray], label: np.ndarray | None = None) -> Doubt:
    """The doubt about a mask.

    Args:
        mask: uint8 [H, W]; 255 undecided.
        others: masks of the same image from other stages.
        label: multi-hot [K], the image's label; None: unknown.
    """
    distances = [1 - image_iou(other, mask) for other in others]
    missing = 0.0 if label is None else _missing(mask, label)
    return Doubt(float(np.mean(distances)) if distances else 0.0, missing)


def _missing(mask: np.ndarray, label: np.ndarray) -> float:
    present = 1 + np.flatnonzero(label)
    shares = np.bincount(mask.ravel(), minlength=256)[present] / mask.size
    return float((shares < SMALLEST_SHARE).mean()) if len(present) else 0.0


def image_iou(truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean IoU, in [0, 1], over the classes (background too) that occur in either mask of one image.

    Pixels that are 255 in `truth` do not count; of those left, pixels that are 255 in `mask` belong to no class there.
    1 if nothing is left.
    """
    counts = confusion_counts(truth, mask, IGNORE_INDEX)  # of all indices that a class may have
    hits = np.diagonal(counts)
    unions = counts.sum(axis=1) + counts[:, :-1].sum(axis=0) - hits
    return float((hits[unions > 0] / unions[unions > 0]).mean()) if unions.any() else 1.0


def queue(rows: Sequence[Row]) -> list[Row]:
    """The most doubtful image first; equals by id."""
    return sorted(rows, key=lambda row: (-row.doubt.score, row.image_id))


def save_queue(path: Path, rows: Sequence[Row], titles: Sequence[str]) -> None:
    """Write `review.csv`: id, doubt and its reasons, and the IoU of each of `titles` (empty without ground truth)."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "doubt", "disagreement", "missing", *(f"IoU {title}" for title in titles)])
        for row in rows:
            reasons = row.doubt.score, row.doubt.disagreement, row.doubt.missing
            ious = [f"{100 * row.ious[title]:.1f}" if title in row.ious else "" for title in titles]
            writer.writerow([row.image_id, *(f"{value:.4f}" for value in reasons), *ious])


def load_queue(path: Path) -> list[str]:
    """The ids of `review.csv`, the most doubtful first. A spreadsheet may have saved it again, with empty rows.

    Raises:
        UserError: missing, or not such a file.
    """
    remedy = "Write it with report.py."
    if not path.exists():
        raise UserError(f"{path}: no such review queue. {remedy}")
    with reading(path, "review queue", remedy), io.StringIO(read_text(path), newline="") as file:
        delimiter = max(DELIMITERS, key=file.readline().count)
        file.seek(0)
        rows = [row for row in csv.DictReader(file, delimiter=delimiter) if row.get("id")]
    if not rows or "doubt" not in rows[0]:
        raise UserError(f"{path}: no review queue (columns id, doubt, ...). {remedy}")
    return [row["id"] for row in rows]
