"""The Triton kernel of `tools.crf.kernel` against PyTorch's `embedding_bag`, run by Triton's interpreter on the CPU.

Not collected with the other tests: `test_bags.py` runs this file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from test_bags import random_lists

from tools.crf import sums as bags
from tools.crf.kernel import bag_sum
from tools.crf.sums import Bags

LENGTHS = {
    "none": [0],
    "one": [1],
    "empty among others": [0, 3, 0, 0, 7, 0],
    "long": [32, 1, 500, 31],
    "many": [i % 7 for i in range(150)],
}


@pytest.mark.parametrize("width", [1, 2, 6, 21, 42, 81])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lists_of_any_length(lengths, width):
    rows, lists = random_lists(lengths, width)
    sums = bag_sum(rows, lists.index, lists.weights, lists.starts, None)
    torch.testing.assert_close(sums, lists(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("count, width", [(1, 1), (63, 6), (200, 3), (20, 81)])
def test_lists_of_one_length(count, length, width):
    rows, lists = random_lists([length] * count, width)
    index, weights = lists.index.view(count, length), lists.weights.view(count, length)
    base = torch.randn(count, width)
    sums = bag_sum(rows, index, weights, None, base)
    torch.testing.assert_close(sums, base + Bags(index, weights)(rows), atol=1e-5, rtol=1e-5)


def test_the_trial_accepts_it():
    assert bags._kernel(torch.device("cpu")) is bag_sum
