"""The memory bank against golden values and a deque; the contrastive loss against its formula; corner cases of both."""

from __future__ import annotations

import inspect
import math
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tools.memory_bank import MemoryBank, contrastive_loss, entropy_masks, feed_bank, sample_anchors

GOLDEN = Path(__file__).parent / "golden"


def keys(bank: MemoryBank, c: int) -> torch.Tensor:
    """All keys of a class, in no particular order."""
    return bank.storage[bank.starts[c] : bank.starts[c] + bank.sizes[c]]


def load(name):
    """Golden arrays as tensors, and what `feed_bank` and `contrastive_loss` share."""
    data = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name).items()}
    labels = torch.cat([data["labeled_masks"], data["unlabeled_masks"]]).long()
    image_labels = torch.cat([data["image_labels_labeled"], data["image_labels_unlabeled"]])
    return data, labels, image_labels


def sorted_rows(keys):
    return keys[np.lexsort(keys.numpy().T)]


def test_bank_golden_over_two_steps():
    data, labels, image_labels = load("memory_bank.npz")
    bank = MemoryBank(num_classes=7, dim=16, queue_size=60, background_queue_size=60)
    ranks = data["low_rank"].item(), data["high_rank"].item()
    high_entropy, push, new = data["high_entropy_mask"][2:, 0], bank.push, []
    bank.push = lambda c, vectors, mask: (new.append(mask.sum()), push(c, vectors, mask))
    for factor, count, contents in ((1, "new_keys", "bank"), (2, "new_keys_second_step", "bank_after_second_step")):
        reps = data["teacher_rep"] * factor
        feed_bank(bank, reps, labels, data["teacher_prob"], image_labels, high_entropy, *ranks)
        assert torch.equal(torch.stack(new[-7:]), data[count])
        for c in range(7):
            assert torch.equal(sorted_rows(keys(bank, c)), sorted_rows(data[f"{contents}_{c}"]))


def test_contrastive_loss_golden():
    data, labels, image_labels = load("contrastive_loss.npz")
    everything = torch.ones_like(labels[2:], dtype=torch.bool)
    loss = contrastive_loss(
        MemoryBank(num_classes=7, dim=16, queue_size=400, background_queue_size=500),
        data["student_rep"],
        data["teacher_rep"],
        labels,
        data["teacher_prob"],
        image_labels,
        low_entropy=everything,
        high_entropy=~everything,
        low_rank=data["low_rank"].item(),
        high_rank=data["high_rank"].item(),
        num_anchors=data["num_queries"].item(),
        num_negatives=data["num_negatives"].item(),
        temperature=data["temperature"].item(),
    )
    assert loss.item() == pytest.approx(data["loss"].item(), abs=1e-4)


def test_published_numbers_are_the_defaults():
    data, *_ = load("contrastive_loss.npz")
    defaults = {name: each.default for name, each in inspect.signature(contrastive_loss).parameters.items()}
    for name, golden in (("num_anchors", "num_queries"), ("num_negatives",) * 2, ("temperature",) * 2):
        assert defaults[name] == data[golden].item()
    assert MemoryBank(num_classes=3, dim=1).capacities == [50_000, 30_000, 30_000]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.lists(st.booleans(), min_size=1, max_size=14), max_size=6))
def test_queues_are_bounded_deques(capacity, background_capacity, pushes):
    bank = MemoryBank(num_classes=3, dim=1, queue_size=capacity, background_queue_size=background_capacity)
    queues = [deque(maxlen=background_capacity), deque(maxlen=capacity), deque(maxlen=capacity)]
    serial = 0
    for turn, mask in enumerate(pushes):
        vectors = torch.arange(serial, serial + len(mask)).float()[:, None]
        serial += len(mask)
        chosen = vectors[torch.tensor(mask)]
        bank.push(turn % 3, vectors, torch.tensor(mask))
        queues[turn % 3].extend(chosen[:, 0].tolist())
    for c, queue in enumerate(queues):
        assert sorted(keys(bank, c)[:, 0].tolist()) == sorted(queue)


