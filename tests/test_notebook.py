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
    lines = re.sub(r"^!(git|pip) .*$", "", lines, flags=re.MULTILINE)
    lines = re.sub(r"^%cd (.+)$", r"os.chdir('\1')", lines, flags=re.MULTILINE)
    lines = re.sub(r"^%env (\w+)=(.+)$", r"os.environ['\1'] = '\2'", lines, flags=re.MULTILINE)
    return re.sub(r"^!(.+)$", r"execute('''\1''', listener)", lines, flags=re.MULTILINE)


def test_the_notebook_goes_from_a_zip_to_a_model(tmp_path, monkeypatch):
    for place in ("birds/robin/a", "birds/robin/b", "birds/wren/a", "birds/background/c"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(
            tmp_path / f"{place}.jpg"
        )
    shutil.make_archive(str(tmp_path / "photographs"), "zip", tmp_path, "birds")
    shutil.copytree(ROOT / "runners", tmp_path / "csrm" / "runners")
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(PYTHON.format(python=sys.executable, path=tmp_path / "line"))
    stub.chmod(0o755)
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
        for cell in json.loads((ROOT / "docs" / "own-photographs.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(python_of(cell), names)
    results = tmp_path / "csrm" / "results"
    assert (tmp_path / "results.zip").stat().st_size > 0 and (results / "folder-deeplab.pth").is_file()
    masks = [load_mask(results / "masks" / f"{i}.png") for i in ("robin/a", "robin/b", "wren/a", "background/c")]
    assert all(mask.shape == (40, 30) for mask in masks)
    assert "robin/b" in (results / "report.html").read_text() and (results / "gallery.png").is_file()
