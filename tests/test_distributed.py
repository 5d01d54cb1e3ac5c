"""Two processes on CPUs against one: equal losses, weights, memory bank, reports and predictions; and what ends a run.

The two start once, do everything in `work`, and leave what they got in files; the tests do the same in this process.
Chance is kept out where the numbers must agree: no mixing, colours or dropout, and fixed choices of classes.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, refusal, run
from timm.layers import convert_sync_batchnorm
from torch import nn

import train_classifier
import train_csrm
from datasets import build_source
from datasets.loaders import build_loader
from models import build_model
from tools import cli, devices, distributed, parallel, training
from tools.ema import Teacher
from tools.errors import UserError
from tools.losses import c2s_loss, cross_entropy, multilabel_loss, s2c_loss, unsupervised_loss
from tools.memory_bank import MemoryBank, contrastive_loss, entropy_masks
from tools.validation import validate

WORLD = 2
MODELS, PREDICTIONS = Path("experiments/models"), Path("experiments/predictions")
RUN = [*TRAINING, "--batch_size", 4, "--max_epoch", 2, "--lr", 0.01]
SCRIPTS = {
    "csrm": ("train_csrm", [*RUN, *DECODER, "--cutmix_prob", 0, "--crf_t", 1, "--w_contra", 0]),
    "bank": ("train_csrm", [*TRAINING, *DECODER, "--batch_size", 4, "--cutmix_prob", 0, "--warmup_epochs", 0]),
    "vanilla": ("train_classifier", [*RUN, "--mode", "fix", "--augment", "none", "--ema", 0.5]),
    "pnoc": (
        "train_classifier",
        [*RUN, "--augment", "none", "--method", "pnoc", "--oc_weights", MODELS / "vanilla.pth"],
    ),
    "segmentation": (
        "train_segmentation",
        [*RUN, *DECODER, "--mode", "fix", "--accumulate_steps", 2, "--max_steps", 3],
    ),
}
VIEWS = ["--scales", 1, "--crf_t", 1, "--device", "cpu"]


# -- what is done by two processes and by one ----------------------------------------------------------------------


def train(name: str, root: Path) -> dict:
    """Run a script of `SCRIPTS`; the checkpoint, unabridged, and the mean losses of each epoch."""
    script, flags = SCRIPTS[name]
    logged = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", lambda self, x: x)
        patch.setattr(train_csrm, "PhotometricAugmentation", nn.Identity)
        patch.setattr(train_classifier, "random_class", lambda labels: (labels.cumsum(1) == 1) * labels)
        patch.setattr(training, "RESUME_ONLY", ())
        patch.setattr(training.Trainer, "log", lambda self, epoch, values: logged.append(values))
        run(script, *data_flags(root), "--tag", name, *flags)
    return {"checkpoint": torch.load(MODELS / f"{name}.pth", weights_only=True), "logged": logged}


def predict(root: Path, begin: Callable[[], None] = lambda: None) -> None:
    """Three images for two processes: maps, pseudo masks, refined ones, segmentation, and the scores of CAMs and masks.

    Args:
        begin: called before each script.
    """
    folder, data = PREDICTIONS / "csrm@train", [*data_flags(root), "--domain", "train"]
    refine = ["--tag", "csrm", "--proposals", "regions", "--pseudo_dir", folder / "pseudos-t0.4-c1"]
    for script, *flags in (
        ("inference", "--tag", "csrm", *VIEWS, "--save_masks"),
        ("refine_sam", *refine),
        ("train_segmentation", "--tag", "segmentation", *VIEWS, "--predict"),
        ("evaluate", "--pred_dir", folder / "cams", "--mode", "cams", "--output", PREDICTIONS / "cams.json"),
        ("evaluate", "--pred_dir", folder / "sam-regions-max_iou_imp2", "--output", PREDICTIONS / "sam.json"),
    ):
        begin()
        run(script, *data, *flags)


def report(root: Path) -> list[dict]:
    """`validate` on two images, and on a single one, of which the second process has none."""
    source = build_source("folder", root)
    torch.manual_seed(0)
    model = build_model("csrm", architecture="test_resnet", num_classes=3, decoder_channels=8, batch_norm="fix")
    whole = validate(model, source, "val", torch.device("cpu"), (0, 64))
    source.ids = lambda domain: ["b"]
    return [whole, validate(model, source, "val", torch.device("cpu"), (0, 64))]


def pixel_losses(part: slice) -> list[torch.Tensor]:
    """Each loss, and its gradient, on a part of eight images; few have labels, unevenly."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 4, 6, 6, generator=generator)
    labels = torch.randint(0, 4, (8, 12, 12), generator=generator)
    labels[torch.rand(8, 12, 12, generator=generator) < torch.arange(8).view(8, 1, 1) / 7] = 255
    labels[2] = 0
    entropies = torch.rand(8, 12, 12, generator=generator)
    image_labels = (torch.rand(8, 4, generator=generator) > 0.5).float()
    labels, entropies = labels[part], entropies[part]
    results = []
    for loss in (
        lambda x: multilabel_loss(x.mean(dim=(2, 3)), image_labels[part], 0.1),
        lambda x: cross_entropy(x, labels, 0.1),
        lambda x: c2s_loss(x, labels, 0.1),
        lambda x: s2c_loss(x[:, 1:], x, labels),
        lambda x: unsupervised_loss(x, labels, entropies, 73),
        lambda x: cross_entropy(x, torch.full_like(labels, 255)),
    ):
        leaf = logits[part].clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        results += [value.detach(), leaf.grad]
    return results


