"""Stage 4: DeepLabV3+ on pseudo masks; with --predict, its segmentation of a split.

    python train_segmentation.py --tag deeplab --masks_dir experiments/predictions/csrm@train_aug/sam-sam-max_iou_imp2
    python train_segmentation.py --tag deeplab2 --masks_dir experiments/predictions/... --corrected_dir corrected
    python train_segmentation.py --tag deeplab --predict --domain val
    python train_segmentation.py --tag deeplab --predict --images holiday/ --save_overlays

Training reads photographs and the masks in --masks_dir (ID.png, 255 ignored; without the flag the dataset's own masks:
fully supervised) and writes experiments/models/TAG.pth. Masks that somebody has corrected (docs/review.md) replace
those of their images, and are drawn more often. Prediction sees each image at several scales and mirrored,
averages the logits, refines with a dense CRF and writes experiments/predictions/TAG@DOMAIN/masks/ID.png. It never reads
labels; with --images, any folder of photographs will do (TAG@FOLDER). Both continue where they stopped, and can be
shared by several GPUs (SETUP.md):

    torchrun --standalone --nproc_per_node 4 train_segmentation.py --tag deeplab ...
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
from pathlib import Path

from tools import cli, options, parallel
from tools.errors import UserError


def make_parser() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    options.add_common(parser)
    data = options.add_dataset(
        parser,
        domain_train=("train_aug", "split to train on"),
        domain_valid=("", "split with masks to report on after each epoch; empty: none"),
        domain=("val", "split to predict, with --predict"),
    )
    data.add_argument("--masks_dir", type=Path, help="folder of the masks to learn (default: the dataset's own)")
    data.add_argument("--corrected_dir", type=Path, help="folder of masks that replace those of their images")
    data.add_argument(
        "--corrected_weight", type=cli.positive_int, default=3, help="how much more often corrected images are drawn"
    )
    network = options.add_network(parser, architecture="resnest269e", mode="normal")
    options.add_decoder(network)
    network.add_argument("--restore", type=Path, help="checkpoint or public state dict to start from")
    options.add_images(parser)
    options.add_optimization(parser, lr=0.007, wd=4e-5, batch_size=32, max_epoch=50, alpha_bias=1.0)
    group = parser.add_argument_group("prediction")
    cli.add_switch(group, "--predict", False, "predict --domain with the trained model instead of training")
    group.add_argument("--images", type=Path, metavar="DIR", help="predict the photographs in it, not --domain")
    cli.add_switch(
        group, "--save_overlays", False, "also write overlays/ID.jpg, the photograph with its classes painted"
    )
    group.add_argument("--weights", type=Path, help="checkpoint, of CSRM too (default: experiments/models/TAG.pth)")
    group.add_argument("--max_images", type=cli.positive_int, help="stop after the first N images of the split")
    options.add_views(group)
    options.add_on_error(group)
    group.add_argument("--crf_t", type=cli.count, default=10, help="mean-field iterations of the dense CRF; 0: no CRF")
    options.add_crf_backend(group)
    return parser


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.data import ConcatDataset, Dataset

from datasets import DataSource, ImageDataset, Photographs, build_loader, build_source
from datasets.transforms import segmentation_geometry
from models import build_model, load_model
from models.restore import restore
from tools import distributed, identity
from tools.cam import enlarged_argmax, multi_scale_logits, working_photograph
from tools.checkpoint import check_classes
from tools.crf import SEGMENTATION_SETTINGS, mean_field, unary_from_probabilities
from tools.devices import select_device
from tools.drawing import save_overlay
from tools.files import load_mask, save_mask
from tools.left_out import LeftOut
from tools.losses import cross_entropy
from tools.maps import normalize
from tools.training import Trainer, seed_everything
from tools.validation import check_domain, validate

PREDICTION = ("predict", "images", "save_overlays", "weights", "max_images", "scales", "hflip", "crf_t", "crf_backend")
"""Flags of the prediction; the training does not see them."""

PREDICTION_RESULT = ("scales", "hflip", "crf_t", "crf_backend")
"""Those on which a predicted mask depends, besides the weights."""


def train_step(model: nn.Module, batch: dict, device: torch.device, label_smoothing: float) -> dict[str, torch.Tensor]:
    """Cross entropy of one batch with its (pseudo) masks."""
    images = normalize(batch["image"].to(device, non_blocking=True))
    masks = batch["mask"].to(device, non_blocking=True)
    with record_function("student"):
        logits = model(images)["seg_logits"]
    with record_function("losses"):
        return {"loss": cross_entropy(logits, masks, label_smoothing)}


def training_set(source: DataSource, args: argparse.Namespace) -> Dataset:
    """The photographs of --domain_train with their masks, those with a corrected one --corrected_weight times.

    Raises:
        UserError: a mask is missing, or none of --corrected_dir is of an image of the split.
    """
    geometry = segmentation_geometry(*options.image_sizes(args))
    read = functools.partial(ImageDataset, transform=geometry, with_masks=True, with_labels=False)
    ids = source.ids(args.domain_train)
    if not args.corrected_dir:
        return read(source, ids)
    better = build_source(args.dataset, options.data_dir(args), args.corrected_dir)
    corrected = {i for i in ids if better.mask_path(i).is_file()}
    if not corrected:
        raise UserError(f"--corrected_dir {args.corrected_dir}: no mask (ID.png) of an image of '{args.domain_train}'.")
    print(f"{len(corrected)} of {len(ids)} masks are corrected; each of them counts {args.corrected_weight} times")
    others = read(source, [i for i in ids if i not in corrected])
    return ConcatDataset([others, *[read(better, [i for i in ids if i in corrected])] * args.corrected_weight])


def training_identity(source: DataSource, args: argparse.Namespace) -> dict:
    """What the training is: its flags, weights, photographs and masks."""
    ids = source.ids(args.domain_train)
    inputs = source.fingerprints(ids, masks=True)
    if args.corrected_dir:
        better = build_source(args.dataset, options.data_dir(args), args.corrected_dir)
        inputs["corrected masks"] = better.fingerprints(ids, masks=True)["masks"]
    harmless = (*PREDICTION, "domain")
    return identity.describe("train_segmentation.py", vars(args), inputs=inputs, harmless=harmless)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train DeepLabV3+ and say what to do next."""
    distributed.start(device)
    source = build_source(args.dataset, options.data_dir(args), args.masks_dir)
    truth = build_source(args.dataset, options.data_dir(args))
    check_domain(truth, args.domain_valid)
    loader = build_loader(training_set(source, args), args.batch_size, **options.loader_arguments(args))
    seed_everything(args.seed)
    model = build_model("segmentation", num_classes=source.info.num_classes, **options.network_arguments(args)).to(
        device
    )
    if args.restore:
        restore(model, args.restore, source.info.classes)
    run = options.training(args, training_identity(source, args))
    trainer = Trainer(model, run, source.info.classes, device=device, steps_per_epoch=len(loader))
    for epoch in trainer.epochs():
        loader.set_epoch(epoch, trainer.batch)
        for batch in trainer.batches(epoch, loader):
            with trainer.autocast():
                losses = train_step(model, batch, device, args.label_smoothing)
            trainer.step(losses)
        if args.domain_valid:
            trainer.log(epoch, validate(model, truth, args.domain_valid, device, args.image_size))
    print(
        f"Next: python train_segmentation.py --tag {args.tag} --predict --domain {args.domain}   (plus the data flags)"
    )


