"""The installation: which packages are asked of which index, where an index is a folder and pip takes notes."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
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
