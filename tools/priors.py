"""The losses of the CAM priors, and the ordinary classifier that two of them play against.

    criterion = PriorCriterion("poc", label_smoothing=0.1, w_re=4, ordinary=ordinary_classifier)
    sample = Sample(images, labels, hidden=random_class(labels))
    losses = criterion(model, sample, progress=step / steps)

The maps of a plain classifier cover only the most discriminative part of an object. What makes them cover the rest:

    vanilla   nothing
    puzzle    an image and its four tiles must give the same maps (Puzzle-CAM, Jo & Yu, ICIP 2021)
    poc       puzzle, and a trained classifier must not find a class whose map is masked out of the image (OC-CSE, Kweon
              et al., ICCV 2021)
    pnoc      poc, and in turn that classifier learns to find the class in what the mask leaves (P-NOC, David et al.,
              arXiv 2304.07396)
"""

from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, InitVar, dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from tools import distributed
from tools.losses import multilabel_loss
from tools.maps import resize_maps, unit_maximum
from tools.optim import Update
from tools.options import PRIOR_METHODS, Optimization


@dataclass
class Sample:
    """A batch, and what the players tell each other about it."""

    images: Tensor  # float32 [B,3,H,W], normalised
    labels: Tensor  # float32 [B,K] in [0,1]
    hidden: Tensor  # float32 [B,K], one class of each image that has any (`random_class`)
    cams: Tensor | None = None  # [B,K,h,w], without gradient: filled in by the criterion, for the opponent


class PriorCriterion:
    """L = L_c + L_p + w_re L_re + w_oc L_oc, as far as the method goes. One method per loss; each returns a scalar.

    Args:
        label_smoothing: of every classification loss.
        w_re: weight of L_re from the middle of the training on.
        ordinary: the ordinary classifier of poc and pnoc; never changed here.
    """

    def __init__(self, method: str, *, label_smoothing: float, w_re: float, ordinary: nn.Module | None = None) -> None:
        assert method in PRIOR_METHODS, f"method must be one of {PRIOR_METHODS}, got {method!r}"
        assert (ordinary is not None) == (method in ("poc", "pnoc")), f"{method}: ordinary classifier {ordinary}"
        self.method, self.label_smoothing, self.w_re, self.ordinary = method, label_smoothing, w_re, ordinary

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each loss after this fraction of the training."""
        return {"c": 1.0, "p": 1.0, "re": ramp(progress, 0.0, self.w_re, length=0.5), "oc": ramp(progress, 0.3, 1.0)}

    @record_function("losses")
    def __call__(self, model: nn.Module, sample: Sample, progress: float) -> dict[str, Tensor]:
        """The losses of one batch, by name if there are several; "loss" is their weighted sum.

        Args:
            model: a `Classifier`.
            progress: optimiser steps taken, as a fraction of all; in [0, 1).
        """
        with record_function("student"):
            outputs = model(sample.images)
        sample.cams = outputs["cams"].detach()
        losses = {"c": self.classification(outputs["class_logits"], sample.labels)}
        if self.method != "vanilla":
            joined = join_tiles(model(cut_tiles(sample.images))["cams"])
            losses["p"] = self.classification(joined.mean(dim=(2, 3)), sample.labels)
            losses["re"] = reconstruction_loss(outputs["cams"], joined, sample.labels)
        if self.ordinary is not None:
            losses["oc"] = self.complement(outputs["cams"], sample)
        weights = self.weights(progress)
        total = sum(weights[name] * loss for name, loss in losses.items())
        return {"loss": total, **(losses if len(losses) > 1 else {})}

    def classification(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """L_c of the image, L_p of the maps its tiles give."""
        return multilabel_loss(class_logits, labels, self.label_smoothing)

    def complement(self, cams: Tensor, sample: Sample) -> Tensor:
        """L_oc: with one class masked out of the image, the ordinary classifier should see the others only."""
        logits = self.ordinary(hide_class(sample.images, cams, sample.hidden))["class_logits"]
        return self.classification(logits, sample.labels * (1 - sample.hidden))


@dataclass(eq=False, repr=False)
class Opponent:
    """P-NOC's ordinary classifier, which learns in turn with the CAM network.

    Outside `learn` its weights take no gradient: the CAM network's loss passes through it without changing it.
    """

    model: nn.Module  # trained in place; always in evaluation mode, as its batch norm is frozen
    options: Optimization  # those of the CAM network, as are the next two, which `Update` takes
    _: KW_ONLY
    updates: InitVar[int]
    dtype: InitVar[torch.dtype | None]
    label_smoothing: float

    def __post_init__(self, updates: int, dtype: torch.dtype | None) -> None:
        distributed.share_model(self.model.eval())
        self.update = Update(self.model, self.options, updates=updates, dtype=dtype)
        self._take_gradients(False)

    def state_dict(self) -> dict[str, dict]:
        """What an unfinished checkpoint keeps: the network, and the state of its training."""
        return {"model": self.model.state_dict(), **self.update.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on from a `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state)

    def learn(self, sample: Sample, progress: float, *, autocast: AbstractContextManager) -> Tensor:
        """Backpropagate the loss of one batch: all classes must be found where the hidden class's CAM is below .2.

        Returns:
            The loss, its weight included. `update.step` changes the weights.
        """
        self._take_gradients(True)
        with autocast:
            images = hide_class(sample.images, sample.cams, sample.hidden, threshold=0.2)
            logits = self.model(images)["class_logits"]
            loss = ramp(progress, 0.0, 1.0) * multilabel_loss(logits, sample.labels, self.label_smoothing)
        self.update.backward(loss)
        self._take_gradients(False)
        return loss.detach()

    def _take_gradients(self, on: bool) -> None:
        self.model.train().eval()  # as in `tools.ema`; what one turn kept is not for the other
        for parameter in self.update.parameters:
            parameter.requires_grad_(on)


def ramp(progress: float, start: float, end: float, length: float = 1.0) -> float:
    """From `start` in a straight line to `end`, which is reached after a fraction `length` of the training."""
    return min(start + (end - start) * progress / length, end)


def random_class(labels: Tensor) -> Tensor:
    """One of each image's classes, at random: float [B,K] in [0,1] -> one-hot [B,K], zeros where there is none."""
    present = labels > 0
    chosen = torch.rand(labels.shape, device=labels.device).masked_fill(~present, -1).argmax(dim=1)
    return torch.zeros_like(labels).scatter_(1, chosen[:, None], 1) * present


