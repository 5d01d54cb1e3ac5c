"""Pools of processes, in a parent whose OpenCV has threads of its own."""

from __future__ import annotations

import argparse
import errno
import itertools
import multiprocessing
import multiprocessing.synchronize
import os
import re
import signal
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np
import pytest

from tools import cli, parallel
from tools.errors import UserError
from tools.parallel import run_jobs


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
    assert list(run_jobs(blur, [1000, 1500], 2, "test", "image")) == [(1.0, 1), (1.0, 1)]
    assert cv2.getNumThreads() == 4


def refuse(number):
    if number == 5:
        raise UserError("5: not a number I like. Take another.")
    return number


def die(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is full
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_user_arrives_as_it_was_raised(workers):
    with pytest.raises(UserError, match="^5: not a number I like. Take another.$"):
        list(run_jobs(refuse, range(200), workers, "test", "number"))
    assert not multiprocessing.active_children()


def test_a_killed_worker_ends_the_run_in_one_line():
    with pytest.raises(BrokenProcessPool) as caught:
        list(run_jobs(die, range(200), 2, "test", "number"))
    words = r"--num_workers 2: a helper process was killed[^\n]*Lower --num_workers[^\n]*"
    assert re.fullmatch(words, cli._in_words(caught.value, argparse.Namespace(num_workers=2)))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "module, name, number",
    [(multiprocessing.synchronize._multiprocessing, "SemLock", errno.ENOSPC), (os, "fork", errno.ENOMEM)],
)
def test_no_room_for_the_workers_is_one_line(monkeypatch, module, name, number):
    """/dev/shm, where semaphores lie, is full; or there is memory for one process, but not for two."""
    works, calls = getattr(module, name), itertools.count(1)

    def full(*args, **options):
        if next(calls) == 2:
            raise OSError(number, os.strerror(number))
        return works(*args, **options)

    monkeypatch.setattr(module, name, full)
    with pytest.raises(OSError) as caught:
        list(run_jobs(abs, range(2), 2, "test", "number"))
    words = cli._in_words(caught.value, argparse.Namespace(num_workers=2))
    assert re.fullmatch(rf"--num_workers 2: .*\({os.strerror(number)}\).*/dev/shm[^\n]*", words)
    for child in multiprocessing.active_children():
        child.join(timeout=10)
    assert not multiprocessing.active_children()


def test_workers_end_when_nobody_wants_more():
    results = run_jobs(abs, range(-1000, 0), 2, "test", "number")
    assert next(results) == 1000 and len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()


def test_shares_are_disjoint_and_whole(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert parallel.share("abcdefg") == "be"
    assert [parallel.share("abcdefg", shard=(index, 2)) for index in range(2)] == ["aceg", "bdf"]  # counts for more


@pytest.mark.parametrize("names", ["WORLD_SIZE", "WORLD_SIZE RANK", "RANK", "WORLD_SIZE RANK LOCAL_RANK"])
def test_variables_that_torchrun_did_not_set_are_ignored_with_a_line(monkeypatch, names):
    for name in parallel.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    assert parallel.left_over() == ""
    names = names.split()
    for name in names:
        monkeypatch.setenv(name, "4")
    assert (parallel.rank(), parallel.world_size(), parallel.share("abcdef")) == (0, 1, "abcdef")
    found = " ".join(f"{name}=4" for name in names[:2])
    missing = "MASTER_ADDR" if "LOCAL_RANK" in names else "LOCAL_RANK and MASTER_ADDR"
    fault = parallel.left_over()
    assert re.match(rf"{found} in the environment is ignored: no {missing}( and |,)", fault), fault


def test_each_process_says_which_share_it_does(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert parallel.share("abcdef") == "bf" and parallel.left_over() == ""
    assert capsys.readouterr().err == "part 2 of 4: 2 of 6 images\n"


def test_processes_share_the_workers_of_their_machine(monkeypatch):
    assert parallel.own_workers(5) == 5
    for name in parallel.LAUNCHER:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [parallel.own_workers(workers) for workers in (0, 1, 4, 5)] == [0, 1, 1, 2]
