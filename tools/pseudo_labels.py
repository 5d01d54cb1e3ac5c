"""Pixel labels made from image labels: from CAMs for the segmentation branch, from the teacher for the CAMs.

    cam_labels = reliable_cam_labels(images, teacher["cams"], image_labels)                  # 0..K, 255 where in doubt
    labels, confidence = teacher_labels(seg_logits, image_labels, images.shape[-2:])
    labels_of_confident_pixels = labels.where(confidence > 0.5, 255)

An image is only ever given classes of its image label: everything here works on the present classes alone, which also
keeps the dense CRF affordable with 80 classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.filters import threshold_otsu, threshold_triangle
from torch import Tensor

from tools.crf import CAM_SETTINGS, mean_field, unary_from_labels
from tools.losses import chunks
from tools.maps import resize_maps, unit_maximum
from tools.options import IGNORE_INDEX

RELATIVE_FOREGROUND = 0.65
"""Part of a class's highest foreground probability in the image above which a pixel is the class (docs/log.md)."""

LEAST_FOREGROUND = 0.3
"""On CSRM's maps, no object begins below this part of the maximum (docs/log.md)."""

SURE = 0.5
"""Without image labels, a class is in an image if its probability is above this at some pixel."""


@torch.no_grad()
def reliable_cam_labels(
    images: Tensor,
    cams: Tensor,
    image_labels: Tensor,
    background_threshold: float = 0.05,
    foreground_threshold: float = 0.30,
    *,
    max_classes: int | None = None,
    crf_iterations: int = 10,
    gt_prob: float = 0.7,
    backend: str = "torch",
) -> Tensor:
    """Labels of the pixels whose class is clear from the CAMs, after IRN (CVPR 2019).

    The CAMs are thresholded twice: a high threshold gives sure objects, a low one sure background. A dense CRF over the
    background and the image's classes refines both maps. Pixels that are sure in neither are ignored.

    Args:
        images: uint8 [B, 3, H, W], RGB: what the network saw, before normalisation.
        cams: float [B, K, h, w], raw CAM logits.
        image_labels: float [B, K]; classes above 0 are in the image. An image without classes becomes all background.
        background_threshold, foreground_threshold: in (0, 1), of CAMs divided by their maximum.
        max_classes: at least as many as any of the images has; None: it is looked up, for which a GPU must wait. Fewer
            maps are less work.
        crf_iterations: mean-field updates; 0 leaves the CRF out.
        gt_prob: confidence of the CRF in the thresholded CAMs.
        backend: of the CRF (`tools.options.CRF_BACKENDS`).

    Returns:
        int64 [B, H, W]: 0 background, 1..K classes, 255 ignore.
    """
    present, classes = _present_maps(cams, image_labels, max_classes)
    score, index = resize_maps(present, images.shape[-2:]).max(dim=1)
    readings = [(index + 1) * (score > t) for t in (foreground_threshold, background_threshold)]
    if crf_iterations:
        num_labels = 1 + (image_labels > 0).sum(dim=1)
        channels = classes.shape[1]
        unaries = [unary_from_labels(reading, num_labels, gt_prob, channels=channels) for reading in readings]
        q = mean_field(images, torch.stack(unaries, dim=1), CAM_SETTINGS, crf_iterations, backend=backend)
        readings = q.max(dim=2).indices.unbind(dim=1)  # the same as argmax, in a tenth of its time on a CPU
    foreground, background = readings
    doubtful = (foreground == 0) & (background != 0)
    return _look_up(classes, foreground).masked_fill(doubtful, IGNORE_INDEX)


@torch.no_grad()
def mutual_promotion_labels(
    background_probs: Tensor, cams: Tensor, image_labels: Tensor, sigma: float = 0.75, *, max_classes: int | None = None
) -> Tensor:
    """Labels from the CAMs and a background probability of another branch; pixels below `sigma` are ignored.

    Args:
        background_probs: float [B, H, W] in [0, 1].
        sigma: in [0, 1], the least value of the winning map.
        cams, image_labels, max_classes: as of `reliable_cam_labels`.

    Returns:
        int64 [B, H, W]: 0 background, 1..K classes, 255 ignore.
    """
    present, classes = _present_maps(cams, image_labels, max_classes)
    maps = torch.cat([background_probs.float()[:, None], resize_maps(present, background_probs.shape[-2:])], dim=1)
    score, index = maps.max(dim=1)
    return _look_up(classes, index).masked_fill(score < sigma, IGNORE_INDEX)


@torch.no_grad()
def teacher_labels(
    seg_logits: Tensor, image_labels: Tensor, size: tuple[int, int], reading: str = "present"
) -> tuple[Tensor, Tensor]:
    """The teacher's class of each pixel, among the background and the image's classes, and how sure that is.

    "present", the published reading, deletes the absent classes from the softmax and renormalises. If the
    network is not sure which of several similar classes it sees, the background gets the share of the absent ones.
    "foreground" asks first whether there is an object: p_fg = 1 - p_bg over all classes. Above 1/2 the pixel is the
    best present class, with confidence p_fg, else background, with confidence p_bg. "relative" shares p_fg among the
    present classes in proportion and divides each class's map by its maximum, as CAMs are. Above
    `RELATIVE_FOREGROUND` a pixel is the best class, with this value as confidence, else background, with 1 minus it.

    Args:
        seg_logits: float [B, K+1, h, w].
        image_labels: float [B, K]; classes above 0 are in the image. Without any, all is background, for certain.
        size: (H, W), to which the logits are upsampled.
        reading: one of `tools.options.READINGS`.

    Returns:
        int64 [B, H, W] in [0, K], and float32 [B, H, W] in [0, 1].
    """
    absent = F.pad(image_labels, (1, 0), value=1.0) <= 0
    read = {"present": _read_present, "foreground": _read_foreground, "relative": _read_relative}[reading]
    labels, confidence = [], []
    for part in chunks(*seg_logits.shape[:2], size):
        best, probability = read(resize_maps(seg_logits[part], size), absent[part, :, None, None])
        labels.append(best)
        confidence.append(probability)
    return torch.cat(labels), torch.cat(confidence)


