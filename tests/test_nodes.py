"""Two machines of two processes each, started by the runners, against one process: equal losses, weights and bank.

Both are this machine. The second comes late, vanishes in the middle of the training and comes again: the processes of
the first end, meet it, and go on at the last checkpoint. `work` is what each process does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_distributed import MODELS, call_at, free_ports, train

from tools import distributed, parallel
from tools.errors import UserError

TESTS = Path(__file__).parent
WORLD = 4


def work(root: Path, ports: list[int]) -> None:
    """Train twice, then look for a folder that the two machines do not share; what came of it goes into a file."""
    torch.set_num_threads(1)

    def meet_again() -> None:  # torchrun's own meeting point is for one group
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports.pop()))

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["NODE"] == "1" and not Path("back").exists():
            call_at(patch, 2, hang)
        results["csrm"] = train("csrm", root)
    meet_again()
    results["bank"] = train("bank", root)
    torch.save(results, f"rank{parallel.rank()}.pt")
    meet_again()
    own = Path(f"machine{os.environ['NODE']}")
    own.mkdir(exist_ok=True)
    os.chdir(own)
    with pytest.raises(UserError) as error:
        distributed.start(Path("experiments"))
    (Path("..") / f"refused{parallel.rank()}.txt").write_text(str(error.value))
    distributed.stop()


def hang() -> None:
    Path(f"hangs{os.getpid()}").touch()
    time.sleep(600)


def start_machine(node: int, folder: Path, root: Path, ports: list[int]) -> subprocess.Popen:
    """`run` of the runners, with a script that is `work`."""
    (folder / "train_it.py").write_text(
        f"import pathlib, sys\nimport test_nodes\ntest_nodes.work(pathlib.Path({str(root)!r}), {ports[1:]})\n"
    )
    shutil.copytree(TESTS.parent / "runners", folder / "runners", dirs_exist_ok=True)
    script = "source runners/config/env.sh; REPORT=report; run train_it.py"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
        "NODES": "2",
        "GPUS": "2",
        "NODE": str(node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0] - 1),
        "RESTARTS": "1",
        "DATASET": "folder",
        "DATA_DIR": str(root),
        "OMP_NUM_THREADS": "1",
    }
    with open(folder / f"log{node}.txt", "a") as log:
        command = ["bash", "-c", script]
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(command, cwd=folder, env=environment, **options)


def wait_for(condition: Callable[[], bool], machines: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        dead = [machine for machine in machines if machine.poll()]
        assert not dead and time.monotonic() < deadline, "".join(f.read_text() for f in folder.glob("log?.txt"))
        time.sleep(0.2)


def vanish(machine: subprocess.Popen, workers: list[int]) -> None:
    """Kill the runner, torchrun and their processes at once, as when a machine loses its power."""
    os.killpg(machine.pid, signal.SIGKILL)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    machine.wait()


@pytest.fixture(scope="module")
def four(folder_root, tmp_path_factory) -> Path:
    """The folder that the four processes leave."""
    folder = tmp_path_factory.mktemp("four")
    ports = free_ports(3)
    machines = [start_machine(0, folder, folder_root, ports)]
    try:
        time.sleep(3)
        machines.append(start_machine(1, folder, folder_root, ports))
        wait_for(lambda: len(list(folder.glob("hangs*"))) == 2, machines, folder)
        vanish(machines.pop(), [int(path.name[5:]) for path in folder.glob("hangs*")])
        (folder / "back").touch()
        machines.append(start_machine(1, folder, folder_root, ports))
        wait_for(lambda: all(machine.poll() == 0 for machine in machines), machines, folder)
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGTERM)
    return folder


@pytest.fixture(scope="module")
def one(folder_root, tmp_path_factory) -> dict[str, dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("one"))
        return {name: train(name, folder_root) for name in ("csrm", "bank")}


@pytest.mark.slow
def test_two_machines_train_like_one_process_though_one_vanished(four, one):
    results = [torch.load(four / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
    for each in results:
        assert len(each["csrm"]["logged"]) == 2, "losses and health of the second epoch only"
        for name in ("c", "c2s", "s2c", "u"):
            for run in ("csrm", "bank"):
                value, expected = (source[run]["logged"][-2][name] for source in (each, one))
                assert value == pytest.approx(expected, abs=1e-5), (run, name)
    actual, expected = results[0]["csrm"]["checkpoint"], one["csrm"]["checkpoint"]
    assert actual["step"] == expected["step"] == 2
    for part in ("model", "teacher"):
        for key, value in expected[part].items():
            torch.testing.assert_close(actual[part][key], value, atol=1e-5, rtol=1e-4)
    actual, expected = (each["bank"]["checkpoint"]["memory_bank"] for each in (results[0], one))
    assert expected["sizes"].sum() > 0 and torch.equal(actual["sizes"], expected["sizes"])
    torch.testing.assert_close(actual["storage"], expected["storage"], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_other_machine_says_what_happened_and_all_go_on(four):
    log = (four / "log0.txt").read_text()
    assert log.count("error: another process has ended or hangs. Its error says why; run again to continue.") == 2
    assert log.count(f"{MODELS / 'csrm.pth'}: continuing after epoch 1 of 2.") <= 1
    assert "continuing after epoch 1 of 2." in log + (four / "log1.txt").read_text()
    assert (four / "report" / "commands.tsv").read_text().count("\n") == 1


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused(four):
    lines = [(four / f"refused{rank}.txt").read_text() for rank in range(WORLD)]
    assert set(lines) == {
        "experiments: 2 of 4 processes do not see what the first one writes there. Start all machines in one shared "
        "folder."
    }
    assert not list(four.glob("**/.shared-*"))
