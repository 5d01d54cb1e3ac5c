"""How a run of CSRM goes, told without masks, and when its network may teach itself.

    health = Health("auto", warmup_epochs=1, max_epoch=15)
    for epoch in range(first, 15):
        only_cam_labels = epoch < health.warmup_epochs(epoch)
        ...
            health.add("reliable", cam_labels != 255, cam_labels.numel())    # tensors; nothing is waited for
        print(health.close())

The signals of an epoch, means over its steps; per cent but for the first and the last:

    class_logit  the teacher's class logit of the classes in the image, on images that are not mixed
    vanished     labelled classes of which the teacher's label map does not show one pixel
    agreement    foreground of teacher labels and CAM labels, intersection over union, where CAM labels are reliable
    reliable     pixels with a CAM label, of the labeled half
    kept         foreground pixels of the unlabeled half that L_u keeps, and not drops for their entropy
    confident    pixels that L_s2c takes
    s2c_to_c2s   gradient of L_s2c over that of L_c2s, norms over the backbone, which both train; of one batch an epoch

docs/method.md says how well they follow the masks' true quality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tools.distributed import all_reduce_sum
from tools.parallel import world_size

SIGNALS = ("class_logit", "vanished", "agreement", "reliable", "kept", "confident", "s2c_to_c2s")

READY_VANISHED = 10.0
"""Per cent of the labelled classes that may be missing from the teacher's labels when self-training starts."""

HARM = 0.7
"""Self-training does harm once the class logit has fallen below this part of what it was at the end of warm-up."""

Record = dict[str, float | None]
"""The signals of an epoch; None where nothing was to be measured."""


class Health:
    """Adds up the signals of an epoch, keeps those of all epochs, and says in which epochs the network teaches itself.

    Its state is its history, so a run that goes on after a break decides as one without.

    Args:
        mode: "on": after `warmup_epochs`, to the end, as published. "off": never. "auto": from the epoch on after which
            the teacher shows nearly all classes; until class logits fall.
        warmup_epochs: first epochs with L_c and L_c2s only; of "auto", at least as many.
        max_epoch: E.
    """

    def __init__(self, mode: str, *, warmup_epochs: int, max_epoch: int) -> None:
        self.mode, self.warmup, self.max_epoch = mode, warmup_epochs, max_epoch
        self.history: list[Record] = []
        self.sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def warmup_epochs(self, epoch: int) -> int:
        """Epochs before self-training, as far as `epoch` (from 0) knows; `epoch` + 1 once that has stopped."""
        first, last = teaching_epochs(self.history[:epoch], self.mode, self.warmup, self.max_epoch)
        return first if epoch < last else epoch + 1

    def s2c_limit(self, epoch: int, w_c2s: float) -> float:
        """The largest weight that "auto" gives L_s2c: with it, its gradient does not exceed that of w_c2s L_c2s."""
        ratio = self.history[epoch - 1]["s2c_to_c2s"] if self.mode == "auto" and epoch else None
        return w_c2s / ratio if ratio else math.inf

    def add(self, name: str, part: Tensor, whole: Tensor | int) -> None:
        """Count towards a signal, which is the sum of all parts over the sum of all wholes.

        Args:
            name: one of `SIGNALS`.
            part, whole: of any shape, summed here; a whole may be a number.
        """
        above, below = self.sums.get(name, (0, 0))
        whole = whole.sum(dtype=torch.float64) if isinstance(whole, Tensor) else whole
        self.sums[name] = above + part.detach().sum(dtype=torch.float64), below + whole

    def add_gradients(self, losses: dict[str, Tensor], backbone: nn.Module) -> None:
        """Measure "s2c_to_c2s", where both losses are there and anything of the backbone is trained."""
        weights = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        if weights and {"s2c", "c2s"} <= losses.keys():
            self.add("s2c_to_c2s", *(_gradient_norm(losses[name], weights) for name in ("s2c", "c2s")))

    def close(self) -> Record:
        """End an epoch: bring its signals to the host, and keep them."""
        record: Record = dict.fromkeys(SIGNALS)
        for name, sums in self.sums.items():
            part, whole = all_reduce_sum(_pair(sums)).tolist()
            scale = 1 if name in ("class_logit", "s2c_to_c2s") else 100
            record[name] = round(scale * part / whole, 4) if whole else None
        self.history.append(record)
        self.sums = {}
        return record

    def news(self) -> str | None:
        """What the last epoch's signals mean for the run, in a line, if anything."""
        epoch = len(self.history)
        first, last = teaching_epochs(self.history, self.mode, self.warmup, self.max_epoch)
        if self.mode == "auto" and epoch < self.max_epoch and epoch in (first, last):
            what = "starts" if epoch == first else "stops, since class logits have fallen,"
            return f"self-training {what} after epoch {epoch}."
        if self.mode == "on" and harmed(self.history, first) == epoch:
            return (
                f"Warning: self-training makes it worse: class logits have fallen below {HARM:g} of what they were. "
                "Start again under another --tag with --self_training auto (or off)."
            )
        return None

    def report(self) -> dict[str, object]:
        """All epochs, signal by signal; and the [first, last] epoch of self-training, counted from 1, or []."""
        first, last = teaching_epochs(self.history, self.mode, self.warmup, self.max_epoch)
        series = {name: [record[name] for record in self.history] for name in SIGNALS}
        return {**series, "self_training": self.mode, "teaches_itself": [first + 1, last] if first < last else []}

    def share(self) -> None:
        """Give each process its equal share of the sums of the epoch so far."""
        for name, sums in self.sums.items():
            self.sums[name] = tuple((all_reduce_sum(_pair(sums)) / world_size()).unbind())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"history": self.history, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.history, self.sums = list(state["history"]), dict(state["sums"])


def _pair(sums: tuple[Tensor, Tensor | int]) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=sums[0].device) for value in sums])


def _gradient_norm(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])


def teaching_epochs(history: Sequence[Record], mode: str, warmup_epochs: int, max_epoch: int) -> tuple[int, int]:
    """(first, last): all five losses in epochs first <= e < last, as far as the epochs so far tell."""
    if mode == "off":
        return max_epoch, max_epoch
    if mode == "on":
        return warmup_epochs, max_epoch
    ready = (e for e in range(max(1, warmup_epochs), len(history) + 1) if is_ready(history[e - 1]))
    first = next(ready, max_epoch)
    return first, harmed(history, first) or max_epoch


def is_ready(record: Record) -> bool:
    """Whether the segmentation branch of an epoch knows the classes well enough to teach."""
    return record["vanished"] is not None and record["vanished"] <= READY_VANISHED


def harmed(history: Sequence[Record], first: int) -> int | None:
    """After how many epochs the self-training that began in epoch `first` had brought class logits down; or None."""
    if not 0 < first < len(history) or not (reference := history[first - 1]["class_logit"]) or reference < 0:
        return None
    fallen = (e + 1 for e in range(first, len(history)) if history[e]["class_logit"] < HARM * reference)
    return next(fallen, None)