def cut_tiles(images: Tensor) -> Tensor:
    """Cut [B,C,H,W] into quarters [4B,C,ceil(H/2),ceil(W/2)]: all top left ones, top right, bottom left, bottom right.

    The two tiles of an odd side share the pixels in the middle: all tiles have one size, and of a side of 32n + 1
    pixels both have 16n + 1, where the cells of their maps lie as in the whole image.
    """
    height, width = ((side + 1) // 2 for side in images.shape[-2:])
    rows = (images[..., :height, :], images[..., -height:, :])
    return torch.cat([tile for row in rows for tile in (row[..., :width], row[..., -width:])])


def join_tiles(maps: Tensor) -> Tensor:
    """Put the maps [4B,K,h,w] of `cut_tiles` together again: [B,K,2h,2w]."""
    top_left, top_right, bottom_left, bottom_right = maps.chunk(4)
    rows = (torch.cat([top_left, top_right], dim=3), torch.cat([bottom_left, bottom_right], dim=3))
    return torch.cat(rows, dim=2)


def reconstruction_loss(cams: Tensor, joined: Tensor, labels: Tensor) -> Tensor:
    """L_re: mean absolute difference of whole and joined CAM logits, where maps of absent classes count as equal.

    Args:
        cams: float [B,K,h,w], of whole images.
        joined: float [B,K,h',w'], of their tiles; brought to the size of `cams`.
        labels: float [B,K]; classes above 0 are present.
    """
    difference = (cams.float() - resize_maps(joined, cams.shape[-2:])).abs()
    return (difference * (labels > 0)[:, :, None, None]).mean()


def hide_class(images: Tensor, cams: Tensor, hidden: Tensor, threshold: float | None = None) -> Tensor:
    """Images without what the CAM of their hidden class shows: x (1 - m), where 0 is the mean colour.

    Args:
        images: float32 [B,3,H,W], normalised.
        cams: float [B,K,h,w], CAM logits; their gradient passes through a soft mask.
        hidden: float [B,K], one-hot; an image whose row is 0 stays as it is.
        threshold: None: m is the CAM in [0,1], its values divided by its maximum; else m is 1 where that is above.
    """
    cam = (cams.float() * hidden[:, :, None, None]).sum(dim=1, keepdim=True).relu()
    cam = resize_maps(unit_maximum(cam), images.shape[-2:])
    return images * (1 - (cam if threshold is None else (cam > threshold).float()))
