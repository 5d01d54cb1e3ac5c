"""The training loop: a run killed anywhere ends with the bytes of one that was not; accumulation; divergence."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command import DECODER, TRAINING, data_flags, parse, refusal, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import loaders
from tools import distributed, options, parallel, training
from tools.checkpoint import previous_path
from tools.errors import UserError
from tools.files import locked
from tools.health import Health
from tools.history import read_run
from tools.priors import PriorCriterion
from tools.training import Trainer

CLASSIFIER = ["--tag", "a", *TRAINING, "--max_steps", 2, "--max_epoch", 3]
CSRM = [*CLASSIFIER, *DECODER, "--warmup_epochs", 0, "--cutmix_prob", 0.7, "--crf_t", 1]
SEGMENTATION = [*CLASSIFIER, *DECODER]
RUNS = [("train_classifier", CLASSIFIER), ("train_csrm", CSRM), ("train_segmentation", SEGMENTATION)]
CHECKPOINT = Path("experiments/models/a.pth")
CPU = torch.device("cpu")


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def change_steps(monkeypatch, script: str, change) -> None:
    """Put `change(losses, number of the step)` behind the script's training step."""
    of_classifier = script == "train_classifier"
    owner, name = (PriorCriterion, "__call__") if of_classifier else (importlib.import_module(script), "train_step")
    original, steps = getattr(owner, name), []

    def train_step(*args):
        steps.append(None)
        return change(original(*args), len(steps) - 1)

    monkeypatch.setattr(owner, name, train_step)


def kill_at(number: int):
    def change(losses, step):
        if step == number:
            raise Killed
        return losses

    return change


class Weight(torch.nn.Linear):
    """One weight, which is not new."""

    pretrained, config = ("weight",), {}

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)


def trainer_of(*flags: object, steps_per_epoch: int = 3) -> Trainer:
    """One that has begun its first epoch, without a log."""
    run = options.training(parse("train_classifier", "--tag", "t", *flags), {})
    trainer = Trainer(Weight(), run, ["background", "cat"], device=CPU, steps_per_epoch=steps_per_epoch)
    trainer.writer, trainer.clock = None, training.Clock(steps_per_epoch)
    trainer.bar = parallel.progress((), desc="training", unit="step")
    return trainer


@pytest.mark.parametrize("script, flags", RUNS, ids=[script for script, _ in RUNS])
def test_a_killed_run_ends_with_the_same_bytes(folder_root, folder, script, flags):
    """Killed in the first epoch, before any checkpoint, and in the third: with momentum, a teacher and keys to keep."""
    flags = [*data_flags(folder_root), *flags]
    folder("whole")
    run(script, *flags)
    expected = CHECKPOINT.read_bytes()
    kept = ["args", "classes", "config", "epoch", "identity", "max_epoch", "model", "step"]
    kept += ["teacher", "version"] if script == "train_csrm" else ["version"]
    assert sorted(torch.load(CHECKPOINT, weights_only=True)) == kept, "not what only a resumed run needs"
    folder("killed")
    for step in (1, 5):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            change_steps(patch, script, kill_at(step))
            run(script, *flags)
    state = torch.load(CHECKPOINT, weights_only=True)
    assert (state["epoch"], state["max_epoch"]) == (2, 3)
    run(script, *flags)
    assert CHECKPOINT.read_bytes() == expected
    assert read_run("a").settings == torch.load(CHECKPOINT, weights_only=True)["args"]


