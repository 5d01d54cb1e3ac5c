"""Stage 4: train DeepLabV3+ on pseudo masks; with --predict, segment photographs with it.

    python train_segmentation.py --tag deeplab --masks_dir experiments/predictions/csrm@train_aug/sam-sam-max_iou_imp2
    python train_segmentation.py --tag deeplab2 --masks_dir experiments/predictions/... --corrected_dir corrected
    python train_segmentation.py --tag deeplab --predict --domain val
    python train_segmentation.py --tag deeplab --predict --images holiday/ --save_overlays --save_confidence

Training reads photographs and the masks in --masks_dir (ID.png, 255 ignored; without the flag the dataset's own masks:
fully supervised) and writes experiments/models/TAG.pth. Masks in --corrected_dir (docs/review.md) replace those of
their images, and these images are used more often. Prediction averages the logits of each image at several scales and
mirrored, and refines the result with a dense CRF. It never reads labels. It also takes a CSRM checkpoint (--weights).
A model that has learnt few pseudo masks is seldom sure, and its argmax is the background too often. For such a model
use --reading relative: the classes that are sure somewhere in the image take the place of an image label, and their
maps are read relative to their maxima, as in inference.py. Prediction writes to experiments/predictions/TAG@DOMAIN/

    masks/ID.png         class indices with a palette, of the size of the upright photograph
    overlays/ID.jpg      the photograph with painted classes, at most 1280 pixels long, and a legend (--save_overlays)
    confidence/ID.png    the network's probability of the class in the mask, times 255: an 8-bit grey image
                         (--save_confidence). It is taken before the dense CRF, whose own probabilities are nearly all
                         0 or 1; where the CRF chose another class, it is low
    areas.csv            --images only: pixels and per cent of each class of the model, background and zeros included,
                         in each photograph that has a mask

--images takes any photographs: one file, a folder, or a text file (.txt) with one path per line, relative to that file.
The results go to TAG@NAME, after the name of the file or folder. --tile finds small objects in large photographs, and
misses those larger than a square. Each square takes the time of a photograph; with --reading relative the network sees
it twice.

Training and prediction continue where they stopped. Several GPUs can share them (SETUP.md).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools import cli, options, parallel
from tools.errors import UserError


def make_parser() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    options.add_common(parser)
    data = options.add_dataset(parser, **options.TRAINING_DOMAINS, domain=("val", "split to predict, with --predict"))
    data.add_argument("--masks_dir", type=Path, help="folder of the masks to learn (default: the dataset's own)")
    data.add_argument("--corrected_dir", type=Path, help="folder of masks that replace those of their images")
    text = "how often an image with a corrected mask is used per epoch"
    data.add_argument("--corrected_weight", type=cli.positive_int, default=3, help=text)
    network = options.add_network(parser, architecture="resnest269e", mode="normal")
    options.add_decoder(network)
    network.add_argument("--restore", type=Path, help="checkpoint or public state dict to start from")
    options.add_images(parser)
    options.add_optimization(parser, lr=0.007, wd=4e-5, batch_size=32, max_epoch=50, alpha_bias=1.0)
    group = parser.add_argument_group("prediction")
    cli.add_switch(group, "--predict", False, "predict --domain with the trained model instead of training")
    text = "photographs to predict instead of --domain: a file, a folder, or a .txt list"
    group.add_argument("--images", type=Path, metavar="PATH", help=text)
    cli.add_switch(group, "--save_overlays", False, "also write the photographs with painted classes")
    cli.add_switch(group, "--save_confidence", False, "also write the probability of each pixel's class")
    text = "segment photographs that are longer than this in overlapping squares of this side"
    group.add_argument("--tile", type=cli.positive_int, metavar="PIXELS", help=text)
    text = "how probabilities become classes; relative: for models that are seldom sure (see above)"
    group.add_argument("--reading", choices=options.PREDICTION_READINGS, default="argmax", help=text)
    group.add_argument("--weights", type=Path, help="checkpoint, of CSRM too (default: experiments/models/TAG.pth)")
    group.add_argument("--max_images", type=cli.positive_int, help="stop after the first N images of the split")
    options.add_shared(group, "scales", "hflip", "on_error", "crf_t", "crf_backend")
    return parser


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.profiler import record_function
from torch.utils.data import ConcatDataset, Dataset

from datasets import DataSource, Photographs, build_source
from datasets.dataset import ImageDataset
from datasets.listing import IMAGE_SUFFIXES
from datasets.loaders import build_loader
from datasets.transforms import segmentation_geometry
from datasets.verify_masks import check_agreement
from models import build_model, load_model, segmentation_forward
from models.restore import restore
from tools import distributed, identity
from tools.cam import enlarged_argmax, multi_scale_logits, values_at, working_photograph
from tools.crf import CAM_SETTINGS, SEGMENTATION_SETTINGS, mean_field, unary_from_labels, unary_from_probabilities
from tools.devices import select_device
from tools.drawing import save_overlay
from tools.files import atomic_write, load_mask, locked, save_mask, save_png
from tools.left_out import LeftOut
from tools.losses import cross_entropy
from tools.maps import normalize, resize_maps
from tools.pseudo_labels import RelativeReading
from tools.tiles import Place, Rows, blended_strips
from tools.training import Trainer, seed_everything
from tools.validation import check_domain, validate

PREDICTION_RESULT = ("scales", "hflip", "reading", "crf_t", "crf_backend", "tile")
"""Flags that change a predicted mask."""

PREDICTION = ("predict", "images", "save_overlays", "save_confidence", "weights", "max_images", *PREDICTION_RESULT)
"""Flags of the prediction. They do not change the training."""

RELATIVE_GT_PROB = 0.9
"""The CRF's confidence in labels of --reading relative: a trained model's are better than CAMs' (docs/log.md)."""