def test_sample_draws_every_key_of_the_own_class_and_nothing_else():
    bank = MemoryBank(num_classes=3, dim=1, queue_size=5, background_queue_size=7)
    bank.push(0, torch.tensor([[1.0], [2.0]]), torch.ones(2, dtype=torch.bool))
    bank.push(2, torch.arange(10.0, 20.0)[:, None], torch.ones(10, dtype=torch.bool))
    drawn = [set(keys[:, 0].tolist()) for keys in bank.sample(500)]
    assert drawn == [{1.0, 2.0}, {0.0}, {15.0, 16.0, 17.0, 18.0, 19.0}]


def test_bank_survives_a_checkpoint():
    first, second = (MemoryBank(num_classes=2, dim=3, queue_size=4, background_queue_size=4) for _ in range(2))
    mask = torch.tensor([True, False, True, True, True, True])
    first.push(1, torch.randn(6, 3), mask)
    second.load_state_dict(first.state_dict())
    vectors = torch.randn(6, 3)
    for bank in (first, second):
        bank.push(1, vectors, mask)
    assert torch.equal(keys(first, 1), keys(second, 1))


def is_negative(c, label, rank_of, in_image, labeled, uncertain, low, high):
    """The rule of the method for one pixel and one class."""
    if labeled:
        return label != 255 and label != c and rank_of[c] < low
    absent = c != 0 and not in_image[c - 1]
    return uncertain and ((rank_of[c] < low and absent) or low <= rank_of[c] < high)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.integers(1, 3), st.integers(0, 3))
def test_new_keys_are_those_of_the_rule(seed, num_classes, low, extra):
    rng = np.random.default_rng(seed)
    shape = (4, 3, 2)
    probs = rng.random((4, num_classes, 3, 2))
    labels = rng.choice([*range(num_classes), 255], shape)
    in_image = rng.random((4, num_classes - 1)) < 0.5
    uncertain = rng.random((2, 3, 2)) < 0.5
    bank = MemoryBank(num_classes=num_classes, dim=1, queue_size=50, background_queue_size=50)
    serial = torch.arange(24.0).view(4, 1, 3, 2)
    feed_bank(
        bank,
        serial,
        torch.from_numpy(labels),
        torch.from_numpy(probs),
        torch.from_numpy(in_image).float(),
        torch.from_numpy(uncertain),
        low,
        low + extra,
    )
    ranks = (-probs).argsort(axis=1).argsort(axis=1)
    for c in range(num_classes):
        expected = [
            serial[n, 0, y, x].item()
            for n, y, x in np.ndindex(*shape)
            if is_negative(
                c, labels[n, y, x], ranks[n, :, y, x], in_image[n], n < 2, uncertain[n - 2, y, x], low, low + extra
            )
        ]
        assert keys(bank, c)[:, 0].tolist() == expected


