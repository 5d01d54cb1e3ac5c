"""The installation: which packages are asked of which index, where an index is a folder and pip takes notes."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """The address of an index that has PyTorch."""
    (tmp_path / "index" / "torch").mkdir(parents=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "index")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def install(tmp_path: Path):
    """Runs the script where PATH has these programs; returns what was installed, and what was printed."""

    def run(torch_index: str, *, torch: bool = False, pip: str = "", **programs: str) -> tuple[list[str], str]:
        folder = tmp_path / "project"
        shutil.copytree(ROOT / "runners", folder / "runners")
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / "bin").mkdir()
        for name in ("bash", "grep", "curl"):
            (folder / "bin" / name).symlink_to(shutil.which(name))
        for name, text in programs.items():
            program(folder / "bin" / name.replace("_", "-"), text)
        program(folder / ".venv" / "bin" / "python", f"exit {int(not torch)}")
        program(folder / ".venv" / "bin" / "pip", f'echo pip "$@" >> calls.txt\n{pip}')
        (folder / "requirements.txt").write_text("torch>=2.6\ntorchvision>=0.21  # like torch\ntimm>=1\n")
        environment = {"PATH": str(folder / "bin"), "TORCH_INDEX": torch_index}
        command = ["bash", "runners/install.sh", "requirements.txt"]
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=20)
        assert process.returncode == 0, process.stderr
        return (folder / "calls.txt").read_text().splitlines(), process.stdout + process.stderr

    return run


ALL = "pip install --quiet -r requirements.txt"


def test_the_cpu_build_of_both_comes_from_its_index(install, index):
    called, printed = install(index)
    assert called == [f"pip install --quiet --index-url {index} torch>=2.6 torchvision>=0.21", ALL]
    assert printed == f"No GPU: PyTorch's CPU build, from {index}\n"


@pytest.mark.parametrize("found", ["torch", "gpu", "nothing there", "no server", "switched off"])
def test_everything_comes_from_pypi(install, index, found):
    """PyTorch is there already; there is a GPU; the index has no PyTorch, does not answer, or is not wanted."""
    addresses = {"nothing there": f"{index}/torch", "no server": "http://127.0.0.1:9", "switched off": ""}
    programs = {"nvidia_smi": ""} if found == "gpu" else {}
    called, printed = install(addresses.get(found, index), torch=found == "torch", **programs)
    assert called == [ALL] and printed == ""


def test_an_index_that_answers_but_does_not_work(install, index):
    called, printed = install(index, pip='[ "$3" != --index-url ]')
    assert called[1:] == [ALL] and printed.endswith("That failed. PyTorch comes from PyPI.\n")


@pytest.mark.parametrize("works", [True, False])
def test_uv_where_it_is(install, works):
    called, _ = install("", uv=f'echo uv "$@" >> calls.txt; exit {int(not works)}')
    uv = "uv pip install --quiet --python .venv/bin/python -r requirements.txt"
    assert called == [uv] + [ALL] * (not works)


@pytest.fixture
def make_venv(tmp_path: Path):
    """Runs a command where PYTHON is such a program, which notes its arguments."""

    def run(*command: str, python: str) -> tuple[list[str], subprocess.CompletedProcess]:
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "requirements.txt").touch()
        shutil.copytree(ROOT / "runners", tmp_path / "runners", dirs_exist_ok=True)
        program(tmp_path / "python3.9", f'echo "$@" >> calls.txt\n{python}')
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python3.9"), "TORCH_INDEX": ""}
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        calls = tmp_path / "calls.txt"
        return calls.read_text().splitlines() if calls.exists() else [], process

    return run


BROKEN = "case $2 in venv) mkdir -p .venv/bin; touch .venv/bin/python; echo no ensurepip; exit 1;; esac"


def test_a_venv_that_could_not_be_made_is_removed(make_venv, tmp_path):
    """So that the next try makes it anew."""
    for _ in range(2):
        called, process = make_venv("make", ".venv/bin/python", python=BROKEN)
        assert process.returncode == 2 and "no ensurepip" in process.stdout and not (tmp_path / ".venv").exists()
    assert called.count("-m venv .venv") == 2


@pytest.mark.parametrize(
    "fault", ["import sys; sys.version_info = (3, 9, 18)", "import tarfile; del tarfile.data_filter"]
)
def test_an_older_python_is_refused_before_anything_is_installed(make_venv, tmp_path, fault):
    called, process = make_venv("make", ".venv/installed", python=f'exec {sys.executable} -c "{fault}\n$2"')
    line = (
        f"{tmp_path}/python3.9: no Python 3.10.12, 3.11.4 or newer. Install one, and name it: export PYTHON=python3.12"
    )
    assert process.returncode == 2 and process.stderr.splitlines()[0] == line and process.stdout == ""
    assert "-m venv .venv" not in called


def test_the_first_stage_installs_with_the_python_that_is_named(make_venv, tmp_path):
    (tmp_path / "images").mkdir()
    called, process = make_venv("env", "DATASET=folder", "DATA_DIR=.", "bash", "runners/0-setup.sh", python=BROKEN)
    assert called[-1] == "-m venv .venv" and process.returncode == 2
