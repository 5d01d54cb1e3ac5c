"""Reports during training: the numbers of `validate` against those of the tools it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from datasets import build_source
from tools.cam import multi_scale_cams, scaled_views
from tools.cam_files import cam_labels
from tools.maps import normalize
from tools.metrics import classification_scores, confusion_counts, scores
from tools.options import Views
from tools.validation import THRESHOLDS, validate

VIEWS = Views(scales=(1,), hflip=False, long_side=(0, 64))


class Net(nn.Module):
    """CAMs that are colours: red stands for the first class, blue for the second. In training half of them are out."""

    def __init__(self, segments: bool) -> None:
        super().__init__()
        self.segments, self.dropout = segments, nn.Dropout()

    def forward(self, x):
        maps = nn.functional.avg_pool2d(self.dropout(x), 2, ceil_mode=True)
        outputs = {"cams": maps[:, [0, 2]], "class_logits": maps[:, [0, 2]].mean(dim=(2, 3))}
        return {**outputs, "seg_logits": maps[:, [1, 0, 2]]} if self.segments else outputs


@pytest.mark.parametrize("segments", [False, True])
def test_the_report(folder_root, capsys, segments):
    source, model = build_source("folder", folder_root), Net(segments)
    report = validate(model, source, "train", torch.device("cpu"), (0, 64))
    ids, mious = source.ids("train"), {}
    np.testing.assert_allclose(THRESHOLDS, np.arange(1, 17) / 20)
    for threshold in THRESHOLDS.tolist():
        counts = 0
        for image_id in ids:
            image, label = normalize(source.photograph(image_id)), torch.tensor(source.image_label(image_id))
            keys, _, hr_cam = multi_scale_cams(lambda v: model(v)["cams"], image, label, VIEWS)
            prediction = keys[cam_labels(hr_cam, threshold)]
            counts = counts + confusion_counts(source.mask(image_id), prediction, 3)
        mious[threshold] = scores(counts).miou
    assert report["valid/miou_cam_at_0.4"] == pytest.approx(mious[0.4])
    best = max(mious, key=mious.get)
    assert report["valid/best_threshold"] == pytest.approx(best)
    assert report["valid/miou_cam"] == pytest.approx(mious[best])
    views = [scaled_views(normalize(source.photograph(i)), VIEWS)[0] for i in ids]
    logits = np.concatenate([model(view)["class_logits"].numpy() for view in views])
    recognised = classification_scores(logits, source.image_labels(ids))
    for name in ("average_precision", "precision", "recall"):
        assert report[f"valid/{name}"] == pytest.approx(recognised[name])
    assert ("valid/miou_seg" in report) == segments
    if segments:
        counts = 0
        for image_id, view in zip(ids, views, strict=True):
            truth, logits = source.mask(image_id), model(view)["seg_logits"]
            maps = nn.functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=True)
            counts = counts + confusion_counts(truth, maps[0].numpy().argmax(axis=0), 3)
        assert report["valid/miou_seg"] == pytest.approx(scores(counts).miou)
    printed = capsys.readouterr().out
    assert all(f"{name} {value:.2f}" in printed for name, value in report.items())


def test_longer_images_are_reduced_to_the_size_of_training(folder_root):
    source, model, sides = build_source("folder", folder_root), Net(True), []
    model.register_forward_pre_hook(lambda module, inputs: sides.append(max(inputs[0].shape[-2:])))
    validate(model, source, "train", torch.device("cpu"), (0, 17))
    assert sides == [17] * 3
