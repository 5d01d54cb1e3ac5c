"""Stage 0: the CAM prior, an image classifier whose 1x1 head on the last feature map gives class activation maps.

    python train_classifier.py --tag prior --dataset voc12 --data_dir data/voc12 --domain_train train_aug

Reads photographs and image-level labels only. Writes experiments/models/TAG.pth and TensorBoard curves in
experiments/logs/TAG. Started again, it continues after the last finished epoch. `inference.py --tag TAG` turns the
checkpoint into CAMs; `train_csrm.py --restore experiments/models/TAG.pth` starts CSRM from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from datasets import ImageDataset, build_loader, build_source
from datasets.transforms import normalize, train_geometry
from models import build_model
from models.restore import restore
from tools import cli
from tools.losses import multilabel_loss
from tools.training import Trainer, seed_everything
from tools.validation import check_domain, validate


def make_parser() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_common(parser)
    cli.add_dataset(
        parser,
        domain_train=("train_aug", "split to train on"),
        domain_valid=("", "split with masks to report on after each epoch; empty: none"),
    )
    group = cli.add_network(parser, architecture="resnest101e", mode="normal")
    group.add_argument("--restore", type=Path, help="checkpoint or public state dict to start from")
    images = cli.add_images(parser)
    images.add_argument(
        "--augment", choices=["none", "randaugment"], default="randaugment", help="besides scale, crop, flip"
    )
    cli.add_optimization(parser, lr=0.1, wd=1e-4, batch_size=32, max_epoch=15, alpha_bias=2.0)
    return parser


def train_step(model: nn.Module, batch: dict, device: torch.device, label_smoothing: float) -> dict[str, torch.Tensor]:
    """Multi-label classification loss of one batch."""
    images = normalize(batch["image"].to(device, non_blocking=True))
    labels = batch["label"].to(device, non_blocking=True)
    logits = model(images)["class_logits"]
    return {"loss": multilabel_loss(logits, labels, label_smoothing)}


def main(args: argparse.Namespace) -> None:
    """Train, epoch by epoch, and say what to do next."""
    device = cli.select_device(args.device)
    source = build_source(args.dataset, cli.data_dir(args))
    check_domain(source, args.domain_valid)
    geometry = train_geometry(*cli.image_sizes(args), randaugment=args.augment == "randaugment")
    dataset = ImageDataset(source, source.ids(args.domain_train), geometry)
    loader = build_loader(dataset, args.batch_size, **cli.loader_arguments(args))
    seed_everything(args.seed)
    model = build_model("classifier", num_classes=source.info.num_classes, **cli.network_arguments(args)).to(device)
    if args.restore:
        restore(model, args.restore)
    trainer = Trainer(model, args, source.info, device=device, steps_per_epoch=len(loader))
    for epoch in trainer.fit(loader, lambda batch: train_step(model, batch, device, args.label_smoothing)):
        if args.domain_valid:
            trainer.log(epoch, validate(model, source, args.domain_valid, device, args.image_size))
    print(f"Next: python inference.py --tag {args.tag} --domain {args.domain_train}   (its CAMs)")


if __name__ == "__main__":
    cli.run(main, make_parser())
