"""Stage 1: CSRM. A student with a CAM branch and a segmentation branch that teach each other, guided by an EMA teacher.

    python train_csrm.py --tag csrm --dataset voc12 --data_dir data/voc12 --restore experiments/models/prior.pth

Reads photographs and image-level labels only. Writes experiments/models/TAG.pth (student and teacher) and TensorBoard
curves in experiments/logs/TAG. Started again, it continues at its last checkpoint. --domain_valid reports the
mean IoU on a split with masks after each epoch; the last checkpoint is kept in any case. `inference.py --tag TAG`
makes the pseudo masks. docs/method.md explains every symbol. Several GPUs: SETUP.md.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import cli, options
from tools.errors import UserError


def make_parser() -> cli.Parser:
    """The script's flags; defaults are the published VOC 2012 run."""
    parser = cli.Parser(__doc__)
    options.add_common(parser)
    options.add_dataset(parser, **options.TRAINING_DOMAINS)
    network = options.add_network(parser, architecture="resnest101e", mode="fix")
    options.add_decoder(network)
    cli.add_switch(network, "--use_sal_head", False, "a saliency head's logit as background of L_s2c")
    cli.add_switch(network, "--use_rep_head", True, "representation branch; false: no contrastive loss")
    text = "CAM prior: a checkpoint of train_classifier.py or public weights"
    network.add_argument("--restore", type=Path, help=text)
    options.add_images(parser)
    options.add_optimization(parser, lr=0.007, wd=1e-4, batch_size=32, max_epoch=15, alpha_bias=1.0)
    add, kinds = parser.add_argument_group("mixing").add_argument, ["classmix", "cutmix", "none"]
    add("--augment", choices=kinds, default="classmix", help="how images are mixed")
    add("--cutmix_prob", type=cli.fraction, default=0.5, help="probability that a step mixes")
    add_labels(parser)
    add_losses(parser)
    return parser


def add_labels(parser: cli.Parser) -> None:
    """Where the labels of L_c2s, L_s2c and L_u come from."""
    group = parser.add_argument_group("pseudo labels")
    add, number = group.add_argument, cli.fraction_or_auto
    source = "labels of L_c2s: CAMs and dense CRF; CAMs against the teacher's background; masks (an upper bound)"
    folder = "labels of L_c2s from elsewhere: masks ID.png (255 ignored), or CAM files ID.npz (docs/seeds.md)"
    reading = (
        "present: the best of background and the image's classes; foreground: object or not first, of all classes; "
    )
    reading += "relative: the same, each class against its maximum in the image"
    auto = "is {}; auto: from the CAMs of --c2s_labels or --restore"
    add("--c2s_mode", choices=["cam", "mp", "gt"], default="cam", help=source)
    add("--c2s_labels", type=Path, metavar="DIR", help=folder)
    add("--c2s_fg", type=number, default=0.30, help="cam: CAM above which a pixel " + auto.format("foreground"))
    add("--c2s_bg", type=number, default=0.05, help="cam: CAM below which a pixel " + auto.format("background"))
    add("--c2s_sigma", type=cli.fraction, default=0.75, help="mp: probability below which a pixel is ignored")
    add("--teacher_labels", choices=options.READINGS, default="present", help=reading)
    add("--s2c_sigma", type=cli.fraction, default=0.5, help="teacher probability that L_s2c asks for")
    options.add_shared(group, "crf_t", "crf_gt_prob", "crf_backend")


