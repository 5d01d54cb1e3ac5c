"""Starting from other weights: our own checkpoints, public CAM priors, or plain timm state dicts.

    restore(model, "experiments/models/prior.pth")    # a classifier's checkpoint into CSRM: backbone and CAM classifier

Tensors are matched by name and shape. What was and was not restored is printed, and no match at all is an error: a
prior that silently fails to load looks like a training run that merely goes badly.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tools.errors import UserError


@dataclass(frozen=True)
class RestoreReport:
    """What a file gave to a model. Names are the model's, except in `unused`; batch counters are left out.

    Attributes:
        path: the file.
        restored: tensors taken from it.
        missing: tensors of the model it does not have.
        mismatched: tensors it has in another shape: name -> (shape in the file, shape in the model).
        unused: names in the file that nothing in the model goes by. Second names of tensors that were used do not
            count: public priors list their layers once by layer and once by stage.
    """

    path: str
    restored: list[str]
    missing: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: list[str]

    def __str__(self) -> str:
        total = len(self.restored) + len(self.missing) + len(self.mismatched)
        lines = [f"{self.path}: restored {len(self.restored)} of {total} tensors ({_summary(self.restored)})."]
        if self.missing:
            lines.append(f"  keep their initial values: {_summary(self.missing)}")
        for name, (theirs, ours) in self.mismatched.items():
            lines.append(f"  keeps its initial value: {name}, {list(theirs)} in the file but {list(ours)} in the model")
        if self.unused:
            lines.append(f"  not used from the file: {_summary(self.unused)}")
        return "\n".join(lines)


def restore(model: nn.Module, path: str | Path) -> RestoreReport:
    """Copy into `model`, in place, every tensor of a file that it has under the same name and shape; print what was.

    Args:
        model: with or without a `Backbone`; dtypes and devices stay the model's.
        path: a checkpoint of this project, a state dict (.pth, as published with Puzzle-CAM, P-NOC, torchvision and
            timm) or a .safetensors file.

    Raises:
        UserError: the file cannot be read, or fits nowhere.
    """
    source = load_state_dict(path)
    target = {name: tensor for name, tensor in model.state_dict().items() if not _is_counter(name)}
    names = {name: next((alias for alias in _aliases(name) if alias in source), None) for name in target}
    found = {name: source[alias] for name, alias in names.items() if alias}
    fits = {name: tensor for name, tensor in found.items() if tensor.shape == target[name].shape}
    used = {tensor.data_ptr() for tensor in found.values()}
    report = RestoreReport(
        path=str(path),
        restored=list(fits),
        missing=[name for name, alias in names.items() if alias is None],
        mismatched={n: (tuple(t.shape), tuple(target[n].shape)) for n, t in found.items() if n not in fits},
        unused=sorted(name for name, tensor in source.items() if tensor.data_ptr() not in used),
    )
    if not fits:
        raise UserError(
            f"{path}: none of its {len(source)} tensors fits this network ({_summary(target)}). "
            "Check --architecture, or pass the weights of another file."
        )
    model.load_state_dict(fits, strict=False)
    print(report)
    return report


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights in a file onto the CPU: of a checkpoint the model's, without the prefix of data parallelism.

    Raises:
        UserError: the file is missing, cannot be read, or holds no tensors.
    """
    try:
        is_safetensors = Path(path).suffix == ".safetensors"
        content = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file of weights.") from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable file of weights. Pass a state dict (.pth or .safetensors).") from error
    for wrapper in ("teacher", "model", "state_dict"):  # of CSRM the teacher, the model that inference uses too
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items() if not _is_counter(name)}
    if not tensors:
        raise UserError(f"{path}: holds no weights. Pass a state dict or a checkpoint of this project.")
    return tensors


def _aliases(name: str) -> Iterator[str]:
    """Names a tensor of ours may have in a file: its own; of the backbone, those of public priors and of timm too."""
    yield name
    match = re.fullmatch(r"(?:backbone\.)?net\.(.+)", name)
    if match:
        inner = match.group(1)
        # timm renames `stages.0` to `stages_0` when it takes features from a network.
        nested = inner.replace("_", ".", 1)
        # Public priors call the whole backbone `backbone` or `model`.
        for prefix in ("backbone.net.", "backbone.", "model.", ""):
            yield from (prefix + inner, prefix + nested)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # of no consequence with a fixed momentum


def _summary(names: Iterable[str]) -> str:
    """Tensors counted by the module they belong to, such as "backbone 933, classifier 1"."""
    counts = Counter(name.removeprefix("net.").partition(".")[0] for name in names)
    shown = [f"{module} {count}" for module, count in counts.most_common(8)]
    return ", ".join(shown + ["..."] * (len(counts) > 8))
