"""Supervised fine-tuning on TRL's SFTTrainer: batches without padding, looks at what is forgotten, remedies against it.

Rows come encoded (`input_ids` and `labels`, -100 where no loss falls), so what carries loss is decided once, in stages/data/turns.py.

Where documents can be attended to one by one (on CPU through stages/models/attention.py, on GPUs through FlashAttention), the
dialogues of a batch lie behind one another in a single row: no padding is computed, and losses and gradients are those of
separate rows. `packing` fills rows of `max_length` with several dialogues besides, so that every step has about as many tokens.
"""
import copy
import importlib.util
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from stages.models.adapters import MethodConfig, head_rows, hold_other_rows
from stages.models.attention import DOCUMENTS
from stages.models.engines import shape_of
from stages.models.forgetting import Watch
from stages.models.training import Resumable, fit, is_main, share_batch, training_arguments, world_size
from stages.run.checkpoint import step_of
from stages.run.config import option
from stages.run.manifest import say

ADAPTER_RATE = 2e-3  # ten times what full tuning likes best, the order of magnitude that Biderman et al. 2024 find between the two


@dataclass(frozen=True, kw_only=True)
class TuningConfig(MethodConfig):
    """How a model is fine-tuned, whatever the dialogues."""

    max_length: int = option(512, "tokens of the longest dialogue; longer ones are cut and counted")
    learning_rate: float | None = option(None, f"peak learning rate (default: {ADAPTER_RATE:g} for adapters, a tenth of it in full tuning)")
    epochs: float = option(2.0, "passes over the training dialogues")
    batch_size: int = option(16, "dialogues a step, over all processes (with packing: rows of max_length)")
    micro_batch_size: int | None = option(None, "dialogues a forward pass and process (default: all)")
    warmup_share: float = option(0.05, "share of the steps with a rising learning rate; it then falls linearly")
    packing: bool = option(False, "fill rows of max_length with several dialogues, which do not see one another")
    neftune_alpha: float = option(0.0, "size of noise on the embeddings while training (NEFTune, Jain et al. 2023: 5; 0: none)")
    kl_coef: float = option(0.0, "weight of KL(base || tuned) on the training dialogues' tokens, against forgetting (0: none)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    attn_implementation: str = option("auto", "attention in training; auto: documents on CPU, flash_attention_2 on a GPU that has it, "
                                      "else sdpa on padded rows", recorded_only=True)


