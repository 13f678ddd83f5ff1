"""What every training stage shares on top of transformers.Trainer: checkpoints to trust, metrics.jsonl, a console line, a stop on NaN."""
import contextlib
import ctypes
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stages.models.optimizer import is_matrix
from stages.run.checkpoint import MetricsLog, mark_complete, newest_complete, remove_incomplete, step_of
from stages.run.console import clock
from stages.run.manifest import Run, is_main, say


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(rows: list[Any]) -> list[Any]:
    """Concatenation of every process's list, in rank order, on every process."""
    if world_size() == 1:
        return rows
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def share_batch(global_batch: int, processes: int, name: str) -> int:
    """Rows of a global batch for each process. Raises ValueError naming sizes that divide."""
    if global_batch % processes:
        below = global_batch // processes * processes
        raise ValueError(f"{name} {global_batch} does not divide over {processes} processes: set {name} to "
                         f"{f'{below} or ' if below else ''}{below + processes}")
    return global_batch // processes


def training_arguments(run: Run, *, seed: int, report_to: str = "none", logging_steps: int, save_steps: int, **more: Any) -> dict[str, Any]:
    """Keyword arguments common to every TrainingArguments subclass; `more` wins.

    Precision follows the launch config: bf16 where it says so and a GPU is there. `gradient_checkpointing` goes by the name
    that the installed transformers has for it.
    """
    transformers.logging.set_verbosity_error()
    cpu = not torch.cuda.is_available()
    common = {
        "output_dir": str(run.directory / "checkpoints"), "seed": seed, "data_seed": seed, "report_to": report_to,
        "use_cpu": cpu, "ddp_backend": "gloo" if cpu and world_size() > 1 else None, "ddp_find_unused_parameters": False,
        "bf16": not cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16", "dataloader_pin_memory": not cpu,
        "logging_steps": logging_steps, "logging_first_step": True, "logging_nan_inf_filter": False, "disable_tqdm": True,
        "save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 2, "remove_unused_columns": False}
    if "gradient_checkpointing" in more and "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        more["activation_checkpointing"] = more.pop("gradient_checkpointing")
    return common | more


class Resumable:
    """Mixin before a Trainer class. Set `tokens_per_step` where the number is known, for tokens and speed in the logs."""

    tokens_per_step: int | None = None
    _began: tuple[float, int] | None = None

    @property
    def metrics_log(self) -> MetricsLog:
        return MetricsLog(Path(self.args.output_dir).parent / "metrics.jsonl")  # type: ignore[attr-defined]

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step` (-1: all of it), which training is about to repeat. Called on every process."""
        if is_main():
            self.metrics_log.rewind(step)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        barrier()
        if is_main():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            mark_complete(folder, world_size=world_size())
        barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._load_experts(model or self.model, resume_from_checkpoint)  # type: ignore[attr-defined]

    def _load_best_model(self):
        super()._load_best_model()  # type: ignore[misc]
        self._load_experts(self.model, self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def _load_experts(self, model: Any, folder: str) -> None:
        """The experts of a checkpoint: transformers saves them one by one and holds them stacked, and Trainer, which reads the file
        without translating names, would go on with those of a fresh model and say nothing."""
        stacked = isinstance(model, PreTrainedModel) and any(is_matrix(n, p) and p.ndim == 3 for n, p in model.named_parameters())
        if stacked and not self.is_fsdp_enabled:  # type: ignore[attr-defined]
            model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())

    def _run_epoch(self, *args, **kwargs):
        """An epoch; none of a training that had come to its end when it was interrupted: Trainer would ask only after one more step."""
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:  # type: ignore[attr-defined]
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: "  # type: ignore[attr-defined]
                             "lower the learning rate or look at the data; earlier checkpoints and products are untouched")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]
        if "train_runtime" in logs or not is_main():
            return
        state = self.state  # type: ignore[attr-defined]
        row: dict[str, Any] = {"step": state.global_step}
        if self.tokens_per_step:
            row["tokens"] = state.global_step * self.tokens_per_step
        for key, value in logs.items():
            if key != "epoch":
                row[key if "/" in key or key == "tokens" else f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"] = value
        self.metrics_log.append(row)
        say(self._line(row, state.max_steps))

    def _line(self, row: dict[str, Any], steps: int) -> str:
        now = time.time()
        if self._began is None:
            self._began = (now, row["step"])
        began, first = self._began
        done = row["step"] - first
        parts = [f"step {row['step']}/{steps}"]
        parts += [f"{key.removeprefix('train/')} {value:.4g}" for key, value in row.items()
                  if key not in ("step", "tokens") and isinstance(value, int | float) and math.isfinite(value)]
        if done > 0:
            if self.tokens_per_step:
                parts.append(f"{done * self.tokens_per_step / (now - began):,.0f} tok/s")
            parts.append(f"ETA {clock((now - began) / done * (steps - row['step']))}")
        return "  ".join(parts)


def keep_memory() -> None:
    """Have glibc keep for the next step what a step frees: handed back, every page is faulted in and zeroed again, 5 to 9 % of a step's
    processor time at widths 64 and 128 (LOG.md). What the user has set stays."""
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(AttributeError):  # other libraries have no such call
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: from this size on, a piece is a mapping of its own, given back at once
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: what may lie free at the top


def fit(trainer: Any) -> None:
    """Train, continuing from the newest complete checkpoint; the metrics file is cut back to its step first."""
    fsdp_asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp_asked and trainer.accelerator.distributed_type.value != "FSDP":
        raise ValueError("the launch config asks for FSDP but transformers set up plain data parallelism: "
                         "FSDP needs GPUs; use cpu-2.yaml on CPU")
    keep_memory()
    trainer.remove_callback(PrinterCallback)  # the console line of `Resumable` says it once
    checkpoints = Path(trainer.args.output_dir)
    barrier()
    if is_main():
        remove_incomplete(checkpoints)
    barrier()
    resume = newest_complete(checkpoints, world_size=world_size())
    trainer.rewind(step_of(resume) if resume else -1)
    if resume:
        say(f"resuming from {resume}")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, **more: Any) -> None:
    """Weights (safetensors), config and tokenizer, loadable by plain transformers and readable by other users."""
    if not is_main():
        return
    model.save_pretrained(path, **more)
    tokenizer.save_pretrained(path)
    for file in path.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read


def export(trainer: Any, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save the trained model whatever engine holds its weights. Call on every process: sharded engines gather here."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    save_model(trainer.accelerator.unwrap_model(trainer.model_wrapped), tokenizer, path, state_dict=state)
    barrier()
