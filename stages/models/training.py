"""What every training stage shares on top of transformers.Trainer: checkpoints to trust that fit the disk, metrics.jsonl, a console
line, and what happens at a step whose loss or gradient is bad."""
import contextlib
import ctypes
import json
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from stages.models.engines import shape_of, whole
from stages.models.optimizer import MuonAdamW, is_matrix
from stages.models.trackers import keep_steps
from stages.run import preemption
from stages.run.checkpoint import PROGRESS, MetricsLog, mark_complete, newest_complete, remove_untrusted, step_of
from stages.run.config import StageConfig, option
from stages.run.console import clock
from stages.run.manifest import Run, is_main, say, write_json

STEPS = "steps.json"  # in each checkpoint: bad steps and lengths of gradients so far
LEFT_OUT = "left_out.json"  # beside them: bad steps that were rewound, and all steps whose updates are left out since
SPIKE_WINDOW, SPIKE_LEAST = 50, 10  # gradient norms of which the median is taken, and how many there have to be


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

    Precision follows the launch config. `gradient_checkpointing` goes by the name that the installed transformers has for it.
    """
    transformers.logging.set_verbosity_error()
    cpu = not torch.cuda.is_available()
    common = {
        "output_dir": str(run.directory / "checkpoints"), "seed": seed, "data_seed": seed, "report_to": report_to,
        "use_cpu": cpu, "ddp_backend": "gloo" if cpu and world_size() > 1 else None, "ddp_find_unused_parameters": False,
        "bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16", "dataloader_pin_memory": not cpu,
        "logging_steps": logging_steps, "logging_first_step": True, "logging_nan_inf_filter": False, "disable_tqdm": True,
        "save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 2, "remove_unused_columns": False}
    if report_to != "none":  # by this name a tracker finds an interrupted run again, and tells a changed one from it
        home = Path(more.get("output_dir", common["output_dir"])).parent
        common["run_name"] = "-".join([run.config.recipe, run.config.STAGE, run.fingerprint.removeprefix("sha256:")[:8],
                                       *([] if home == run.directory else [home.name])])
    if "gradient_checkpointing" in more and "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        more["activation_checkpointing"] = more.pop("gradient_checkpointing")
    return common | more


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StageConfig):
    """What a training does at a bad step: one whose loss or gradient is not finite or, with `spike_factor`, whose gradient is too long.

    PaLM's training went back to a checkpoint and left out the batches up to a spike (Chowdhery et al. 2022, section 5.1): `rewind`.
    """

    on_bad_step: Literal["stop", "skip", "rewind"] = option(
        "stop", "at a step whose loss or gradient is not finite, or a spike: stop there, leave its update out, or go back to the last "
        "checkpoint and leave out all updates up to it", added=True)
    spike_factor: float | None = option(None, "a gradient so many times as long as the median of the last 50 steps is a spike (null: "
                                        "none is)", added=True)
    max_bad_steps: int = option(10, "bad steps after which the run stops all the same", added=True)


class _Rewind(Exception):
    """Back to the last checkpoint, since the step of this number is bad."""


class Resumable:
    """Mixin before a Trainer class. Set `tokens_per_step` where the number is known, for tokens and speed in the logs."""

    tokens_per_step: int | None = None
    steps_between_saves = 1  # a checkpoint holds all there is only after a multiple of these
    guard = TrainingConfig()
    critic_grad_norm: float | None = None  # of a second model with a gradient of its own
    _began: tuple[float, int] | None = None
    _before: Any = None  # the sum of losses that are not logged yet, as it was before this step
    _window = (0, 0)  # the step last logged, and bad steps since

    def __init__(self, *args, **kwargs):
        self.bad_steps: list[dict[str, Any]] = []
        self.norms: list[float] = []
        self.left_out: set[int] = set()
        super().__init__(*args, **kwargs)

    @property
    def metrics_log(self) -> MetricsLog:
        return MetricsLog(Path(self.args.output_dir).parent / "metrics.jsonl")  # type: ignore[attr-defined]

    @property
    def num_skipped(self) -> int:
        """Steps whose update was left out, bad ones and those rewound with them."""
        return len({bad["step"] for bad in self.bad_steps} | self.left_out)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step` (-1: all of it), which training is about to repeat. Called on every process."""
        if is_main():
            self.metrics_log.rewind(step)
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        known = _read(folder / f"checkpoint-{step}" / STEPS, {"bad": [], "norms": []})
        rewound = _read(folder.parent / LEFT_OUT, {"bad": [], "steps": []})
        self.bad_steps, self.norms, self.left_out = known["bad"], known["norms"], set(rewound["steps"])
        self.bad_steps += [bad for bad in rewound["bad"] if bad not in self.bad_steps]
        self._window, self._before, self._began = (max(step, 0), 0), None, None

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        barrier()
        if is_main():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            write_json(folder / STEPS, {"bad": self.bad_steps, "norms": self.norms})
            mark_complete(folder, world_size=world_size(), engine=engine_of(self))
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
        if self._before is None:
            self._before = self._tr_loss.clone()  # type: ignore[attr-defined]
        if self.state.global_step + 1 in self.left_out:  # type: ignore[attr-defined]
            return torch.zeros((), device=self.args.device)  # type: ignore[attr-defined]
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            if self.guard.on_bad_step == "stop":
                self._stop(f"the loss is {loss.item()}")
            return torch.zeros_like(loss)  # its gradient is not finite on any process, as `_get_grad_norm` finds
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of the step's gradient, which is dropped where it is bad: an optimizer passes over what has none."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        if step in self.left_out or (fault := self._fault(norm)):
            if step not in self.left_out:
                self._record(step, fault)
            self._tr_loss = self._before  # not less this step's: beside a huge loss the others are lost in rounding
            self._window = (self._window[0], self._window[1] + 1)
            for parameter in model.parameters():
                parameter.grad = None
        self._before = None
        return norm

    def _fault(self, norm: Any) -> str:
        """What is wrong with the gradient, nothing if all is well; it is the same on every process."""
        if norm is None:  # DeepSpeed has none before its first step
            return ""
        if isinstance(norm, torch.Tensor):
            with whole(norm) as full:
                norm = float(full)
        for length in (norm, self.critic_grad_norm):
            if length is not None and not math.isfinite(length):
                return f"the gradient's norm is {length}"
        recent, factor = self.norms[-SPIKE_WINDOW:], self.guard.spike_factor
        if factor and len(recent) >= SPIKE_LEAST and norm > factor * (usual := statistics.median(recent)):
            return f"the gradient's norm, {norm:.3g}, is {norm / usual:.1f} times the median of the last {len(recent)} steps"
        self.norms = [*recent, norm]
        return ""

    def _record(self, step: int, fault: str) -> None:
        if self.guard.on_bad_step == "stop":
            self._stop(fault)
        self.bad_steps.append({"step": step, "fault": fault})
        if len(self.bad_steps) > self.guard.max_bad_steps:
            self._stop(f"{fault}, and it is bad step number {len(self.bad_steps)}, above max_bad_steps {self.guard.max_bad_steps}")
        if self.guard.on_bad_step == "rewind":
            raise _Rewind(step)
        say(f"step {step}: {fault}: its update is left out ({len(self.bad_steps)} of {self.guard.max_bad_steps} at most)")

    def _stop(self, fault: str) -> None:
        raise ValueError(f"{fault} at step {self.state.global_step + 1}: "  # type: ignore[attr-defined]
                         "lower the learning rate or look at the data, or set on_bad_step to skip or rewind; earlier checkpoints and "
                         "products are untouched")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # Trainer's mean counts all steps since the last line
            step, (last, bad) = self.state.global_step, self._window  # type: ignore[attr-defined]
            if bad:
                good = step - last - bad
                logs = {**logs, "loss": logs["loss"] * (step - last) / good} if good else {k: v for k, v in logs.items() if k != "loss"}
            self._window = (step, 0)
            if self.bad_steps:
                logs = {**logs, "skipped_steps": self.num_skipped}
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
        write_json(self.metrics_log.path.with_name(PROGRESS), {"step": row["step"], "steps": state.max_steps, "since": self._began})

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


