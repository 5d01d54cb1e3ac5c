"""Checkpoints: everything needed to use a model without knowing how it was trained, or to go on training it.

    path = Path("experiments/models/a.pth")
    save_checkpoint(path, model=model.state_dict(), config=model.config, classes=classes, epoch=1)
    checkpoint = load_checkpoint(path)     # models.load_model makes a network of it

A checkpoint is a dict of plain containers and tensors, read with `weights_only=True`:

    config      arguments of models.build_model          model      its weights (CSRM: the student's)
    classes     class names, background first            teacher    CSRM: the teacher's weights
    args        the command line, for the record         epoch      epochs finished; max_epoch: of how many
    step        optimiser steps taken                    version    of the code
    identity    what made it (`tools.identity`)
    optimizer, scaler, memory_bank                       what only a resumed run needs

Random states are not stored: every epoch seeds all generators from (seed, epoch), so a resumed run draws what an
uninterrupted one would have drawn.
"""

import io
import os
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tools.errors import UserError
from tools.files import atomic_write, read_json
from tools.identity import VERSION

DAMAGE = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError),
    *(pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile, zlib.error),
)
"""What reading a damaged file of weights raises."""


def save_checkpoint(path: Path, **content: Any) -> None:
    """Write a checkpoint atomically; the one before it stays as TAG.previous.pth. Equal content gives equal bytes."""
    buffer = io.BytesIO()  # PyTorch's writer, interrupted while it writes to a file, can end the process
    torch.save({"version": VERSION, **content}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        if path.exists():
            _keep(path, previous_path(path))


def previous_path(path: Path) -> Path:
    """Where the checkpoint before `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, so that the first can be replaced and is never missing."""
    spare = previous.with_name(f".{previous.name}")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without links
        shutil.copyfile(path, spare)
    os.replace(spare, previous)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU: TAG.pth, or the model.safetensors of an export with its config.json.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this project.
    """
    try:
        exported = Path(path).suffix == ".safetensors"
        _check_sums(path)
        content = read_export(Path(path)) if exported else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint. Train it first, or pass another with --weights.") from error
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable checkpoint. Train it again, or pass another.") from error
    if not isinstance(content, dict) or not {"config", "model", "classes", "epoch"} <= content.keys():
        raise UserError(
            f"{path}: bare weights, not a checkpoint of this project. Use them with --restore when training."
        )
    return content


def _check_sums(path: str | Path) -> None:
    """Raise BadZipFile if the check sum of an entry is wrong: PyTorch looks at none of them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise zipfile.BadZipFile(name)


def read_export(path: Path) -> dict[str, Any]:
    """What config.json beside a .safetensors file says, and the tensors as "model" (UserError: there is none)."""
    tensors, config = load_file(path), path.with_name("config.json")
    if not config.is_file():
        raise UserError(f"{config}: missing; it says which network {path.name} is. Copy it there too.")
    return {**read_json(config, "Export the model again, or copy the file again."), "model": tensors}


def warn_unfinished(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Print a line if the training of a checkpoint has not reached its last epoch."""
    epoch, last = (checkpoint.get(key) for key in ("epoch", "max_epoch"))
    if isinstance(epoch, int) and isinstance(last, int) and epoch < last:
        print(f"Warning: {path}: after epoch {epoch} of {last}. Its training has stopped, or is going on.")