class DialogueCollator:
    """Encoded dialogues to `input_ids`, `labels`, `position_ids`, (B, T) int64 each, padded at the right; labels are -100 there.

    No mask: what pads a row comes after all of it, and attention is causal.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, filler: int) -> Tensor:
            return torch.tensor([[*row[key], *[filler] * (longest - len(row[key]))] for row in rows])

        return {"input_ids": padded("input_ids", self.pad_id), "labels": padded("labels", -100),
                "position_ids": torch.arange(longest).expand(len(rows), -1)}


class FineTuner(Resumable, SFTTrainer):
    """SFTTrainer that watches what it forgets, and can hold on to its base.

    Validation loss is a mean over tokens; Trainer's own is one over batches and moves with their division. `looks` are steps at
    which to look besides the regular ones; `patience` looks in a row that lie above the lowest validation loss end the training.
    """

    def __init__(self, *, model: Any, watch: Watch, kl_coef: float = 0.0, patience: int = 0, looks: Sequence[int] = (),
                 head_rows: Sequence[int] = (), **kwargs):
        self.watch, self.kl_coef, self.patience = watch, kl_coef, patience
        adapted = kwargs.get("peft_config") is not None or isinstance(model, PeftModel)
        self.frozen = copy.deepcopy(model).requires_grad_(False).eval() if kl_coef and not adapted else None
        super().__init__(model=model, **kwargs)
        head = self.model.get_output_embeddings()  # type: ignore[union-attr, operator]
        if not hasattr(head, "bias"):
            head.bias = None  # TRL's fused head asks for one; peft's wrapper of trained rows, at a tied head, has none
        if looks:
            self.add_callback(_LookAt(looks))
        if head_rows:
            hold_other_rows(head.weight, head_rows)

    @property
    def num_trainable(self) -> int:
        model: Any = self.model
        return sum(shape_of(p).numel() for p in model.parameters() if p.requires_grad)

    def rewind(self, step: int) -> None:
        super().rewind(step)
        self.watch.rewind(step)

    def evaluate(self, *args, **kwargs):
        model: Any = self.model
        attention = model.config._attn_implementation
        if attention == "flash_attention_2":  # of rows that are packed side by side it sees no boundaries
            model.set_attn_implementation("sdpa")
        logs = self.watch.look(self.model, self.state.global_step)
        model.set_attn_implementation(attention)
        self.model.eval()  # by this SFTTrainer.log tells training from evaluation
        self.log(logs)
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        if self.state.global_step:
            self._tidy()
            if self.patience and self.watch.worse_in_a_row() >= self.patience:
                say(f"stopping early: the last {self.patience} looks at the validation set are above the lowest beyond their noise")
                self.control.should_training_stop = True
        return logs

    def recommended(self) -> tuple[int, list[int]]:
        """As `Watch.recommended`, among the steps whose weights are there: those with a checkpoint, and the last."""
        return self.watch.recommended({self.state.global_step, *map(step_of, Path(str(self.args.output_dir)).glob("checkpoint-*"))})

    def _tidy(self) -> None:
        """Remove checkpoints that learned less than the best, beyond noise. The newest stays, to continue from."""
        folders = {step_of(p): p for p in Path(str(self.args.output_dir)).glob("checkpoint-*")}
        _, equal = self.recommended()
        for step in set(folders) - set(equal) - {max(folders, default=0)} if is_main() else ():
            shutil.rmtree(folders[step])

    def load_step(self, step: int) -> None:
        """Put the weights of a checkpoint of this run into the model, whatever engine holds them."""
        if step != self.state.global_step:
            folder = Path(f"{self.args.output_dir}/checkpoint-{step}")
            assert folder.is_dir(), f"{folder} is gone, and Trainer would only warn of it"
            self.state.best_model_checkpoint = str(folder)
            self._load_best_model()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss; with `kl_coef`, plus that times KL(base || model) summed over all tokens, a loss-bearing token.

        Distillation from the model as it was, on the new task's inputs (Li & Hoiem 2016, Learning without forgetting).
        """
        if not self.kl_coef:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[:, 1:]
        real = inputs["attention_mask"][:, 1:].bool() if "attention_mask" in inputs else torch.ones_like(labels, dtype=torch.bool)
        if "position_ids" in inputs:
            real = real & (inputs["position_ids"][:, 1:] != 0)  # the first token of a dialogue follows nothing
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        with torch.no_grad():
            base = self._base_logits(inputs)[:, :-1].float().log_softmax(-1)
        kept = labels != -100
        count = kept.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        nll = nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
        kl = nn.functional.kl_div(logits[real].log_softmax(-1), base[real], reduction="sum", log_target=True)
        self._metrics["train"]["kl_to_base"].append(float(self.accelerator.gather(kl.detach() / real.sum().clamp(min=1)).mean()))
        loss = (nll + self.kl_coef * kl) / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as SFTTrainer: the count is of all ranks, whose gradients DDP averages
        return loss

    def _base_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.frozen is not None:
            return self.frozen.to(self.args.device)(**inputs, use_cache=False).logits
        model: Any = self.accelerator.unwrap_model(self.model)
        model.eval()  # no dropout, no noise on the embeddings, which belong to both
        with model.disable_adapter():
            logits = model(**inputs, use_cache=False).logits
        model.train()
        return logits


class _LookAt(TrainerCallback):
    def __init__(self, steps: Sequence[int]):
        self.steps = frozenset(steps)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            control.should_evaluate = control.should_save = True


def check_fit(tokenizer, model, config: TuningConfig) -> None:
    """Raises ValueError for a tokenizer with more tokens than the model, and for dialogues longer than its context."""
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the model only {model.config.vocab_size}: they do not match")
    context = getattr(model.config, "max_position_embeddings", None)
    if context and config.max_length > context:
        raise ValueError(f"max_length {config.max_length} is longer than the model's context of {context} tokens: lower it")


@torch.no_grad()
def average(model: nn.Module, base: Mapping[str, Tensor], share: float) -> None:
    """Set `model` to base + share x (model - base), weight by weight (WiSE-FT, Wortsman et al. 2022, section 3)."""
    for name, weight in model.named_parameters():  # each once: in state_dict() tied ones come twice
        weight.lerp_(base[name].to(weight), 1 - share)


