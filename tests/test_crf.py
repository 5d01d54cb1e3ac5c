"""`tools.crf` against pydensecrf: stored results, and the package itself on random problems where it is installed."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.crf import (
    CAM_SETTINGS,
    SEGMENTATION_SETTINGS,
    CRFSettings,
    _grid_kernel,
    _image_kernel,
    _softmax,
    lattice,
    mean_field,
    unary_from_labels,
    unary_from_probabilities,
)
from tools.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_crf.npz")


def golden_image(index: int) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"image_{index}"]).permute(2, 0, 1)[None]


def golden_unaries(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The unaries of hard labels and of probabilities."""
    probabilities = torch.from_numpy(GOLDEN[f"softmax_{index}"])[None]
    labels = torch.from_numpy(GOLDEN[f"labels_{index}"]).long()[None]
    return unary_from_labels(labels, probabilities.shape[1]), unary_from_probabilities(probabilities)


def random_problem(height: int, width: int, labels: int, batch: int = 1, seed: int = 0):
    """Noise images uint8 [B,3,H,W] and random unaries float32 [B,C,H,W]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
    return images, torch.rand(batch, labels, height, width, generator=generator) * 3


def assert_same(q: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(q, expected, atol=1e-3, rtol=0)
    agreement = (q.argmax(dim=-3) == expected.argmax(dim=-3)).double().mean()
    assert agreement >= 0.9999, f"argmax agrees on {agreement:.4%} of the pixels"


@pytest.mark.parametrize("index", range(4))
def test_golden(index):
    hard, soft = golden_unaries(index)
    cases = [
        ("labels_gt0.7_g3-3_b50-5-10_t10", hard, CAM_SETTINGS, 10),
        ("softmax_g1-3_b67-3-4_t10", soft, SEGMENTATION_SETTINGS, 10),
        ("softmax_g1-3_b67-3-4_t1", soft, SEGMENTATION_SETTINGS, 1),
    ]
    for name, unary, crf_settings, iterations in cases:
        q = mean_field(golden_image(index), unary, crf_settings, iterations)
        assert_same(q[0], torch.from_numpy(GOLDEN[f"q_{name}_{index}"]))


@st.composite
def problems(draw):
    """An image (noise, constant, nearly constant, dark), random probabilities and parameters."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    low, spread = draw(st.sampled_from([(0, 256), (0, 1), (255, 1), (120, 12), (0, 20)]))
    image = torch.randint(low, low + spread, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    labels = draw(st.sampled_from([2, 3, 4, 21, 81]))
    probabilities = (torch.randn(1, labels, height, width, generator=generator) * 2).softmax(dim=1)
    bounds = [(0.5, 6), (0, 5), (1, 80), (1, 30), (0, 10)]
    crf_settings = CRFSettings(*(draw(st.floats(*bound)) for bound in bounds))
    return image, unary_from_probabilities(probabilities), crf_settings, draw(st.integers(0, 10))


# Derandomised: on a random field a pixel between two labels may tip over by the last digit of a sum, in any code.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_equals_pydensecrf(problem):
    pytest.importorskip("pydensecrf")
    assert_same(mean_field(*problem), mean_field(*problem, backend="pydensecrf"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (2, 2), (33, 35)])
def test_odd_shapes_equal_pydensecrf(shape):
    pytest.importorskip("pydensecrf")
    images, unary = random_problem(*shape, labels=3, batch=2)
    assert_same(mean_field(images, unary), mean_field(images, unary, backend="pydensecrf"))


@pytest.mark.parametrize("shape", [(3, 7), (3, 6), (3, 5), (4, 4)])
def test_dark_images_of_any_number_of_pixels_equal_pydensecrf(shape):
    """It adds black pixels to each image, up to a multiple of four: they join dark ones near the origin."""
    images, unary = random_problem(*shape, labels=3, batch=20)
    images //= 22
    q = mean_field(images, unary, SEGMENTATION_SETTINGS)
    for i in range(20):
        torch.testing.assert_close(q[i : i + 1], mean_field(images[i : i + 1], unary[i : i + 1], SEGMENTATION_SETTINGS))
    pytest.importorskip("pydensecrf")
    assert_same(q, mean_field(images, unary, SEGMENTATION_SETTINGS, backend="pydensecrf"))


def test_bounds_of_features_are_their_maxima(monkeypatch):
    """Larger features would overflow into the next digit of a key. In an image that is not square, one is white."""
    given = []
    monkeypatch.setattr("tools.crf.Kernel", lambda features, highest, weight: given.append((features, highest)))
    images = torch.zeros(2, 3, 5, 90, dtype=torch.uint8)
    images[1] = 255
    _image_kernel(images, CAM_SETTINGS)
    _grid_kernel.__wrapped__(2, 5, 90, 3, 3, images.device)
    for features, highest in given:
        assert features.amin(dim=(1, 2)).eq(0).all()
        torch.testing.assert_close(features.amax(dim=(1, 2)), torch.tensor(highest))


@pytest.mark.parametrize("highest", [[0.0, 12.3], [166, 125], [0.4, 7.3, 51, 51, 51]])
def test_no_digit_of_a_key_is_at_its_bound(highest):
    """So that the keys of neighbours, whose quotients are one more or less, do not run into the next digit."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(len(highest), 30_000, generator=generator)
    points[:, ::2] = points[:, ::2].round()  # corners
    quotients, rank, _ = lattice._enclosing_simplex(points * torch.tensor(highest)[:, None])
    digits = lattice._vertex_digits(highest, batch=2)
    keys = lattice._vertex_keys(quotients, rank, torch.arange(30_000) % 2, digits)
    for place, above in itertools.pairwise([*digits.quotients[:-1], digits.image]):
        digit = keys % above // place
        assert digit.min() > 0 and digit.max() < above // place - 1


def brute_force(image: np.ndarray, unary: np.ndarray, crf: CRFSettings, iterations: int) -> np.ndarray:
    """Mean field with exact Gaussian kernels, as full matrices: the model itself, without any lattice."""
    y, x = np.mgrid[: image.shape[1], : image.shape[2]].reshape(2, -1)
    messages = np.zeros((x.size, x.size))
    for sxy, srgb, weight in (
        (crf.gaussian_sxy, math.inf, crf.gaussian_weight),
        (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_weight),
    ):
        f = np.concatenate([np.stack([x, y]) / sxy, image.reshape(3, -1) / srgb])
        kernel = np.exp(-((f[:, :, None] - f[:, None]) ** 2).sum(0) / 2)
        norm = 1 / np.sqrt(kernel.sum(1))
        messages += weight * norm[:, None] * kernel * norm
    q = np.exp(-unary) / np.exp(-unary).sum(0)
    for _ in range(iterations):
        q = np.exp(-unary + q @ messages)
        q /= q.sum(0)
    return q


def test_approximates_exact_gaussian_kernels():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 90, 24).expand(3, 24, 24) + 8 * torch.randn(3, 24, 24, generator=generator) + 80
    unary = torch.rand(1, 3, 24, 24, generator=generator)
    crf = CRFSettings(2, 1, 8, 20, 1)
    q = mean_field(ramp.byte()[None], unary, crf, iterations=5)[0].flatten(1).double().numpy()
    exact = brute_force(ramp.byte().double().numpy(), unary[0].flatten(1).double().numpy(), crf, iterations=5)
    assert np.abs(q - exact).max() < 0.05
    assert np.abs(q - exact).mean() < 0.01


def test_batch_equals_single_images():
    images, unary = random_problem(19, 23, labels=4, batch=5)
    together = mean_field(images, unary)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], mean_field(images[i : i + 1], unary[i : i + 1]))


def test_chunks_equal_single_images():
    images, unary = random_problem(60, 61, labels=2, batch=6)  # on a CPU, chunks of 4 and 2 images
    q = mean_field(images, unary)
    torch.testing.assert_close(q[5:], mean_field(images[5:], unary[5:]))


def test_unaries_of_one_image_share_a_lattice():
    images, first = random_problem(18, 20, labels=3, batch=3)
    second = first.flip(1) * 2
    both = mean_field(images, torch.stack([first, second], dim=1))
    assert both.shape == (3, 2, 3, 18, 20)
    torch.testing.assert_close(both[:, 0], mean_field(images, first))
    torch.testing.assert_close(both[:, 1], mean_field(images, second))


@pytest.mark.parametrize("backend", ["torch", "pydensecrf"])
def test_numbers_of_labels_may_differ(backend):
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf")
    images, _ = random_problem(16, 15, labels=1, batch=3)
    counts = torch.tensor([1, 2, 4])
    labels = torch.arange(16 * 15).view(16, 15) // 3 % counts[:, None, None]
    q = mean_field(images, unary_from_labels(labels, counts), backend=backend)
    assert q.shape == (3, 4, 16, 15)
    for i, count in enumerate(counts.tolist()):
        alone = mean_field(images[i : i + 1], unary_from_labels(labels[i : i + 1], count))
        torch.testing.assert_close(q[i : i + 1, :count], alone, atol=1e-5, rtol=0)
        assert (q[i, count:] == 0).all()


def test_one_label_is_certain():
    images, _ = random_problem(7, 9, labels=1)
    unary = unary_from_labels(torch.zeros(1, 7, 9, dtype=torch.long), num_labels=1)
    assert torch.isfinite(unary).all()
    assert (mean_field(images, unary) == 1).all()


def test_no_iterations_and_no_kernels_are_softmax():
    images, unary = random_problem(10, 11, labels=5)
    torch.testing.assert_close(mean_field(images, unary, iterations=0), (-unary).softmax(1))
    torch.testing.assert_close(mean_field(images, unary, CRFSettings(3, 0, 50, 5, 0)), (-unary).softmax(1))


def test_empty_batch():
    assert mean_field(torch.zeros(0, 3, 4, 5, dtype=torch.uint8), torch.zeros(0, 2, 4, 5)).shape == (0, 2, 4, 5)


def test_repeats_bit_by_bit():
    images, unary = random_problem(64, 60, labels=3, batch=2)
    assert torch.equal(mean_field(images, unary), mean_field(images, unary))


def test_threads_solve_images_alike():
    """Each thread takes whole images, so that no sum changes its order; afterwards the caller has its threads back."""
    images, unary = random_problem(160, 130, labels=3, batch=5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = mean_field(images, unary)
        torch.set_num_threads(3)
        with torch.inference_mode():
            assert torch.equal(mean_field(images, unary), expected)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_no_gradient_is_recorded():
    images, unary = random_problem(6, 6, labels=2)
    assert not mean_field(images, unary.requires_grad_()).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_equals_cpu():
    images, unary = random_problem(61, 67, labels=4, batch=3)
    q = mean_field(images.cuda(), unary.cuda())
    assert q.is_cuda
    assert_same(q.cpu(), mean_field(images, unary))


def test_unary_from_labels():
    labels = torch.tensor([[[0, 2, 255]]])
    unary = unary_from_labels(labels, num_labels=3, gt_prob=0.6)[0, :, 0]
    right, wrong = -math.log(0.6), -math.log(0.2)
    expected = torch.tensor([[right, wrong, wrong], [wrong, wrong, wrong], [wrong, right, wrong]])
    torch.testing.assert_close(unary, expected)


def test_unary_from_probabilities_is_finite():
    unary = unary_from_probabilities(torch.tensor([0.0, 1.0, 0.25]).view(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(unary, torch.tensor([-math.log(1e-5), 0.0, -math.log(0.25)]))


@pytest.mark.parametrize(
    ("images", "unary", "message"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4), "uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 4, 4), r"\[B,3,H,W\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 4, 5), "does not fit"),
    ],
)
def test_bad_arguments_are_named(images, unary, message):
    with pytest.raises(AssertionError, match=message):
        mean_field(images, unary)


def test_missing_backend_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    images, unary = random_problem(4, 4, labels=2)
    with pytest.raises(UserError, match="pip install pydensecrf2"):
        mean_field(images, unary, backend="pydensecrf")


@pytest.mark.parametrize("labels", [1, 2, 3, 15, 16, 40])
def test_the_quick_softmax_of_a_cpu(labels):
    """Of two groups of columns, with impossible labels; the largest of each group is between 0 and 20."""
    generator = torch.Generator().manual_seed(labels)
    groups = torch.randn(2 * 500, labels, generator=generator).mul(30)
    groups[:, 1:][groups[:, 1:] < -60] = -torch.inf
    groups += 20 * torch.rand(1000, 1, generator=generator) - groups.amax(dim=1, keepdim=True)
    actual = _softmax(groups.view(500, -1), labels, bounded=True)
    torch.testing.assert_close(actual, groups.softmax(dim=1).view(500, -1), atol=1e-6, rtol=1e-5)


def test_energies_and_weights_of_any_size():
    """Where a quick softmax would overflow: energies far from 0, and kernels of great weight."""
    images, labels = torch.zeros(1, 3, 12, 15, dtype=torch.uint8), torch.zeros(1, 12, 15, dtype=torch.long)
    labels[:, 3:8, 4:9] = 1
    unary = unary_from_labels(labels, 3)
    expected = mean_field(images, unary)
    torch.testing.assert_close(mean_field(images, unary - 500), expected, atol=1e-3, rtol=0)
    for weight in (60, 1000):
        q = mean_field(images, unary, CRFSettings(3, weight, 50, 5, weight))
        torch.testing.assert_close(q.sum(dim=1), torch.ones(1, 12, 15))


@pytest.mark.parametrize("link", [lattice._link_by_search, lattice._link_by_merging])
@pytest.mark.parametrize("count, dtype", [(1, torch.int32), (2, torch.int64), (700, torch.int32), (701, torch.int64)])
def test_neighbours_of_vertices(link, count, dtype):
    keys = torch.randperm(3 * count, generator=torch.Generator().manual_seed(count))
    vertices = keys[:count].sort().values.to(dtype)
    before = (vertices + 5) % (3 * count)  # in two ascending runs, as in a lattice
    rows = torch.full((count + 1, 3), count, dtype=torch.int32)
    link(vertices, before, rows)
    place = {key: i for i, key in enumerate(vertices.tolist())}
    found = [place.get(key, count) for key in before.tolist()]
    assert rows[:, 1].tolist() == [*found, count]
    assert rows[:, 2].tolist() == [found.index(i) if i in found else count for i in range(count)] + [count]


def test_pydensecrf_takes_a_unary_of_any_layout():
    pytest.importorskip("pydensecrf")
    images, unary = random_problem(9, 7, labels=3, batch=1)
    turned = unary.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert_same(mean_field(images, turned, backend="pydensecrf"), mean_field(images, unary, backend="pydensecrf"))