OVERVIEW = 4
"""Stride, pixels, at which the maps of a tiled photograph are searched for their maxima: the network's own."""


def train_step(model: nn.Module, batch: dict, device: torch.device, label_smoothing: float) -> dict[str, torch.Tensor]:
    """Cross entropy of one batch with its (pseudo) masks."""
    images = normalize(batch["image"].to(device, non_blocking=True))
    masks = batch["mask"].to(device, non_blocking=True)
    with record_function("student"):
        logits = model(images)["seg_logits"]
    with record_function("losses"):
        return {"loss": cross_entropy(logits, masks, label_smoothing)}


def training_data(source: DataSource, args: argparse.Namespace) -> tuple[Dataset, dict[str, dict]]:
    """The photographs of --domain_train with their masks, --corrected_weight times those with a corrected one; and the
    fingerprints of all (`DataSource.fingerprints`).

    Raises:
        UserError: a mask is missing; or those of --masks_dir are of other classes, photographs or image labels; or
            --corrected_dir holds one of no photograph, or none of an image of the split.
    """
    geometry = segmentation_geometry(*options.image_sizes(args))
    read = functools.partial(ImageDataset, transform=geometry, with_masks=True, with_labels=False)
    ids = source.ids(args.domain_train)
    inputs = source.fingerprints(ids, masks=True)
    better, corrected = corrected_masks(args, ids) if args.corrected_dir else (source, set())
    others = [i for i in ids if i not in corrected]
    parts = [read(source, others)]
    if args.masks_dir:
        made_of = source.fingerprints(others, labels=all(map(source.has_label, others)))
        identity.check_classes(args.masks_dir, source.info.classes[1:], made_of)
        check_agreement(source, others)
    if corrected:
        print(f"{len(corrected)} of {len(ids)} masks are corrected; each of them counts {args.corrected_weight} times")
        parts += [read(better, [i for i in ids if i in corrected], all_empty=True)] * args.corrected_weight
        inputs["corrected masks"] = better.fingerprints(ids, masks=True)["masks"]
    return ConcatDataset(parts), inputs


