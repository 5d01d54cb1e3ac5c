"""Files of weights from anywhere: a state dict, alone or in a checkpoint, with or without a prefix before names.

    weights = load_weights("resnet50.pth")
    weights.tensors["layer1.0.conv1.weight"]
    prefix = common_prefix(weights.tensors, {"layer1.0.conv1.weight", ...})    "encoder.", say

Files are read with `weights_only=True`: no code in them runs. Training scripts save harmless Python objects beside the
weights (`argparse.Namespace`, NumPy numbers, paths). Blanks replace these, so their code does not run either.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tools.checkpoint import DAMAGE, read_export, warn_unfinished
from tools.errors import UserError

HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    "datetime.timedelta",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
WRAPPERS = ("teacher", "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "weights")
WRAPPERS += ("params", "params_ema", "model_ema", "ema", "state_dict_ema", "ema_state_dict")
"""Entries that hold the weights, those of ours first: of CSRM the teacher, the model that inference uses too."""

_WRAPPED = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    tensors: dict[str, torch.Tensor]  # by name, on the CPU, without what data parallelism and compilation add to names
    classes: tuple[str, ...] | None  # the class names, background first, of a checkpoint of this project; else None


class _Blank:
    """Stands in for a Python object: takes what it is made of, keeps nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _blank(name: str) -> type[_Blank]:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (_Blank,), {"__module__": module, "__qualname__": qualname})


_BLANKS = [_blank(name) for name in HARMLESS]


def load_weights(path: str | Path) -> Weights:
    """Read the weights in a .pth or .safetensors file; of our exports, config.json beside it names the classes.

    Raises:
        UserError: the file is missing, cannot be read, could run code, or holds no tensors.
    """
    content = _read(Path(path))
    if isinstance(content, dict):
        warn_unfinished(path, content)
    classes = content.get("classes") if isinstance(content, dict) else None
    if not (isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)):
        classes = None
    tensors = {re.sub(r"^\.", "", _WRAPPED.sub("", name)): tensor for name, tensor in _flat(_unwrap(content))}
    if not tensors:
        raise UserError(f"{path}: holds no weights. Pass a state dict or a checkpoint of this project.")
    return Weights(tensors, None if classes is None else tuple(classes))


def common_prefix(names: Iterable[str], wanted: set[str]) -> str:
    """What stands before most of the `wanted` names in a file: "" or such as "encoder." or "model.backbone."."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for split in range(len(parts)):
            if ".".join(parts[split:]) in wanted:
                counts["".join(f"{part}." for part in parts[:split])] += 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)), default="")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return read_export(path) if path.with_name("config.json").is_file() else load_file(path)
        with torch.serialization.safe_globals(_BLANKS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file of weights. Make it first, or pass another.") from error
    except DAMAGE as error:
        fault = f"{path}: not a readable file of weights"
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):  # what PyTorch says of a pickle
            raise UserError(
                f"{fault}: it holds Python objects ({foreign[1]}), which could run code. "
                "Save the state dict alone, where that code is at home: torch.save(model.state_dict(), FILE)."
            ) from error
        raise UserError(f"{fault}. Pass a state dict (.pth or .safetensors).") from error


def _unwrap(content: Any) -> Any:
    """The innermost dict that a known entry leads to."""
    while isinstance(content, dict):
        inner = next((content[name] for name in WRAPPERS if any(_flat(content.get(name)))), None)
        if inner is None:
            break
        content = inner
    return content


def _flat(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a dict and of the dicts in it; not of optimisers, which have numbers for names."""
    if not isinstance(content, dict):
        return
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(name, str):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _flat(value))
