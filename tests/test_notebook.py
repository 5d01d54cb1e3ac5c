"""docs/own-photographs.ipynb, cell by cell, on tiny photographs: its commands run through the runners."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from command import DECODER, TRAINING, run
from PIL import Image

from tools.files import load_mask

ROOT = Path(__file__).parent.parent
NETWORK = " ".join(TRAINING[4:8])  # --architecture, --backbone_weights
PYTHON = """#!{python} -S
import json, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect("{path}")
    line.sendall((json.dumps(sys.argv[1:]) + "\\n").encode())
    sys.exit(line.recv(1) != b"0")
"""
GIT = """#!/bin/sh
[ "$1" = clone ] && mkdir "$4" && cp -r {root}/runners {root}/train_csrm.py "$4"
"""


def execute(command: str, listener: socket.socket) -> None:
    """Run a shell command; each Python that it calls is answered by this process, which has PyTorch loaded already."""
    process = subprocess.Popen(["bash", "-ec", command])
    while process.poll() is None:
        if select.select([listener], [], [], 0.05)[0]:
            with listener.accept()[0] as line:
                script, *flags = [text for text in json.loads(line.makefile().readline()) if text != "-m"]
                run(script.removesuffix(".py"), *flags)
                line.sendall(b"0")
    assert process.returncode == 0, command


def python_of(cell: dict) -> str:
    """A cell without IPython's magic; what only a new machine needs is left out."""
    lines = "".join(cell["source"])
    lines = re.sub(r"^!pip .*$", "", lines, flags=re.MULTILINE)
    lines = re.sub(r"^( *)%cd (.+)$", r"\1os.chdir('\2')", lines, flags=re.MULTILINE)
    lines = re.sub(r"^%env (\w+)=(.+)$", r"os.environ['\1'] = '\2'", lines, flags=re.MULTILINE)
    return re.sub(r"^( *)!(.+)$", r"\1execute('''\2''', listener)", lines, flags=re.MULTILINE)


def zip_photographs(folder: Path, *places: str) -> None:
    """photographs.zip, as a file manager makes it: what it notes for itself is in a folder with a dot."""
    for place in places:
        (folder / "zip" / place).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(noise).save(folder / "zip" / f"{place}.jpg")
    (folder / "zip" / ".thumbnails").mkdir()
    shutil.make_archive(str(folder / "photographs"), "zip", folder / "zip")
    shutil.rmtree(folder / "zip")


def test_the_notebook_goes_from_a_zip_to_a_model(tmp_path, monkeypatch):
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(PYTHON.format(python=sys.executable, path=tmp_path / "line"))
    git = tmp_path / "bin" / "git"
    git.write_text(GIT.format(root=ROOT))
    for program in (stub, git):
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("DATASET", "DATA_DIR"):  # so that what the notebook sets ends with this test
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    flags = {"IMAGE_FLAGS": " ".join(TRAINING[8:14]), "BACKBONE": NETWORK, "BACKBONE_SEG": f"{NETWORK} {DECODER[0]} 8"}
    flags |= {"PRIOR_FLAGS": "--max_epoch 1 --batch_size 2", "SEG_FLAGS": "--max_epoch 1 --batch_size 2"}
    flags |= {"CSRM_FLAGS": f"--max_epoch 1 --batch_size 2 {DECODER[0]} 8", "WORKERS": "0", "DEVICE": "cpu"}
    for name, value in flags.items():
        monkeypatch.setenv(name, value)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "line"))
        listener.listen()
        names = {"os": os, "execute": execute, "listener": listener}
        cells = json.loads((ROOT / "docs" / "own-photographs.ipynb").read_text())["cells"]
        cells = [python_of(cell) for cell in cells if cell["cell_type"] == "code"]
        zip_photographs(tmp_path, "birds/tit/a", "birds/wren/old")
        for cell in cells[:2]:
            exec(cell, names)
        os.chdir(tmp_path)  # where a kernel that is started again begins
        exec(cells[0], names)
        zip_photographs(tmp_path, "birds/robin/a", "birds/robin/b", "birds/wren/a", "birds/background/c")
        for cell in cells:  # the first ones again, with other photographs
            exec(cell, names)
    results = tmp_path / "csrm" / "results"
    assert (tmp_path / "results.zip").stat().st_size > 0 and (results / "folder-deeplab.pth").is_file()
    assert {path.stem for path in (results / "masks").rglob("*.png")} == {"a", "b", "c"}
    assert not (tmp_path / "csrm" / "csrm").exists() and not (results / "masks" / "tit").exists()
    masks = [load_mask(results / "masks" / f"{i}.png") for i in ("robin/a", "robin/b", "wren/a", "background/c")]
    assert all(mask.shape == (40, 30) for mask in masks)
    assert "robin/b" in (results / "report.html").read_text() and (results / "gallery.png").is_file()
