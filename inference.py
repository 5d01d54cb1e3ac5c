"""Stage 2: CAMs, segmentation maps and pseudo masks of training images, restricted to their image labels.

    python inference.py --tag csrm --dataset voc12 --data_dir data/voc12 --domain train_aug

The network sees each image at several scales and mirrored. Only classes of the image-level label may appear. Use this
on training images, to make the pseudo masks that a segmentation model learns. Do not report results of a test split
with it. It writes to experiments/predictions/TAG@DOMAIN/

    cams/ID.npz         class activation maps: arrays keys, cam (stride 4), hr_cam (image size), values in [0, 1]
    masks/ID.npz        the same arrays from the segmentation branch: probabilities of the image's classes, computed as
                        in training (--teacher_labels of train_csrm.py)
    pseudos-.../ID.png  pseudo masks: argmax of [threshold; CAMs], refined by a dense CRF; class indices

The model of stage 4 can also make pseudo masks of its own training photographs, again with the classes of their labels
only (--save_cams false --pseudos_from masks). A second model can learn these masks.

The checkpoint says which network it is. If the script is started again, it makes only the missing files. Several GPUs
share the images under torchrun (SETUP.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import cli, options, parallel
from tools.errors import UserError


def make_parser() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    options.add_common(parser)
    options.add_dataset(parser, domain=("train_aug", "split to predict"))
    group = parser.add_argument_group("inference")
    group.add_argument("--weights", type=Path, help="checkpoint (default: experiments/models/TAG.pth)")
    options.add_shared(group, "scales", "hflip", "on_error")
    cli.add_switch(group, "--save_cams", True, "write cams/")
    cli.add_switch(group, "--save_masks", False, "write masks/ (a classifier has none)")
    cli.add_switch(group, "--save_pseudos", True, "write pseudos-.../")
    text = "npy: the pickled dict that other projects read"
    group.add_argument("--cam_format", choices=["npz", "npy"], default="npz", help=text)
    group = parser.add_argument_group("pseudo masks")
    group.add_argument("--pseudos_from", choices=["cams", "masks"], default="cams", help="maps that they are made from")
    default, text = options.PSEUDO_MASK_THRESHOLD, "background threshold on CAMs; auto: computed from the CAMs"
    group.add_argument("--threshold", type=cli.fraction_or_auto, default=default, help=text)
    options.add_shared(group, "crf_t", "crf_gt_prob", "crf_backend")
    return parser


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets import DataSource, build_source
from models import cam_forward, load_model, segmentation_forward
from tools import distributed, identity
from tools.cam import enlarged_argmax, multi_scale_cams, multi_scale_logits, working_photograph
from tools.cam_files import cam_labels, load_cams, save_cams
from tools.crf import CAM_SETTINGS, mean_field, unary_from_labels
from tools.devices import select_device
from tools.files import save_mask
from tools.left_out import LeftOut
from tools.maps import cells, normalize, resize_maps, unit_maximum
from tools.pseudo_labels import foreground_maps, object_threshold
from tools.seeds import auto_threshold, network_cams

HARMLESS = ("seed", "domain", "save_cams", "save_masks", "save_pseudos", "cam_format")
"""Flags that do not change the content of any file."""

PSEUDO_MASKS = ("pseudos_from", "threshold", "crf_t", "crf_gt_prob", "crf_backend")
"""Flags that change only the pseudo masks."""


@dataclass(frozen=True)
class Outputs:
    """What is written, and how it is made."""

    wanted: tuple[str, ...]  # of "cams", "masks" and "pseudos"
    cam_format: str  # npz or npy
    views: options.Views  # of an image
    reading: str  # of the segmentation branch, one of `tools.options.READINGS`
    graded: bool  # whether its maps are CSRM's (`object_threshold`)
    pseudos_from: str  # cams or masks, the maps that pseudo masks are made of
    threshold: float  # of the background, on CAMs
    is_auto: bool  # whether the threshold was computed from the CAMs
    crf: options.CRF  # of the pseudo masks

    @property
    def pseudos_name(self) -> str:
        """The folder of the pseudo masks. Its name holds their settings, so that masks of two settings do not mix."""
        maps = "masks" if self.pseudos_from == "masks" else "tauto" if self.is_auto else f"t{self.threshold:g}"
        return f"pseudos-{maps}-c{self.crf.iterations}"


class Predictor:
    """Makes the files of one image at a time.

    Args:
        model: a `Classifier` or `CSRM` in eval mode.
        source: where images and labels come from.
        folder: experiments/predictions/TAG@DOMAIN.
        outputs: which files.
    """

    def __init__(self, model: nn.Module, source: DataSource, folder: Path, outputs: Outputs) -> None:
        self.model, self.source, self.outputs = model, source, outputs
        self.device = next(model.parameters()).device
        self.folders = {"cams": folder / "cams", "masks": folder / "masks", "pseudos": folder / outputs.pseudos_name}
        self.suffixes = {"cams": f".{outputs.cam_format}", "masks": f".{outputs.cam_format}", "pseudos": ".png"}

    def path(self, kind: str, image_id: str) -> Path:
        """The file of `kind` ('cams', 'masks' or 'pseudos') of an image."""
        return self.folders[kind] / f"{image_id}{self.suffixes[kind]}"

    def is_done(self, image_id: str) -> bool:
        """Whether all wanted files of an image exist."""
        return all(self.path(kind, image_id).exists() for kind in self.outputs.wanted)

    @torch.inference_mode()
    def __call__(self, image_id: str) -> bool:
        """Write the missing files of one image.

        Returns:
            Whether CAMs were made and are all 0, although the image has classes.
        """
        photograph, is_empty = self.source.photograph(image_id), False
        for kind in self.outputs.wanted:
            path = self.path(kind, image_id)
            if not path.exists() and kind == "pseudos":
                save_mask(path, self._pseudo_mask(photograph, image_id), self.source.info.palette)
            elif not path.exists():
                keys, cam, hr_cam = self._maps(kind, photograph, image_id)
                save_cams(path, keys, cam, hr_cam)
                is_empty |= kind == "cams" and len(keys) > 1 and not hr_cam.any()
        return is_empty

    def _maps(self, kind: str, photograph: torch.Tensor, image_id: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arrays of a CAM file (`tools.cam_files`); `kind` is cams or masks."""
        label, size = torch.from_numpy(self.source.image_label(image_id)), tuple(photograph.shape[-2:])
        views = self.outputs.views
        image = normalize(working_photograph(photograph, views).to(self.device))
        if kind == "cams":
            return multi_scale_cams(cam_forward(self.model), image, label, views, size=size)
        logits = multi_scale_logits(segmentation_forward(self.model), image, views)
        return segmentation_maps(logits, label, size, self.outputs.reading)

    def _pseudo_mask(self, photograph: torch.Tensor, image_id: str) -> np.ndarray:
        """Class indices uint8 [H,W], from the maps in the image's file or, if none is wanted, from new maps.

        A file that this run does not want may be of another model.
        """
        kind, crf, size = self.outputs.pseudos_from, self.outputs.crf, photograph.shape[-2:]
        if kind in self.outputs.wanted:
            keys, _, maps = load_cams(self.path(kind, image_id))
        else:
            keys, _, maps = self._maps(kind, photograph, image_id)
            maps = maps.astype(np.float16)  # as in a file: so writing one changes no mask
        if not crf.iterations or len(keys) == 1:
            return keys[self._labels(maps)].astype(np.uint8)
        working = working_photograph(photograph, self.outputs.views)
        maps = resize_maps(torch.from_numpy(maps)[None], working.shape[-2:])[0].numpy()
        labels = torch.from_numpy(self._labels(maps)).to(self.device)
        unary = unary_from_labels(labels[None], len(keys), crf.gt_prob)
        refined = mean_field(working.to(self.device), unary, CAM_SETTINGS, crf.iterations, backend=crf.backend)
        return keys[enlarged_argmax(refined, size).cpu().numpy()].astype(np.uint8)

    def _labels(self, maps: np.ndarray) -> np.ndarray:
        """Index into the image's classes of each pixel of the maps [n,H,W], int64 [H,W]; 0 is the background."""
        if self.outputs.pseudos_from == "cams":
            return cam_labels(maps, self.outputs.threshold)
        return segmentation_labels(maps, self.outputs.reading, graded=self.outputs.graded)


