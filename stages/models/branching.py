"""Runs that share a beginning: one at a constant learning rate, and a cooldown from it for each of several budgets.

Hägele et al. 2024 (arXiv 2405.18392): after a warmup the rate stays constant and falls to zero over the last part of the budget, by 1 - sqrt
rather than by a line; a fifth of the steps does what a cosine made for the budget does. A run of the schedule `wsd` (warmup, stable, decay)
therefore needs nothing of its own but its cooldown: it may start from a checkpoint that another run of the same settings took while the rate
was constant. It is then the run that trained on by itself, to the bit (a test holds it), which is why a fingerprint does not say how
a run came by its beginning.
"""
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from stages.run.checkpoint import MetricsLog, is_complete, step_of
from stages.run.manifest import Manifest, Run, say, write_json

if TYPE_CHECKING:
    from stages.models.pretraining import PretrainConfig

LENGTH = ("tokens", "cooldown_share", "evaluations", "eval_rows", "checkpoints")  # what does not change how a run begins
DECAYS = {"wsd": "1-sqrt", "wsd-linear": "linear"}


def cooldown_start(config: "PretrainConfig") -> int:
    """Steps before the rate begins to fall; the budget's steps are rounded down, the cooldown's to the nearest and at least one, unless
    its share is zero: such a run is all warmup and constant rate."""
    steps = config.tokens // config.batch_tokens
    return steps - (max(1, round(steps * config.cooldown_share)) if config.cooldown_share else 0)


def warmup_steps(config: "PretrainConfig") -> int:
    return max(1, int(config.tokens // config.batch_tokens * config.warmup_share) if config.warmup_tokens is None
               else config.warmup_tokens // config.batch_tokens)


def learning_rate_schedule(config: "PretrainConfig") -> dict[str, Any]:
    """Arguments of TrainingArguments. Raises ValueError where warmup and cooldown do not fit into the run."""
    warmup, steps, start = warmup_steps(config), config.tokens // config.batch_tokens, cooldown_start(config)
    if config.schedule == "linear":
        return {"lr_scheduler_type": "linear", "warmup_steps": warmup}
    if not 0 <= config.cooldown_share < 1 or warmup > start:
        raise ValueError(f"cooldown_share {config.cooldown_share:g} begins the cooldown at step {start} of {steps}, and the warmup takes "
                         f"{warmup}: set cooldown_share to 0.2, or warmup_tokens lower")
    if not config.cooldown_share:  # transformers' wsd schedule would set the rate to zero after the last step, for whoever goes on there
        return {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup}
    return {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": warmup,
            "lr_scheduler_kwargs": {"num_decay_steps": steps - start, "decay_type": DECAYS[config.schedule]}}


def same_start(config: "PretrainConfig", source: Manifest, parents: dict[str, str]) -> str | None:
    """What makes a run begin unlike the one in `source`; None where they begin alike. `parents` are fingerprints, by stage."""
    if config.schedule == "linear":
        return "schedule is linear, whose rate depends on tokens from the first step: set schedule to wsd"
    for name, share in (("warmup_tokens", config.warmup_share), ("easy_tokens", config.easy_share)):
        if getattr(config, name) is None and share:
            return f"{name} is not set, so that the beginning depends on tokens: set it to {int(share * config.tokens)}, for example"
    if source.data.get("stage") != config.STAGE:
        return f"{source.path} is a {source.data.get('stage')} run: give a finished pretrain run"
    if source.data["parents"] != parents:
        return f"{source.path} was trained on other tokens"
    theirs, ours = source.data["identity"]["config"], config.fingerprinted()
    for key in sorted((theirs.keys() | ours.keys()) - set(LENGTH)):
        if theirs.get(key) != ours.get(key):
            return f"{source.path} has {key} {theirs.get(key)!r}, not {ours.get(key)!r}"
    return None


def start_from(config: "PretrainConfig", run: Run) -> int:
    """Copy the newest checkpoint of `branch_from` that this run can go on from, with the metrics up to it, where a run resumes from; one
    that has begun stays as it is. Returns the step of the checkpoint. Call on the main process.

    Raises ValueError when the other run began in another way or kept no such checkpoint.
    """
    assert config.branch_from is not None
    source, mark = Manifest(config.branch_from), run.directory / "branched.json"
    if reason := same_start(config, source, run.identity["parents"]):
        raise ValueError(f"branch_from {config.branch_from}: {reason}")
    if mark.is_file():
        return json.loads(mark.read_text(encoding="utf-8"))["step"]
    last = min(cooldown_start(config), cooldown_start(type(config)(**source.config)))
    there = sorted((p for p in (source.path / "checkpoints").glob("checkpoint-*") if is_complete(p)), key=step_of)
    fitting = [p for p in there if step_of(p) <= last]
    if not fitting:
        raise ValueError(f"branch_from {config.branch_from}: it kept no checkpoint up to step {last}, where the rate begins to fall, but at "
                         f"{', '.join(str(step_of(p)) for p in there) or 'none'}: train it with keep_at {last * config.batch_tokens}")
    target = run.directory / "checkpoints" / fitting[-1].name
    shutil.copytree(fitting[-1], target, dirs_exist_ok=True)
    if (source.path / "metrics.jsonl").is_file():
        shutil.copy(source.path / "metrics.jsonl", run.directory)
        MetricsLog(run.directory / "metrics.jsonl").rewind(step_of(target))
    write_json(mark, {"step": step_of(target), "from": str(source.path), "fingerprint": source.fingerprint})
    say(f"branches off at step {step_of(target):,} of {source.path}")
    return step_of(target)


class OwnSteps(TrainerCallback):
    """Keeps the checkpoints that others branch off from, and the run's own times to log, evaluate and save: a checkpoint of another run
    carries the times of that one, and Trainer would go by them."""

    def __init__(self, keep_at: set[int]):
        self.keep_at = keep_at

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step in self.keep_at