def test_the_seed_decides(folder_root, folder):
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder(name)
        run("train_classifier", *data_flags(folder_root), "--tag", "a", *TRAINING, "--seed", seed)
        states.append(torch.load(CHECKPOINT, weights_only=True)["model"]["classifier.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("script, flags", RUNS, ids=[script for script, _ in RUNS])
def test_the_seed_decides_on_the_first_weights_and_on_the_batches(folder_root, folder, monkeypatch, script, flags):
    weights, seeds = [], []

    def epochs(trainer):
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        return iter(())

    class Sampler(loaders.EpochSampler):
        def __post_init__(self):
            seeds.append(self.seed)

    monkeypatch.setattr(Trainer, "epochs", epochs)
    monkeypatch.setattr(loaders, "EpochSampler", Sampler)
    for seed in (0, 1):
        folder(str(seed))
        run(script, *data_flags(folder_root), *flags, "--seed", seed)
    assert not torch.equal(*weights)
    assert len(set(seeds)) == len(seeds) == (4 if script == "train_csrm" else 2)


def test_a_finished_run_is_not_run_again(folder_root, folder, monkeypatch, capsys):
    folder("run")
    flags = [*data_flags(folder_root), "--tag", "a", *TRAINING]
    run("train_classifier", *flags)
    files = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    change_steps(monkeypatch, "train_classifier", kill_at(0))
    run("train_classifier", *flags)
    assert "already trained" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}


def test_two_batches_accumulated_are_one_of_twice_the_size(folder_root, folder):
    """Frozen batch norm: an image's gradient does not depend on the others of its batch."""
    flags = [*data_flags(folder_root), "--tag", "a", *TRAINING, "--mode", "fix", "--augment", "none", "--max_epoch", 2]
    checkpoints = []
    for name, batch_size, accumulate in (("one", 4, 1), ("two", 2, 2)):
        folder(name)
        sizes = ["--batch_size", batch_size, "--accumulate_steps", accumulate, "--max_steps", accumulate]
        run("train_classifier", *flags, *sizes)
        checkpoints.append(torch.load(CHECKPOINT, weights_only=True))
    first, second = checkpoints
    assert first["step"] == second["step"] == 2
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, atol=1e-6, rtol=1e-4)


def test_the_last_batches_of_an_epoch_are_not_left_over(folder_root, folder):
    folder("run")
    flags = ["--accumulate_steps", 2, "--max_steps", 3, "--max_epoch", 2]
    run("train_classifier", *data_flags(folder_root), "--tag", "a", *TRAINING, *flags)
    assert torch.load(CHECKPOINT, weights_only=True)["step"] == 4


def test_divergence_stops_the_run_and_names_the_remedy(folder_root, folder, monkeypatch, capsys):
    folder("run")

    def diverge(losses, step):
        return {name: loss * float("nan") if step >= 2 else loss for name, loss in losses.items()}

    change_steps(monkeypatch, "train_classifier", diverge)
    line = refusal(capsys, "train_classifier", *data_flags(folder_root), *CLASSIFIER)
    assert "--lr 0.1: training diverged (loss nan; first in step 1 of the epoch, images c, a). Lower it" in line
    assert torch.load(CHECKPOINT, weights_only=True)["epoch"] == 1, "the last good epoch stays"


@pytest.mark.parametrize("script, flags", RUNS, ids=[script for script, _ in RUNS])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion"])
def test_a_loss_that_is_not_finite_changes_no_weight(
    folder_root, folder, monkeypatch, capsys, script, flags, optimizer
):
    """It is the sixth step, between two looks at the losses: 40 steps have one every second step."""
    folder("run")
    weights = []

    def diverge(trainer, losses):
        if trainer.batch == 5:
            losses = {name: loss * float("inf") for name, loss in losses.items()}
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        stepped = original(trainer, losses)
        weights.append(all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters()))
        return stepped

    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", diverge)
    extra = ["--max_steps", 60, "--optimizer", optimizer, "--lr", 1e-4]
    line = refusal(capsys, script, *data_flags(folder_root), *flags, *extra)
    assert "first in step 6 of the epoch, images " in line and not CHECKPOINT.exists()
    assert weights == [False] * 5 + [True]


def test_a_run_says_once_how_long_it_will_take(monkeypatch, capsys):
    """The first step takes a minute, the others a second; asked after every fifth."""
    now = 0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    clock = training.Clock(steps=3800)
    for step in range(1, 31):
        now += 1 if step > 1 else 60
        clock.tick()
        if step % 5 == 0:
            clock.tell()
    assert capsys.readouterr().out == "3785 steps to go, at this speed in 1:03:05\n"


def test_the_progress_bar_is_that_of_all_epochs(folder_root, folder, capsys):
    folder("bar")
    run("train_classifier", *data_flags(folder_root), *CLASSIFIER, "--max_steps", 12, "--max_epoch", 2)
    out, err = capsys.readouterr()
    assert "24/24" in err and "/12 " not in err and "epoch 2/2: 100%" in err
    assert out.count("steps to go, at this speed in 00:0") == 1


def test_a_resumed_run_counts_the_steps_that_are_left(folder_root, folder, monkeypatch, capsys):
    """Of 24, eight are done; it says how many are left after eleven more."""
    folder("resumed")
    monkeypatch.setattr(training, "STEPS_PER_SAVE", 4)
    flags = [*data_flags(folder_root), *CLASSIFIER, "--max_steps", 24, "--max_epoch", 1]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        change_steps(patch, "train_classifier", kill_at(8))
        run("train_classifier", *flags)
    capsys.readouterr()
    run("train_classifier", *flags)
    out, err = capsys.readouterr()
    assert "24/24" in err and "\n5 steps to go" in out