def add_losses(parser: cli.Parser) -> None:
    """What the losses weigh, and when they start."""
    add = parser.add_argument_group("losses").add_argument
    for name, text in (
        ("c", "image labels -> class logits"),
        ("c2s", "CAM labels -> segmentation branch"),
        ("s2c", "teacher labels -> CAMs"),
        ("u", "teacher labels -> segmentation branch"),
        ("contra", "contrast of pixel representations"),
    ):
        add(f"--w_{name}", type=cli.non_negative, default=1.0, help=f"weight of L_{name}: {text}")
    low, high = "most probable classes of which a pixel can be a hard negative", "rank from which a class is impossible"
    when = "L_s2c, L_u and L_contra. on: after the warm-up; off: never; auto: from where the teacher shows the classes "
    when += "to where class logits fall"
    first = "first epochs with L_c and L_c2s only (auto: at least)"
    add("--contra_low_rank", type=cli.positive_int, default=3, help=low)
    add("--contra_high_rank", type=cli.positive_int, default=6, help=f"{high} (COCO: 12)")
    add("--self_training", choices=options.SELF_TRAINING, default="on", help=when)
    add("--warmup_epochs", type=cli.count, default=1, help=first)


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from tqdm import tqdm

from datasets import DataSource, build_source
from datasets.dataset import ImageDataset
from datasets.loaders import Loader, build_loader
from datasets.mixing import classmix, cutmix
from datasets.transforms import PhotometricAugmentation, crop_geometry, train_geometry
from datasets.verify_masks import check_agreement
from models import build_model, cam_forward
from models.restore import restore
from tools import distributed, identity, parallel
from tools.devices import select_device
from tools.ema import Teacher, ema_decay
from tools.files import save_json
from tools.health import Health
from tools.losses import (
    c2s_loss,
    certain_pixels,
    entropy,
    kept_loss,
    multilabel_loss,
    s2c_loss,
    s2c_weight,
    unreliable_percent,
)
from tools.maps import normalize, resize_labels, resize_maps
from tools.memory_bank import MemoryBank, contrastive_loss, entropy_masks
from tools.options import IGNORE_INDEX
from tools.pseudo_labels import mutual_promotion_labels, reliable_cam_labels, teacher_labels
from tools.seeds import CamsOf, auto_threshold, file_cams, label_files, network_cams, write_labels
from tools.training import Trainer, seed_everything
from tools.validation import check_domain, validate

HEALTH_EVERY = 5
"""In warm-up the teacher segments every fifth batch only: no loss asks for it, just the signals of `health`."""


@dataclass(frozen=True)
class Batch:
    """Two halves of B images each: "labeled" (strongly augmented, first) and "unlabeled" (cropped only)."""

    images: Tensor  # uint8 [2B,3,H,W]: what the dense CRF looks at; networks get normalize(images)
    image_labels: Tensor  # float32 [2B,K]
    max_classes: int  # most classes of an image
    masks: Tensor | None  # int64 [2B,H,W], only for --c2s_mode gt
    ids: tuple[str, ...] = ()  # 2B


@dataclass(frozen=True)
class Targets:
    """What the student learns, at full size; a tensor of 2B images has the labeled half first."""

    image_labels: Tensor  # float32 [2B,K], after mixing
    cam_labels: Tensor  # int64 [B,H,W] of the labeled half: reliable CAM labels, 255 elsewhere
    teacher_labels: Tensor | None  # int64 [2B,H,W]: the teacher's classes among [background, image labels]
    confidence: Tensor | None  # float32 [2B,H,W]: their probability


@dataclass(frozen=True)
class LossOptions:
    """Weights and schedule of the five losses."""

    weights: dict[str, float]  # of each loss by its name; 0 switches it off
    label_smoothing: float  # e of the cross entropies and of L_c
    s2c_sigma: float  # teacher probability above which L_s2c takes a pixel
    contra_low_rank: int  # of the memory bank (`tools.memory_bank.contrastive_loss`), as the next
    contra_high_rank: int
    max_epoch: int  # E
    self_training: str  # on, off or auto (`tools.health`)
    warmup_epochs: int  # first epochs with L_c and L_c2s only