def in_blocks(blocks: Sequence[Sequence[dict]], epochs: float, seed: int) -> tuple[list[dict], list[int]]:
    """Rows of all epochs of each block in turn, shuffled anew in each epoch, and how many rows there are by the end of each block."""
    rows: list[dict] = []
    ends = []
    for number, block in enumerate(blocks):
        rng = random.Random(f"blocks:{seed}:{number}")
        wanted = round(len(block) * epochs)
        end = len(rows) + wanted
        while len(rows) < end:
            rows += rng.sample(block, len(block))[:end - len(rows)]
        ends.append(end)
    return rows, ends


def attention_of(config: TuningConfig) -> str:
    if config.attn_implementation != "auto":
        return config.attn_implementation
    if not torch.cuda.is_available():
        return DOCUMENTS
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def tune(model: Any, tokenizer: PreTrainedTokenizerBase, config: TuningConfig, *, run: Any, train: Sequence[Mapping[str, Any]],
         watch: Watch, evaluations: int, peft_config: PeftConfig | None, in_order: bool = False, look_at: Sequence[int] = (),
         patience: int = 0) -> FineTuner:
    """Train on encoded rows and return the trainer, the model at its last step. Interrupted, it continues from `run.directory`.

    `evaluations` looks are spread over the steps, with a checkpoint each; `in_order` trains on the rows as they stand, once, instead
    of `epochs` shuffled passes, and all of them: `patience` would leave out what comes last. Raises ValueError for batches that do not
    divide.
    """
    local = share_batch(config.batch_size, world_size(), "batch_size")
    micro = min(config.micro_batch_size or local, local)
    if local % micro:
        raise ValueError(f"{local} dialogues a process do not divide into micro batches of {micro}: set micro_batch_size to a divisor")
    rate = config.learning_rate if config.learning_rate is not None else ADAPTER_RATE * (0.1 if config.method == "full" else 1)
    attention = attention_of(config)
    model.set_attn_implementation(attention)
    flat = config.packing or attention in (DOCUMENTS, "flash_attention_2")
    mean_length = sum(len(row["input_ids"]) for row in train) / len(train)
    side_by_side = micro * (config.max_length / mean_length if config.packing else 1) if flat else 1  # dialogues in one row of a batch
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in train])
    trainer = FineTuner(
        model=model, processing_class=tokenizer, train_dataset=data, eval_dataset=data.select(range(1)), peft_config=peft_config,
        watch=watch, kl_coef=config.kl_coef, patience=0 if in_order else patience, looks=look_at,
        head_rows=head_rows(config, peft_config or getattr(model, "peft_config", {}).get("default")),
        args=TrlSftConfig(**training_arguments(
            run, seed=config.seed, report_to=config.report_to, logging_steps=1, save_steps=1, save_total_limit=None, eval_steps=1,
            eval_strategy="steps", eval_on_start=True, per_device_train_batch_size=micro, gradient_accumulation_steps=local // micro,
            learning_rate=rate, lr_scheduler_type="linear", num_train_epochs=1 if in_order else config.epochs,
            max_length=config.max_length if config.packing else None, packing=config.packing, eval_packing=False,
            padding_free=flat, gradient_checkpointing=config.gradient_checkpointing, max_grad_norm=1.0, weight_decay=0.0,
            # The paper's noise falls with the square root of a dialogue's length; Trainer takes the length of the row.
            neftune_noise_alpha=config.neftune_alpha * math.sqrt(side_by_side) or None,
            **({"train_sampling_strategy": "sequential"} if in_order else {}))))
    arguments, rows = trainer.args, len(trainer.train_dataset)  # type: ignore[arg-type]
    steps = math.ceil(arguments.num_train_epochs * math.ceil(rows / config.batch_size))  # as Trainer counts; packing alone knows its rows
    arguments.logging_steps, arguments.warmup_steps = max(1, steps // 25), max(1, int(steps * config.warmup_share))
    arguments.eval_steps = arguments.save_steps = math.ceil(steps / evaluations)  # the last look is at the end
    fit(trainer, config)
    if watch.points[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    trainer.accelerator.unwrap_model(trainer.model_wrapped).set_attn_implementation("sdpa")
    return trainer