def test_the_speed_is_that_of_the_steps_that_were_timed(monkeypatch, capsys):
    """Three of four: one was done before the run was resumed. Each takes ten seconds, for two images per process."""
    trainer = trainer_of("--max_epoch", 1, "--lr", 0.5, "--lr_poly_power", 1, steps_per_epoch=4)
    trainer.batch = 1
    monkeypatch.setattr(training.time, "perf_counter", lambda: 10 * trainer.batch)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda total: 2 * total)
    monkeypatch.setattr(distributed, "broadcast", lambda _: None)
    for _ in trainer.batches(0, [{"id": ["a", "b"]}] * 3):
        trainer.step({"loss": trainer.model.weight.sum()})
    assert capsys.readouterr().out.endswith("  lr 1.25e-01  0.10 steps/s  0.4 images/s\n")


def test_the_losses_that_are_logged_are_means_over_each_epoch(folder_root, folder, monkeypatch):
    folder("run")
    change_steps(monkeypatch, "train_classifier", lambda losses, step: {n: 0 * v + step for n, v in losses.items()})
    run("train_classifier", *data_flags(folder_root), *CLASSIFIER)
    assert read_run("a").curves["loss"] == [(1, 0.5), (2, 2.5), (3, 4.5)]


def test_a_run_that_has_diverged_is_not_saved_within_an_epoch(monkeypatch):
    """The losses are looked at then, not only at every fifth of a hundred steps."""
    monkeypatch.setattr(training, "STEPS_PER_SAVE", 2)
    trainer, saved = trainer_of(steps_per_epoch=100), []
    monkeypatch.setattr(Trainer, "_save", lambda self, epoch: saved.append(epoch))
    with pytest.raises(UserError, match="training diverged .*; first in step 2 of the epoch, images a"):
        for _ in trainer.batches(0, [{"id": ["a"]}] * 100):
            trainer.step({"loss": trainer.model.weight.sum() * (torch.inf if trainer.batch else 1)})
    assert not saved


def test_the_end_of_an_epoch_is_not_saved_as_a_part_of_it(monkeypatch):
    """A run that goes on there would have no batch left."""
    monkeypatch.setattr(training, "STEPS_PER_SAVE", 2)
    trainer, saved = trainer_of(steps_per_epoch=6), []
    monkeypatch.setattr(Trainer, "_save", lambda self, epoch: saved.append((epoch, self.batch)))
    for _ in trainer.batches(0, [{"id": ["a"]}] * 6):
        trainer.step({"loss": trainer.model.weight.sum()})
    assert saved == [(0, 2), (0, 4)]


@pytest.mark.parametrize("script, flags", RUNS, ids=[script for script, _ in RUNS])
def test_a_run_killed_within_an_epoch_ends_with_the_same_bytes(folder_root, folder, monkeypatch, capsys, script, flags):
    """Seven steps an epoch, a checkpoint after four (two updates of two batches) and at its end. The means that are
    logged, and the health of CSRM, are over all seven."""
    monkeypatch.setattr(training, "STEPS_PER_SAVE", 5)
    seeds, seed = [], Trainer._seed
    monkeypatch.setattr(Trainer, "_seed", lambda *args: seed(*args) or seeds.append(torch.initial_seed()))
    flags = [*data_flags(folder_root), *flags, "--max_steps", 7, "--max_epoch", 2, "--accumulate_steps", 2]
    folder("whole")
    run(script, *flags)
    expected, whole = CHECKPOINT.read_bytes(), read_run("a")
    assert len(set(seeds)) == len(seeds) == 4, "each part of an epoch draws its own"
    folder("killed")
    for step in (5, 2, 4):  # counted in each process: behind the first checkpoint, behind the second, in the next epoch
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            change_steps(patch, script, kill_at(step))
            run(script, *flags)
    assert "continuing after epoch 0 of 2 and step 4 of the next." in capsys.readouterr().out
    state = torch.load(CHECKPOINT, weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 0)
    run(script, *flags)
    assert CHECKPOINT.read_bytes() == expected
    resumed = read_run("a")
    assert (resumed.curves, resumed.health) == (whole.curves, whole.health) and whole.curves