class _SaveWhenTold(TrainerCallback):
    """Ends training with a checkpoint at the end of the step in which any process was signalled."""

    def __init__(self, steps: int):
        self.steps = steps  # a checkpoint can only follow a multiple of these

    def on_step_end(self, args, state, control, **kwargs):
        if preemption.anywhere(preemption.signalled()) and state.global_step % self.steps == 0:
            control.should_save = control.should_training_stop = True


def _read(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def engine_of(trainer: Any) -> str:
    """Accelerate's name of what the training runs on: NO, MULTI_GPU (any plain data parallelism), FSDP or DEEPSPEED."""
    return trainer.accelerator.distributed_type.value


def check_engine(trainer: Any) -> None:
    """Raises ValueError for what the engine of the launch config cannot do, or where it is not the one that was asked for."""
    engine = engine_of(trainer)
    for asked in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{asked}", "false").lower() == "true" and engine != asked:
            raise ValueError(f"the launch config asks for {asked} but transformers set up {engine}: it needs GPUs; use cpu-2.yaml on CPU")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        optimizer = trainer.optimizer or trainer.create_optimizer()
        if isinstance(getattr(optimizer, "optimizer", optimizer), MuonAdamW):
            raise ValueError(f"optimizer muon orthogonalises whole matrices, which {engine} divides: set optimizer to adamw, or launch "
                             "with ddp.yaml")
    if trainer.is_deepspeed_enabled and trainer.guard.on_bad_step != "stop":
        raise ValueError(f"on_bad_step is {trainer.guard.on_bad_step}, but DeepSpeed updates the weights before anyone can look at the "
                         "gradient: set on_bad_step to stop, or launch with ddp.yaml or fsdp2.yaml")


def disk_needed(trainer: Any) -> tuple[int, int, int]:
    """Bytes of a checkpoint, how many there are at one time, and bytes of the product: estimates from above, before the first save.

    A checkpoint holds the weights that train (frozen ones are not saved), two moments of AdamW for each (Muon keeps one), and a MiB for
    tokenizer and states. The product of adapters holds their base, too.
    """
    def size(chosen: list[Any], each: int = 0) -> int:
        return sum(shape_of(p).numel() * (each or p.element_size()) for p in chosen)

    parameters, args, spare = list(trainer.model.parameters()), trainer.args, 1 << 20
    trained = [p for p in parameters if p.requires_grad]
    passes = args.num_train_epochs * len(trainer.train_dataset) / (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size())
    steps = args.max_steps if args.max_steps > 0 else math.ceil(passes)
    saves = math.ceil(steps / max(1, args.save_steps)) + 1  # one more where it is told to go
    count = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves  # the oldest goes when the newest is there
    return size(trained) + size(trained, 8) + spare, count, size(parameters) + spare


def check_disk(trainer: Any) -> None:
    """Say what the run will take on the disk. Raises ValueError where that is not free. The main process's work."""
    checkpoints = Path(trainer.args.output_dir)
    each, count, product = disk_needed(trainer)
    there = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())  # of an earlier attempt
    needed, free = each * count + product, shutil.disk_usage(next(p for p in checkpoints.resolve().parents if p.exists())).free

    def mib(size: int) -> str:
        return f"{size / 2**20:,.1f} MiB"

    say(f"disk: at most {count} checkpoints of {mib(each)} and a product of {mib(product)}, {mib(needed)} in all; {mib(free)} are free")
    if needed > free + there:
        raise ValueError(f"{checkpoints.parent} needs up to {mib(needed)} ({count} checkpoints of {mib(each)}, a product of "
                         f"{mib(product)}), and {mib(free)} are free: free some space, or set run_dir (all runs: PLUMBLINE_RUNS) to "
                         "another disk")


