"""CAM priors: every loss against plain loops, the two players of P-NOC, and whole runs of every method."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from command import TRAINING, data_flags, parse, refusal, run
from torch import nn

import train_classifier
from datasets import DatasetInfo
from datasets.loaders import EpochSampler, class_balance
from models import build_model
from tools.options import Optimization
from tools.priors import Opponent, PriorCriterion, Sample, cut_tiles, hide_class, join_tiles, ramp, random_class

SMOOTHING = 0.1


class Net(nn.Module):
    """A classifier one can follow by hand: means of 4x4 pixels (the last ones of an odd side smaller), then 1x1."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pool = nn.AvgPool2d(4, ceil_mode=True)
        self.classifier = nn.Conv2d(3, classes, 1, bias=False)
        self.pretrained = {"pool"}

    def forward(self, x):
        cams = self.classifier(self.pool(x))
        return {"class_logits": cams.mean(dim=(2, 3)), "cams": cams}


def make_sample(labels, size=(16, 16), hidden=None, seed=1) -> Sample:
    labels = torch.tensor(labels, dtype=torch.float32)
    torch.manual_seed(seed)
    hidden = random_class(labels) if hidden is None else torch.tensor(hidden, dtype=torch.float32)
    return Sample(torch.randn(len(labels), 3, *size), labels, hidden)


# -- plain loops -----------------------------------------------------------------------------------------------------
def plain_margin(logits, labels) -> float:
    """Multi-label soft margin with smoothed labels, from its definition."""
    total = 0.0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for z, y in zip(row, targets, strict=True):
            y = y * (1 - SMOOTHING) + SMOOTHING / 2
            p = 1 / (1 + math.exp(-z))
            total -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / len(row)
    return total / len(labels)


def plain_resize(grid, height, width):
    """Bilinear with aligned corners, of a list of rows."""

    def position(i, length, other):
        x = i * (length - 1) / (other - 1) if other > 1 else 0.0
        low = min(int(x), max(length - 2, 0))
        return low, min(low + 1, length - 1), x - low

    rows = []
    for i in range(height):
        a, b, u = position(i, len(grid), height)
        row = []
        for j in range(width):
            c, d, v = position(j, len(grid[0]), width)
            top, bottom = [(1 - v) * grid[r][c] + v * grid[r][d] for r in (a, b)]
            row.append((1 - u) * top + u * bottom)
        rows.append(row)
    return rows