class Criterion(nn.Module):
    """L = w_c L_c + w_c2s L_c2s + w(e) w_s2c L_s2c + w_u L_u + w_contra L_contra.

    During warm-up only L_c and L_c2s. A weight of 0 switches a loss off. One method per loss; each returns a scalar.

    Args:
        options: weights and schedule.
        num_classes: background included.
        dim: length of the representations.
    """

    def __init__(self, options: LossOptions, *, num_classes: int, dim: int) -> None:
        super().__init__()
        self.options = options
        contrasts = options.weights["contra"] and options.self_training != "off"
        self.bank = MemoryBank(num_classes=num_classes, dim=dim) if contrasts else None
        self.health = Health(options.self_training, warmup_epochs=options.warmup_epochs, max_epoch=options.max_epoch)

    def teaches_itself(self, epoch: int) -> bool:
        """Whether there are more losses than L_c and L_c2s."""
        return epoch >= self.health.warmup_epochs(epoch)

    def has_any(self, epoch: int, *losses: str) -> bool:
        """Whether this epoch has any of these losses, which the network teaches itself by."""
        return self.teaches_itself(epoch) and any(self.options.weights[name] for name in losses)

    @record_function("losses")
    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], targets: Targets, epoch: int) -> dict:
        """The losses of one mixed batch, by name; "loss" is their weighted sum.

        Args:
            student, teacher: outputs of `models.CSRM` for the mixed images (teacher: anything where not needed).
            epoch: counted from 0.
        """
        options, warmup = self.options, self.health.warmup_epochs(epoch)
        terms = {"c": self.classification, "c2s": self.cam_to_segmentation}
        if self.teaches_itself(epoch):
            terms |= {"s2c": self.segmentation_to_cam, "u": self.unsupervised, "contra": self.contrast}
        losses = {name: term(student, teacher, targets, epoch) for name, term in terms.items() if options.weights[name]}
        w_s2c = options.weights["s2c"] * s2c_weight(epoch, options.max_epoch, warmup)
        w_s2c = min(w_s2c, self.health.s2c_limit(epoch, options.weights["c2s"]))
        weights = {**options.weights, "s2c": w_s2c}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}

    def classification(self, student: dict, teacher: dict, targets: Targets, epoch: int) -> Tensor:
        """L_c: image labels, both halves."""
        return multilabel_loss(student["class_logits"], targets.image_labels, self.options.label_smoothing)

    def cam_to_segmentation(self, student: dict, teacher: dict, targets: Targets, epoch: int) -> Tensor:
        """L_c2s: reliable CAM labels teach the segmentation branch, labeled half."""
        labeled = student["seg_logits"][: len(targets.cam_labels)]
        return c2s_loss(labeled, targets.cam_labels, self.options.label_smoothing)

    def segmentation_to_cam(self, student: dict, teacher: dict, targets: Targets, epoch: int) -> Tensor:
        """L_s2c: the teacher's confident labels teach the CAMs, both halves."""
        labels = targets.teacher_labels.where(targets.confidence > self.options.s2c_sigma, IGNORE_INDEX)
        return s2c_loss(
            student["cams"], student["seg_logits"], labels, self.options.label_smoothing, student.get("saliency")
        )

    def unsupervised(self, student: dict, teacher: dict, targets: Targets, epoch: int) -> Tensor:
        """L_u: the teacher's certain labels teach the segmentation branch, unlabeled half."""
        _, labels = targets.teacher_labels.chunk(2)
        _, student_logits = student["seg_logits"].chunk(2)
        _, teacher_logits = teacher["seg_logits"].chunk(2)
        kept = certain_pixels(labels, entropy(teacher_logits, labels.shape[-2:]), 100 - self.alpha(epoch))
        self.health.add("kept", kept & (labels > 0), labels > 0)
        return kept_loss(student_logits, labels, kept)

    def contrast(self, student: dict, teacher: dict, targets: Targets, epoch: int) -> Tensor:
        """L_contra: pixels against class means and the memory bank, at stride 4."""
        _, teacher_labels = targets.teacher_labels.chunk(2)
        logits = teacher["seg_logits"].float()
        labels = resize_labels(torch.cat([targets.cam_labels, teacher_labels]), logits.shape[-2:])
        _, unlabeled_labels = labels.chunk(2)
        _, unlabeled_logits = logits.chunk(2)
        low, high = entropy_masks(entropy(unlabeled_logits), unlabeled_labels, self.alpha(epoch))
        return contrastive_loss(
            self.bank,
            student["representations"],
            teacher["representations"],
            labels,
            logits.softmax(dim=1),
            targets.image_labels,
            low,
            high,
            low_rank=self.options.contra_low_rank,
            high_rank=self.options.contra_high_rank,
        )

    def alpha(self, epoch: int) -> float:
        """Per cent of the pixels that count as (un)certain in this epoch."""
        return unreliable_percent(epoch, self.options.max_epoch)

    def observe(self, targets: Targets, class_logits: Tensor, image_labels: Tensor) -> None:
        """Add this step's signals to `health`.

        Args:
            class_logits, image_labels: float [2B,K], the teacher's logits, and the labels, of images before mixing.
        """
        add, labels, cam_labels = self.health.add, targets.teacher_labels, targets.cam_labels
        add("class_logit", class_logits * (image_labels > 0), image_labels > 0)
        present = targets.image_labels > 0
        shown = nn.functional.pad(present, (1, 0)).zero_().scatter_(1, labels.flatten(1), True)[:, 1:]
        add("vanished", present & ~shown, present)
        reliable, objects = cam_labels != IGNORE_INDEX, labels[: len(cam_labels)] > 0
        add("reliable", reliable, reliable.numel())
        add("agreement", objects & (cam_labels > 0) & reliable, (objects | (cam_labels > 0)) & reliable)
        add("confident", targets.confidence > self.options.s2c_sigma, labels.numel())