@pytest.mark.parametrize("script, flags", RUNS, ids=[script for script, _ in RUNS])
def test_a_run_goes_on_where_imagenets_weights_cannot_be_had(folder_root, folder, monkeypatch, capsys, script, flags):
    create, known = timm.create_model, ["resnet"]

    def create_model(*args, pretrained=False, **arguments):
        if pretrained and not known:
            raise OSError("no route to host")
        return create(*args, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    flags = [*data_flags(folder_root), *flags, "--backbone_weights", "imagenet"]
    folder("whole")
    run(script, *flags)
    expected = CHECKPOINT.read_bytes()
    folder("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        change_steps(patch, script, kill_at(3))
        run(script, *flags)
    known.clear()
    run(script, *flags)
    run(script, *flags)
    assert "already trained" in capsys.readouterr().out and CHECKPOINT.read_bytes() == expected
    assert "no.pth: no such file" in refusal(capsys, script, *flags, "--backbone_weights", "no.pth")
    assert "timm could not download" in refusal(capsys, script, *flags, "--seed", 1, "--overwrite")


def test_a_training_anew_replaces_the_log_and_a_resumed_one_goes_on_with_it(folder_root, folder):
    folder("run")
    flags = [*data_flags(folder_root), *CLASSIFIER]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        change_steps(patch, "train_classifier", kill_at(5))
        run("train_classifier", *flags)
    resumed_from = read_run("a").curves["loss"]
    run("train_classifier", *flags)
    whole = read_run("a")
    assert [epoch for epoch, _ in whole.curves["loss"]] == [1, 2, 3] and whole.curves["loss"][:2] == resumed_from
    shown = EventAccumulator("experiments/logs/a").Reload().Scalars("loss")  # by TensorBoard, from all starts
    assert [(event.step, event.value) for event in shown] == whole.curves["loss"]
    anew = [*flags, "--max_epoch", 1, "--lr", 0.2, "--overwrite"]
    run("train_classifier", *anew)
    shorter = read_run("a")
    assert [epoch for epoch, _ in shorter.curves["loss"]] == [1] and shorter.seconds < whole.seconds
    folder("fresh")
    run("train_classifier", *anew)
    assert (shorter.curves, shorter.settings) == (read_run("a").curves, read_run("a").settings)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(folder_root, folder, monkeypatch, capsys, damage):
    flags = [*data_flags(folder_root), *CLASSIFIER]
    folder("whole")
    run("train_classifier", *flags)
    expected = CHECKPOINT.read_bytes()
    folder("damaged")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        change_steps(patch, "train_classifier", kill_at(5))
        run("train_classifier", *flags)
    whole = CHECKPOINT.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    CHECKPOINT.write_bytes({"cut": whole[:-1000], "empty": b"", "flipped": flipped, "text": b"<html>"}[damage])
    run("train_classifier", *flags)
    output = capsys.readouterr().out
    assert f"Warning: {CHECKPOINT} is damaged; going on from the one before it, {previous_path(CHECKPOINT)}." in output
    assert "continuing after epoch 1 of 3." in output and CHECKPOINT.read_bytes() == expected
    for path in (CHECKPOINT, previous_path(CHECKPOINT)):
        path.write_bytes(b"")
    line = refusal(capsys, "train_classifier", *flags)
    assert f"{CHECKPOINT}: not a readable checkpoint. Choose another --tag, or pass --overwrite to train anew." in line
    run("train_classifier", *flags, "--overwrite")
    assert f"{CHECKPOINT}: not a readable checkpoint. Training anew, as --overwrite says." in capsys.readouterr().out
    assert CHECKPOINT.read_bytes() == expected


def test_classes_in_another_order_are_another_run(folder_copy, folder, capsys):
    """No image has two, so that all labels are written as before."""
    (folder_copy / "labels.csv").write_text("id,labels\na,cat\nb,cat\nc,dog\nd,\n")
    folder("run")
    flags = [*data_flags(folder_copy), *CLASSIFIER, "--max_epoch", 1]
    run("train_classifier", *flags)
    first = CHECKPOINT.read_bytes()
    (folder_copy / "classes.txt").write_text("background\ndog\ncat\n")
    fault = f"{CHECKPOINT}: made with the classes [cat, dog], not [dog, cat]."
    line = refusal(capsys, "train_classifier", *flags)
    assert f"{fault} Choose another --tag, or pass --overwrite to train anew." in line
    assert CHECKPOINT.read_bytes() == first
    run("train_classifier", *flags, "--overwrite")
    assert f"{fault} Training anew, as --overwrite says." in capsys.readouterr().out
    anew = CHECKPOINT.read_bytes()
    folder("fresh")
    run("train_classifier", *flags)
    assert CHECKPOINT.read_bytes() == anew != first


def test_two_runs_of_one_name(folder_root, folder, monkeypatch, capsys):
    folder("run")
    logs = Path("experiments/logs/a")
    logs.mkdir(parents=True)
    monkeypatch.setattr(training, "SECONDS_TO_END", 0)
    flags = [*data_flags(folder_root), *CLASSIFIER]
    with locked(logs) as mine:
        assert mine
        assert "--tag a: another process is training it. Wait, or" in refusal(capsys, "train_classifier", *flags)
    run("train_classifier", *flags)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(folder_root, folder, precision):
    folder("run")
    run("train_csrm", *data_flags(folder_root), *CSRM, "--mixed_precision", precision)
    state = torch.load(CHECKPOINT, weights_only=True)["teacher"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("script, flags", RUNS, ids=[script for script, _ in RUNS])
def test_compiled_networks_train_alike(folder_root, folder, monkeypatch, script, flags):
    """Each network is a single graph; without its code generator, the compiler leaves the numbers as they are."""
    compile_module, names = torch.nn.Module.compile, []

    def trace_only(module):
        names.append(type(module).__name__)
        compile_module(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", trace_only)
    runs = []
    for switch in ("false", "true"):
        folder(switch)
        run(script, *data_flags(folder_root), *flags, "--max_epoch", 1, "--compile", switch)
        runs.append(torch.load(CHECKPOINT, weights_only=True)["model"])
    assert len(names) == (3 if script == "train_csrm" else 1)
    torch.testing.assert_close(*runs)


def test_the_learning_rate_falls_over_the_updates_of_all_epochs():
    """Three batches an epoch, two of them an update: the last one of an epoch is an update, too."""
    trainer, rates = trainer_of("--max_epoch", 2, "--accumulate_steps", 2, "--lr", 0.5, "--lr_poly_power", 1), []
    for _ in range(2):
        trainer.batch = 0
        for _ in range(3):
            (rate,) = trainer.update.schedule.get_last_lr()[:1]
            rates += [rate] * trainer.step({"loss": trainer.model.weight.sum()})
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    "precision, dtype, scale", [("off", torch.float32, 1), ("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 2**16)]
)
def test_the_precision_is_that_of_the_flag(precision, dtype, scale):
    trainer = trainer_of("--mixed_precision", precision)
    with trainer.autocast():
        assert trainer.model(torch.ones(1, 1)).dtype == dtype
    assert trainer.update.scaler.get_scale() == scale


def test_first_weights_epochs_parts_and_processes_draw_their_own(monkeypatch):
    """But what concerns a whole step is the same in all processes."""
    trainer, own, shared = trainer_of("--seed", 5), [], []
    training.seed_everything(5)
    own.append(torch.rand(1).item())
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        for epoch, trainer.batch in ((0, 0), (0, 2), (1, 0)):
            trainer._seed(epoch)
            own.append(torch.rand(1).item())
            shared.append((random.random(), np.random.rand()))
    assert len(set(own)) == 7 and shared[:3] == shared[3:] and len(set(shared)) == 3


def test_a_save_within_an_epoch_leaves_the_means_of_two_processes(monkeypatch):
    """The other process had losses of 3 in all, this one of 1, in two batches each; then both hold the mean.

    So does what else adds up an epoch, as health.
    """
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(Trainer, "_save", lambda *_: None)
    monkeypatch.setattr(Trainer, "_seed", lambda *_: None)
    trainer = Trainer.__new__(Trainer)
    trainer.model, trainer.ids, trainer.losses = torch.nn.Linear(1, 1), [], []
    health = Health("on", warmup_epochs=0, max_epoch=1)
    health.add("reliable", torch.ones(3), 4)
    trainer.companions = {"health": health}
    trainer.sums, trainer.batch = {"loss": torch.tensor(1.0)}, 2
    monkeypatch.setattr(distributed, "broadcast", lambda _: None)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda total: total + 3)
    assert trainer.means() == {"loss": 1.0}
    monkeypatch.setattr("tools.health.all_reduce_sum", lambda sums: sums + torch.tensor([1, 4]))
    monkeypatch.setattr("tools.health.world_size", lambda: 2)
    trainer._save_within(0)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda total: total * 2)
    assert trainer.means() == {"loss": 1.0}
    assert torch.equal(torch.stack(health.sums["reliable"]), torch.tensor([2.0, 4.0], dtype=torch.float64))
