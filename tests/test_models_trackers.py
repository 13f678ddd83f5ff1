"""Trackers after a kill: a training that was killed between two checkpoints and went on has each step once, with what it logged last."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stages.run.checkpoint import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TRAIN = """
import os, sys, signal, types
from pathlib import Path
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from stages.models.training import Resumable, fit, training_arguments

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(1, 1)
    def forward(self, x, labels=None):
        return {"loss": (self.w(x) - x).square().mean()}

class Plain(Resumable, Trainer):
    pass

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

home = Path(sys.argv[1])
home.mkdir(exist_ok=True)
run = types.SimpleNamespace(directory=home, fingerprint="sha256:0123456789", config=types.SimpleNamespace(recipe="r", STAGE="sft"))
rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([0.0])} for i in range(64)]
fit(Plain(Line(), TrainingArguments(**training_arguments(run, seed=0, report_to=sys.argv[2], logging_steps=1, save_steps=4, max_steps=12,
          per_device_train_batch_size=4, learning_rate=0.01)), train_dataset=rows, callbacks=[Die()]))
"""


def killed_and_continued(folder: Path, tracker: str) -> dict[int, float]:
    """The run's losses by step, as its own metrics.jsonl has them."""
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": str(ROOT), "TRACKIO_TELEMETRY": "0"}
    for step, code in ((7, -signal.SIGKILL), (0, 0)):
        done = subprocess.run([sys.executable, "-c", TRAIN, str(folder / "run"), tracker, str(step)], env=environment,
                              capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    losses = {row["step"]: row["train/loss"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in row}
    assert list(losses) == list(range(1, 13))
    return losses


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed (pip install tensorboard)")
def test_tensorboard_has_each_step_once(tmp_path):
    losses = killed_and_continued(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(losses)
    assert [event.value for event in events] == pytest.approx(list(losses.values()), rel=1e-6)
    assert not list((tmp_path / "run" / "checkpoints").rglob("events.*"))


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed (pip install trackio)")
def test_trackio_has_the_trainer_s_steps_in_one_run(tmp_path):
    losses = killed_and_continued(tmp_path, "trackio")
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as found:
        rows = found.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    logged = [(name, step, json.loads(text)) for name, step, text in rows]
    curve = [(step, values["train/loss"]) for _, step, values in logged if "train/loss" in values]
    assert {name for name, _, _ in logged} == {"r-sft-01234567"}
    found = dict(curve)  # of a step that was repeated, what came last
    assert set(range(5, 13)) <= set(found) <= set(losses)  # trackio writes behind the training's back: a kill can cost it the lines before
    assert found == pytest.approx({step: losses[step] for step in found}) and len(curve) <= 12 + 3  # 5 to 7 were logged by both attempts
