"""Pools of processes, in a parent whose OpenCV has threads of its own."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from tools import parallel
from tools.errors import UserError
from tools.parallel import process_pool, run_jobs


def blur(side: int) -> tuple[float, int]:
    """Something that OpenCV does on several threads."""
    cv2.setNumThreads(1)
    return float(cv2.GaussianBlur(np.ones((side, side), np.float32), (9, 9), 3).mean()), cv2.getNumThreads()


@pytest.fixture
def busy_opencv():
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    cv2.GaussianBlur(np.ones((2000, 2000), np.float32), (9, 9), 3)  # starts the threads
    yield
    cv2.setNumThreads(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers, busy_opencv):
    assert list(run_jobs(len, ["a", "bb", "", "cccc"], workers, "test", "word")) == [1, 2, 0, 4]


def test_workers_do_not_wait_for_threads_they_do_not_have(busy_opencv):
    with process_pool(2) as pool:
        results = pool.map_async(blur, [1000, 1500]).get(timeout=30)
    assert results == [(1.0, 1), (1.0, 1)]
    assert cv2.getNumThreads() == 4


@pytest.mark.parametrize("threads", [0, 1, 3, 9])
def test_threads_keep_the_order_and_share_the_cores(threads):
    before = torch.get_num_threads()
    results = list(parallel.thread_map(lambda item: (item**2, torch.get_num_threads()), range(5), threads))
    assert [square for square, _ in results] == [0, 1, 4, 9, 16]
    assert {cores for _, cores in results} == {before if threads <= 1 else max(1, before // min(threads, 5))}
    assert torch.get_num_threads() == before


def test_an_error_in_a_thread_is_raised_and_nothing_more_is_begun():
    begun = []

    def work(item):
        begun.append(item)
        if item == 2:
            raise UserError("2.jpg: broken.")

    with pytest.raises(UserError, match="2.jpg"):
        list(parallel.thread_map(work, range(1000), 2))
    assert len(begun) < 1000
