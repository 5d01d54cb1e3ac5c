"""Metrics against plain loops, argmax at every threshold, and the golden vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.metrics import (
    average_precision,
    classification_scores,
    confusion_counts,
    scores,
    sweep_counts,
    threshold_range,
)

GOLDEN = Path(__file__).parent / "golden" / "evaluation.npz"


def plain_scores(pairs, num_classes):
    """IoU, FP and FN per class, pixel by pixel, from their definitions."""
    rows = []
    for c in range(num_classes):
        tp = fp = fn = 0
        for mask, prediction in pairs:
            for truth, guess in zip(mask.flatten().tolist(), prediction.flatten().tolist(), strict=True):
                if truth != 255:
                    tp += truth == c and guess == c
                    fp += truth != c and guess == c
                    fn += truth == c and guess != c
        union = max(tp + fp + fn, 1)
        rows.append([100 * tp / union, 100 * fp / union, 100 * fn / union])
    return np.array(rows).T


def confusion(pairs, num_classes):
    none = np.zeros((num_classes, num_classes + 1), np.int64)
    return sum((confusion_counts(*pair, num_classes) for pair in pairs), start=none)


def random_mask(rng, num_classes, size):
    return rng.choice([*range(num_classes), 255], size=size).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(1, 5), images=st.integers(1, 3))
def test_confusion_matrix_equals_plain_loops(seed, num_classes, images):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 8, 2)
    pairs = [(random_mask(rng, num_classes, size), random_mask(rng, num_classes, size)) for _ in range(images)]
    got = scores(confusion(pairs, num_classes))
    np.testing.assert_allclose([got.iou, got.false_positive, got.false_negative], plain_scores(pairs, num_classes))
    sums = got.iou + got.false_positive + got.false_negative
    np.testing.assert_allclose(sums, [0 if c in got.absent else 100 for c in range(num_classes)])


def test_perfect_prediction_with_an_absent_class():
    mask = np.array([[0, 1], [255, 0]], np.uint8)
    got = scores(confusion([(mask, np.where(mask == 255, 2, mask))], 4))
    assert got.absent == (2, 3)
    assert got.miou == 50.0  # absent classes stay in the mean, as 0
    assert got.miou_foreground == pytest.approx(100 / 3)


def test_undecided_pixels_are_misses_and_no_false_positives():
    mask, prediction = np.array([[1, 1, 0]], np.uint8), np.array([[1, 255, 255]], np.uint8)
    got = scores(confusion([(mask, prediction)], 2))
    np.testing.assert_allclose(got.iou, [0, 50])
    np.testing.assert_allclose(got.false_negative, [100, 50])
    np.testing.assert_allclose(got.false_positive, [0, 0])


def test_everything_ignored_and_empty_batches_count_nothing():
    ignored = np.full((3, 2), 255, np.uint8)
    empty = np.zeros((0, 4, 4), np.uint8)
    got = scores(confusion([(ignored, np.ones_like(ignored)), (empty, empty)], 2))
    assert got.miou == 0 and got.absent == (0, 1)


def test_background_only_dataset_has_no_foreground_mean():
    assert scores(confusion([(np.zeros((2, 2), np.uint8),) * 2], 1)).miou_foreground == 0


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="predictions"):
        confusion_counts(np.zeros((2, 2)), np.zeros((2, 3)), 2)


def test_threshold_range_includes_its_end_and_does_not_drift():
    assert threshold_range(0.05, 0.80, 0.05).tolist() == [round(0.05 * i, 2) for i in range(1, 17)]
    assert threshold_range(0.3, 0.3, 0.1).tolist() == [0.3]
    assert threshold_range(0.1, 0.45, 0.1).tolist() == [0.1, 0.2, 0.3, 0.4]
    assert threshold_range(0.1, 0.7, 0.1).tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "though 0.6 / 0.1 < 6"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), present=st.integers(0, 3), ties=st.booleans())
def test_sweep_equals_argmax_at_every_threshold(seed, present, ties):
    rng = np.random.default_rng(seed)
    num_classes, thresholds = 5, threshold_range(0.0, 1.0, 0.1)
    counts, pairs = 0, [[] for _ in thresholds]
    for _ in range(3):
        mask = random_mask(rng, num_classes, rng.integers(1, 9, 2))
        keys = np.concatenate([[0], rng.permutation(np.arange(1, num_classes))[:present]])
        cams = rng.random((present, *mask.shape), np.float32)
        if ties:  # exactly at thresholds, and equal to each other
            cams = thresholds.astype(np.float32)[(cams * len(thresholds)).astype(int)]
        counts = counts + sweep_counts(mask, keys, cams, num_classes, thresholds)
        for j, t in enumerate(thresholds):
            stack = np.concatenate([np.full((1, *mask.shape), t, np.float32), cams])
            pairs[j].append((mask, keys[stack.argmax(axis=0)].astype(np.uint8)))
    expected = np.stack([confusion(p, num_classes) for p in pairs])
    np.testing.assert_array_equal(counts, expected)


def test_sweep_reproduces_golden_vectors():
    golden = np.load(GOLDEN)
    thresholds = golden["thresholds"]
    num_classes, files = golden["iou_per_threshold_per_class"].shape[1], range(6)
    parts = ([golden[f"{name}_{i}"] for name in ("gt", "keys", "cam")] for i in files)
    curve = [scores(counts) for counts in sum(sweep_counts(*part, num_classes, thresholds) for part in parts)]
    np.testing.assert_allclose([s.iou for s in curve], golden["iou_per_threshold_per_class"], atol=1e-6, rtol=0)
    np.testing.assert_allclose([s.miou for s in curve], golden["miou"], atol=1e-6, rtol=0)


def test_sweep_rejects_unordered_thresholds_and_wrong_shapes():
    with pytest.raises(AssertionError, match="ascend"):
        sweep_counts(np.zeros((2, 2)), np.array([0]), np.zeros((0, 2, 2)), 2, np.array([0.2, 0.1]))
    with pytest.raises(AssertionError, match="CAMs"):
        sweep_counts(np.zeros((2, 2)), np.array([0, 1]), np.zeros((1, 2, 3)), 2, np.array([0.2]))


# -- classification --------------------------------------------------------------------------------------------------
def plain_average_precision(scores, truth):
    """From the definition: accept everything at or above each score in turn, highest first."""
    area = recall_before = 0.0
    for threshold in sorted(set(scores), reverse=True):
        accepted = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        recall = sum(accepted) / sum(truth)
        area += (recall - recall_before) * sum(accepted) / len(accepted)
        recall_before = recall
    return area


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_average_precision_equals_its_definition(pairs):
    scores, truth = [float(s) for s, _ in pairs], [t for _, t in pairs]
    expected = plain_average_precision(scores, truth) if any(truth) else 0.0
    assert average_precision(np.array(scores), np.array(truth)) == pytest.approx(expected)


def test_average_precision_of_a_worked_example():
    """The example in scikit-learn's documentation of average_precision_score."""
    assert average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == pytest.approx(
        5 / 6
    )
    assert average_precision(np.zeros(0), np.zeros(0, bool)) == 0


def test_precision_and_recall_of_classes():
    logits = np.array([[2.0, -1, -1], [1, 3, -1], [-1, 2, -1]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    got = classification_scores(logits, labels)
    assert got["precision"] == got["recall"] == (50 + 100) / 2  # no image has the third class
    assert got["average_precision"] == pytest.approx((100 * (1 / 2 + 1 / 2 * 2 / 3) + 100) / 2)
    assert classification_scores(logits[:, ::2], labels[:, ::2])["recall"] == 50
    assert classification_scores(logits / 10, labels) == got, "present above one half, a logit of 0"
    assert set(classification_scores(logits, 0 * labels).values()) == {0}
