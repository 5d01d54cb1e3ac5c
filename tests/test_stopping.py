"""What stops a run from outside: signals, memory, lost helpers. One line says what to do, and nothing is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TRAINING, data_flags, parse

from tools import cli, files
from tools.files import atomic_write

ROOT = Path(__file__).parent.parent


def start(folder: Path, *flags: object) -> subprocess.Popen:
    """The classifier's training in a process of its own."""
    command = [sys.executable, str(ROOT / "train_classifier.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_one_line_that_continues_it(folder_root, tmp_path, number, code):
    """To all of its processes, as a terminal, Slurm and systemd send it."""
    flags = [*data_flags(folder_root), "--tag", "a b", *TRAINING, "--max_epoch", 10**6, "--num_workers", 1]
    process, model = start(tmp_path, *flags), tmp_path / "experiments" / "models" / "a b.pth"
    deadline = time.monotonic() + 60
    while not model.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in errors, errors
    line = errors.rstrip("\n").split("\n")[-1]
    name = signal.Signals(number).name
    assert line.startswith(
        f"train_classifier.py: stopped by {name}. To continue where it was, run the same command again:"
    )
    assert line.endswith("--num_workers 1") and "--tag 'a b'" in line
    assert torch.load(model, weights_only=True)["epoch"] >= 1


def test_a_module_that_is_stopped_names_a_command_that_continues_it(tmp_path):
    command = [sys.executable, "-m", "datasets.prepare.shapes", "--data_dir", str(tmp_path), "--num_workers", "0"]
    process = subprocess.Popen([*command, "--num_train", "100000"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    line = process.communicate(timeout=30)[1].rstrip("\n").split("\n")[-1]
    assert line.startswith("python -m datasets.prepare.shapes: stopped by SIGTERM.")
    again = shlex.split(line.split("again: ")[1])
    assert again == ["python", *command[1:], "--num_train", "100000"]


def stopped(monkeypatch, capsys, main) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, parse("train_classifier", "--tag", "t", "--num_workers", 3))
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize("error, words", [
    (lambda: torch.empty(2**55), "the memory is full. Lower --batch_size or --image_size, and raise"),
    (lambda: np.empty(2**55), "the memory is full. Lower --batch_size"),
    (raising(RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")),
     "--num_workers 3: /dev/shm is too small for them. Enlarge it (docker: --shm-size 8g)"),
    (raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                          "workers are out of shared memory. Please try to raise your shared memory limit.")),
     "--num_workers 3: /dev/shm is too small for them."),
    (raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
     "--num_workers 3: a helper process was killed, probably because memory is full. Lower --num_workers."),
    (raising(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")),
     "--num_workers 3: a helper process was killed"),
    (raising(OSError(errno.ENOSPC, "No space left on device")), "--num_workers 3: the helper processes cannot start"),
])  # fmt: skip
def test_memory_and_helpers_in_one_line(monkeypatch, capsys, error, words):
    main = error if error.__name__ == "main" else lambda args: error()
    code, text = stopped(monkeypatch, capsys, main)
    assert code == 2 and f"x.py: error: {words}" in text and text.count("\n") == 1, text


def test_a_signal_counts_though_what_it_interrupts_raises_another_error(monkeypatch, capsys):
    def main(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise RuntimeError("unexpected pos 4096 vs 3980")

    code, text = stopped(monkeypatch, capsys, main)
    assert code == 143 and text.startswith("x.py: stopped by SIGTERM.") and text.count("\n") == 1


def test_a_second_ctrl_c_ends_cleaning_up(monkeypatch, capsys):
    def main(args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    began = time.monotonic()
    code, text = stopped(monkeypatch, capsys, main)
    assert time.monotonic() - began < 1
    assert code == 130 and text.startswith("x.py: stopped by SIGINT.") and text.count("\n") == 1


def ignore_signals(ready: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.send(True)
    time.sleep(60)


def test_a_stopped_run_does_not_wait_for_helpers_that_ignore_signals(monkeypatch, capsys):
    """Such as a loading process that PyTorch was just starting: nobody tells it to end."""

    def main(args):
        ready, send = context.Pipe(duplex=False)
        helpers.append(context.Process(target=ignore_signals, args=(send,), daemon=True))
        helpers[0].start()
        ready.recv()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    helpers, context = [], multiprocessing.get_context("forkserver")
    code, _ = stopped(monkeypatch, capsys, main)
    helpers[0].join(10)
    assert (code, helpers[0].exitcode) == (143, -signal.SIGKILL)


class InDestructor:
    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        os.getpid()  # the handler runs between two instructions at the latest


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number, expected", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_python_drops_is_raised_anew_and_cleaning_up_is_left_in_peace(
    monkeypatch, capsys, number, expected
):
    start, cleaned = signal.setitimer, []
    monkeypatch.setattr(signal, "setitimer", lambda clock, seconds: start(clock, seconds / 50))

    def main(args):
        try:
            InDestructor(number)
            dropped.append(True)
            time.sleep(5)
        finally:
            for _ in range(5):
                time.sleep(0.03)
                cleaned.append(True)

    dropped = []
    began = time.monotonic()
    code, text = stopped(monkeypatch, capsys, main)
    assert dropped and len(cleaned) == 5 and time.monotonic() - began < 2
    assert code == expected and text.startswith(f"x.py: stopped by {signal.Signals(number).name}.")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_other_errors_keep_their_traceback(monkeypatch):
    for error in (RuntimeError("a bug"), OSError(errno.ENOSPC, "No space left on device", "a.txt")):
        with pytest.raises(type(error)):
            cli.run(raising(error), parse("train_classifier", "--tag", "t"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_files_reach_the_disk_before_their_name_and_the_name_after(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("x")
    assert calls == [str(temporary), "rename", str(tmp_path)]
    with atomic_write(tmp_path / "b.png", durable=False) as temporary:
        temporary.write_text("x")
    assert calls[3:] == ["rename"]
