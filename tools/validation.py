"""Progress reports during training: single-scale quality of a model on a split with masks. They select nothing.

check_domain(source, "val")              # at the start of a run
validate(model, source, "val", device, (320, 512))   # {"valid/miou_cam": 41.2, ..., "valid/miou_seg": 55.0}
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tools import distributed, parallel
from tools.cam import multi_scale_cams, scaled_views
from tools.maps import normalize, resize_maps
from tools.metrics import classification_scores, confusion_counts, scores, sweep_counts, threshold_range
from tools.options import PSEUDO_MASK_THRESHOLD, Views

THRESHOLDS = threshold_range(0.05, 0.80, 0.05)


def check_domain(source: Any, domain: str, *, cams: bool = True) -> None:
    """Check, before training, that `validate` will find ids, masks and, for a model with CAMs, image labels.

    Args:
        domain: the split; '': no validation.

    Raises:
        UserError: it will not.
    """
    if domain:
        source.check_masks(source.ids(domain))
        if cams:
            source.image_labels(source.ids(domain))


@torch.inference_mode()
def validate(
    model: nn.Module, source: Any, domain: str, device: torch.device, long_side: tuple[int, int]
) -> dict[str, float]:
    """Quality in per cent, at one scale, of what the model gives on `domain`; `long_side` as of `Views`.

    CAMs are restricted to the image's labels, as pseudo masks are; their mean IoU is reported at the best background
    threshold (and which that is) and at the fixed one of pseudo masks. The segmentation branch is not told the labels,
    as a segmentation model is not. Of class logits: mean average precision, precision and recall over the classes.
    Several processes share the images; each returns the report on all.
    """
    model.eval()
    views = Views(scales=(1,), hflip=False, long_side=long_side)
    ids, classes = source.ids(domain), source.info.num_classes
    of_cams = np.zeros((len(THRESHOLDS), classes, classes + 1), np.int64)
    of_masks, logits = np.zeros_like(of_cams[0]), torch.zeros(len(ids), classes - 1)
    mine = range(parallel.rank(), len(ids), parallel.world_size())
    for index in parallel.progress(mine, desc=f"validating on {domain}", unit="image"):
        image_id = ids[index]
        image = normalize(source.photograph(image_id).to(device))
        (view,) = scaled_views(image, views)
        outputs = model(view)
        truth = source.mask(image_id)
        if "cams" in outputs:
            logits[index] = outputs["class_logits"][0].float()
            maps, label = outputs["cams"], torch.from_numpy(source.image_label(image_id))
            keys, _, cams = multi_scale_cams(lambda _, maps=maps: maps, image, label, views)
            of_cams += sweep_counts(truth, keys, cams, classes, THRESHOLDS)
        if "seg_logits" in outputs:
            prediction = resize_maps(outputs["seg_logits"], truth.shape)[0].max(dim=0).indices
            of_masks += confusion_counts(truth, prediction.cpu().numpy(), classes)
    of_cams, of_masks, logits = (
        distributed.all_reduce_sum(torch.as_tensor(part).to(device)).cpu().numpy()
        for part in (of_cams, of_masks, logits)
    )
    report = _cam_report(of_cams, logits, source.image_labels(ids)) if of_cams.any() else {}
    if of_masks.any():
        report["valid/miou_seg"] = scores(of_masks).miou
    tqdm.write("  ".join(f"{name} {value:.2f}" for name, value in report.items()))  # above the training's bar
    return report


def _cam_report(curve: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    mious = [scores(counts).miou for counts in curve]
    best = int(np.argmax(mious))
    return {
        "valid/miou_cam": mious[best],
        "valid/best_threshold": float(THRESHOLDS[best]),
        f"valid/miou_cam_at_{PSEUDO_MASK_THRESHOLD:g}": mious[THRESHOLDS.tolist().index(PSEUDO_MASK_THRESHOLD)],
        **{f"valid/{name}": value for name, value in classification_scores(logits, labels).items()},
    }
