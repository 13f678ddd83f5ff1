"""Runs that share a beginning: one at a constant learning rate, and a cooldown from it for each of several budgets.

Hägele et al. 2024 (arXiv 2405.18392): after a warmup the rate stays constant, and over the last part of the budget it falls to zero, by
1 - sqrt rather than by a line; a fifth of the steps does what a cosine made for the budget does. A run of the schedule `wsd` (warmup,
stable, decay) therefore needs nothing of its own but its cooldown: it may start from a checkpoint that another run of the same settings
took while the rate was constant. It is then the run that trained on by itself, to the bit (a test holds it), which is why a fingerprint
does not say how a run came by its beginning.
"""
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from stages.run.checkpoint import MetricsLog, is_complete, step_of
from stages.run.manifest import Manifest, Run, precision, say, write_json

if TYPE_CHECKING:
    from stages.models.pretraining import PretrainConfig

LENGTH = ("tokens", "cooldown_share", "evaluations", "eval_rows", "checkpoints")  # what does not change how a run begins
KEPT = "kept"  # folder of a run beside its checkpoints
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


def tied_to_budget(config: "PretrainConfig") -> str | None:
    """What ties the beginning of a run to its budget, so that none of another budget begins alike; None where nothing does."""
    if config.schedule == "linear":
        return "schedule is linear, whose rate depends on tokens from the first step: set schedule to wsd"
    for name, share in (("warmup_tokens", config.warmup_share), ("easy_tokens", config.easy_share)):
        if getattr(config, name) is None and share:
            return f"{name} is not set, so that the beginning depends on tokens: set it to {int(share * config.tokens)}, for example"
    return None


def usable_checkpoints(config: "PretrainConfig", source: Manifest, parents: Mapping[str, str]) -> list[Path]:
    """The checkpoints of the run in `source` that this one can go on from, the newest last; `parents` are fingerprints, by stage.

    Raises ValueError when the other run began in another way or kept no such checkpoint.
    """
    reason = tied_to_budget(config)
    if source.data.get("stage") != config.STAGE:
        reason = f"a {source.data.get('stage')} run: give a finished pretrain run"
    elif source.data["parents"] != parents:
        reason = "trained on other tokens"
    elif (theirs := source.data["provenance"].get("precision", precision())) != precision():
        reason = f"trained with mixed_precision {theirs!r}, and this launch config has {precision()!r}"
    theirs, ours = source.data["identity"]["config"], config.fingerprinted()
    other = [key for key in sorted((theirs.keys() | ours.keys()) - set(LENGTH)) if theirs.get(key) != ours.get(key)]
    if not reason and other:
        reason = f"{other[0]} is {theirs.get(other[0])!r} there and {ours.get(other[0])!r} here"
    if reason:
        raise ValueError(f"branch_from {source.path}: {reason}")
    last = min(cooldown_start(config), cooldown_start(type(config)(**source.config)))
    there = {step_of(p): p for p in source.path.glob("*/checkpoint-*") if is_complete(p)}
    fitting = [there[step] for step in sorted(there) if step <= last]
    if not fitting:
        raise ValueError(f"branch_from {source.path}: it kept no checkpoint up to step {last}, where the rate begins to fall, but at "
                         f"{', '.join(map(str, sorted(there))) or 'none'}: train it with keep_at {last * config.batch_tokens}")
    return fitting


def start_from(config: "PretrainConfig", run: Run) -> int:
    """Copy the checkpoint to go on from, and the metrics up to it, to where a run resumes from; one that has begun stays as it is. A run
    that others branch off gets the earlier ones too. Returns the step. Call on the main process. Raises ValueError as `usable_checkpoints`
    does.
    """
    assert config.branch_from is not None
    mark = run.directory / "branched.json"
    if mark.is_file():
        return json.loads(mark.read_text(encoding="utf-8"))["step"]
    source = Manifest(config.branch_from)
    there = usable_checkpoints(config, source, run.identity["parents"])
    for checkpoint in there if config.keep_at else ():
        keep(checkpoint, run.directory)
    shutil.copytree(there[-1], run.directory / "checkpoints" / there[-1].name, dirs_exist_ok=True)
    step = step_of(there[-1])
    if (source.path / "metrics.jsonl").is_file():
        shutil.copy(source.path / "metrics.jsonl", run.directory)
        MetricsLog(run.directory / "metrics.jsonl").rewind(step)
    write_json(mark, {"step": step, "from": str(source.path), "fingerprint": source.fingerprint})
    say(f"branches off at step {step:,} of {source.path}")
    return step


def keep(checkpoint: Path, directory: Path) -> None:
    """Put a checkpoint where Trainer, which holds on to the last two, does not remove it; by hard links, where the disk has them."""
    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    target = directory / KEPT / checkpoint.name
    if not is_complete(target):
        shutil.rmtree(target, ignore_errors=True)  # what a kill has cut
        shutil.copytree(checkpoint, target, copy_function=link)


class OwnSteps(TrainerCallback):
    """Has the checkpoints saved that others branch off from, and keeps the run's own times to log, evaluate and save: a checkpoint of
    another run carries the times of that one, and Trainer would go by them."""

    def __init__(self, keep_at: set[int]):
        self.keep_at = keep_at

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step in self.keep_at
