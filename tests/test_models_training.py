"""What every training does at a bad step, on a model of two weights whose updates are worked out beside it; what it says of the disk."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from stages.models import training
from stages.models.training import Resumable, TrainingConfig, disk_needed, fit, training_arguments
from stages.run.checkpoint import read_metrics

RATE, STEPS, BAD = 0.01, 30, 23  # the bad step's number; checkpoints at 10, 20, 30


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x, y):
        return {"loss": ((x @ self.weights - y) ** 2).mean()}


class LineTrainer(Resumable, Trainer):
    pass


def rows(fault: float) -> list[dict]:
    """A row a step (two with accumulation), of which that of step BAD holds the fault."""
    drawn = torch.randn(2 * STEPS, 2, generator=torch.Generator().manual_seed(0)) + 3
    made = [{"x": x, "y": x.sum() + 0.1 * i % 3} for i, x in enumerate(drawn)]
    made[BAD - 1] = {"x": drawn[0] * fault, "y": torch.tensor(1.0)}
    return made


def by_hand(data: list[dict], left_out: set[int]) -> torch.Tensor:
    """Gradient descent on a row a step, but for the steps left out."""
    weights = torch.tensor([0.5, -0.5])
    for step, row in enumerate(data[:STEPS], 1):
        if step not in left_out:
            weights -= RATE * 2 * (row["x"] @ weights - row["y"]) * row["x"]
    return weights


def trainer(folder: Path, fault: float = math.nan, **more) -> LineTrainer:
    arguments = training_arguments(
        SimpleNamespace(directory=folder), seed=0, logging_steps=more.pop("logging_steps", 1), save_steps=10, max_steps=STEPS,
        learning_rate=RATE, lr_scheduler_type="constant", optim="sgd", max_grad_norm=1e9, train_sampling_strategy="sequential",
        per_device_train_batch_size=1, **more)
    return LineTrainer(Line(), TrainingArguments(**arguments), train_dataset=rows(fault))


def logged(folder: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_metrics(folder / "metrics.jsonl")}


def test_a_bad_step_stops_the_run_and_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=rf"the loss is nan at step {BAD}: lower the learning rate or look at the data, or set on_"):
        fit(trainer(tmp_path))
    with pytest.raises(ValueError, match=rf"the gradient's norm is inf at step {BAD}"):
        fit(trainer(tmp_path / "inf", fault=1e18))  # the loss is finite, its gradient overflows
    fit(trainer(tmp_path / "long", fault=30.0))  # long, but nobody asked


@pytest.mark.parametrize(("fault", "spike_factor"), [(math.nan, None), (math.inf, None), (1e18, None), (30.0, 20.0)])
def test_a_bad_steps_update_is_left_out_counted_and_logged(fault, spike_factor, tmp_path, capsys):
    t = trainer(tmp_path, fault)
    fit(t, TrainingConfig(on_bad_step="skip", spike_factor=spike_factor))
    torch.testing.assert_close(t.model.weights.data, by_hand(rows(fault), {BAD}))
    assert t.num_skipped == 1 and f"step {BAD}: " in capsys.readouterr().out
    found = logged(tmp_path)
    assert "train/loss" not in found[BAD] and found[BAD]["train/skipped_steps"] == found[STEPS]["train/skipped_steps"] == 1
    assert "train/skipped_steps" not in found[BAD - 1]
    assert all(math.isfinite(row["train/loss"]) for step, row in found.items() if step != BAD)


@pytest.mark.parametrize("fault", [math.nan, 1e18])  # no loss at all, and one that is finite
def test_the_mean_loss_between_two_lines_is_that_of_the_good_steps(fault, tmp_path):
    fit(trainer(tmp_path / "each", fault), TrainingConfig(on_bad_step="skip"))
    fit(trainer(tmp_path / "fives", fault, logging_steps=5), TrainingConfig(on_bad_step="skip"))
    each, fives = logged(tmp_path / "each"), logged(tmp_path / "fives")
    good = [each[step]["train/loss"] for step in range(21, 26) if step != BAD]
    assert fives[25]["train/loss"] == pytest.approx(sum(good) / 4, rel=1e-5)
    assert fives[20]["train/loss"] == pytest.approx(sum(each[step]["train/loss"] for step in range(16, 21)) / 5, rel=1e-5)


def test_one_bad_micro_batch_spoils_its_step_alone(tmp_path):
    data = rows(math.nan)
    t = trainer(tmp_path, gradient_accumulation_steps=2)
    t.train_dataset = data
    fit(t, TrainingConfig(on_bad_step="skip"))
    bad = (BAD + 1) // 2
    assert [b["step"] for b in t.bad_steps] == [bad] and torch.isfinite(t.model.weights).all()
    found = logged(tmp_path)
    assert "train/loss" not in found[bad] and math.isfinite(found[bad + 1]["train/loss"])


def test_a_rewound_run_leaves_out_the_updates_since_its_checkpoint(tmp_path, capsys):
    t = trainer(tmp_path)
    fit(t, TrainingConfig(on_bad_step="rewind"))
    torch.testing.assert_close(t.model.weights.data, by_hand(rows(math.nan), {21, 22, BAD}))
    assert t.num_skipped == 3 and "back to checkpoint-20, and 3 updates are left out" in capsys.readouterr().out
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1)) and logged(tmp_path)[STEPS]["train/skipped_steps"] == 3
    early = trainer(tmp_path / "early")
    early.train_dataset = [rows(math.nan)[BAD - 1], *rows(0.0)]
    with pytest.raises(ValueError, match="there is no checkpoint before it to go back to"):
        fit(early, TrainingConfig(on_bad_step="rewind"))


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_run_killed_after_a_bad_step_resumes_with_what_it_knew(action, tmp_path, monkeypatch):
    guard = TrainingConfig(on_bad_step=action, spike_factor=20.0)
    whole = trainer(tmp_path / "whole", fault=30.0)
    fit(whole, guard)
    stop = 29 if action == "skip" else 25  # after the checkpoint that knows of it, and before the next one
    step = LineTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step + 1 == stop:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LineTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer(tmp_path / "killed", fault=30.0), guard)
    monkeypatch.setattr(LineTrainer, "training_step", step)
    resumed = trainer(tmp_path / "killed", fault=30.0)
    fit(resumed, guard)
    assert torch.equal(resumed.model.weights, whole.model.weights)
    assert [bad["step"] for bad in whole.bad_steps] == [BAD]
    assert (resumed.bad_steps, resumed.norms) == (whole.bad_steps, whole.norms) and resumed.num_skipped == whole.num_skipped
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_too_many_bad_steps_stop_the_run(tmp_path):
    t = trainer(tmp_path)
    t.train_dataset = [rows(math.nan)[BAD - 1]] * STEPS
    with pytest.raises(ValueError, match="it is bad step number 4, above max_bad_steps 3 at step 4"):
        fit(t, TrainingConfig(on_bad_step="skip", max_bad_steps=3))


def test_deepspeed_cannot_leave_an_update_out():
    t = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED")), is_fsdp_enabled=False,
                        is_deepspeed_enabled=True, optimizer=torch.optim.SGD([torch.zeros(1)]), guard=TrainingConfig(on_bad_step="skip"))
    with pytest.raises(ValueError, match="on_bad_step is skip, but DeepSpeed updates the weights before"):
        training.check_engine(t)


def test_the_disk_is_looked_at_before_training(tmp_path, monkeypatch, capsys):
    t = trainer(tmp_path, fault=0.0)
    each, count, product = disk_needed(t)
    assert (each, count, product) == (2 * 4 + 2 * 8 + 2**20, 3, 2 * 4 + 2**20)
    free = each * count + product
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(ValueError, match=r"needs up to 4.0 MiB \(3 checkpoints of 1.0 MiB, a product of 1.0 MiB\), and 4.0 MiB are free: "):
        fit(t)
    assert not list(tmp_path.glob("checkpoints/*"))
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    fit(t)
    assert "disk: at most 3 checkpoints of 1.0 MiB and a product of 1.0 MiB, 4.0 MiB in all" in capsys.readouterr().out
    assert len(list(tmp_path.glob("checkpoints/checkpoint-*"))) == 2  # what save_total_limit leaves
    assert json.loads((tmp_path / "checkpoints/checkpoint-30/steps.json").read_text())["bad"] == []
