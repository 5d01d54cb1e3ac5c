"""Proposal files against pycocotools, SAM against a tiny model of its classes, regions by their properties."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_rle

from tests.tiny_sam import build_tiny_sam
from tools.errors import UserError
from tools.proposals import load_proposals, regions, save_proposals
from tools.proposals.generator import MaskGenerator, MaskOptions, load_sam
from tools.proposals.regions import RegionGenerator, RegionTree, merge_regions
from tools.rle import encode


@pytest.fixture
def registry(monkeypatch):
    import segment_anything

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_tiny_sam)


@pytest.fixture
def checkpoint(tmp_path, registry):
    path = tmp_path / "sam.pth"
    torch.save(build_tiny_sam().state_dict(), path)
    return path


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, count, height, width, seed):
    masks = np.random.default_rng(seed).random((count, height, width)) < 0.5
    path = tmp_path_factory.mktemp("proposals") / "image.json"
    save_proposals(path, masks, masks.shape[1:])
    loaded = load_proposals(path, (height, width))
    assert len(loaded) == count
    for rle, mask in zip(loaded, masks, strict=True):
        np.testing.assert_array_equal(coco_rle.decode(rle), mask)


def test_pycocotools_reads_the_file(tmp_path):
    masks = np.random.default_rng(0).random((3, 11, 8)) < 0.4
    save_proposals(tmp_path / "a.json", masks, masks.shape[1:])
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["image"] == {"height": 11, "width": 8}
    for mask, annotation in zip(masks, content["annotations"], strict=True):
        np.testing.assert_array_equal(coco_rle.decode(annotation["segmentation"]), mask)
        assert coco_rle.area(annotation["segmentation"]) == mask.sum()


def test_rle_and_arrays_make_the_same_file(tmp_path):
    masks = np.random.default_rng(1).random((2, 6, 7)) < 0.5
    save_proposals(tmp_path / "a.json", masks, masks.shape[1:])
    save_proposals(tmp_path / "b.json", encode(masks), (6, 7))
    save_proposals(tmp_path / "none.json", [], (6, 7))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert load_proposals(tmp_path / "none.json", (6, 7)) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "7", '{"image": {}}', "\xff", '{"annotations": [{"segmentation": 1}]}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="broken.json: not a readable file of masks as COCO RLE"):
        load_proposals(path, (2, 2))


@pytest.mark.parametrize("counts", ["", "0", "\\u00e9", "J6", 5, None, [], [3], [3, 2], [5, -1], ["a"], [1e40], [[4]]])
def test_damaged_counts_are_named(tmp_path, counts):
    """pycocotools would read past the end of some of these, and never return from others."""
    path = tmp_path / "broken.json"
    masks = [{"segmentation": {"size": [2, 2], "counts": each}} for each in ([1, 3], counts)]
    path.write_text(json.dumps({"annotations": masks}))
    with pytest.raises(UserError, match="broken.json: not a readable file of masks as COCO RLE"):
        load_proposals(path, (2, 2))


def test_masks_of_another_size_and_missing_files_are_named(tmp_path):
    save_proposals(tmp_path / "a.json", np.ones((1, 4, 5), bool), (4, 5))
    with pytest.raises(UserError, match="a.json: 5x4 pixels, but its image is 4x5"):
        load_proposals(tmp_path / "a.json", (5, 4))
    with pytest.raises(UserError, match="b.json: no such file of masks"):
        load_proposals(tmp_path / "b.json", (5, 4))


@pytest.mark.parametrize("prefix", ["", "sam."])
def test_sam_has_the_weights_of_the_file(tmp_path, registry, prefix):
    state = {name: torch.randn_like(tensor) for name, tensor in build_tiny_sam().state_dict().items()}
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "sam.pth")
    model = load_sam(tmp_path / "sam.pth", "vit_b", torch.device("cpu"))
    assert not model.training and model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_sam_takes_a_batch_of_images(checkpoint):
    images = [np.full((height, 30, 3), 99, np.uint8) for height in (20, 40, 25)]
    model = load_sam(checkpoint, "vit_b", torch.device("cpu"))
    generator = MaskGenerator(model, MaskOptions(points_per_side=2), images_per_batch=2)
    assert [isinstance(masks, list) for masks in generator(images)] == [True] * 3


class Trap:
    def __reduce__(self):
        return (eval, ("1/0",))  # would raise ZeroDivisionError if the file were unpickled


def test_weights_of_sam_hq_are_not_said_to_be_of_another_model_type(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "mask_decoder.hf_token.weight": torch.zeros(1, 256)}, checkpoint)
    with pytest.raises(UserError, match=r"tensors fit\)\. Pass weights of the first SAM; those of SAM-HQ, "):
        load_sam(checkpoint, "vit_b", torch.device("cpu"))


@pytest.mark.parametrize("content", [{"pos": torch.zeros(1)}, torch.zeros(2), [1, 2], Trap(), b"noise", b""])
def test_wrong_checkpoints_are_one_line(tmp_path, registry, content):
    path = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="wrong.pth: (not|holds no weights)"):
        load_sam(path, "vit_b", torch.device("cpu"))


def test_missing_checkpoint_is_one_line(tmp_path, registry):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_sam(tmp_path / "none.pth", "vit_b", torch.device("cpu"))


def disc_image(size=96):
    rows, columns = np.mgrid[:size, :size]
    disc = (rows - size // 2) ** 2 + (columns - size // 2) ** 2 < (size // 6) ** 2
    image = np.where(disc[..., None], (200, 60, 40), (40, 90, 160)) + np.random.default_rng(0).normal(
        0, 4, (size, size, 1)
    )
    return image.clip(0, 255).astype(np.uint8), disc


def test_a_plain_object_is_one_of_the_regions():
    image, disc = disc_image()
    masks = RegionGenerator().propose(image)
    iou = (masks & disc).sum(axis=(1, 2)) / (masks | disc).sum(axis=(1, 2))
    assert iou.max() > 0.9


def test_regions_keep_their_limits_and_are_repeatable():
    image = np.random.default_rng(3).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    generator = RegionGenerator(min_size=0.01, max_size=0.3, max_masks=20)
    masks = generator.propose(image)
    sizes = masks.mean(axis=(1, 2))
    assert masks.dtype == bool and masks.shape[1:] == (50, 71) and len(masks) <= 20
    assert (sizes >= 0.01).all() and (sizes <= 0.3).all() and (np.diff(sizes) <= 0).all()
    np.testing.assert_array_equal(generator.propose(image), masks)


def test_leaves_are_found_as_the_options_say(monkeypatch):
    given = {}
    monkeypatch.setattr(
        regions, "felzenszwalb", lambda image, **options: given.update(options) or np.zeros((50, 71), int)
    )
    RegionGenerator(scale=30.0, sigma=0.5, min_size=0.01).propose(disc_image()[0][:50, :71])
    assert given == {"scale": 30, "sigma": 0.5, "min_size": 36, "channel_axis": -1}  # 1 % of 3550 pixels


def test_regions_out_of_range_or_without_an_edge_or_nearly_there_already_are_left_out():
    """Of 1000 pixels: 0 is too small, 6 too large, 5 has no edge; 2 is nearly 3; 1, which is in both, is not."""
    sizes, parents = np.array([9, 84, 95, 100, 480, 110, 600]), np.array([3, 2, 3, 5, 6, 6, -1])
    tree = RegionTree(np.eye(7, dtype=bool), sizes, parents, np.array([9.0, 2, 9, 9, 9, 1.9, 9]))
    limits = {"min_size": 0.01, "max_size": 0.5, "min_contrast": 2.0}
    assert RegionGenerator(**limits)._select(tree, 1000).tolist() == [4, 3, 1]
    assert RegionGenerator(**limits, max_masks=2)._select(tree, 1000).tolist() == [4, 3]


def test_regions_of_a_large_photograph_are_those_of_a_reduced_one():
    small = disc_image()[0][:, :80]
    large, noise = small.repeat(3, axis=0).repeat(3, axis=1), np.random.default_rng(0).integers(0, 20, small.shape)
    large[1::3, 1::3] += noise.astype(np.uint8)
    large[::3, ::3] -= noise.astype(np.uint8)  # its mean over 3x3 pixels is `small` again
    generator = RegionGenerator(long_side=96)
    of_small, of_large = generator(["small", "large"], [small, large])
    assert len(of_small) > 1
    decoded = coco_rle.decode(of_large).transpose(2, 0, 1).astype(bool)
    np.testing.assert_array_equal(decoded, of_small.repeat(3, axis=1).repeat(3, axis=2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (2, 2), (33, 17)])
def test_flat_and_tiny_images_have_no_regions_worth_proposing(shape):
    assert RegionGenerator().propose(np.full((*shape, 3), 128, np.uint8)).shape == (0, *shape)


def test_the_tree_joins_the_leaves_to_the_whole_image():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    labels = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 4, axis=0), 4, axis=1)
    tree = merge_regions(image, labels)
    assert tree.members.shape == (23, 12) and tree.sizes[-1] == 192 and tree.members[-1].all()
    np.testing.assert_array_equal(tree.sizes, 16 * tree.members.sum(axis=1))
    for child, parent in enumerate(tree.parents[:-1]):
        assert parent > child and (tree.members[child] <= tree.members[parent]).all()


def plain_costs(image, labels):
    """What a merge of each two neighbours costs, and the contrast of each region: from all its pixels, one by one."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)
    dx, dy = cv2.Sobel(lab[..., 0], cv2.CV_32F, 1, 0), cv2.Sobel(lab[..., 0], cv2.CV_32F, 0, 1)
    smooth = cv2.GaussianBlur(lab, (0, 0), 1.0)
    slopes = [cv2.Sobel(smooth, cv2.CV_32F, *order, scale=1 / 8) for order in ((1, 0), (0, 1))]
    edges, borders = np.sqrt(sum((s**2).sum(axis=2) for s in slopes)), {}
    sizes = {region: (labels == region).sum() for region in np.unique(labels).tolist()}
    histograms = {region: np.zeros((4, 24)) for region in sizes}
    for y, x in np.ndindex(labels.shape):
        angle = int(np.arctan2(dy[y, x], dx[y, x]) % np.pi / np.pi * 4) % 4
        strength = min(int(np.log2(1 + np.hypot(dx[y, x], dy[y, x])) * 6 / 9), 5)
        bins = [int(lab[y, x, k] * n / 256) for k, n in enumerate((16, 24, 24))] + [6 * angle + strength]
        histograms[labels[y, x]][range(4), bins] += 1 / sizes[labels[y, x]]
        for v, u in ((y + 1, x), (y, x + 1)):
            if v < labels.shape[0] and u < labels.shape[1] and labels[v, u] != labels[y, x]:
                pair = tuple(sorted((int(labels[y, x]), int(labels[v, u]))))
                borders.setdefault(pair, []).append(max(edges[y, x], edges[v, u]))
    costs = {}
    for (a, b), strengths in borders.items():
        distance = 1 - np.minimum(histograms[a], histograms[b]).sum() / 4
        costs[a, b] = (distance + 0.02 * np.mean(strengths)) * (min(sizes[a], sizes[b]) / labels.size) ** 0.3
    of_region = {each: [s for pair, s in borders.items() if each in pair] for each in sizes}
    return costs, {each: np.concatenate(parts).mean() if parts else 0.0 for each, parts in of_region.items()}


