"""`tools.crf.sums` against plain loops; its Triton kernel against PyTorch's `embedding_bag`, interpreted on the CPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.crf import sums as bags
from tools.crf.sums import LONGEST, Bags, split


def random_lists(lengths: list[int], width: int, seed: int = 0) -> tuple[torch.Tensor, Bags]:
    """Rows float32 [40,width], and lists of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    index = torch.randint(0, 40, (sum(lengths),), generator=generator, dtype=torch.int32)
    weights = torch.randn(sum(lengths), generator=generator)
    return torch.randn(40, width, generator=generator), Bags(index, weights, starts)


def in_a_loop(lists: Bags, rows: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros(len(lists.starts) - 1, rows.shape[1])
    for b, (start, end) in enumerate(zip(lists.starts[:-1], lists.starts[1:], strict=True)):
        for entry in range(start, end):
            sums[b] += lists.weights[entry] * rows[lists.index[entry]]
    return sums


list_lengths = st.lists(st.sampled_from([0, 0, 1, 5, 31, 32, 33, 100]), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def _forget_kernels():
    bags._kernel.cache_clear()
    yield
    bags._kernel.cache_clear()


@settings(max_examples=40, deadline=None)
@given(lengths=list_lengths, width=st.integers(1, 9))
def test_sums_whole_and_split(lengths, width):
    rows, lists = random_lists(lengths, width)
    expected = in_a_loop(lists, rows)
    torch.testing.assert_close(lists(rows), expected, atol=1e-5, rtol=1e-5)
    pieces, whole = split(lists)
    assert pieces.starts.diff().max() <= LONGEST
    torch.testing.assert_close(whole(pieces(rows)), expected, atol=1e-5, rtol=1e-5)


def test_lists_of_one_length():
    rows, lists = random_lists([6] * 11, width=3)
    same = Bags(lists.index.view(-1, 6), lists.weights.view(-1, 6))
    base = torch.randn(11, 3)
    torch.testing.assert_close(same(rows, base), base + in_a_loop(lists, rows), atol=1e-5, rtol=1e-5)


def test_triton_kernel():
    """In a process of its own: Triton must know that it interprets when it is imported."""
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("kernel_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("length", [0, 3, 6])
def test_triton_kernel_compiles_for_gpus(capability, length, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from tools.crf import kernel as bag_kernel

    kinds = ["*fp32", "*i32", "*fp32", "*i32", "*fp32", "*fp32", "i32", "i32"]
    pointers = dict(zip(bag_kernel._bag_sum.arg_names, kinds, strict=False))
    constants = {"HAS_BASE": length > 3, "LENGTH": length, "LISTS": 64, "COLUMNS": 8}
    source = triton.compiler.ASTSource(bag_kernel._bag_sum, pointers | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]


def test_without_triton(monkeypatch):
    """A GPU where Triton does not work, here because there is none, still gets PyTorch's sums."""
    monkeypatch.setitem(sys.modules, "tools.crf.kernel", None)
    with pytest.warns(UserWarning, match="without Triton"):
        assert bags._kernel(torch.device("cpu")) is bags._embedding_bag


@pytest.mark.parametrize("errors", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_a_kernel_is_tried_before_it_is_used(errors, monkeypatch):
    """With lists of one length, and with lists of any."""

    def bag_sum(rows, index, weights, starts, base):
        return bags._embedding_bag(rows, index, weights, starts, base) + errors[starts is not None]

    monkeypatch.setitem(sys.modules, "tools.crf.kernel", types.SimpleNamespace(bag_sum=bag_sum))
    right = not any(errors)
    with contextlib.nullcontext() if right else pytest.warns(UserWarning, match="without Triton"):
        assert (bags._kernel(torch.device("cpu")) is bag_sum) == right


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_kernel_on_a_gpu():
    rows, lists = random_lists([0, 5, 500, 3], width=6)
    on_gpu = Bags(lists.index.cuda(), lists.weights.cuda(), lists.starts.cuda())
    assert bags._kernel(torch.device("cuda", torch.cuda.current_device())) is not bags._embedding_bag
    torch.testing.assert_close(on_gpu(rows.cuda()).cpu(), lists(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(split(on_gpu)[1](split(on_gpu)[0](rows.cuda())).cpu(), lists(rows), atol=1e-5, rtol=1e-5)