def plain_joined(net, image):
    """CAMs of the four tiles, side by side: nested lists [K][2h][2w]."""
    height, width = ((side + 1) // 2 for side in image.shape[1:])
    tops, lefts = (0, image.shape[1] - height), (0, image.shape[2] - width)
    maps = [[net(image[None, :, t : t + height, x : x + width])["cams"][0].tolist() for x in lefts] for t in tops]
    return [[left + right for row in maps for left, right in zip(row[0][k], row[1][k], strict=True)] for k in range(3)]


def plain_puzzle(net, sample):
    """L_p and L_re."""
    means, difference, count = [], 0.0, 0
    whole = net(sample.images)["cams"].tolist()
    for image, cams, label in zip(sample.images, whole, sample.labels.tolist(), strict=True):
        joined = plain_joined(net, image)
        means.append([sum(map(sum, grid)) / (len(grid) * len(grid[0])) for grid in joined])
        for k, grid in enumerate(cams):
            resized = plain_resize(joined[k], len(grid), len(grid[0]))
            for row, other in zip(grid, resized, strict=True):
                count += len(row)
                if label[k] > 0:
                    difference += sum(abs(a - b) for a, b in zip(row, other, strict=True))
    return plain_margin(torch.tensor(means), sample.labels), difference / count


def plain_hidden_images(sample, cams, threshold=None):
    """The images, with the CAM of the hidden class taken out of each."""
    images = sample.images.clone()
    for b, row in enumerate(sample.hidden.tolist()):
        if 1.0 not in row:
            continue
        grid = [[max(value, 0.0) for value in line] for line in cams[b][row.index(1.0)].tolist()]
        peak = max(map(max, grid)) + 1e-5
        mask = plain_resize([[value / peak for value in line] for line in grid], *images.shape[-2:])
        for i, line in enumerate(mask):
            for j, m in enumerate(line):
                images[b, :, i, j] *= 1 - (m if threshold is None else float(m > threshold))
    return images


LABELS = {
    "several": [[1, 0, 1], [0, 1, 0], [1, 1, 1]],
    "no class": [[0, 0, 0], [0, 1, 0]],
    "one image": [[0, 1, 1]],
    "mixed": [[0.3, 0.7, 0], [1, 0, 0.25]],
}


@pytest.mark.parametrize("size", [(16, 16), (13, 18)], ids=["even", "odd tiles"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("method", ["vanilla", "puzzle", "poc", "pnoc"])
@torch.no_grad()
def test_losses_equal_plain_loops(method, labels, size):
    net, ordinary = Net(), Net(seed=5) if method in ("poc", "pnoc") else None
    sample = make_sample(labels, size)
    losses = PriorCriterion(method, label_smoothing=SMOOTHING, w_re=4, ordinary=ordinary)(net, sample, progress=0.25)
    outputs = net(sample.images)
    expected = plain_margin(outputs["class_logits"], sample.labels)
    if method != "vanilla":
        part, reconstruction = plain_puzzle(net, sample)
        assert losses["c"] == pytest.approx(expected, abs=1e-5)
        assert losses["p"] == pytest.approx(part, abs=1e-5)
        assert losses["re"] == pytest.approx(reconstruction, abs=1e-5)
        expected += part + 2.0 * reconstruction  # half way to 4 after a quarter of the training
    if ordinary is not None:
        logits = ordinary(plain_hidden_images(sample, outputs["cams"]))["class_logits"]
        complement = plain_margin(logits, sample.labels * (sample.hidden == 0))
        assert losses["oc"] == pytest.approx(complement, abs=1e-5)
        expected += (0.3 + 0.7 * 0.25) * complement
    assert losses["loss"] == pytest.approx(expected, abs=1e-5)
    assert torch.equal(sample.cams, outputs["cams"])


def test_schedules():
    weights = PriorCriterion("vanilla", label_smoothing=0, w_re=4).weights
    assert weights(0.0) == {"c": 1, "p": 1, "re": 0, "oc": 0.3}
    assert weights(0.5)["re"] == weights(0.99)["re"] == 4 and weights(0.5)["oc"] == pytest.approx(0.65)
    lighter = PriorCriterion("puzzle", label_smoothing=0, w_re=0.5).weights
    assert lighter(0.25) == {**weights(0.25), "re": 0.25} and lighter(0.9)["re"] == 0.5
    assert ramp(1.0, 0.3, 1.0) == 1 and ramp(0.1, 0.0, 4.0, length=0.5) == pytest.approx(0.8)


def test_tiles_of_an_odd_side_overlap_by_one_pixel_and_come_back_in_place():
    x = torch.arange(2 * 5 * 7.0).view(2, 1, 5, 7)
    tiles = cut_tiles(x)
    assert tiles.shape == (8, 1, 3, 4)
    assert torch.equal(tiles[3], x[1, :, :3, 3:]) and torch.equal(tiles[4], x[0, :, 2:, :4])
    joined = join_tiles(tiles)
    assert joined.shape == (2, 1, 6, 8)
    assert torch.equal(joined[:, :, [0, 1, 2, 4, 5]][..., [0, 1, 2, 3, 5, 6, 7]], x)
    even = torch.randn(3, 2, 8, 6)
    assert torch.equal(join_tiles(cut_tiles(even)), even)


def test_the_hidden_class_is_one_of_the_image_and_any_of_them():
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0.4, 0, 0]]).repeat(300, 1)
    hidden = random_class(labels).view(300, 3, 4)
    assert set(hidden.unique().tolist()) == {0, 1}
    assert (hidden[:, 0].sum(dim=1) == 1).all() and not hidden[:, 1].any() and (hidden[:, 2, 1] == 1).all()
    counts = hidden[:, 0].sum(dim=0).tolist()
    assert counts[1] == 0 and min(counts[0], counts[2], counts[3]) > 70


def test_maps_without_a_positive_value_hide_nothing():
    sample = make_sample([[1, 1, 0]])
    for threshold in (None, 0.2):
        hidden = hide_class(sample.images, -torch.rand(1, 3, 4, 4), sample.hidden, threshold)
        assert torch.equal(hidden, sample.images)


# -- two players -----------------------------------------------------------------------------------------------------
def make_opponent(ordinary: nn.Module, **changes) -> Opponent:
    options = Optimization("sgd", lr=0.1, wd=0, lr_alpha_scratch=1, lr_alpha_bias=2, **changes)
    return Opponent(ordinary, options, label_smoothing=SMOOTHING, updates=8, dtype=None)


