"""Every stage, stopped anywhere and run again, ends with the bytes of one that was not: signals, a full disk, twins.

The stages run in forks of a process that has imported everything. A few cases run always; all of them:

    python -m pytest tests/test_kills.py -m "slow or not slow"
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, run

import evaluate  # noqa: F401 (what the stages need, imported before the forks)
import inference  # noqa: F401
import refine_sam  # noqa: F401
import train_classifier  # noqa: F401
import train_csrm  # noqa: F401
import train_segmentation  # noqa: F401
from tools import training

LEARN = [*TRAINING, "--max_epoch", 2, "--max_steps", 3]
PREDICT = ["--scales", 1, "--crf_t", 1, "--device", "cpu"]
MAPS = "experiments/predictions/csrm@train"
PRIOR = ["--restore", "experiments/models/prior.pth", "--warmup_epochs", 0]
STAGES = {
    "prior": ("train_classifier", "--tag", "prior", *LEARN),
    "csrm": ("train_csrm", "--tag", "csrm", *LEARN, *DECODER, *PRIOR, "--crf_t", 1, "--cutmix_prob", 0.7),
    "maps": ("inference", "--tag", "csrm", "--domain", "train", *PREDICT, "--save_masks", "--num_workers", 2),
    "refined": ("refine_sam", "--tag", "csrm", "--domain", "train", "--pseudo_dir", f"{MAPS}/pseudos-t0.4-c1",
                "--proposals", "regions", "--num_workers", 0),
    "deeplab": ("train_segmentation", "--tag", "deeplab", *LEARN, *DECODER,
                "--masks_dir", f"{MAPS}/sam-regions-max_iou_imp2"),
    "final": ("train_segmentation", "--tag", "deeplab", "--predict", "--domain", "val", *PREDICT, "--save_overlays",
              "--num_workers", 0),
    "scores": ("evaluate", "--pred_dir", "experiments/predictions/deeplab@val/masks", "--domain", "val",
               "--output", "experiments/scores.json", "--num_workers", 0),
}  # fmt: skip
LONG = [name for name in STAGES if name != "scores"]
KILLED = list(itertools.product(LONG, ("SIGKILL", "SIGTERM"), ("file", "time")))
ALWAYS = {(name, *KILLED[index][1:]) for index, name in enumerate(LONG)}  # one of each stage
EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.chmod", "os.mkdir")


class Ended(NamedTuple):
    """How a stage ended: exit code (negative: a signal), stderr, seconds of CPU, and uses of files in experiments/."""

    code: int
    errors: str = ""
    seconds: float = 0.0
    uses: int = 0


class Fault(NamedTuple):
    """What happens to a stage.

    Attributes:
        number: of a signal, which it gets
        use: at this use of a file in experiments/, or
        seconds: after so long on the CPU.
        limit: bytes beyond which no file can grow.
    """

    number: int = 0
    use: int = 0
    seconds: float = 0.0
    limit: int = 0


def act(name: str, data: Path, folder: Path, fault: Fault, answer: Connection) -> None:
    """Run a stage in this process."""
    os.chdir(folder)
    torch.set_num_threads(1)
    training.STEPS_PER_SAVE = 2
    uses, start = itertools.count(1), time.process_time()

    def strike(*_: object) -> None:
        os.kill(os.getpid(), fault.number)

    def count(event: str, args: tuple) -> None:
        if event in EVENTS and "experiments" in str(args[0]) and next(uses) == fault.use:
            strike()

    sys.addaudithook(count)
    signal.signal(signal.SIGPROF, strike)
    signal.setitimer(signal.ITIMER_PROF, fault.seconds)
    if fault.limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, fault.limit))
    script, *flags = STAGES[name]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            run(script, *data_flags(data), *flags)
        finally:
            answer.send((errors.getvalue(), time.process_time() - start, next(uses) - 1))


def start(name: str, data: Path, folder: Path, fault: Fault = Fault()):  # noqa: B008 (it cannot be changed)
    """Start a stage; returns its process and where its answer comes."""
    context = multiprocessing.get_context("forkserver")
    answer, send = context.Pipe(duplex=False)
    process = context.Process(target=act, args=(name, data, folder, fault, send))
    process.start()
    send.close()
    return process, answer


def end(process, answer: Connection) -> Ended:
    told = ()
    with contextlib.suppress(EOFError):  # a killed process says nothing
        told = answer.recv()
    process.join()
    return Ended(process.exitcode, *told)


def products(folder: Path) -> dict[str, bytes]:
    """What is in experiments/ under a name of its own; without logs, and the checkpoints before the last."""
    files = [path for path in (folder / "experiments").rglob("[!.]*") if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in files}
    return {n: p.read_bytes() for n, p in names.items() if "/logs/" not in n and not n.endswith(".previous.pth")}


class Whole(NamedTuple):
    """Runs that nothing stopped: per stage its folder before it, what is in it after it, and how it ended."""

    before: dict[str, Path]
    after: dict[str, dict[str, bytes]]
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def whole(folder_root, tmp_path_factory) -> Whole:
    root, result = tmp_path_factory.mktemp("whole"), Whole({}, {}, {})
    folder = root / "now"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", f"{here.parent}:{here}")  # of the process that is forked
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        for name in STAGES:
            result.before[name] = Path(shutil.copytree(folder, root / name))
            result.ended[name] = end(*start(name, folder_root, folder))
            result.after[name] = products(folder)
            assert result.ended[name].code == 0, result.ended[name].errors
    return result


@pytest.fixture
def again(whole, folder_root, tmp_path):
    """A folder as it is before a stage; and a check that running it ends with the same bytes."""

    def enter(name: str) -> Path:
        return shutil.copytree(whole.before[name], tmp_path / name)

    def check(name: str) -> None:
        ended = end(*start(name, folder_root, tmp_path / name))
        assert ended.code == 0, ended.errors
        now = products(tmp_path / name)
        assert now.keys() == whole.after[name].keys()
        assert [path for path in now if now[path] != whole.after[name][path]] == []

    return enter, check


def complete(folder: Path, expected: dict[str, bytes]) -> bool:
    """Whether every file of a single image is as it should be, or not there."""
    files = {name: data for name, data in products(folder).items() if "/predictions/" in name}
    return all(expected[name] == data for name, data in files.items())


@pytest.mark.parametrize("name, number, where", [
    pytest.param(*case, marks=[] if case in ALWAYS else pytest.mark.slow) for case in KILLED
])  # fmt: skip
def test_killed_anywhere(whole, again, folder_root, name, number, where):
    """By a signal at a random use of a file, or at a random time; behind the first third, which is mostly start-up."""
    (enter, check), chance = again, random.Random(f"{name} {number} {where}")
    folder, number, (_, _, seconds, uses) = enter(name), signal.Signals[number], whole.ended[name]
    when = {"use": chance.randint(uses // 3, uses)}
    if where == "time":
        when = {"seconds": chance.uniform(0.3, 0.7) * seconds}
    ended = end(*start(name, folder_root, folder, Fault(number, **when)))
    assert ended.code in ((-number,) if number == signal.SIGKILL else (143, -number)), ended.errors
    assert complete(folder, whole.after[name])
    check(name)


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk(whole, again, folder_root, name):
    """No file can get larger than a random number of bytes, smaller than the largest the stage writes."""
    enter, check = again
    folder = enter(name)
    made = whole.after[name].keys() - products(folder).keys()
    largest = max(len(whole.after[name][path]) for path in made)
    limit = random.Random(name).randrange(1, largest)
    ended = end(*start(name, folder_root, folder, Fault(limit=limit)))
    *_, line, empty = ended.errors.split("\n")
    assert ended.code == 2 and empty == "" and "could not be written (File too large). Check free space" in line
    quiet = "Traceback" not in ended.errors or np.lib.NumpyVersion(np.__version__) < "2.2.0"  # it complains itself
    assert quiet and complete(folder, whole.after[name])
    check(name)


@pytest.mark.parametrize("name", LONG)
def test_two_at_once(whole, again, folder_root, name):
    """The second training waits, then finds the work done; other stages do it twice, and write the same bytes."""
    enter, check = again
    folder = enter(name)
    both = [start(name, folder_root, folder) for _ in range(2)]
    for process, answer in both:
        ended = end(process, answer)
        assert ended.code == 0, ended.errors
    check(name)


@pytest.mark.parametrize("before, damaged, removed, reader, maker", [
    ("refined", f"{MAPS}/cams/b.npz", f"{MAPS}/pseudos-t0.4-c1/b.png", "maps", "maps"),
    ("refined", f"{MAPS}/pseudos-t0.4-c1/b.png", None, "refined", "maps"),
    ("deeplab", f"{MAPS}/proposals-regions/b.json", f"{MAPS}/sam-regions-max_iou_imp2/b.png", "refined", "refined"),
    ("deeplab", f"{MAPS}/sam-regions-max_iou_imp2/b.png", None, "deeplab", "refined"),
    ("scores", "experiments/predictions/deeplab@val/masks/b.png", None, "scores", "final"),
], ids=["CAM file", "pseudo mask", "proposals", "refined mask", "prediction"])  # fmt: skip
def test_what_cannot_be_read_is_named_and_made_again(again, folder_root, before, damaged, removed, reader, maker):
    enter, check = again
    folder = enter(before)
    path = folder / damaged
    if removed:  # what was made of it, so that it is read
        (folder / removed).unlink()
    path.write_bytes(path.read_bytes()[:-30])
    ended = end(*start(reader, folder_root, folder))
    line = ended.errors.split("\n")[-2]
    assert ended.code == 2 and damaged in line and "Traceback" not in ended.errors
    path.unlink()
    assert end(*start(maker, folder_root, folder)).code == 0
    check(before)