def corrected_masks(args: argparse.Namespace, ids: Sequence[str]) -> tuple[DataSource, set[str]]:
    """The dataset with the masks of --corrected_dir, and the ids that have one (UserError: see `training_data`)."""
    better = build_source(args.dataset, options.data_dir(args), args.corrected_dir)
    strays = [text for path, text in better.stray_masks() if path.suffix.lower() in IMAGE_SUFFIXES]
    if strays:
        raise UserError(f"--corrected_dir: {strays[0]} (one of {len(strays)} files). Rename or remove it.")
    corrected = {i for i in ids if better.mask_path(i).is_file()}
    if not corrected:
        raise UserError(f"--corrected_dir {args.corrected_dir}: no mask (ID.png) of an image of '{args.domain_train}'.")
    return better, corrected


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train DeepLabV3+ and print the next command."""
    distributed.start(options.EXPERIMENTS, device)
    source = build_source(args.dataset, options.data_dir(args), args.masks_dir)
    truth = build_source(args.dataset, options.data_dir(args))
    check_domain(truth, args.domain_valid, cams=False)
    dataset, inputs = training_data(source, args)
    loader = build_loader(dataset, args.batch_size, **options.loader_arguments(args))
    seed_everything(args.seed)
    model = build_model("segmentation", num_classes=source.info.num_classes, **options.network_arguments(args)).to(
        device
    )
    if args.restore:
        restore(model, args.restore, source.info.classes)
    made_by = identity.describe("train_segmentation.py", vars(args), inputs=inputs, harmless=(*PREDICTION, "domain"))
    run = options.training(args, made_by)
    trainer = Trainer(model, run, source.info.classes, device=device, steps_per_epoch=len(loader))
    for epoch in trainer.epochs():
        loader.set_epoch(epoch, trainer.batch)
        for batch in trainer.batches(epoch, loader):
            with trainer.autocast():
                losses = train_step(model, batch, device, args.label_smoothing)
            trainer.step(losses)
        if args.domain_valid:
            trainer.log(epoch, validate(model, truth, args.domain_valid, device, options.long_side(vars(args))))
    domain = next((name for name in truth.domains() if name.startswith(args.domain)), args.domain_train)  # or val2014
    print(options.next_step(args, "train_segmentation.py", "--tag", args.tag, "--predict", "--domain", domain))


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """How photographs are segmented."""

    views: options.Views  # of a photograph, or of a tile
    crf: options.CRF  # dense CRF of the averaged views
    reading: str = "argmax"  # of the probabilities, one of `tools.options.PREDICTION_READINGS`
    tile: int | None = None  # side of the tiles of longer photographs, pixels; None: no tiles
    confidence: bool = False  # whether the network's probabilities are returned, too


@torch.inference_mode()
def segment(model: nn.Module, photograph: torch.Tensor, how: Segmentation) -> tuple[np.ndarray, np.ndarray | None]:
    """Class indices uint8 [H,W] of a photograph, uint8 RGB [1,3,H,W].

    With `how.confidence` also the network's probability of these classes times 255, uint8 [H,W]; else None.
    """
    size = photograph.shape[-2:]
    if how.tile is None or max(size) <= how.tile:
        before = probabilities(model, photograph, how.views)
        reading = RelativeReading.of(before) if how.reading == "relative" else None
        return class_indices(before, refined(photograph, before, how, reading), size, how, reading)
    masks, confidences = zip(*tiled(model, photograph, how), strict=True)
    return np.concatenate(masks), np.concatenate(confidences) if how.confidence else None


def class_indices(
    before: torch.Tensor,
    after: torch.Tensor,
    size: Sequence[int],
    how: Segmentation,
    reading: RelativeReading | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `segment` returns, from the probabilities f32[1,C,h,w] and what `refined` made of them; `size` is (H, W)."""
    index = enlarged_argmax(after, size)
    if reading:
        index = reading.keys[index]
    mask = index.to(torch.uint8).cpu().numpy()
    if not how.confidence:
        return mask, None
    return mask, (255 * values_at(before, index)).round().to(torch.uint8).cpu().numpy()


def probabilities(model: nn.Module, photograph: torch.Tensor, views: options.Views) -> torch.Tensor:
    """Class probabilities f32[1,C,h,w] of a photograph, uint8 RGB [1,3,H,W], at its working size (`tools.cam`)."""
    image = normalize(working_photograph(photograph, views).to(next(model.parameters()).device))
    return multi_scale_logits(segmentation_forward(model), image, views).softmax(dim=1)