def test_every_merge_and_every_contrast_is_that_of_plain_loops():
    """A histogram distance and edges, small ones first: nothing is carried over from merge to merge."""
    rng = np.random.default_rng(4)
    image = (rng.normal(0, 12, (20, 24, 3)) + rng.integers(60, 200, (4, 4, 3)).repeat(5, 0).repeat(6, 1)).clip(0, 255)
    image, labels = image.astype(np.uint8), np.arange(12).reshape(3, 4).repeat([7, 3, 10], 0).repeat([4, 9, 5, 6], 1)
    tree = merge_regions(image, labels)
    for merged in range(12, 24):
        costs, contrasts = plain_costs(image, labels)
        assert tree.contrasts[list(contrasts)] == pytest.approx(list(contrasts.values()), rel=1e-5)
        if merged < 23:
            assert tuple(np.flatnonzero(tree.parents == merged)) == (pair := min(costs, key=costs.get))
            labels = np.where(np.isin(labels, pair), merged, labels)


def test_the_most_alike_neighbours_are_merged_first():
    labels = np.repeat(np.arange(4), 6)[None].repeat(6, axis=0)
    colours = np.array([[200, 30, 30], [30, 200, 30], [32, 198, 30], [30, 30, 200]], np.uint8)
    tree = merge_regions(colours[labels], labels)
    assert tree.parents[1] == tree.parents[2] == 4
