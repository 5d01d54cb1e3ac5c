"""The losses of CSRM on logits, and the schedules that go with them.

Every function returns a float32 scalar with its graph intact, also when no pixel counts (then 0, never NaN), and reads
nothing back to the host. Segmentation maps may be smaller than the labels: they are upsampled here, a few images at a
time, because one full-size map of 64 VOC images, [64, 21, 512, 512], takes 1.4 GB.

    loss_c = multilabel_loss(student["class_logits"], image_labels, label_smoothing=0.1)
    loss_c2s = c2s_loss(student["seg_logits"], cam_labels, label_smoothing=0.1)

The contrastive loss lives in `tools.memory_bank`, beside the memory it draws from. In several processes each function
gives a process its share: the mean over the processes is the loss of the whole batch (`tools.distributed`).
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tools.distributed import all_reduce_sum, gather_batch
from tools.maps import resize_maps
from tools.options import IGNORE_INDEX
from tools.parallel import world_size

CHUNK_VALUES = 2**25
"""Most values of a full-size map that is held at once (128 MB in float32), unless a single image has more."""


def multilabel_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Multi-label soft margin loss, L_c, with binary label smoothing: y <- (1 - e) y + e / 2.

    Logits and labels are float [B, K]; labels lie in [0, 1], and mixed images may have fractions.
    """
    targets = (1 - label_smoothing) * labels + label_smoothing / 2
    return F.multilabel_soft_margin_loss(logits.float(), targets)


