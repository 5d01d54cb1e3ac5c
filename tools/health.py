"""Signals of a CSRM run that need no masks, and the epochs in which its network teaches itself.

    health = Health("auto", warmup_epochs=1, max_epoch=15)
    for epoch in range(first, 15):
        only_cam_labels = epoch < health.warmup_epochs(epoch)
        ...
            health.add("reliable", cam_labels != 255, cam_labels.numel())    # tensors; nothing waits for the device
        print(health.close())

The signals of an epoch are means over its steps, in per cent except for the first and the last:

    class_logit  the teacher's class logit of the classes in the image, on images that are not mixed
    vanished     labelled classes without a pixel in the teacher's label map
    agreement    IoU of the foreground of teacher labels and of CAM labels, where CAM labels are reliable
    reliable     pixels of the labeled half that have a CAM label
    kept         foreground pixels of the unlabeled half whose entropy is low enough for L_u
    confident    pixels that L_s2c takes
    s2c_to_c2s   norm of the gradient of L_s2c on the backbone, divided by that of L_c2s; of the first batch of an epoch

docs/method.md says how well they follow the true quality of the masks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tools.distributed import all_reduce_sum
from tools.history import SHARES, SIGNALS
from tools.parallel import world_size

READY_VANISHED = 10.0
"""Per cent of the labelled classes: self-training starts when no more are missing from the teacher's labels."""

HARM = 0.7
"""Self-training is harmful when the class logit is below this fraction of its value at the end of warm-up."""

Record = dict[str, float | None]
"""The signals of an epoch; None where there was nothing to measure."""


class Health:
    """Adds up the signals of an epoch, keeps those of all epochs, and decides when the network teaches itself.

    It decides from its history alone, which is its state: so a resumed run decides as one without a break.

    Args:
        mode: "on": after `warmup_epochs`, to the end, as published. "off": never. "auto": from the first epoch after
            which the teacher shows nearly all classes, until class logits fall.
        warmup_epochs: first epochs with L_c and L_c2s only; the least number of them for "auto".
        max_epoch: E.
    """

    def __init__(self, mode: str, *, warmup_epochs: int, max_epoch: int) -> None:
        self.mode, self.warmup, self.max_epoch = mode, warmup_epochs, max_epoch
        self.history: list[Record] = []
        self.sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def warmup_epochs(self, epoch: int) -> int:
        """Epochs before self-training, as known in `epoch` (from 0); `epoch` + 1 once self-training has stopped."""
        first, last = self.teaching_epochs(epoch)
        return first if epoch < last else epoch + 1

    def teaching_epochs(self, epoch: int | None = None) -> tuple[int, int]:
        """(first, last): epochs first <= e < last have all five losses, as known in `epoch`, by default now."""
        if self.mode == "off":
            return self.max_epoch, self.max_epoch
        if self.mode == "on":
            return self.warmup, self.max_epoch
        history = self.history[:epoch]
        ready = (e for e in range(max(1, self.warmup), len(history) + 1) if is_ready(history[e - 1]))
        first = next(ready, self.max_epoch)
        return first, harmed(history, first) or self.max_epoch

    def s2c_limit(self, epoch: int, w_c2s: float) -> float:
        """The largest weight of L_s2c in "auto": its weighted gradient does not exceed that of w_c2s L_c2s."""
        ratio = self.history[epoch - 1]["s2c_to_c2s"] if self.mode == "auto" and epoch else None
        return w_c2s / ratio if ratio else math.inf

    def add(self, name: str, part: Tensor, whole: Tensor | int) -> None:
        """Add to a signal (one of `SIGNALS`): the sum of all parts divided by the sum of all wholes.

        Args:
            part, whole: of any shape, summed here; a whole may be a number.
        """
        above, below = self.sums.get(name, (0, 0))
        whole = whole.sum(dtype=torch.float64) if isinstance(whole, Tensor) else whole
        self.sums[name] = above + part.detach().sum(dtype=torch.float64), below + whole

    def add_gradients(self, losses: dict[str, Tensor], backbone: nn.Module) -> None:
        """Measure "s2c_to_c2s", if there are both losses and a part of the backbone is trained."""
        weights = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        if weights and {"s2c", "c2s"} <= losses.keys():
            self.add("s2c_to_c2s", *(_gradient_norm(losses[name], weights) for name in ("s2c", "c2s")))

    def close(self) -> Record:
        """End an epoch: copy its signals to the host, and keep them."""
        record: Record = dict.fromkeys(SIGNALS)
        for name, sums in self.sums.items():
            part, whole = all_reduce_sum(_pair(sums)).tolist()
            scale = 100 if name in SHARES else 1
            record[name] = round(scale * part / whole, 4) if whole else None
        self.history.append(record)
        self.sums = {}
        return record

    def news(self) -> str | None:
        """A line for the user if the signals of the last epoch start or stop self-training, or show that it harms."""
        epoch = len(self.history)
        first, last = self.teaching_epochs()
        if self.mode == "auto" and epoch < self.max_epoch and epoch in (first, last):
            what = "starts" if epoch == first else "stops, since class logits have fallen,"
            return f"self-training {what} after epoch {epoch}."
        if self.mode == "on" and harmed(self.history, first) == epoch:
            return (
                f"Warning: class logits have fallen below {HARM:g} of what they were, as where self-training makes it "
                "worse. Compare the masks with those of --self_training auto (or off), under another --tag."
            )
        return None

    def report(self) -> dict[str, object]:
        """All epochs, signal by signal; and the [first, last] epoch of self-training, counted from 1, or []."""
        first, last = self.teaching_epochs()
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
    """The norm of the gradient of the whole batch, of which each process has its share."""
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return nn.utils.get_total_norm([all_reduce_sum(each) / world_size() for each in gradients if each is not None])


def is_ready(record: Record) -> bool:
    """Whether the segmentation branch knows the classes well enough to teach."""
    return record["vanished"] is not None and record["vanished"] <= READY_VANISHED


def harmed(history: Sequence[Record], first: int) -> int | None:
    """After how many epochs the class logit fell, in self-training that began in epoch `first`; None if it did not."""
    if not 0 < first < len(history) or not (reference := history[first - 1]["class_logit"]) or reference < 0:
        return None
    fallen = (e + 1 for e in range(first, len(history)) if history[e]["class_logit"] < HARM * reference)
    return next(fallen, None)