@torch.inference_mode()
def segment(model: nn.Module, photograph: torch.Tensor, views: options.Views, crf: options.CRF) -> torch.Tensor:
    """Class indices int64 [H,W] of a photograph, uint8 RGB [1,3,H,W], on the model's device."""
    size = photograph.shape[-2:]
    photograph = working_photograph(photograph, views).to(next(model.parameters()).device)
    forward = lambda images: model(images)["seg_logits"]  # noqa: E731
    logits = multi_scale_logits(forward, normalize(photograph), **dataclasses.asdict(views))
    probabilities = logits.softmax(dim=1)
    if crf.iterations:
        unary = unary_from_probabilities(probabilities)
        probabilities = mean_field(photograph, unary, SEGMENTATION_SETTINGS, crf.iterations, backend=crf.backend)
    return enlarged_argmax(probabilities, size)


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Write the predicted mask of every image that is not there yet."""
    source = None if args.images else build_source(args.dataset, options.data_dir(args))
    weights = args.weights or options.model_path(args.tag)
    model, checkpoint = load_model(weights, device, kinds=["segmentation", "csrm"])
    views = options.views(args, checkpoint["args"]["image_size"])
    crf = options.CRF(iterations=args.crf_t, backend=args.crf_backend)
    if source is None:
        source, domain, name = Photographs(args.images, checkpoint["classes"]), "train", args.images.resolve().name
        if source.unread:
            print(f"{len(source.unread)} files are of kinds that are not read, the first is {source.unread[0]}")
    else:
        domain = name = args.domain
        check_classes(checkpoint, source.info.classes, weights)
    ids = source.ids(domain)[: args.max_images]
    folder = options.predictions_dir(args.tag, name)
    masks, overlays = folder / "masks", folder / "overlays"
    wanted = [(masks, "png"), (overlays, "jpg")] if args.save_overlays else [(masks, "png")]
    flags = {name: getattr(args, name) for name in PREDICTION_RESULT}
    flags["images"] = args.images and str(args.images.resolve())  # two folders of one name never mix
    inputs = source.fingerprints(ids)
    made_by = identity.describe("train_segmentation.py", {**flags, "weights": weights}, inputs=inputs)
    for kind, suffix in wanted:
        identity.claim_folder(kind, made_by, f".{suffix}", overwrite=args.overwrite)
    pending = [i for i in ids if not all((kind / f"{i}.{suffix}").exists() for kind, suffix in wanted)]
    print(f"{len(ids)} images of '{name}', {len(ids) - len(pending)} done already; writing to {folder}")

    def work(image_id: str) -> None:
        path, photograph = masks / f"{image_id}.png", source.photograph(image_id)
        if path.exists():
            mask = load_mask(path)
        else:
            mask = segment(model, photograph, views, crf).cpu().numpy()
            save_mask(path, mask, source.info.palette)
        if args.save_overlays:
            image = photograph[0].permute(1, 2, 0).numpy()
            save_overlay(overlays / f"{image_id}.jpg", image, mask, source.info)

    mine = parallel.share(ids, pending)
    left_out = LeftOut(folder, "train_segmentation", skip=args.on_error == "skip")
    done = parallel.thread_map(left_out.guard(work), mine, parallel.own_workers(args.num_workers))
    done = left_out.sift(parallel.progress(done, desc="predicting", unit="image", total=len(mine)))
    collections.deque(done, maxlen=0)
    for kind, _ in wanted:
        print(f"{kind.name}: {kind}")
    if not args.images:
        print(f"Next: python evaluate.py --pred_dir {masks} --domain {args.domain}   (plus the data flags)")
    left_out.finish(ids)


def main(args: argparse.Namespace) -> None:
    """Train, or predict with --predict."""
    if args.images and not args.predict:
        raise UserError("--images: photographs to predict. Pass --predict too.")
    device = select_device(args.device)
    (predict if args.predict else train)(args, device)


if __name__ == "__main__":
    cli.run(main, ARGS)
