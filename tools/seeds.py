"""Where L_c2s gets its labels besides the network's own CAMs, and thresholds on CAMs without any mask.

    files = label_files(Path("experiments/predictions/prior@train/cams"), ids)    # {id: path}: masks or CAM files
    threshold = auto_threshold(file_cams(source, files), ids)                     # 0.42
    write_labels(source, files, made, thresholds=(0.21, 0.52), crf=CRF(), ...)

Labels from elsewhere are masks ID.png (255: ignored), taken as they are, or CAM files, which go through the step that
makes reliable labels of the network's own CAMs. docs/seeds.md has recipes.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.filters import threshold_otsu

from tools import distributed, identity, parallel
from tools.cam import Forward, multi_scale_cams, working_photograph
from tools.cam_files import read_cams
from tools.errors import FileError
from tools.files import check_present, file_of, save_mask
from tools.maps import normalize, resize_labels, resize_maps
from tools.options import CRF, PSEUDO_MASK_THRESHOLD, Views
from tools.parallel import sample
from tools.pseudo_labels import reliable_cam_labels

CamsOf = Callable[[str], np.ndarray]
"""CAMs f32[n,H,W] in [0, 1] of the classes of an image, from its ID."""


def auto_threshold(cams_of: CamsOf, ids: Sequence[str], *, skip: bool = False) -> float:
    """A background threshold on CAMs: Otsu's (1979) for each image of a sample, and the mean of these.

    Otsu's threshold parts the values of an image's strongest CAM into two groups that vary least within themselves.

    Args:
        ids: of the images; a sample of them is taken (`tools.parallel.sample`).
        skip: pass over images whose files cannot be used.

    Returns:
        In (0, 1), two decimals; the usual threshold if no image of the sample has a class with a CAM above 0.
    """
    thresholds = []
    for image_id in sample(ids):
        with contextlib.suppress(*(FileError,) if skip else ()):
            cams = cams_of(image_id)
            if cams.any():
                thresholds.append(threshold_otsu(cams.max(axis=0)))
    return round(float(np.mean(thresholds)), 2) if thresholds else PSEUDO_MASK_THRESHOLD


def network_cams(forward: Forward, source: Any, views: Views, device: torch.device) -> CamsOf:
    """The CAMs that a network makes.

    Args:
        forward: gives CAM logits f32[B,K,h,w] of normalised images.
        source: a `datasets.DataSource` with image labels.
    """

    @torch.inference_mode()
    def cams_of(image_id: str) -> np.ndarray:
        image = normalize(working_photograph(source.photograph(image_id), views).to(device))
        return multi_scale_cams(forward, image, torch.from_numpy(source.image_label(image_id)), views)[2]

    return cams_of


def file_cams(source: Any, files: dict[str, Path]) -> CamsOf:
    """The CAMs in files of `label_files`, of the classes in the images' labels."""
    return lambda i: cams_of_file(files[i], source.image_label(i), source.image(i).shape[:2])[1]


def label_files(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """The label of each image: all ID.png, all ID.npz or all ID.npy.

    Raises:
        UserError: one is missing.
    """
    suffix = next((s for s in (".png", ".npz", ".npy") if file_of(folder, ids[0], s).is_file()), ".png")
    remedy = "--c2s_labels needs ID.png or ID.npz of every image of --domain_train: make them."
    check_present(folder, ids, suffix, remedy)
    return {image_id: file_of(folder, image_id, suffix) for image_id in ids}


def write_labels(
    source: Any,
    files: dict[str, Path],
    made: Path,
    *,
    thresholds: tuple[float, float],
    crf: CRF,
    views: Views,
    overwrite: bool = False,
    threads: int = 0,
) -> None:
    """Write the reliable labels of CAM files as masks into the folder `made`.

    Args:
        source: a `datasets.DataSource` with image labels.
        files: of `label_files`.
        thresholds: background and foreground, on CAMs divided by their maximum.
        views: of the training; larger photographs are reduced for the dense CRF, as `inference.py` does.
        overwrite: replace the labels in `made` if they are of other files or thresholds.
        threads: how many images are done at once.

    Raises:
        UserError: a file cannot be read; or `made` holds other labels.
    """
    flags = {"c2s_bg": thresholds[0], "c2s_fg": thresholds[1], "c2s_labels": next(iter(files.values())).parent}
    flags |= {"crf_t": crf.iterations, "crf_gt_prob": crf.gt_prob, "crf_backend": crf.backend}
    flags |= {"long_side": views.long_side, "classes": source.info.classes[1:]}
    inputs = {**source.fingerprints(list(files), labels=True), "CAM files": identity.contents(files)}
    identity.claim_folder(made, identity.describe("train_csrm.py", flags, inputs=inputs), overwrite=overwrite)

    refinement = {"crf_iterations": crf.iterations, "gt_prob": crf.gt_prob, "backend": crf.backend}

    def make(image_id: str) -> None:
        photograph, label = source.photograph(image_id), source.image_label(image_id)
        size, working = tuple(photograph.shape[-2:]), working_photograph(photograph, views)
        classes, maps = cams_of_file(files[image_id], label, size)
        cams = torch.zeros(1, len(label), *working.shape[-2:])
        if len(classes):  # no map at all could not be resized
            cams[0, classes] = resize_maps(torch.from_numpy(maps)[None], working.shape[-2:])[0]
        labels = reliable_cam_labels(working, cams, torch.from_numpy(label)[None], *thresholds, **refinement)
        save_mask(made / f"{image_id}.png", resize_labels(labels, size)[0].numpy(), source.info.palette)

    pending = [i for i in parallel.share(list(files)) if not (made / f"{i}.png").exists()]
    for _ in parallel.run_jobs(make, pending, name="labels of CAM files", threads=threads):
        pass
    distributed.wait()


def cams_of_file(path: Path, label: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What a CAM file says of the classes in the image's label: their indices int64 [n] and CAMs f32[n,H,W].

    Args:
        label: f32[K], of the image.
        size: (H, W) of the photograph.

    Raises:
        UserError: unreadable, of another size than the photograph, with classes that the dataset has not, or without
            a class of the label: its object would become background.
    """
    keys, maps = read_cams(path, size, 1 + len(label))
    if absent := sorted({*(1 + np.flatnonzero(label)).tolist()} - {*keys.tolist()}):
        raise FileError(
            f"{path}: no CAM of class {absent[0]} (0 is background), which the label of the image names. Make it again "
            "for this label, or correct the label."
        )
    classes = keys[1:] - 1
    present = label[classes] > 0
    return classes[present], maps[present].astype(np.float32)
