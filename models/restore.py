"""Starting from other weights: our own checkpoints, public CAM priors, or plain timm state dicts.

    restore(model, "experiments/models/prior.pth")    # a classifier's checkpoint into CSRM: backbone and CAM classifier

Tensors are matched by name and shape, class outputs by class. What was and was not restored is printed, and a file that
gives little or nothing is an error: a prior that silently fails to load looks like a training run that goes badly.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tools.errors import UserError
from tools.weights import common_prefix, load_weights

OUTPUTS = {"classifier.weight": 1, "segmentation.4.weight": 0, "segmentation.4.bias": 0}
"""Tensors with a row for each class, and the class of their first row: the classifier has none for the background."""

MOST = 0.95
"""Part of the backbone that a file must give. resnet50 would give .89 of resnet50d, all but its shortcuts and stem."""

MORE = 0.2
"""How much more it may have of the same blocks: buffers that other versions of timm keep (Swin) are a tenth."""

_BACKBONE = re.compile(r"(?:backbone\.)?net\.(.+)")
_LIST = re.compile(r"(.+)\.\d+\.")  # of blocks


@dataclass(frozen=True)
class RestoreReport:
    """What a file gave to a model. Names are the model's, except in `unused`; batch counters are left out."""

    path: str  # the file
    restored: list[str]  # tensors taken from it
    missing: list[str]  # tensors of the model it does not have
    # tensors it has in another shape: name -> (shape in the file, shape in the model)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    # names in the file that the model does not use. Second names of tensors that it uses do not count: public
    # priors list their layers once by layer and once by stage
    unused: list[str]
    # of a file that names its classes in another order than the model's, or names others: its own
    file_classes: list[str]
    # of a file that names its classes, ours that it has not; their rows keep their initial values
    new_classes: list[str]
    nameless: bool  # the file gave class outputs without naming the classes

    def __str__(self) -> str:
        total = len(self.restored) + len(self.missing) + len(self.mismatched)
        lines = [f"{self.path}: restored {len(self.restored)} of {total} tensors ({_summary(self.restored)})."]
        if self.missing:
            lines.append(f"  keep their initial values: {_summary(self.missing)}")
        for name, (theirs, ours) in self.mismatched.items():
            lines.append(f"  keeps its initial value: {name}, {list(theirs)} in the file but {list(ours)} in the model")
        if self.file_classes:
            lines.append(f"  outputs are matched by class; the file's are {', '.join(self.file_classes)}")
        if self.new_classes:
            lines.append(f"  keep their initial values, as the file has no such class: {', '.join(self.new_classes)}")
        if self.nameless:
            lines.append("  classes: the file does not name its own, so they are taken to be ours, in our order")
        if self.unused:
            lines.append(f"  not used from the file: {_summary(self.unused)}")
        return "\n".join(lines)


def restore(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> RestoreReport:
    """Copy into `model`, in place, every tensor of a file that it has under the same name and shape; print what was.

    A CAM classifier that the file gives joins the model's `pretrained` parts (`models.build_model`).

    Args:
        model: with or without a `Backbone`; dtypes and devices stay the model's.
        path: a checkpoint of this project, a state dict (.pth, as published with Puzzle-CAM, P-NOC, torchvision and
            timm, with any prefix before the names) or a .safetensors file.
        classes: names, background first, of the model's outputs. If the file names its classes too, the outputs are
            matched by name: rows of a class that the file has not keep their initial values.

    Raises:
        UserError: the file cannot be read, fits nowhere, is of another backbone, or a deeper one, or is not finite.
    """
    weights = load_weights(path)
    source = {name: tensor for name, tensor in weights.tensors.items() if not _is_counter(name)}
    target = {name: tensor for name, tensor in model.state_dict().items() if not _is_counter(name)}
    pairs = _pairs(target, source)
    found = {name: source[alias] for name, alias in pairs.items()}
    used = {tensor.data_ptr() for tensor in found.values()}
    sort = classes is not None and weights.classes is not None and weights.classes != tuple(classes)
    new_classes = _sort_rows(found, target, weights.classes, classes) if sort else []
    kinds = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in target.items()}
    fits = {name: t for name, t in found.items() if (t.shape, t.is_floating_point()) == kinds[name]}
    report = RestoreReport(
        path=str(path),
        restored=list(fits),
        missing=[name for name in target if name not in found],
        mismatched={n: (tuple(t.shape), tuple(target[n].shape)) for n, t in found.items() if n not in fits},
        unused=sorted(name for name, tensor in source.items() if tensor.data_ptr() not in used),
        file_classes=list(weights.classes[1:]) if sort else [],
        new_classes=new_classes,
        nameless=weights.classes is None and any(name in fits for name in OUTPUTS),
    )
    _check(path, fits, source, target, _blocks_beside(pairs, report.unused))
    model.load_state_dict(fits, strict=False)
    if "classifier.weight" in fits:
        model.pretrained.add("classifier")
    print(report)
    return report


