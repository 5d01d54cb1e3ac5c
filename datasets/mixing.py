"""Mixing the images of a batch, with everything that belongs to them: ClassMix and CutMix.

    images, cam_labels, teacher_logits, labels = classmix(images, cam_labels, teacher_logits, labels)

Every image a gets pixels of a partner b, another image of the batch: of some of b's classes (ClassMix, Olsson et al.,
WACV 2021) or of a rectangle (CutMix, Yun et al., ICCV 2019). Both are vectorised over the batch and stay on its
device; nothing waits for the host.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_VALUES = 256  # a label map holds 0..255

Mixed = tuple[Tensor, Tensor, Tensor | None, Tensor]


def classmix(images: Tensor, label_maps: Tensor, seg_logits: Tensor | None, image_labels: Tensor) -> Mixed:
    """Paste half (at least one) of the foreground classes of each partner's label map, chosen at random.

    Ignored pixels (255) are never pasted. A partner without foreground leaves the image as it is.

    Args:
        images: uint8 [B, 3, H, W].
        label_maps: int64 [B, H, W], 0 background, 1..K classes, 255 ignore.
        seg_logits: float [B, C, h, w] of any size; the pasted region is brought to it by nearest neighbour. None
            stays None.
        image_labels: float [B, K], multi-hot.

    Returns:
        The four, mixed. The pasted classes are set to 1 in the image labels.
    """
    partner = random_partners(len(images), images.device)
    theirs = label_maps[partner].flatten(1)
    chosen = _choose_classes(theirs, image_labels.shape[1])
    paste = chosen.gather(1, theirs).view_as(label_maps)
    pasted_classes = chosen[:, 1 : 1 + image_labels.shape[1]].to(image_labels.dtype)
    mixed_labels = torch.maximum(image_labels, pasted_classes)
    return *_paste(paste, partner, images, label_maps, seg_logits), mixed_labels


def cutmix(images: Tensor, label_maps: Tensor, seg_logits: Tensor | None, image_labels: Tensor) -> Mixed:
    """Paste a random rectangle of half the area of each partner, ignored pixels included.

    Arguments as of `classmix`; image labels may be in [0, 1].

    Returns:
        The four, mixed. Image labels are mixed by area, so they are no longer multi-hot but in [0, 1].
    """
    partner = random_partners(len(images), images.device)
    paste = _random_rectangles(label_maps)
    area = paste.float().mean(dim=(1, 2)).unsqueeze(1).to(image_labels.dtype)
    mixed_labels = torch.lerp(image_labels, image_labels[partner], area)
    return *_paste(paste, partner, images, label_maps, seg_logits), mixed_labels


def random_partners(batch_size: int, device: torch.device) -> Tensor:
    """A random permutation int64 [B] in which nobody is their own partner (for B > 1): one random ring."""
    ring = torch.rand(batch_size, device=device).argsort()
    return torch.empty_like(ring).scatter_(0, ring, ring.roll(1))


def _choose_classes(labels: Tensor, num_foreground: int) -> Tensor:
    """Half (at least one) of the foreground classes in each row of int64 [B, H * W], at random: bool [B, 256]."""
    present = torch.zeros(len(labels), MASK_VALUES, dtype=torch.bool, device=labels.device).scatter_(1, labels, True)
    present = present[:, 1 : 1 + num_foreground]
    count = present.sum(dim=1, keepdim=True)
    score = torch.rand(present.shape, device=present.device)
    rank = score.masked_fill(~present, 2).argsort(dim=1).argsort(dim=1)  # classes present rank before all others
    chosen = present & (rank < (count // 2).clamp(min=1))
    return F.pad(chosen, (1, MASK_VALUES - 1 - num_foreground))


def _random_rectangles(label_maps: Tensor) -> Tensor:
    """Per map a rectangle of random shape and place, half the area up to rounding: bool [B, H, W]."""
    batch_size, height, width = label_maps.shape
    shape, left, top = torch.rand(3, batch_size, 1, device=label_maps.device)
    box_width = (width * (1 + shape) / 2).round()
    box_height = (height * width / 2 / box_width).round().clamp(max=height)
    columns = _interval(left, box_width, width).unsqueeze(1)
    return columns & _interval(top, box_height, height).unsqueeze(2)


def _interval(position: Tensor, length: Tensor, total: int) -> Tensor:
    """`length` [B, 1] consecutive entries out of `total`, placed by `position` [B, 1] in [0, 1): bool [B, total]."""
    start = (position * (total - length + 1)).floor()
    index = torch.arange(total, device=length.device)
    return (index >= start) & (index < start + length)


def _paste(
    paste: Tensor, partner: Tensor, images: Tensor, label_maps: Tensor, seg_logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where `paste` (bool [B, H, W]) holds, the partner's pixels; elsewhere one's own."""
    label_maps = torch.where(paste, label_maps[partner], label_maps)
    paste = paste.unsqueeze(1)
    images = torch.where(paste, images[partner], images)
    if seg_logits is not None:
        small = F.interpolate(paste.float(), seg_logits.shape[-2:], mode="nearest").bool()
        seg_logits = torch.where(small, seg_logits[partner], seg_logits)
    return images, label_maps, seg_logits