def test_the_cam_network_learns_through_the_ordinary_classifier_and_leaves_it_alone():
    net, ordinary = Net(), Net(seed=5)
    opponent = make_opponent(ordinary)
    sample = make_sample(LABELS["several"])
    criterion = PriorCriterion("pnoc", label_smoothing=SMOOTHING, w_re=4, ordinary=ordinary)
    criterion(net, sample, progress=0.5)["oc"].backward()
    assert net.classifier.weight.grad.abs().sum() > 0
    assert ordinary.classifier.weight.grad is None
    assert not sample.cams.requires_grad and opponent.update.parameters


def test_the_opponent_takes_the_step_of_plain_gradient_descent():
    """w <- w - lr dL/dw, the first step of SGD with Nesterov momentum being (1 + momentum) times that."""
    net, ordinary, copy = Net(), Net(seed=5), Net(seed=5)
    sample = make_sample(LABELS["several"], size=(13, 18))
    sample.cams = net(sample.images)["cams"].detach()
    images = plain_hidden_images(sample, sample.cams, threshold=0.2)
    targets = sample.labels * (1 - SMOOTHING) + SMOOTHING / 2
    logits = copy(images)["class_logits"]
    reference = 0.5 * nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert reference.item() == pytest.approx(0.5 * plain_margin(logits, sample.labels), abs=1e-5)
    reference.backward()
    opponent = make_opponent(ordinary, grad_max_norm=0)
    loss = opponent.learn(sample, 0.5, autocast=contextlib.nullcontext())
    opponent.update.step()
    assert loss.item() == pytest.approx(reference.item(), abs=1e-6)
    expected = copy.classifier.weight - 1.9 * 0.1 * copy.classifier.weight.grad
    torch.testing.assert_close(ordinary.classifier.weight, expected)
    assert net.classifier.weight.grad is None and ordinary.classifier.weight.grad is None


def test_the_opponent_accumulates_like_the_cam_network():
    sample = make_sample(LABELS["several"])
    sample.cams = Net()(sample.images)["cams"].detach()
    weights = []
    for accumulate in (1, 2):
        ordinary = Net(seed=5)
        opponent = make_opponent(ordinary, accumulate_steps=accumulate)
        for _ in range(accumulate):
            opponent.learn(sample, 0.5, autocast=contextlib.nullcontext())
        opponent.update.step()
        weights.append(ordinary.classifier.weight.detach())
    torch.testing.assert_close(*weights)


def test_the_opponent_forgets_what_its_network_has_kept():
    """EfficientViT keeps, in evaluation mode, biases that it has looked up in its weights; each turn needs its own."""
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31):
        pytest.skip("its features cannot be had from this timm")
    torch.manual_seed(0)
    net, ordinary = Net(), build_model("classifier", architecture="efficientvit_m0", num_classes=4)
    opponent, sample = make_opponent(ordinary), make_sample(LABELS["one image"], size=(64, 64))
    criterion = PriorCriterion("pnoc", label_smoothing=SMOOTHING, w_re=4, ordinary=ordinary)
    before = {name: value.clone() for name, value in ordinary.named_parameters() if name.endswith("attention_biases")}
    for _ in range(2):
        criterion(net, sample, progress=0.5)["oc"].backward()
        opponent.learn(sample, 0.5, autocast=contextlib.nullcontext())
        opponent.update.step()
    assert before and not any(torch.equal(ordinary.get_parameter(name), value) for name, value in before.items())
    kept = ordinary(sample.images)["cams"]
    torch.testing.assert_close(kept, ordinary.train().eval()(sample.images)["cams"])