def _pairs(target: Iterable[str], source: Iterable[str]) -> dict[str, str]:
    """The model's names that a file has, and how they are called there.

    The file may have them below a prefix, and the backbone alone below another; timm renames `stages.0` to `stages_0`
    when it takes features from a network.
    """
    names = set(source)
    inner = {name: match[1] for name in target if (match := _BACKBONE.fullmatch(name))}
    outside = common_prefix(names, set(target))
    inside = common_prefix(names, {alias for name in inner.values() for alias in (name, name.replace("_", ".", 1))})
    pairs = {}
    for name in target:
        aliases = [outside + name]
        if name in inner:
            aliases += [inside + inner[name], inside + inner[name].replace("_", ".", 1)]
        present = [alias for alias in aliases if alias in names]
        if present:
            pairs[name] = present[0]
    return pairs


def _sort_rows(
    found: dict[str, torch.Tensor], target: dict[str, torch.Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> list[str]:
    """Bring the outputs in `found` from the order of their classes to ours, in place.

    Returns:
        The classes that the file has not. If that is all of them, the outputs are taken out of `found`; so are those
        with more or fewer rows than the file names classes, as one cannot tell which class a row is of.
    """
    shared = [name for name in ours[1:] if name in theirs[1:]]
    for output, first in OUTPUTS.items():
        rows = found.pop(output, None)
        if rows is None or not shared or len(rows) != len(theirs) - first:
            continue
        if rows.shape[1:] != target[output].shape[1:]:
            found[output] = rows
            continue
        found[output] = target[output].clone()
        for name in [ours[0], *shared][first:]:
            found[output][ours.index(name) - first] = rows[theirs.index(name) - first].to(found[output])
    return [name for name in ours[1:] if name not in shared]


def _blocks_beside(pairs: dict[str, str], unused: Iterable[str]) -> list[str]:
    """Unused names in blocks of the file that stand in one list with blocks of the backbone."""
    inner = {alias: match[1] for name, alias in pairs.items() if (match := _BACKBONE.fullmatch(name))}
    lists = {alias[: match.end(1) - len(n)] for alias, n in inner.items() if (match := _LIST.match(n))}
    return [name for name in unused if (match := _LIST.match(name)) and match[1] in lists]


def _check(
    path: str | Path,
    fits: dict[str, torch.Tensor],
    source: dict[str, torch.Tensor],
    target: dict[str, torch.Tensor],
    beside: Sequence[str],
) -> None:
    """Raise UserError unless what fits is a start, and the file has no further blocks `beside` it."""
    if not fits:
        raise UserError(
            f"{path}: none of its {len(source)} tensors fits this network ({_summary(target)}). "
            "Check --architecture, or pass the weights of another file."
        )
    ours = [name for name in target if _BACKBONE.fullmatch(name)]
    given = sum(name in fits for name in ours)
    if len(beside) > MORE * given:
        raise UserError(
            f"{path}: has {len(beside)} tensors more than the {len(ours)} of the backbone in the same stages, so it is "
            "of a deeper network. Check --architecture, or pass the weights of another file."
        )
    if given < MOST * len(ours):
        raise UserError(
            f"{path}: gives {given} of the {len(ours)} tensors of the backbone, so it is of another network. "
            "Check --architecture, or pass the weights of another file."
        )
    broken = [name for name, tensor in fits.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} tensors hold values that are not finite. Pass another file.")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # of no consequence with a fixed momentum


def _summary(names: Iterable[str]) -> str:
    """Tensors counted by the module they belong to, such as "backbone 933, classifier 1"."""
    counts = Counter(name.removeprefix("net.").partition(".")[0] for name in names)
    shown = [f"{module} {count}" for module, count in counts.most_common(8)]
    return ", ".join(shown + ["..."] * (len(counts) > 8))
