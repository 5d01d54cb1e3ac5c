"""Progress reports during training: single-scale quality of a model on a split with masks. They select nothing.

check_domain(source, "val")              # at the start of a run
validate(model, source, "val", device, 512)   # {"valid/miou_cam": 41.2, "valid/miou_seg": 55.0}
"""

from __future__ import annotations

import torch
from torch import nn

from datasets import DataSource
from datasets.transforms import normalize
from tools import cli
from tools.cam import multi_scale_cams, scaled_views
from tools.losses import resize_maps
from tools.metrics import ConfusionMatrix, ThresholdSweep, scores, threshold_range


def check_domain(source: DataSource, domain: str) -> None:
    """Prove that `validate` will find its ids and masks, before an epoch is trained. '' stands for no validation.

    Raises:
        UserError: it will not.
    """
    if domain:
        source.check_masks(source.ids(domain))


@torch.inference_mode()
def validate(
    model: nn.Module, source: DataSource, domain: str, device: torch.device, long_side: int
) -> dict[str, float]:
    """Mean IoU in per cent of what the model gives on `domain`; longer images are reduced to `long_side` pixels.

    CAMs are restricted to the image's labels and reported at their best threshold, as pseudo masks are; the
    segmentation branch is not told the labels, as a segmentation model is not.
    """
    model.eval()
    classes = source.info.num_classes
    sweep = ThresholdSweep(classes, threshold_range(0.05, 0.80, 0.05))
    matrix = ConfusionMatrix(classes)
    for image_id in cli.progress(source.ids(domain), desc=f"validating on {domain}", unit="image"):
        image = normalize(source.photograph(image_id).to(device))
        (view,) = scaled_views(image, [1], long_side)
        outputs = model(view)
        truth = source.mask(image_id)
        if "cams" in outputs:
            label = torch.from_numpy(source.image_label(image_id))
            maps = outputs["cams"]
            keys, _, cams = multi_scale_cams(lambda _, maps=maps: maps, image, label, scales=[1], hflip=False)
            sweep.update(truth, keys, cams)
        if "seg_logits" in outputs:
            prediction = resize_maps(outputs["seg_logits"], truth.shape)[0].argmax(dim=0)
            matrix.update(torch.tensor(truth), prediction.cpu())
    report = {}
    if "cams" in outputs:
        report["valid/miou_cam"] = max(scores(counts).miou for counts in sweep.counts)
    if "seg_logits" in outputs:
        report["valid/miou_seg"] = scores(matrix.counts).miou
    print("  ".join(f"{name} {value:.2f}" for name, value in report.items()))
    return report