# -- runs ------------------------------------------------------------------------------------------------------------
ORDINARY, CHECKPOINT = Path("experiments/models/vanilla.pth"), Path("experiments/models/a.pth")
SHORT = [*TRAINING, "--max_steps", 2, "--max_epoch", 3]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def ordinary(folder_root, tmp_path_factory):
    """A trained vanilla classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("vanilla"))
        run("train_classifier", *data_flags(folder_root), "--tag", "vanilla", *TRAINING)
        return ORDINARY.resolve()


def method_flags(method: str, ordinary: Path) -> list:
    return ["--method", method, *(["--oc_weights", ordinary] if method in ("poc", "pnoc") else [])]


MANY = ["--augment", "colorjitter,cutmix,mixup", "--cutmix_prob", 0.7, "--sampler", "balanced", "--ema", 0.9]


@pytest.mark.parametrize("method, extra", [("puzzle", []), ("poc", []), ("pnoc", []), ("vanilla", MANY)])
def test_a_killed_run_ends_with_the_same_bytes(folder_root, folder, ordinary, monkeypatch, method, extra):
    flags = [*data_flags(folder_root), "--tag", "a", *SHORT, *extra, *method_flags(method, ordinary)]
    folder("whole")
    run("train_classifier", *flags)
    expected = CHECKPOINT.read_bytes()
    folder("killed")
    original, steps = PriorCriterion.__call__, []

    def train_step(*args):
        steps.append(None)
        if len(steps) == 6:
            raise Killed
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PriorCriterion, "__call__", train_step)
        run("train_classifier", *flags)
    unfinished = torch.load(CHECKPOINT, weights_only=True)
    assert ("opponent" in unfinished) == (method == "pnoc") and ("teacher" in unfinished) == bool(extra)
    run("train_classifier", *flags)
    assert CHECKPOINT.read_bytes() == expected
    finished = torch.load(CHECKPOINT, weights_only=True)
    assert finished.keys() - {"teacher"} == {
        "version", "config", "model", "classes", "args", "epoch", "identity", "max_epoch", "step"
    }  # fmt: skip


STAGES = {"layer1", "layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    "method, extra, trained", [("poc", [], set()), ("pnoc", [], STAGES), ("pnoc", ["--mode", "normal"], STAGES)]
)
def test_what_may_change_in_the_ordinary_classifier(ordinary, method, extra, trained):
    args = parse("train_classifier", "--tag", "t", *TRAINING, *method_flags(method, ordinary), *extra)
    train_classifier.complete(args)
    model = train_classifier.load_ordinary(args, DatasetInfo(("background", "cat", "dog")))
    changing = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[2] for name in changing if name.startswith("backbone")} == trained
    assert ("classifier.weight" in changing) == bool(trained) and not any(".bn" in name for name in changing)
    assert not model.training
    other_order = train_classifier.load_ordinary(args, DatasetInfo(("background", "dog", "cat")))
    assert torch.equal(other_order.classifier.weight, model.classifier.weight.flip(0))


def test_the_opponent_of_pnoc_is_trained_but_for_its_batch_norm_and_stem(folder_root, folder, ordinary):
    before = torch.load(ordinary, weights_only=True)["model"]
    folder("run")
    states, rates, smoothing = {}, [], []

    def keep(self):
        states["after"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        rates.append(self.update.schedule.get_last_lr()[0])
        smoothing.append(self.label_smoothing)
        return {}

    flags = [*data_flags(folder_root), "--tag", "a", *SHORT, *method_flags("pnoc", ordinary), "--label_smoothing", 0]
    flags += ["--lr", 0.1, "--accumulate_steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Opponent, "state_dict", keep)
        run("train_classifier", *flags)
    weights = {name: value for name, value in states["after"].items() if not name.endswith("num_batches_tracked")}
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert "classifier.weight" in changed and any("layer4" in name for name in changed)
    assert not any("running" in name or ".bn" in name or "net.conv1" in name for name in changed)
    assert smoothing == [0] * 3
    assert rates == pytest.approx([0.1 * (2 / 3) ** 0.9, *[0.1 * (1 / 3) ** 0.9] * 2]), "one step in an epoch"


def test_the_trained_classifier_of_the_opponent_is_no_new_layer(ordinary):
    """It learns at the rate of the backbone, as a CAM classifier of --restore does."""
    args = parse("train_classifier", "--tag", "t", *TRAINING, *method_flags("pnoc", ordinary))
    train_classifier.complete(args)
    model = train_classifier.load_ordinary(args, DatasetInfo(("background", "cat", "dog")))
    opponent = Opponent(model, Optimization("sgd", 0.1, 1e-4), label_smoothing=SMOOTHING, updates=8, dtype=None)
    rates = {id(p): group["lr"] for group in opponent.update.optimizer.param_groups for p in group["params"]}
    assert rates[id(model.classifier.weight)] == rates[id(model.backbone.net.layer4[0].conv1.weight)] == 0.1


def test_pnoc_freezes_batch_norm_and_stem_unless_told_otherwise(folder_root, folder, ordinary):
    folder("run")
    flags = [*data_flags(folder_root), *TRAINING, *method_flags("pnoc", ordinary)]
    configs = []
    for tag, extra in (("a", []), ("b", ["--mode", "normal", "--trainable_stem"])):
        run("train_classifier", *flags, "--tag", tag, *extra)
        config = torch.load(f"experiments/models/{tag}.pth", weights_only=True)["config"]
        configs.append((config["batch_norm"], config["trainable_stem"]))
    assert configs == [("fix", False), ("normal", True)]
    assert torch.load(ordinary, weights_only=True)["config"]["batch_norm"] == "normal"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pnoc_trains_in_mixed_precision(folder_root, folder, ordinary, precision):
    folder("run")
    flags = [*data_flags(folder_root), "--tag", "a", *SHORT, *method_flags("pnoc", ordinary)]
    run("train_classifier", *flags, "--mixed_precision", precision, "--accumulate_steps", 2)
    assert all(value.isfinite().all() for value in torch.load(CHECKPOINT, weights_only=True)["model"].values())


def test_the_moving_average_is_what_inference_and_restore_take(folder_root, folder, capsys):
    folder("run")
    data = data_flags(folder_root)
    run("train_classifier", *data, "--tag", "a", *SHORT, "--ema", 0.9)
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    average, last = (checkpoint[name]["classifier.weight"] for name in ("teacher", "model"))
    assert not torch.equal(average, last)
    run("inference", *data, "--tag", "a", "--domain", "train", "--scales", 1, "--crf_t", 0, "--device", "cpu")
    assert len(list(Path("experiments/predictions/a@train/cams").glob("*.npz"))) == 3
    run("train_classifier", *data, "--tag", "b", *TRAINING, "--restore", CHECKPOINT, "--lr", 1e-9)
    again = torch.load("experiments/models/b.pth", weights_only=True)["model"]["classifier.weight"]
    torch.testing.assert_close(again, average, atol=1e-6, rtol=0)


def test_flags_of_the_methods_that_do_not_fit(capsys, folder_root, folder, ordinary):
    folder("run")
    refuse = lambda *extra: refusal(  # noqa: E731
        capsys, "train_classifier", *data_flags(folder_root), "--tag", "a", *TRAINING, *extra
    )
    assert "--method poc: needs a trained classifier" in refuse("--method", "poc")
    assert "--oc_weights: --method puzzle has no use for it" in refuse("--method", "puzzle", "--oc_weights", ordinary)
    missing = refuse("--method", "pnoc", "--oc_weights", "none.pth")
    assert "none.pth: no such file" in missing
    with_another = refuse(*method_flags("poc", ordinary), "--architecture", "test_byobnet")
    assert f"{ordinary}: none of its" in with_another
    torch.save({"classifier.weight": torch.zeros(2, 96, 1, 1)}, "head.pth")
    assert "head.pth: gives 0 of the 75 tensors of the backbone" in refuse(*method_flags("pnoc", Path("head.pth")))
    assert "'clahe' is none of randaugment" in refuse("--augment", "clahe")
    alone = refuse("--architecture", "resnest14d", "--batch_size", 1)
    assert "--batch_size 1: the batch norm of this network needs more" in alone
    run("train_classifier", *data_flags(folder_root), "--tag", "a", *TRAINING)
    assert "made with --method vanilla, not puzzle" in refuse("--method", "puzzle")
    assert "made with --ema 0.0, not 0.5" in refuse("--ema", 0.5)


# -- sampler ---------------------------------------------------------------------------------------------------------
def test_class_balance_draws_a_class_and_then_one_of_its_images():
    labels = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0.0]])
    thirds = [1 / 3 * 1 / 3, 1 / 3 * 1 / 3, 1 / 3 * (1 / 3 + 1), 1 / 3]  # cat: 3 images, dog: 1, neither: 1
    assert class_balance(labels).tolist() == pytest.approx(thirds)
    assert class_balance(labels[:2]).tolist() == [0.5, 0.5]


def test_the_weighted_sampler_follows_its_weights_and_its_seed():
    weights = class_balance(torch.tensor([[1, 0.0]] * 9 + [[0, 1.0]]))
    draw = lambda seed, epoch=0: [  # noqa: E731
        d.index for d in sampler_at(EpochSampler(10, 4000, seed=seed, weights=weights), epoch)
    ]
    counts = Counter(draw(0))
    assert counts[9] / 4000 == pytest.approx(0.5, abs=0.03) and len(counts) == 10
    assert draw(0) == draw(0) != draw(1) and draw(0, epoch=1) != draw(0)


def sampler_at(sampler: EpochSampler, epoch: int) -> EpochSampler:
    sampler.epoch = epoch
    return sampler