def _read_present(logits: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    # A softmax without the absent classes is the full one with them masked out and the rest renormalised.
    logits = logits.masked_fill(absent, -torch.inf)
    score, best = logits.max(dim=1)
    return best, (score - logits.logsumexp(dim=1)).exp()


def _read_foreground(logits: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    background = logits.softmax(dim=1)[:, 0].where((~absent[:, 1:]).any(dim=1), 1.0)
    best = 1 + logits[:, 1:].masked_fill(absent[:, 1:], -torch.inf).max(dim=1).indices
    return best * (background < 0.5), background.maximum(1 - background)


def _read_relative(logits: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    maps = foreground_maps(logits.softmax(dim=1), ~absent[:, 1:])
    score, best = unit_maximum(maps).max(dim=1)
    is_object = score > RELATIVE_FOREGROUND
    return (1 + best) * is_object, score.where(is_object, 1 - score)


def foreground_maps(probabilities: Tensor, present: Tensor | float = 1.0) -> Tensor:
    """The foreground probability, p_fg = 1 - p_bg over all classes, shared among the present classes in proportion.

    Args:
        probabilities: float [B, n+1, h, w], of the background and n classes: all, or those that are present.
        present: 1 or True for present classes, else 0; broadcasts to [B, n, h, w].

    Returns:
        float [B, n, h, w]: p_fg p_c / (sum of p over the present classes); 0 for absent classes.
    """
    shown = probabilities[:, 1:] * present
    return (1 - probabilities[:, :1]) * shown / shown.sum(dim=1, keepdim=True).clamp(min=1e-30)


def object_threshold(maps: np.ndarray, *, graded: bool = False) -> float:
    """Where objects begin on relative maps f32[n,H,W], in (0, `RELATIVE_FOREGROUND`].

    The maps of a final model have two groups of pixels, which Otsu's threshold (1979) parts; it is limited because an
    image that is all object has one. CSRM's maps fall off gradually, and Otsu's threshold cuts into the object. There
    it is the triangle threshold (Zack et al., 1977), at least `LEAST_FOREGROUND`: where the flank of the histogram's
    highest peak ends. That peak is the background in most images, and the object in one that it fills.

    Args:
        graded: whether the maps are CSRM's.
    """
    if not len(maps):
        return RELATIVE_FOREGROUND
    highest = maps.max(axis=0)
    threshold = max(float(threshold_triangle(highest)), LEAST_FOREGROUND) if graded else threshold_otsu(highest)
    return min(threshold, RELATIVE_FOREGROUND)


@dataclass(frozen=True)
class RelativeReading:
    """The reading "relative" of a model's probabilities without image labels: its sure classes take their place.

    A model that has learnt few pseudo masks knows what is in an image, but is unsure of most of the object's pixels.
    Its argmax is the background there. Relative maps ask where in the image a class is most probable.
    """

    keys: Tensor  # int64 [n+1], 0 and 1 + class of the n sure classes
    highest: Tensor  # f32[n,1,1], the maximum of each class's map in the whole image
    threshold: float  # where objects begin on the relative maps (`object_threshold`)

    @classmethod
    def of(cls, probabilities: Tensor) -> "RelativeReading":
        """The reading of a whole image, from its probabilities f32[1,K+1,h,w]."""
        sure = probabilities[0].amax(dim=(1, 2)) > SURE
        sure[0] = True
        keys = sure.nonzero().flatten()
        maps = foreground_maps(probabilities[:, keys])[0]
        return cls(keys, maps.amax(dim=(1, 2), keepdim=True), object_threshold(unit_maximum(maps).cpu().numpy()))

    def labels(self, probabilities: Tensor) -> Tensor:
        """Index into `keys` of each pixel, int64 [1,h,w], from probabilities f32[1,K+1,h,w] of a part of the image."""
        maps = unit_maximum(foreground_maps(probabilities[:, self.keys])[0], self.highest)
        return F.pad(maps, (0, 0, 0, 0, 1, 0), value=self.threshold).argmax(dim=0)[None]


def _present_maps(cams: Tensor, image_labels: Tensor, max_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """CAMs of the present classes, rectified and divided by their maximum, first in the channels; the rest is zero.

    Returns:
        float32 [B, n, h, w], where n (at least 1) is `max_classes`, by default the most that an image of the batch has,
        and int64 [B, n+1], the label of each channel, with the background in front.
    """
    present = image_labels > 0
    most = max(1, int(present.sum(dim=1).max()) if max_classes is None else max_classes)
    order = present.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    maps = (cams.float() * present[:, :, None, None]).relu()
    maps = maps.gather(1, order[:, :, None, None].expand(-1, -1, *cams.shape[-2:]))
    maps = unit_maximum(maps)
    return maps, F.pad(order + 1, (1, 0), value=0)


def _look_up(classes: Tensor, index: Tensor) -> Tensor:
    """Replace channel indices [B, H, W] by class labels, with one table [B, n+1] per image."""
    return classes.gather(1, index.flatten(1)).view_as(index)