def c2s_loss(seg_logits: Tensor, cam_labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """L_c2s, class activation maps teach the segmentation branch: cross entropy over the images that show a class.

    An image whose reliable labels are all background or ignored most likely has CAMs that found nothing; training on
    it would teach that its objects are background.

    Args:
        seg_logits: float [B, C, h, w].
        cam_labels: int64 [B, H, W], 0 background, 255 ignore (`tools.pseudo_labels.reliable_cam_labels`).
    """
    foreground = (cam_labels != 0) & (cam_labels != IGNORE_INDEX)
    has_foreground = foreground.flatten(1).any(dim=1)[:, None, None]
    return cross_entropy(seg_logits, cam_labels.where(has_foreground, IGNORE_INDEX), label_smoothing)


def s2c_loss(
    cams: Tensor, seg_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, saliency: Tensor | None = None
) -> Tensor:
    """L_s2c, the segmentation branch teaches the CAMs: cross entropy of [background; CAM logits] with teacher labels.

    CAMs have no background channel, so the student's own background logit stands in, without gradient: only the CAMs
    learn here. A saliency head, if there is one, takes its place and does learn, as this is its only supervision.

    Args:
        cams: float [B, K, h', w'] raw CAM logits.
        seg_logits: float [B, K+1, h, w].
        labels: int64 [B, H, W], the teacher's labels where it is confident, else 255.
        saliency: float [B, 1, h, w] logits, or None.
    """
    background = seg_logits[:, :1].detach() if saliency is None else saliency
    return cross_entropy([background, cams], labels, label_smoothing)


def unsupervised_loss(logits: Tensor, labels: Tensor, teacher_entropy: Tensor, percentile: float) -> Tensor:
    """L_u (U2PL, CVPR 2022): cross entropy with the teacher's labels on the pixels it is least uncertain about.

    The mean over these pixels is multiplied by (all pixels, the ignored included) / (kept pixels).

    Args:
        logits: float [B, C, h, w], of the student.
        labels: int64 [B, H, W], 255 ignore.
        teacher_entropy: float [B, H, W] (`entropy`).
        percentile: in [0, 100]; 100 - alpha(e) (`unreliable_percent`).
    """
    return kept_loss(logits, labels, certain_pixels(labels, teacher_entropy, percentile))


def certain_pixels(labels: Tensor, teacher_entropy: Tensor, percentile: float) -> Tensor:
    """The pixels that L_u keeps, bool [B, H, W]: labelled, and of an entropy below the percentile of the labelled."""
    labelled = labels != IGNORE_INDEX
    return labelled & (teacher_entropy < masked_percentile(teacher_entropy, labelled, percentile))


def kept_loss(logits: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """L_u on the pixels `kept`, bool [B, H, W]."""
    weight = labels.numel() * world_size() / all_reduce_sum(kept.sum()).clamp(min=1)
    return weight * cross_entropy(logits, labels.where(kept, IGNORE_INDEX))


def cross_entropy(logits: Tensor | Sequence[Tensor], labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy over the pixels that are not 255; 0 if there is none, where torch's own mean is NaN.

    Args:
        logits: float [B, C, h, w], upsampled to the size of the labels; or several such maps, of any sizes, whose
            channels together are the classes.
        labels: int64 [B, H, W].
    """
    maps = [logits] if isinstance(logits, Tensor) else logits
    parts = list(chunks(len(labels), sum(m.shape[1] for m in maps), labels.shape[-2:]))
    one = _summed_cross_entropy
    if len(parts) > 1:  # full-size maps of one part at a time: they are made again in the backward pass
        one = functools.partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False)
    total = sum(one(labels[part], label_smoothing, *(m[part] for m in maps)) for part in parts)
    return total * world_size() / all_reduce_sum((labels != IGNORE_INDEX).sum()).clamp(min=1)


def _summed_cross_entropy(labels: Tensor, label_smoothing: float, *maps: Tensor) -> Tensor:
    """Sum of the cross entropy over the pixels of some images; the maps are upsampled and joined in the channels."""
    logits = torch.cat([resize_maps(m, labels.shape[-2:]) for m in maps], dim=1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum")


def chunks(images: int, channels: int, size: tuple[int, int]) -> Iterator[slice]:
    """Slices of a batch of `images`, such that maps of `size` stay within `CHUNK_VALUES`."""
    step = max(1, CHUNK_VALUES // (channels * size[0] * size[1]))
    return (slice(start, start + step) for start in range(0, images, step))


def entropy(logits: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Entropy in nats of the softmax over the classes of logits [B, C, h, w], upsampled to `size` (H, W) if given.

    float32 [B, H, W] in [0, log C], without gradient.
    """
    size = size or logits.shape[-2:]
    parts = []
    for part in chunks(*logits.shape[:2], size):
        log_probs = resize_maps(logits[part].detach(), size).log_softmax(dim=1)
        parts.append(-(log_probs.exp() * log_probs).sum(dim=1))
    return torch.cat(parts)


def masked_percentile(values: Tensor, mask: Tensor, percentile: float) -> Tensor:
    """The percentile (linear interpolation) of the float `values` where the boolean `mask` holds; NaN if nowhere.

    It is that of the whole batch, from the values of all processes: exact, at the price of sorting them everywhere.
    `torch.quantile` refuses more than 16 million values, which a batch of full-size maps can exceed, and choosing
    the values with a boolean index would wait for the device.
    """
    ordered = gather_batch(values.masked_fill(~mask, torch.inf)).flatten().sort().values
    position = percentile / 100 * (all_reduce_sum(mask.sum()) - 1).clamp(min=0).double()
    below, above = ordered[torch.stack([position.floor(), position.ceil()]).long()]
    return below.lerp(above, position.frac().to(values.dtype))


def s2c_weight(epoch: int, max_epoch: int, warmup_epochs: int = 1) -> float:
    """w(e), the weight of L_s2c: 0 during warm-up, then linear from .1 towards 1 (`epoch` counts from 0)."""
    if epoch < warmup_epochs:
        return 0.0
    return min(0.1 + 0.9 * (epoch - warmup_epochs) / (max_epoch - warmup_epochs), 1.0)


def unreliable_percent(epoch: int, max_epoch: int) -> float:
    """alpha(e), per cent of the pixels at either end of the entropy that count as (un)certain: 20 falling to 0."""
    return 20.0 * (1 - epoch / max_epoch)