def contrast(part: slice) -> list[torch.Tensor]:
    """L_contra of eight images, its gradient, and the bank: with queues that overflow, and a class in one image only.

    The representations of a class are one vector, so that it does not matter which pixels are drawn.
    """
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (8, 5, 5), generator=generator)
    labels[labels == 3] = 255
    labels[5, 0] = 3
    prototypes = torch.randn(2, 256, 8, generator=generator)
    student, teacher = (p[labels].permute(0, 3, 1, 2).contiguous() for p in prototypes)
    probs = torch.randn(8, 4, 5, 5, generator=generator).mul(2).softmax(dim=1)
    probs.scatter_(1, labels.clamp(max=3)[:, None], 2.0)
    entropies = torch.rand(8, 5, 5, generator=generator)
    image_labels = (torch.rand(8, 3, generator=generator) > 0.3).float()
    bank = MemoryBank(num_classes=4, dim=8, queue_size=30, background_queue_size=40)
    low, high = entropy_masks(entropies[part][len(labels[part]) // 2 :], labels[part][len(labels[part]) // 2 :], 30)
    leaf = student[part].clone().requires_grad_()
    options = {"low_rank": 2, "high_rank": 3}
    inputs = (leaf, teacher[part], labels[part], probs[part], image_labels[part], low, high)
    torch.manual_seed(0)
    loss = contrastive_loss(bank, *inputs, **options)
    loss.backward()
    return [loss.detach(), leaf.grad, bank.storage[:-1].clone(), bank.sizes.clone()]


def exchange(rank: int) -> dict[str, torch.Tensor]:
    """What each function of `distributed` makes of tensors that differ by rank."""
    share = torch.arange(6.0).view(2, 3) + 100 * rank
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (1,), (4,))]
    weights[0].grad, weights[2].grad = share.clone(), torch.full((4,), float(rank))
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for tensor in model.state_dict().values():
        tensor.fill_(rank + 1)
    distributed.share_model(model)
    total, gathered = distributed.all_reduce_sum(share), distributed.gather_batch(share.T)
    distributed.average_gradients(weights)
    assert weights[1].grad is None
    state = torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()])
    return {
        "share": share,
        "total": total,
        "gathered": gathered,
        "first": weights[0].grad,
        "last": weights[2].grad,
        "model": state,
    }


# -- the two processes ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def work(root: Path, ports: list[int]) -> None:
    """Everything, in one of the two processes that torchrun started; at the end the second one dies."""
    torch.set_num_threads(1)
    rank = parallel.rank()
    distributed.start(Path("experiments"))
    part = slice(rank, None, WORLD)
    results = {"losses": pixel_losses(part), "contrast": contrast(part), "report": report(root)}
    results["exchange"] = exchange(rank)
    distributed.stop()

    def meet_again() -> None:  # torchrun's own meeting point is for one group
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports.pop()))

    for name in SCRIPTS:
        meet_again()
        results[name] = train(name, root)
    predict(root, meet_again)
    meet_again()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        SCRIPTS["resumed"] = SCRIPTS["segmentation"]
        call_at(patch, 5, kill)
        train("resumed", root)
    torch.distributed.destroy_process_group()
    torch.save(results, f"rank{rank}.pt")
    for name, kills in (("whole", [0]), ("killed", [4, 4, 4, 0])):  # 0: never
        for number in kills:
            meet_again()
            train_and_kill(name, number, root)
    meet_again()
    lose_the_second(root)