def fit(trainer: Any, guard: TrainingConfig | None = None) -> None:
    """Train, continuing from the newest complete checkpoint; the metrics file is cut back to its step first.

    `guard` says what happens at bad steps. Raises Preempted when a process is told to go (stages/run/preemption.py), after a checkpoint,
    and ValueError for what the engine cannot do, where the disk is too small, and where there is no checkpoint to rewind to.
    """
    trainer.guard = guard or trainer.guard
    check_engine(trainer)
    keep_memory()
    trainer.remove_callback(PrinterCallback)  # the console line of `Resumable` says it once
    trainer.add_callback(_SaveWhenTold(trainer.steps_between_saves))
    checkpoints = Path(trainer.args.output_dir)
    barrier()
    if is_main():
        remove_untrusted(checkpoints)
        check_disk(trainer)
    while True:
        barrier()
        resume = newest_complete(checkpoints, world_size=world_size(), engine=engine_of(trainer))
        trainer.rewind(step_of(resume) if resume else -1)
        keep_steps(trainer, step_of(resume) if resume else 0)
        if resume:
            say(f"resuming from {resume}")
        try:
            with preemption.deferred():
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
                if preemption.anywhere(preemption.signalled()):
                    raise preemption.Preempted(f"checkpoint-{trainer.state.global_step} is saved")
            break
        except _Rewind as bad:
            _leave_out_until(bad.args[0], trainer, checkpoints)


def _leave_out_until(step: int, trainer: Any, checkpoints: Path) -> None:
    """Note that no update from the newest checkpoint to `step` is taken again. Raises ValueError where there is no checkpoint."""
    newest = newest_complete(checkpoints, world_size=world_size(), engine=engine_of(trainer))
    if newest is None:
        raise ValueError(f"step {step} is bad ({trainer.bad_steps[-1]['fault']}) and there is no checkpoint before it to go back to: save "
                         "more often, or set on_bad_step to skip")
    fault, left_out = trainer.bad_steps[-1]["fault"], sorted({*trainer.left_out, *range(step_of(newest) + 1, step + 1)})
    say(f"step {step}: {fault}: back to {newest.name}, and {step - step_of(newest)} updates are left out")
    barrier()
    if is_main():
        write_json(checkpoints.parent / LEFT_OUT, {"bad": trainer.bad_steps, "steps": left_out})


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
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    plain = state and {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # a compiled model's names have it
    save_model(model, tokenizer, path, state_dict=plain)
    barrier()