def refined(
    photograph: torch.Tensor, before: torch.Tensor, how: Segmentation, reading: RelativeReading | None = None
) -> torch.Tensor:
    """The probabilities f32[1,C,h,w] after the dense CRF. With a reading, C are its keys instead of all classes."""
    if not how.crf.iterations and not reading:
        return before
    image = working_photograph(photograph, how.views).to(before.device)
    if reading:
        unary, settings = unary_from_labels(reading.labels(before), len(reading.keys), how.crf.gt_prob), CAM_SETTINGS
    else:
        unary, settings = unary_from_probabilities(before), SEGMENTATION_SETTINGS
    return mean_field(image, unary, settings, how.crf.iterations, backend=how.crf.backend)


def tiled(
    model: nn.Module, photograph: torch.Tensor, how: Segmentation
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What `segment` returns, from the tiles of a photograph, in strips of rows.

    The network's probabilities are blended first. The dense CRF then works on the same tiles of the blended maps, and
    its results are blended again. A dense CRF of each tile alone would leave straight lines where tiles disagree.
    """
    size = tuple(photograph.shape[-2:])

    def look(place: Place) -> torch.Tensor:
        tile = photograph[(..., *place)]
        return resize_maps(probabilities(model, tile, how.views), tile.shape[-2:])

    def refine(place: Place) -> torch.Tensor:
        tile, before = photograph[(..., *place)], blended[place]
        working = working_photograph(tile, how.views).shape[-2:]
        return resize_maps(refined(tile, resize_maps(before, working), how, reading), tile.shape[-2:])

    def finish(rows: slice, after: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        before = blended[rows, :] if is_refined else after
        return class_indices(before, after, after.shape[-2:], how, reading)

    reading = None
    if how.reading == "relative":  # its maxima are those of the whole photograph: the network sees all of it first
        overview = [
            strip[..., -rows.start % OVERVIEW :: OVERVIEW, ::OVERVIEW].clone()
            for rows, strip in blended_strips(look, size, how.tile)
        ]
        reading = RelativeReading.of(torch.cat(overview, dim=-2))
    strips = blended_strips(look, size, how.tile)
    blended, is_refined = Rows(strips), how.crf.iterations or reading
    final = blended_strips(refine, size, how.tile) if is_refined else strips
    return itertools.starmap(finish, final)  # a loop would keep a strip in memory while the next one is made


class Predictor:
    """Makes the files of one photograph at a time.

    Args:
        model: a `DeepLabV3Plus` or `CSRM` in eval mode.
        source: of the photographs.
        folder: experiments/predictions/TAG@DOMAIN.
        how: how they are segmented.
        overlays: whether overlays are written.
    """

    def __init__(
        self, model: nn.Module, source: DataSource, folder: Path, how: Segmentation, *, overlays: bool
    ) -> None:
        self.model, self.source, self.folder, self.how = model, source, folder, how
        self.suffixes = {"masks": ".png"}
        if overlays:
            self.suffixes["overlays"] = ".jpg"
        if how.confidence:
            self.suffixes["confidence"] = ".png"

    def path(self, kind: str, image_id: str) -> Path:
        """The file of `kind`, a key of `suffixes`, of a photograph."""
        return self.folder / kind / f"{image_id}{self.suffixes[kind]}"

    def missing(self, image_id: str) -> list[str]:
        """The kinds of files that the photograph does not have yet."""
        return [kind for kind in self.suffixes if not self.path(kind, image_id).exists()]

    def __call__(self, image_id: str) -> None:
        """Write the missing files of one photograph."""
        missing, photograph = self.missing(image_id), self.source.photograph(image_id)
        if missing == ["overlays"]:
            mask = load_mask(self.path("masks", image_id))
        else:
            mask, confidence = segment(self.model, photograph, self.how)
        if "masks" in missing:
            save_mask(self.path("masks", image_id), mask, self.source.info.palette)
        if "confidence" in missing:
            save_png(self.path("confidence", image_id), Image.fromarray(confidence))
        if "overlays" in missing:
            image = photograph[0].permute(1, 2, 0).numpy()
            save_overlay(self.path("overlays", image_id), image, mask, self.source.info)

    def save_areas(self, ids: Sequence[str], threads: int) -> Path:
        """Write areas.csv: pixels and per cent of each class in each photograph that has a mask.

        Each of several processes writes it. The last one finds all masks.
        """
        path = self.folder / "areas.csv"
        with locked(self.folder), atomic_write(path) as temporary:
            done = [image_id for image_id in ids if self.path("masks", image_id).exists()]
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "class", "pixels", "per_cent"])
                for rows in parallel.thread_map(self._areas, done, threads):
                    writer.writerows(rows)
        return path

    def _areas(self, image_id: str) -> list[list]:
        """The rows of a photograph in areas.csv."""
        classes = self.source.info.classes
        pixels = np.bincount(load_mask(self.path("masks", image_id)).ravel(), minlength=len(classes))
        return [[image_id, name, n, f"{100 * n / pixels.sum():.4f}"] for name, n in zip(classes, pixels, strict=True)]


def photographs(args: argparse.Namespace, checkpoint: dict, weights: Path) -> tuple[DataSource, str, str]:
    """The source of the photographs, their domain in it, and the name that the predictions get."""
    if not args.images:
        source = build_source(args.dataset, options.data_dir(args))
        identity.compare_classes(weights, checkpoint["classes"][1:], source.info.classes[1:])
        return source, args.domain, args.domain
    source = Photographs(args.images, checkpoint["classes"])
    if others := source.images.others:
        print(f"{len(others)} files have a type that cannot be read. The first: {others[0]}")
    place = args.images.resolve()
    return source, "train", place.stem if place.is_file() else place.name


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Write the missing files of every photograph."""
    distributed.start(options.EXPERIMENTS)
    weights = args.weights or options.model_path(args.tag)
    model, checkpoint = load_model(weights, device, kinds=["segmentation", "csrm"])
    source, domain, name = photographs(args, checkpoint, weights)
    ids = source.ids(domain)[: args.max_images]
    views = options.views(args, checkpoint["args"])
    crf = options.CRF(args.crf_t, RELATIVE_GT_PROB, args.crf_backend)
    how = Segmentation(views, crf, args.reading, args.tile, args.save_confidence)
    predictor = Predictor(model, source, options.predictions_dir(args.tag, name), how, overlays=args.save_overlays)
    flags = {name: getattr(args, name) for name in PREDICTION_RESULT}
    flags |= {"weights": weights, "classes": checkpoint["classes"][1:]}
    flags["images"] = args.images and str(args.images.resolve())  # two folders of one name never mix
    inputs = source.fingerprints(ids)
    made_by = identity.describe("train_segmentation.py", flags, inputs=inputs)
    identity.inherit(made_by, checkpoint)
    old = [kind for kind in ("overlays", "confidence") if args.overwrite and (predictor.folder / kind).is_dir()]
    for kind in dict.fromkeys([*predictor.suffixes, *old]):  # those of the old masks go with them
        another = f"--tag (with --weights {weights})"
        identity.claim_folder(predictor.folder / kind, made_by, another=another, overwrite=args.overwrite)
    mine, threads = parallel.share(ids), parallel.own_workers(args.num_workers)
    what = f"{len(mine)} images of '{name}'"
    pending = parallel.pending(mine, lambda i: not predictor.missing(i), what, predictor.folder)
    left_out = LeftOut(predictor.folder, "train_segmentation", skip=args.on_error == "skip")
    for _ in left_out.results(predictor, pending, "predicting", threads=threads):
        pass
    for kind in predictor.suffixes:
        print(f"{kind}: {predictor.folder / kind}")
    if args.images:
        print(f"areas: {predictor.save_areas(ids, threads)}")
    elif args.max_images is None and all(map(source.has_mask, ids)):
        masks = predictor.folder / "masks"
        print(options.next_step(args, "evaluate.py", "--pred_dir", masks, "--domain", domain))
    left_out.finish(ids, mine)


def main(args: argparse.Namespace) -> None:
    """Train, or predict with --predict."""
    for name in () if args.predict else ("images", "weights", "max_images", "tile", "save_overlays", "save_confidence"):
        if getattr(args, name):
            raise UserError(f"--{name}: without effect on a training. Pass --predict too, or drop it.")
    device = select_device(args.device)
    (predict if args.predict else train)(args, device)


if __name__ == "__main__":
    cli.run(main, ARGS)