def call_at(patch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Call `action` before the losses of the training step of this number are backpropagated."""
    steps, step = [], training.Trainer.step

    def counting(self, losses):
        steps.append(None)
        if len(steps) == number:
            action()
        return step(self, losses)

    patch.setattr(training.Trainer, "step", counting)


def kill() -> None:
    raise Killed


def train_and_kill(folder: str, number: int, root: Path) -> None:
    """CSRM with all its chances, five steps an epoch, saved after every second; killed in its `number`-th step."""
    Path(folder).mkdir(exist_ok=True)
    flags = [*TRAINING, *DECODER, "--batch_size", 4, "--max_epoch", 2, "--max_steps", 5, "--warmup_epochs", 0]
    flags += ["--use_gn", "false"]  # running statistics that differ between the processes
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.chdir(folder)
        patch.setattr(training, "STEPS_PER_SAVE", 2)
        call_at(patch, number, kill)
        run("train_csrm", *data_flags(root), "--tag", "t", *flags, "--crf_t", 1)
    if torch.distributed.is_initialized():  # a killed one has not left
        torch.distributed.destroy_process_group()


def lose_the_second(root: Path) -> None:
    """The second process vanishes in the middle of a training. How the first ends: exit code and stderr, in a file."""
    flags = [*data_flags(root), "--tag", "lost", *RUN, *DECODER]
    if parallel.rank():
        with pytest.MonkeyPatch.context() as patch:
            call_at(patch, 2, lambda: os._exit(3))
            run("train_segmentation", *flags)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end it first; on another machine it is alone
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as stop:
        run("train_segmentation", *flags)
    Path("lost.txt").write_text(f"{stop.value.code}\n{errors.getvalue()}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Two(NamedTuple):
    """What two processes left behind: their folder, the results of each, and what was printed."""

    folder: Path
    results: list[dict]
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def two(folder_root, tmp_path_factory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    ports = map(str, free_ports(len(SCRIPTS) + 12))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.run(
        [*launcher, __file__, str(folder_root), *ports],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (folder / "lost.txt").exists() and process.returncode == 1, process.stderr
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return Two(folder, results, process.stdout, process.stderr)


@pytest.fixture(scope="module")
def one(folder_root, tmp_path_factory) -> Iterator[tuple[Path, dict]]:
    """The same of one process; the working directory is its folder."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = {
            "losses": pixel_losses(slice(None)),
            "contrast": contrast(slice(None)),
            "report": report(folder_root),
        }
        results |= {name: train(name, folder_root) for name in SCRIPTS}
        predict(folder_root)
        yield folder, results


# -- the tests -----------------------------------------------------------------------------------------------------


def mean(results: list[dict], name: str, index: int) -> torch.Tensor:
    return torch.stack([each[name][index] for each in results]).mean(dim=0)


def joined(results: list[dict], name: str, index: int) -> torch.Tensor:
    """The mean over the processes of the gradients with respect to the shares, in the order of the batch."""
    return torch.stack([each[name][index] for each in results], dim=1).flatten(0, 1) / WORLD


def test_predictions_have_the_same_bytes(two, folder_root, tmp_path, monkeypatch):
    """One process predicts with the checkpoints of the two."""
    shutil.copytree(two.folder / MODELS, tmp_path / MODELS)
    monkeypatch.chdir(tmp_path)
    predict(folder_root)
    files = [path.relative_to(tmp_path) for path in (tmp_path / PREDICTIONS).rglob("[!.]*") if path.is_file()]
    # cams, masks, pseudo masks, proposals, refined masks, segmentation, with the settings of each; two tables of scores
    assert len(files) == 6 * (3 + 1) + 2 * 2
    for path in files:
        assert path.read_bytes() == (two.folder / path).read_bytes(), path
    assert len(files) == len([path for path in (two.folder / PREDICTIONS).rglob("[!.]*") if path.is_file()])