@dataclass(frozen=True)
class LabelOptions:
    """How a step makes its labels."""

    augment: str  # classmix, cutmix or none
    cutmix_prob: float  # probability that a step mixes
    c2s_mode: str  # labels of L_c2s: cam (CAMs and dense CRF), mp (CAMs against the teacher's background), gt (masks)
    # cam: CAM below which a pixel is background, CAM above which it is foreground
    c2s_thresholds: tuple[float, float] | None
    c2s_sigma: float  # mp: probability below which a pixel is ignored
    crf: options.CRF  # cam
    teacher_labels: str  # how they are read from the segmentation logits, one of `tools.options.READINGS`


def train_step(
    batch: Batch,
    student: nn.Module,
    teacher: Teacher,
    criterion: Criterion,
    labels: LabelOptions,
    epoch: int,
    observed: bool = True,
) -> dict[str, Tensor]:
    """One step of CSRM up to its losses: teacher labels, mixing, student, losses.

    Args:
        epoch: counted from 0.
        observed: whether `health` looks at a step of the warm-up; at later steps it always does.
    """
    # 1. The teacher sees both halves. If nothing is mixed, the losses use this pass, too.
    mixes = labels.augment != "none" and random.random() < labels.cutmix_prob
    teaches, contrasts = criterion.teaches_itself(epoch), criterion.has_any(epoch, "contra")
    segments = teaches or observed or labels.c2s_mode == "mp"
    needs = {"segmented": None if segments else 0, "representations": contrasts and not mixes}
    teacher_out = teacher(normalize(batch.images), **needs) if segments or labels.c2s_mode != "gt" else {}
    seg_logits, class_logits = teacher_out.get("seg_logits"), teacher_out.get("class_logits")

    # 2. Its CAMs become reliable pixel labels. Those of the unlabeled half are needed for mixing only.
    to_label = slice(None) if mixes else slice(len(batch.images) // 2)
    cam_labels = pixel_labels(batch, teacher_out, to_label, labels)

    # 3. Images, image labels, CAM labels and teacher logits are mixed together.
    images, image_labels = batch.images, batch.image_labels
    if mixes:
        mix = classmix if labels.augment == "classmix" else cutmix
        images, cam_labels, seg_logits, image_labels = mix(images, cam_labels, seg_logits, image_labels)

    # 4. The teacher labels each pixel with the background or a class of the image.
    hard_labels = confidence = None
    if segments:
        hard_labels, confidence = teacher_labels(seg_logits, image_labels, images.shape[-2:], labels.teacher_labels)

    # 5. Student and teacher see the mixed images. In warm-up no loss asks how the unlabeled half is segmented.
    inputs = normalize(images)
    with record_function("student"):
        student_out = student(inputs, segmented=None if teaches else len(images) // 2, representations=contrasts)
    if mixes and criterion.has_any(epoch, "u", "contra"):  # they look at the teacher's outputs, not only at its labels
        teacher_out = teacher(inputs, representations=contrasts)

    # 6. The five losses.
    targets = Targets(image_labels, cam_labels[: len(images) // 2], hard_labels, confidence)
    if segments:
        criterion.observe(targets, class_logits, batch.image_labels)
    return criterion(student_out, teacher_out, targets, epoch)


@record_function("CAM labels")
def pixel_labels(batch: Batch, teacher_out: dict[str, Tensor], images: slice, options: LabelOptions) -> Tensor:
    """Label maps int64 [n,H,W] for L_c2s of the chosen images; 255 where not reliable."""
    if options.c2s_mode == "gt":
        return batch.masks[images]
    cams, labels = teacher_out["cams"][images].float(), batch.image_labels[images]
    if options.c2s_mode == "mp":
        logits = resize_maps(teacher_out["seg_logits"][images], batch.images.shape[-2:])
        background = logits.softmax(dim=1)[:, 0]
        return mutual_promotion_labels(background, cams, labels, options.c2s_sigma, max_classes=batch.max_classes)
    return reliable_cam_labels(
        batch.images[images],
        cams,
        labels,
        *options.c2s_thresholds,
        max_classes=batch.max_classes,
        gt_prob=options.crf.gt_prob,
        crf_iterations=options.crf.iterations,
        backend=options.crf.backend,
    )


def c2s_mode(args: argparse.Namespace) -> str:
    """--c2s_mode; the labels of --c2s_labels are masks."""
    return "gt" if args.c2s_labels else args.c2s_mode


def labelled_source(source: DataSource, args: argparse.Namespace, views: options.Views) -> DataSource:
    """The dataset with the masks of --c2s_labels instead of its own.

    Raises:
        UserError: see `tools.seeds.label_files`; or masks are of other classes, photographs or image labels.
    """
    files = label_files(args.c2s_labels, source.ids(args.domain_train))
    identity.check_classes(args.c2s_labels, source.info.classes[1:], source.fingerprints([*files], labels=True))
    folder = args.c2s_labels
    if next(iter(files.values())).suffix != ".png":
        folder = options.EXPERIMENTS / "labels" / args.tag
        thresholds = cam_thresholds(args, file_cams(source, files), list(files))
        write_labels(
            source,
            files,
            folder,
            thresholds=thresholds,
            crf=options.crf(args),
            views=views,
            overwrite=args.overwrite,
            threads=parallel.own_workers(args.num_workers),
        )
    learnt = build_source(args.dataset, options.data_dir(args), folder)
    if folder == args.c2s_labels:
        check_agreement(learnt, [*files])
    return learnt


def cam_thresholds(args: argparse.Namespace, cams_of: CamsOf, ids: Sequence[str]) -> tuple[float, float]:
    """--c2s_bg and --c2s_fg. `auto`: .5 t and 1.25 t, at most .99, where t is the `auto_threshold` of the CAMs.

    Raises:
        UserError: the first is above the second, so that no pixel could be in doubt.
    """
    thresholds = {"bg": args.c2s_bg, "fg": args.c2s_fg}
    if automatic := [name for name, value in thresholds.items() if value == "auto"]:
        middle = auto_threshold(cams_of, ids)
        thresholds |= {name: min(round(middle * {"bg": 0.5, "fg": 1.25}[name], 3), 0.99) for name in automatic}
        print("  ".join(f"--c2s_{name} auto: {thresholds[name]:g}" for name in automatic))
    if thresholds["bg"] > thresholds["fg"]:
        raise UserError("--c2s_bg {bg:g}: above --c2s_fg {fg:g}. Lower it, or raise the other.".format(**thresholds))
    return thresholds["bg"], thresholds["fg"]


def own_thresholds(
    student: nn.Module, source: DataSource, args: argparse.Namespace, views: options.Views
) -> tuple[float, float] | None:
    """`cam_thresholds` of the student's own CAMs as they are now; None if L_c2s learns other labels.

    Raises:
        UserError: `auto`, but --restore has given no CAM classifier.
    """
    if c2s_mode(args) != "cam":
        return None
    if "auto" in (args.c2s_bg, args.c2s_fg) and "classifier" not in student.pretrained:
        name = "bg" if args.c2s_bg == "auto" else "fg"
        raise UserError(
            f"--c2s_{name} auto: no CAMs to read it from. Pass a prior of these classes with --restore, or a number."
        )
    cams_of = network_cams(cam_forward(student), source, views, next(student.parameters()).device)
    return cam_thresholds(args, cams_of, source.ids(args.domain_train))


def build_loaders(source: DataSource, args: argparse.Namespace) -> tuple[Loader, Loader]:
    """The labeled and the unlabeled loader: the same photographs, other crops, in other orders."""
    ids = source.ids(args.domain_train)
    geometries = (train_geometry(*options.image_sizes(args)), crop_geometry(args.image_size, args.min_image_size))
    shared = options.loader_arguments(args)
    labeled, unlabeled = (
        build_loader(
            ImageDataset(source, ids, geometry, with_masks=c2s_mode(args) == "gt"),
            args.batch_size,
            **{**shared, "seed": 2 * args.seed + half, "num_workers": (shared["num_workers"] + 1) // 2},
        )
        for half, geometry in enumerate(geometries)
    )
    return labeled, unlabeled


def batches(labeled: Loader, unlabeled: Loader, augment: nn.Module, device: torch.device) -> Iterator[Batch]:
    """Join the two halves on the device; the labeled half gets colour jitter and blur there."""
    for pair in zip(labeled, unlabeled, strict=True):
        # Counted on the host: reading the number from the device would wait for it.
        max_classes = max(int(half["label"].count_nonzero(dim=1).max()) for half in pair)
        first, second = ({k: v.to(device, non_blocking=True) for k, v in half.items() if k != "id"} for half in pair)
        yield Batch(
            images=torch.cat([augment(first["image"]), second["image"]]),
            image_labels=torch.cat([first["label"], second["label"]]),
            max_classes=max_classes,
            masks=torch.cat([first["mask"], second["mask"]]) if "mask" in first else None,
            ids=(*pair[0]["id"], *pair[1]["id"]),
        )


def teacher_decay(epoch: int, step: int, *, warmup_epochs: int, updates_per_epoch: int) -> float:
    """EMA decay after optimiser step `step`: 0 (a copy of the student) up to and including the epoch after warm-up."""
    if epoch <= warmup_epochs:
        return 0.0
    return ema_decay(step - warmup_epochs * updates_per_epoch)


def loss_options(args: argparse.Namespace) -> LossOptions:
    """The flags of the losses."""
    weights = {name: getattr(args, f"w_{name}") for name in ("c", "c2s", "s2c", "u", "contra")}
    if not args.use_rep_head:
        weights["contra"] = 0.0
    return options.from_flags(LossOptions, args, weights=weights)


def label_options(args: argparse.Namespace, thresholds: tuple[float, float] | None) -> LabelOptions:
    """The flags of the labels and of mixing, with the `own_thresholds`."""
    given = {"c2s_mode": c2s_mode(args), "c2s_thresholds": thresholds, "crf": options.crf(args)}
    return options.from_flags(LabelOptions, args, **given)


def build_student(args: argparse.Namespace, classes: Sequence[str]) -> nn.Module:
    """The network, with the weights of --restore."""
    heads = {"use_sal_head": args.use_sal_head, "use_rep_head": args.use_rep_head}
    student = build_model("csrm", num_classes=len(classes), **options.network_arguments(args), **heads)
    if args.restore:
        restore(student, args.restore, classes)
    return student


def report_health(health: Health, trainer: Trainer, epoch: int) -> None:
    """End an epoch of `health`: a line on the console, TensorBoard, and TAG.health.json beside the checkpoint."""
    record = {name: value for name, value in health.close().items() if value is not None}
    trainer.log(epoch, {f"health/{name}": value for name, value in record.items()})
    tqdm.write("  ".join(["health", *(f"{name} {value:.4g}" for name, value in record.items())]))
    if news := health.news():
        tqdm.write(news)
    if parallel.is_main():
        save_json(trainer.path.with_suffix(".health.json"), health.report())


def check_flags(args: argparse.Namespace) -> None:
    """Refuse combinations of flags that cannot work (UserError), before anything is computed."""
    low, high = args.contra_low_rank, args.contra_high_rank
    if low > high:
        raise UserError(f"--contra_low_rank {low}: above --contra_high_rank {high}. Lower it, or raise the other.")
    if not (args.w_c or args.w_c2s) and (args.warmup_epochs or args.self_training != "on"):
        raise UserError(
            "--w_c 0 --w_c2s 0: there is nothing to learn before self-training. Raise one, or pass --warmup_epochs 0 "
            "--self_training on."
        )
    if args.c2s_labels and args.c2s_mode != "cam":
        raise UserError(f"--c2s_mode {args.c2s_mode}: without effect, as --c2s_labels are learnt. Drop one of the two.")


def main(args: argparse.Namespace) -> None:
    """Train, epoch by epoch, and say what to do next."""
    check_flags(args)
    device = select_device(args.device)
    distributed.start(options.EXPERIMENTS, device)
    source = build_source(args.dataset, options.data_dir(args))
    check_domain(source, args.domain_valid)
    long_side = options.long_side(vars(args))
    views = options.Views(scales=(1.0,), hflip=True, long_side=long_side)
    learnt = labelled_source(source, args, views) if args.c2s_labels else source
    labeled, unlabeled = build_loaders(learnt, args)
    seed_everything(args.seed)
    student = build_student(args, source.info.classes).to(device)
    teacher = Teacher(student)
    criterion = Criterion(loss_options(args), num_classes=source.info.num_classes, dim=args.decoder_channels).to(device)
    labels = label_options(args, own_thresholds(student.eval(), source, args, views))
    augment = PhotometricAugmentation()
    health = criterion.health
    companions = {"teacher": teacher.module, "health": health}
    if criterion.bank is not None:
        companions["memory_bank"] = criterion.bank
    inputs = learnt.fingerprints(source.ids(args.domain_train), labels=True, masks=labels.c2s_mode == "gt")
    run = options.training(args, identity.describe("train_csrm.py", vars(args), inputs=inputs))
    trainer = Trainer(
        student, run, source.info.classes, device=device, steps_per_epoch=len(labeled), companions=companions
    )
    for epoch in trainer.epochs():
        warmup = {"warmup_epochs": health.warmup_epochs(epoch), "updates_per_epoch": trainer.updates_per_epoch}
        labeled.set_epoch(epoch, trainer.batch)
        unlabeled.set_epoch(epoch, trainer.batch)
        for batch in trainer.batches(epoch, batches(labeled, unlabeled, augment, device)):
            with trainer.autocast():
                observed = trainer.batch % HEALTH_EVERY == 0
                losses = train_step(batch, student, teacher, criterion, labels, epoch, observed)
            if trainer.batch == 0:
                health.add_gradients(losses, student.backbone)
            if trainer.step(losses):
                teacher.update(student, teacher_decay(epoch, trainer.updates, **warmup))
        report_health(health, trainer, epoch)
        if args.domain_valid:
            trainer.log(epoch, validate(teacher.module, source, args.domain_valid, device, long_side))
    print(options.next_step(args, "inference.py", "--tag", args.tag, "--domain", args.domain_train))


if __name__ == "__main__":
    cli.run(main, ARGS)