def setting(labels, num_classes=4, dim=6, filled=True, seed=0):
    """Inputs where a class's student pixels, teacher pixels and keys are one vector each, and no new key comes."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(3, num_classes, dim, generator=generator)
    bank = MemoryBank(num_classes=num_classes, dim=dim, queue_size=8, background_queue_size=8)
    for c in range(num_classes if filled else 0):
        bank.push(c, prototypes[2, c].expand(8, dim), torch.ones(8, dtype=torch.bool))
    student, teacher = (p[labels.clamp(max=num_classes - 1)].permute(0, 3, 1, 2).contiguous() for p in prototypes[:2])
    probs = torch.full((len(labels), num_classes, *labels.shape[1:]), 0.9)
    low_entropy = torch.ones_like(labels[len(labels) // 2 :], dtype=torch.bool)
    arguments = {
        "bank": bank,
        "student_reps": student.requires_grad_(),
        "teacher_reps": teacher,
        "labels": labels,
        "teacher_probs": probs,
        "image_labels": torch.ones(len(labels), num_classes - 1),
        "low_entropy": low_entropy,
        "high_entropy": ~low_entropy,
        "low_rank": 0,
        "high_rank": 0,
    }
    return arguments, prototypes


def expected_loss(prototypes, classes, num_reliable):
    total = 0.0
    for c in classes:
        student, teacher, key = prototypes[:, c]
        positive = torch.cosine_similarity(student, teacher, dim=0).item() / 0.5
        negative = torch.cosine_similarity(student, key, dim=0).item() / 0.5
        total += math.log(math.exp(positive) + 50 * math.exp(negative)) - positive
    return total / num_reliable


def test_absent_classes_do_not_shift_the_banks():
    """Anchors, positives and negatives all go by class id: classes 0 and 2 are absent here."""
    labels = torch.tensor([1, 3, 255, 3, 1, 1, 3, 3]).view(2, 2, 2)
    arguments, prototypes = setting(labels)
    loss = contrastive_loss(**arguments)
    assert loss.item() == pytest.approx(expected_loss(prototypes, [1, 3], 2), abs=1e-5)
    loss.backward()
    gradient = arguments["student_reps"].grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_classes_without_anchors_or_keys_count_only_in_the_divisor():
    labels = torch.tensor([0, 1, 2, 3] * 4).view(2, 2, 4)
    arguments, prototypes = setting(labels)
    arguments["teacher_probs"][:, 1] = 0.3  # no anchor for class 1
    arguments["teacher_probs"][:, 3] = 0.31
    arguments["bank"].sizes[2] = 0  # no key for class 2
    assert contrastive_loss(**arguments).item() == pytest.approx(expected_loss(prototypes, [0, 3], 4), abs=1e-5)


def test_uncertain_pixels_are_not_reliable():
    labels = torch.tensor([[[0, 1]], [[2, 3]]])
    arguments, prototypes = setting(labels)
    arguments["low_entropy"] = torch.tensor([[[False, True]]])
    assert contrastive_loss(**arguments).item() == pytest.approx(expected_loss(prototypes, [0, 1, 3], 3), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "filled"),
    [([255] * 8, True), ([2] * 8, True), ([1, 2] * 4, False)],
    ids=["ignored", "one", "empty bank"],
)
def test_zero_with_the_graph_intact(labels, filled):
    arguments, _ = setting(torch.tensor(labels).view(2, 2, 2), filled=filled)
    loss = contrastive_loss(**arguments)
    loss.backward()
    assert loss == 0 and torch.equal(arguments["student_reps"].grad, torch.zeros(2, 6, 2, 2))


def test_nothing_is_read_back_to_the_host():
    """Fake tensors have no values: whatever would make the host wait for the device raises."""
    with FakeTensorMode():
        labels = torch.randint(0, 4, (2, 3, 3))
        arguments, _ = setting(labels)
        arguments.update(low_rank=1, high_rank=3)
        arguments["low_entropy"], arguments["high_entropy"] = entropy_masks(torch.rand(1, 3, 3), labels[1:], 20)
        contrastive_loss(**arguments).backward()


def test_mixed_precision_gives_a_float32_loss_of_the_same_value():
    labels = torch.tensor([1, 3, 255, 3, 1, 1, 3, 3]).view(2, 2, 2)
    arguments, _ = setting(labels)
    expected = contrastive_loss(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(**arguments)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_anchors_are_drawn_evenly_from_the_confident_pixels_of_the_class():
    labels = torch.tensor([[[0, 1, 1, 255, 1]]])
    probs = torch.zeros(1, 3, 1, 5)
    probs[0, 1, 0] = torch.tensor([0.9, 0.31, 0.3, 0.9, 0.8])
    pixels, candidates = sample_anchors(labels, probs, 2000, 0.3)
    assert candidates.tolist() == [0, 2, 0]
    positions, counts = pixels[1].unique(return_counts=True)
    assert positions.tolist() == [1, 4] and counts.min() > 800


def test_entropy_masks_leave_ignored_pixels_out():
    entropy = torch.arange(12.0).view(1, 3, 4)
    labels = torch.zeros(1, 3, 4, dtype=torch.long)
    labels[0, 2, 3] = 255
    low, high = entropy_masks(entropy, labels, alpha=20)
    assert entropy[low].tolist() == [0, 1] and entropy[high].tolist() == [8, 9, 10]
    nothing = entropy_masks(entropy, torch.full_like(labels, 255), alpha=20)
    assert not any(mask.any() for mask in nothing)
