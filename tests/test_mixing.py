"""ClassMix and CutMix against loops over pixels, with partners and pasted regions read off the result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.mixing import classmix, cutmix, random_partners

STRIDE = 4
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_batch(batch_size: int, num_foreground: int, height: int, width: int, seed: int) -> Batch:
    """Random blocks of labels; image i and its logits are i everywhere, so that pasted pixels tell their origin."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, *range(1, num_foreground + 1), 255])
    coarse = values[torch.randint(len(values), (batch_size, -(-height // 5), -(-width // 5)), generator=generator)]
    maps = coarse.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :height, :width].contiguous()
    origin = torch.arange(batch_size).view(-1, 1, 1, 1)
    images = origin.expand(-1, 3, height, width).to(torch.uint8)
    logits = origin.expand(-1, num_foreground + 1, -(-height // STRIDE), -(-width // STRIDE)).float()
    labels = torch.stack([(maps == c).flatten(1).any(1) for c in range(1, num_foreground + 1)], 1).float()
    return images, maps, logits, labels


def nearest(mask: list[list[bool]], height: int, width: int) -> list[list[bool]]:
    """Nearest-neighbour resizing: output (y, x) is input (floor(y H / h), floor(x W / w))."""
    rows, columns = len(mask), len(mask[0])
    return [[mask[y * rows // height][x * columns // width] for x in range(width)] for y in range(height)]


def classmix_by_loops(batch: Batch, partner: list[int], chosen: list[set[int]]) -> Batch:
    images, maps, logits, labels = (tensor.clone() for tensor in batch)
    for a, b in enumerate(partner):
        paste = [[int(value) in chosen[a] for value in row] for row in batch[1][b]]
        small = nearest(paste, *logits.shape[-2:])
        for mixed, original, mask in ((images, batch[0], paste), (maps, batch[1], paste), (logits, batch[2], small)):
            for y, row in enumerate(mask):
                for x, pasted in enumerate(row):
                    if pasted:
                        mixed[a, ..., y, x] = original[b, ..., y, x]
        for c in chosen[a]:
            labels[a, c - 1] = 1
    return images, maps, logits, labels


def seeded(mix, batch: Batch, seed: int) -> Batch:
    torch.manual_seed(seed)
    return mix(*batch)


def draws_of(batch: Batch, seed: int) -> tuple[list[int], list[set[int]]]:
    """The partners and classes that `classmix` drew, worked out from where pixels came from."""
    images, maps = batch[:2]
    torch.manual_seed(seed)
    partner = random_partners(len(images), images.device).tolist()
    mixed = seeded(classmix, batch, seed)[0]
    chosen = [set(maps[b][mixed[a, 0] == b].tolist()) if a != b else set() for a, b in enumerate(partner)]
    return partner, chosen


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(1, 7), st.integers(5, 14), st.integers(5, 14), st.integers(0, 10**6))
def test_classmix_matches_loops(batch_size: int, num_foreground: int, height: int, width: int, seed: int):
    batch = make_batch(batch_size, num_foreground, height, width, seed)
    partner, chosen = draws_of(batch, seed)
    for b, classes in zip(partner, chosen, strict=True):
        foreground = set(batch[1][b].unique().tolist()) - {0, 255}
        assert classes <= foreground
        assert len(classes) == (max(1, len(foreground) // 2) if foreground else 0)
    expected = classmix_by_loops(batch, partner, chosen)
    mixed = seeded(classmix, batch, seed)
    for got, want in zip(mixed, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_classmix_chooses_every_class_equally_often():
    batch = make_batch(2, 4, 20, 20, seed=0)
    batch = (*batch[:1], torch.arange(400).view(1, 20, 20).expand(2, -1, -1) % 5, *batch[2:])
    batch = (*batch[:3], torch.zeros(2, 4))
    torch.manual_seed(0)
    counts = sum(classmix(*batch)[3] for _ in range(500)).sum(0)
    assert counts.sum() == 2 * 500 * 2
    assert ((counts / 1000 - 0.5).abs() < 0.06).all()


def test_classmix_without_foreground_changes_nothing():
    images, maps, logits, labels = make_batch(4, 3, 9, 9, seed=1)
    maps = torch.where(maps == 255, 255, 0)
    for got, want in zip(classmix(images, maps, logits, labels), (images, maps, logits, labels), strict=True):
        assert torch.equal(got, want)


def test_classmix_pastes_an_object_of_one_pixel():
    images, maps, logits, labels = make_batch(2, 2, 8, 8, seed=0)
    maps, labels = torch.zeros_like(maps), torch.zeros_like(labels)
    maps[1, 4, 5] = 2
    mixed_images, mixed_maps, _, mixed_labels = classmix(images, maps, logits, labels)
    assert mixed_images[0].sum() == 3 and mixed_images[0, :, 4, 5].eq(1).all()
    assert mixed_maps[0].sum() == 2 and mixed_maps[0, 4, 5] == 2
    assert mixed_labels.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("mix", [classmix, cutmix])
def test_an_image_alone_is_its_own_partner(mix):
    batch = make_batch(1, 3, 10, 10, seed=0)
    for got, want in zip(mix(*batch), batch, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("mix", [classmix, cutmix])
def test_inputs_are_left_alone(mix):
    batch = make_batch(4, 3, 10, 10, seed=0)
    before = [tensor.clone() for tensor in batch]
    mix(*batch)
    assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(4, 30), st.integers(4, 30), st.integers(0, 10**6))
def test_cutmix_pastes_a_rectangle_of_half_the_area(batch_size: int, height: int, width: int, seed: int):
    batch = make_batch(batch_size, 3, height, width, seed)
    torch.manual_seed(seed)
    partner = random_partners(batch_size, batch[0].device).tolist()
    images, maps, logits, labels = seeded(cutmix, batch, seed)
    for a, b in enumerate(partner):
        paste = images[a, 0] == b
        rows, columns = paste.any(1), paste.any(0)
        assert torch.equal(paste, rows[:, None] & columns[None])
        assert all(int((side[1:] & ~side[:-1]).sum() + side[0]) == 1 for side in (rows, columns))  # unbroken
        assert abs(int(paste.sum()) - height * width / 2) <= width / 2  # half a row of rounding
        assert torch.equal(maps[a], torch.where(paste, batch[1][b], batch[1][a]))
        small = torch.tensor(nearest(paste.tolist(), *logits.shape[-2:]))
        assert torch.equal(logits[a], torch.where(small, batch[2][b], batch[2][a]))
        area = paste.float().mean()
        torch.testing.assert_close(labels[a], (1 - area) * batch[3][a] + area * batch[3][b])


def test_each_image_of_a_batch_draws_its_own_rectangle():
    batch = make_batch(50, 3, 20, 30, 0)
    changed = (seeded(cutmix, batch, 0)[0] != batch[0]).any(dim=1)
    assert len(changed.unique(dim=0)) > 45


def test_rectangles_reach_every_border_equally_often():
    torch.manual_seed(0)
    images, maps, logits, labels = make_batch(4000, 1, 4, 5, 0)
    pasted = cutmix(torch.arange(4000).view(-1, 1, 1, 1).expand(-1, 1, 4, 5), maps, logits, labels)[0]
    share = (pasted[:, 0] != torch.arange(4000).view(-1, 1, 1)).float().mean(dim=0)
    torch.testing.assert_close(share, share.flip(0), atol=0.05, rtol=0)  # five standard deviations
    torch.testing.assert_close(share, share.flip(1), atol=0.05, rtol=0)


def test_partners_are_a_permutation_without_fixed_points():
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        partner = random_partners(4, torch.device("cpu")).tolist()
        assert sorted(partner) == [0, 1, 2, 3]
        assert all(a != b for a, b in enumerate(partner))
        seen.add(tuple(partner))
    assert len(seen) == 6  # all rings of four


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mix", [classmix, cutmix])
def test_mixing_on_a_gpu_never_waits(mix):
    batch = [tensor.cuda() for tensor in make_batch(6, 5, 33, 40, seed=0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed = mix(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(got.is_cuda and got.shape == want.shape for got, want in zip(mixed, batch, strict=True))