def test_what_processes_exchange(two):
    first = torch.arange(6.0).view(2, 3)
    second = first + 100
    rows = [row for pair in zip(first.T, second.T, strict=True) for row in pair]
    for rank, each in enumerate(two.results):
        actual = each["exchange"]
        assert torch.equal(actual["share"], (first, second)[rank]), "a sum leaves its argument as it is"
        assert torch.equal(actual["total"], first + second)
        assert torch.equal(actual["gathered"], torch.stack(rows))
        assert torch.equal(actual["first"], first + 50) and actual["last"].tolist() == [0.5] * 4
        assert actual["model"].unique().tolist() == [1.0], "weights and statistics are the first one's"


def test_the_mean_of_every_loss_and_its_gradient_are_those_of_the_whole_batch(one, two):
    expected = one[1]["losses"]
    for index in range(0, len(expected), 2):
        torch.testing.assert_close(mean(two.results, "losses", index), expected[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(joined(two.results, "losses", index + 1), expected[index + 1], atol=1e-6, rtol=1e-5)
    shares = [each["losses"][2] for each in two.results]
    assert abs(shares[0] - shares[1]) > 0.05, "the shares are uneven, or this proves nothing"


def test_the_contrastive_loss_and_its_bank(one, two):
    loss, _, storage, sizes = one[1]["contrast"]
    torch.testing.assert_close(mean(two.results, "contrast", 0), loss, atol=1e-5, rtol=0)
    assert loss > 0.1
    for each in two.results:
        assert torch.equal(each["contrast"][2], storage) and torch.equal(each["contrast"][3], sizes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_losses_of_every_script(one, two, name):
    names = {"c", "c2s", "s2c", "u"} if name in ("csrm", "bank") else one[1][name]["logged"][0].keys()
    for epoch, key in ((epoch, key) for epoch in range(len(one[1][name]["logged"])) for key in names):
        expected = one[1][name]["logged"][epoch].get(key)
        values = [each[name]["logged"][epoch].get(key) for each in two.results]
        assert values[0] == values[1] and values[0] == pytest.approx(expected, abs=1e-5), (epoch, key)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "bank"])
def test_the_weights_of_every_script(one, two, name):
    """Of the student, its teacher or moving average, and P-NOC's opponent."""
    expected, actual = one[1][name]["checkpoint"], two.results[0][name]["checkpoint"]
    assert actual["step"] == expected["step"] > 0 and actual.keys() == expected.keys()
    opponents = [checkpoint.get("opponent", {}).get("model", {}) for checkpoint in (actual, expected)]
    for mine, theirs in [(actual[part], expected[part]) for part in ("model", "teacher") if part in actual] + [
        opponents
    ]:
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, atol=1e-5, rtol=1e-4)


def test_the_bank_of_a_step_holds_the_same_keys(one, two):
    expected, actual = (each["bank"]["checkpoint"]["memory_bank"] for each in (one[1], two.results[0]))
    assert expected["sizes"].sum() > 0 and torch.equal(actual["sizes"], expected["sizes"])
    torch.testing.assert_close(actual["storage"], expected["storage"], atol=1e-5, rtol=1e-4)


def test_reports_are_on_all_images(one, two):
    for each in two.results:
        assert each["report"] == [pytest.approx(numbers) for numbers in one[1]["report"]]


def test_a_run_of_two_processes_goes_on_in_one(one, two, folder_root, monkeypatch):
    monkeypatch.chdir(two.folder)
    monkeypatch.setitem(SCRIPTS, "resumed", SCRIPTS["segmentation"])
    assert torch.load(MODELS / "resumed.pth", weights_only=True)["epoch"] == 1
    resumed, whole = train("resumed", folder_root)["checkpoint"], one[1]["segmentation"]["checkpoint"]
    assert resumed["step"] == whole["step"]
    for key, value in whole["model"].items():
        torch.testing.assert_close(resumed["model"][key], value, atol=1e-5, rtol=1e-4)