def segmentation_maps(
    logits: torch.Tensor, label: torch.Tensor, size: tuple[int, int], reading: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segmentation logits f32[1,K+1,h,w] as a CAM file's arrays at `size`, read like teacher labels.

    "present": softmax over the background and the image's classes. Other readings: `foreground_maps` of
    `tools.pseudo_labels`. Only the maps of the image's classes are kept, as in every CAM file.
    """
    classes = label.nonzero().flatten()
    keys = F.pad(1 + classes, (1, 0))
    if reading == "present":
        maps = logits[:, keys].softmax(dim=1)
    else:
        foreground = foreground_maps(logits.softmax(dim=1)[:, keys])
        maps = F.pad(foreground, (0, 0, 0, 0, 1, 0))  # no map at all could not be resized
    low, high = (resize_maps(maps, place)[0, 1:].cpu().numpy() for place in (cells(size, 4), size))
    return keys.numpy(), low, high


def segmentation_labels(maps: np.ndarray, reading: str, *, graded: bool) -> np.ndarray:
    """Index into the image's classes of each pixel, from the maps [n,H,W] of `segmentation_maps`; 0 is the background.

    "present": argmax of the background and the maps. "foreground": the best map where they sum to more than 1/2.
    "relative": like CAMs, each map is divided by its maximum in the image and compared with `object_threshold`.
    """
    maps = maps.astype(np.float32)
    if reading in ("present", "foreground"):
        background = 1 - maps.sum(axis=0)
        return cam_labels(maps, background if reading == "present" else (background >= 0.5).astype(np.float32))
    maps = unit_maximum(torch.from_numpy(maps)).numpy()
    return cam_labels(maps, object_threshold(maps, graded=graded))


def check_flags(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse flags that ask for maps that the model does not have.

    Raises:
        UserError: maps of a classifier's segmentation branch, or CAMs of a segmentation model.
    """
    kind = model.config["kind"]
    if (args.save_masks or args.pseudos_from == "masks") and kind == "classifier":
        raise UserError("--save_masks / --pseudos_from masks: a classifier has no segmentation branch. Use the CAMs.")
    if (args.save_cams or args.pseudos_from == "cams") and kind == "segmentation":
        raise UserError(
            "--save_cams / --pseudos_from cams: a segmentation model has no CAMs. "
            "Pass --save_cams false --pseudos_from masks."
        )


def background_threshold(args: argparse.Namespace, model: nn.Module, source: DataSource, views: options.Views) -> float:
    """The value of --threshold; `auto` is replaced by a threshold computed from the CAMs of some images."""
    if args.threshold != "auto" or args.pseudos_from == "masks":
        return args.threshold
    device = next(model.parameters()).device
    cams_of = network_cams(cam_forward(model), source, views, device)
    threshold = auto_threshold(cams_of, source.ids(args.domain), skip=args.on_error == "skip")
    print(f"--threshold auto: {threshold:g}")
    return threshold


def reading(checkpoint: dict) -> str:
    """How segmentation logits are read: CSRM's as its teacher's were in training; a final model's as "relative"."""
    default = "relative" if checkpoint["config"]["kind"] == "segmentation" else "present"
    return checkpoint["args"].get("teacher_labels", default)


def identities(args: argparse.Namespace, source: DataSource, ids: Sequence[str], weights: Path) -> tuple[dict, dict]:
    """The identities of the maps and of the pseudo masks (`tools.identity`)."""
    flags = {**vars(args), "weights": weights, "classes": source.info.classes[1:]}
    harmless = (*HARMLESS, "threshold") if args.pseudos_from == "masks" else HARMLESS
    pseudos = identity.describe("inference.py", flags, inputs=source.fingerprints(ids, labels=True), harmless=harmless)
    settings = {name: value for name, value in pseudos["settings"].items() if name not in PSEUDO_MASKS}
    return {**pseudos, "settings": settings}, pseudos


def main(args: argparse.Namespace) -> None:
    """Write the missing files of every image of the split."""
    device = select_device(args.device)
    distributed.start(options.EXPERIMENTS)
    source = build_source(args.dataset, options.data_dir(args))
    ids = source.ids(args.domain)
    weights = args.weights or options.model_path(args.tag)
    # First: if a training replaces the weights meanwhile, the next run finds others in the record.
    maps, pseudos = identities(args, source, ids, weights)
    model, checkpoint = load_model(weights, device, kinds=["classifier", "csrm", "segmentation"])
    identity.compare_classes(weights, checkpoint["classes"][1:], source.info.classes[1:])
    for made_by in (maps, pseudos):
        identity.inherit(made_by, checkpoint)
    check_flags(args, model)
    folder = options.predictions_dir(args.tag, args.domain)
    views = options.views(args, checkpoint["args"])
    outputs = Outputs(
        wanted=tuple(kind for kind in ("cams", "masks", "pseudos") if getattr(args, f"save_{kind}")),
        cam_format=args.cam_format,
        views=views,
        reading=reading(checkpoint),
        graded=checkpoint["config"]["kind"] == "csrm",
        pseudos_from=args.pseudos_from,
        threshold=background_threshold(args, model, source, views),
        is_auto=args.threshold == "auto",
        crf=options.crf(args),
    )
    predict = Predictor(model, source, folder, outputs)
    if args.pseudos_from == "cams":
        pseudos["settings"]["threshold"] = outputs.threshold  # of `auto`: its value, or two could mix
    for kind in outputs.wanted:
        made_by = pseudos if kind == "pseudos" else maps
        another = f"--tag (with --weights {weights})"
        identity.claim_folder(predict.folders[kind], made_by, another=another, overwrite=args.overwrite)
    mine = parallel.share(ids)
    pending = parallel.pending(mine, predict.is_done, f"{len(mine)} images of '{args.domain}'", folder)
    left_out = LeftOut(folder, "inference", skip=args.on_error == "skip")
    empty = sum(left_out.results(predict, pending, "inference", threads=parallel.own_workers(args.num_workers)))
    if empty > len(pending) / 10:
        print(
            f"Warning: the CAMs of {empty} of {len(pending)} images are empty; {weights} does not see their "
            "classes. Train it for longer, or at a lower learning rate (puzzle, poc, pnoc: or with a lower --w_re)."
        )
    for kind in outputs.wanted:
        print(f"{kind}: {predict.folders[kind]}")
    if "pseudos" in outputs.wanted:
        flags = ["--tag", args.tag, "--domain", args.domain, "--pseudo_dir", predict.folders["pseudos"]]
        note = "with Segment Anything: --checkpoint FILE instead of --proposals regions"
        print(options.next_step(args, "refine_sam.py", *flags, "--proposals", "regions", note=note))
    left_out.finish(ids, mine)


if __name__ == "__main__":
    cli.run(main, ARGS)
