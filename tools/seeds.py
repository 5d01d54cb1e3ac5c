"""Where L_c2s gets its labels besides the network's own CAMs, and thresholds on CAMs without any mask.

    threshold = auto_threshold(cam_logits, source, ids, views, device)     # 0.42
    folder = label_folder(source, ids, Path("clip-es"), made, thresholds=(0.05, 0.3), crf=CRF())

Labels from elsewhere are masks ID.png (255: ignored), taken as they are, or CAM files, which go through the step that
makes reliable labels of the network's own CAMs. docs/seeds.md has recipes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.filters import threshold_otsu

from tools import distributed, identity, parallel
from tools.cam import Forward, multi_scale_cams, read_cams, working_photograph
from tools.files import check_present, save_mask
from tools.maps import normalize
from tools.options import CRF, PSEUDO_MASK_THRESHOLD, Views
from tools.pseudo_labels import reliable_cam_labels

SAMPLE = 100
"""Images that are looked at for a threshold."""


@torch.inference_mode()
def auto_threshold(forward: Forward, source: Any, ids: Sequence[str], views: Views, device: torch.device) -> float:
    """A background threshold on CAMs: Otsu's (1979) for each image of a sample, and the mean of these.

    Otsu's threshold parts the values of an image's strongest CAM into two groups that vary least within themselves.

    Args:
        forward: gives CAM logits f32[B,K,h,w] of normalised images.
        source: a `datasets.DataSource` with image labels.
        ids: of the images; `SAMPLE` of them are taken, evenly spread.

    Returns:
        In (0, 1), two decimals; the usual threshold if no image of the sample has a class with a CAM above 0.
    """
    thresholds = []
    for image_id in ids[:: max(1, len(ids) // SAMPLE)][:SAMPLE]:
        image = normalize(working_photograph(source.photograph(image_id), views).to(device))
        label = torch.from_numpy(source.image_label(image_id))
        _, _, cams = multi_scale_cams(forward, image, label, **asdict(views))
        if cams.any():
            thresholds.append(threshold_otsu(cams.max(axis=0)))
    return round(float(np.mean(thresholds)), 2) if thresholds else PSEUDO_MASK_THRESHOLD


def label_folder(
    source: Any,
    ids: Sequence[str],
    folder: Path,
    made: Path,
    *,
    thresholds: tuple[float, float],
    crf: CRF,
    overwrite: bool = False,
) -> Path:
    """The folder of masks ID.png that L_c2s learns: `folder` itself, or `made`, where those of CAM files are written.

    Args:
        source: a `datasets.DataSource` with image labels.
        folder: ID.png, ID.npz or ID.npy of every id.
        thresholds: background and foreground, on CAMs divided by their maximum.
        overwrite: replace the labels in `made` if they are of other files or thresholds.

    Raises:
        UserError: a file is missing, or cannot be read; or `made` holds other labels.
    """
    suffix = next((s for s in (".png", ".npz", ".npy") if (folder / f"{ids[0]}{s}").is_file()), None)
    remedy = "--c2s_labels needs ID.png or ID.npz of every image of --domain_train: make them."
    check_present(folder, ids, suffix or ".png", remedy)
    if suffix == ".png":
        return folder
    inputs = {
        **source.fingerprints(ids, labels=True),
        "CAM files": identity.contents({i: folder / f"{i}{suffix}" for i in ids}),
    }
    flags = {"c2s_bg": thresholds[0], "c2s_fg": thresholds[1], "c2s_labels": folder}
    flags |= {"crf_t": crf.iterations, "crf_gt_prob": crf.gt_prob, "crf_backend": crf.backend}
    identity.claim_folder(made, identity.describe("train_csrm.py", flags, inputs=inputs), ".png", overwrite=overwrite)

    def make(image_id: str) -> None:
        labels = labels_of_cams(source, image_id, folder / f"{image_id}{suffix}", thresholds, crf)
        save_mask(made / f"{image_id}.png", labels.numpy(), source.info.palette)

    pending = parallel.share(ids, [i for i in ids if not (made / f"{i}.png").exists()])
    for _ in parallel.run_jobs(make, pending, name="labels of CAM files"):
        pass
    distributed.wait()
    return made


def labels_of_cams(source: Any, image_id: str, path: Path, thresholds: tuple[float, float], crf: CRF) -> torch.Tensor:
    """Reliable labels int64 [H,W] of one CAM file; classes that the image's label lacks are left out.

    Raises:
        UserError: unreadable, of another size than the photograph, or with classes that the dataset has not.
    """
    photograph, label = source.photograph(image_id), torch.from_numpy(source.image_label(image_id))
    size = tuple(photograph.shape[-2:])
    keys, maps = read_cams(path, size, 1 + len(label))
    cams = torch.zeros(1, len(label), *size)
    cams[0, keys[1:] - 1] = torch.from_numpy(maps.astype(np.float32))
    background, foreground = thresholds
    options = {"crf_iterations": crf.iterations, "gt_prob": crf.gt_prob, "backend": crf.backend}
    return reliable_cam_labels(photograph, cams, label[None], background, foreground, **options)[0]