def test_two_processes_killed_three_times_end_with_the_same_bytes(two):
    """Behind checkpoints within and between epochs: dropout, mixing, running statistics and the memory bank go on."""
    within = "and step 2 of the next"
    for where in (f"after epoch 0 of 2 {within}", "after epoch 1 of 2", f"after epoch 1 of 2 {within}"):
        assert two.stdout.count(f"t.pth: continuing {where}.") == 1
    whole, killed = (two.folder / name / MODELS / "t.pth" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()


def test_the_first_process_ends_in_one_line_when_the_second_vanishes(two):
    code, *errors, line, end = (two.folder / "lost.txt").read_text().split("\n")
    assert code == "1" and end == ""
    assert line.startswith("train_segmentation.py (process 0): error: another process has ended or hangs.")
    assert not [text for text in errors if "Traceback" in text]


def test_one_process_speaks_and_torch_has_nothing_to_complain_of(two):
    for name in SCRIPTS:
        assert two.stdout.count(f"Model: experiments/models/{name}.pth") == 1
    assert two.stderr.count("inference: 100%") == 1
    assert "reducer.cpp" not in two.stderr and "deprecated" not in two.stderr, two.stderr


# -- what is the same in one process, and what is refused ----------------------------------------------------------


def test_in_a_single_process_nothing_happens():
    x = torch.rand(3, requires_grad=True)
    assert distributed.all_reduce_sum(x) is x and distributed.gather_batch(x) is x
    assert parallel.share("abc") == "abc" and parallel.is_main()
    distributed.start(Path("experiments"))
    distributed.stop()
    layer = nn.Linear(1, 1)
    distributed.share_model(layer)
    layer(torch.ones(1, 1)).sum().backward()
    distributed.average_gradients(layer.parameters())
    assert layer.weight.grad == 1


def test_generators_differ_by_rank_where_they_should():
    def draws(rank):
        training.seed_everything(3, 1, rank)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first, second = draws(0), draws(1)
    assert first[:2] == second[:2] and first[2] != second[2]


def test_another_process_than_the_first_says_only_what_stopped_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main(args):
        print("Model: m.pth")
        raise UserError("b.png: broken.")

    for flags, expected in ((["x"], "\nx.py (process 1): error: b.png: broken.\n"), ([], "")):
        monkeypatch.setattr(sys, "argv", ["x.py", *flags])
        parser = cli.Parser("Reads a file.")
        parser.add_argument("file")
        with pytest.raises(SystemExit) as stop:
            cli.run(main, parser.parse_args())
        assert stop.value.code == 2 and capsys.readouterr() == ("", expected)


def test_processes_that_do_not_see_one_checkpoint(folder_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda tensor: tensor + 1)  # another one is an epoch ahead
    line = refusal(capsys, "train_segmentation", *data_flags(folder_root), "--tag", "t", *TRAINING, *DECODER)
    assert "experiments/models/t.pth: not the same file in all processes." in line


@pytest.mark.parametrize("device, message", [("cuda:0", "gives each of its processes a GPU"), ("cuda", "sees 1 GPUs")])
def test_a_gpu_for_each_process(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"LOCAL_RANK": "1", "RANK": "3", "MASTER_ADDR": "localhost", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)  # the second process of the second machine
    assert devices.select_device("cuda") == torch.device("cuda:1")
    assert devices.select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        devices.select_device(device)


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match="--batch_size 5: cannot be shared by 2 processes"):
        build_loader([0] * 9, 5, num_workers=0, seed=0, world_size=2)


@pytest.mark.parametrize("length", [8, 9, 10, 11])
def test_an_epoch_has_as_many_batches_in_every_process(length):
    """Else those with more would wait for ever for the others."""
    options = {"num_workers": 0, "seed": 0, "world_size": 2}
    loaders = [build_loader(list(range(length)), 4, rank=rank, **options) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert [len(batch) for each in batches for batch in each] == [2] * 4


def test_batch_norm_over_the_whole_batch_fits_checkpoints_and_teacher():
    """What GPUs get; PyTorch has no such layer on CPUs, so only its weights and its evaluation mode are tested."""
    model = build_model("classifier", architecture="resnest14d", num_classes=3)
    teacher, before, images = Teacher(model), model.state_dict(), torch.rand(1, 3, 33, 33)
    expected = teacher(images)["cams"]
    convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == list(before)
    teacher.update(model, 0.5)
    torch.testing.assert_close(model.eval()(images)["cams"], expected)


if __name__ == "__main__":
    work(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]])
