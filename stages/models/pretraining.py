"""One pretraining run, from a config to a manifest. `stages.pretrain` runs one, `stages.scaling` runs a ladder of them."""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from stages.data.packing import PackedCollator
from stages.models.attention import DOCUMENTS
from stages.models.counts import count_parameters, train_flops_per_token
from stages.models.heldout import heldout
from stages.models.optimizer import build_optimizer
from stages.models.sizes import build_decoder, decoder_config
from stages.models.training import Resumable, export, fit, share_batch, training_arguments, world_size
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import StageConfig, option
from stages.run.console import table
from stages.run.manifest import Manifest, Run, hash_data, is_main, say


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    STAGE = "pretrain"
    PARENTS = ("prepare",)

    architecture: str = option("qwen3", "model type of transformers: qwen3, llama, ...")
    hidden_size: int = option(128, "width")
    num_layers: int = option(4, "decoder layers")
    num_heads: int = option(4, "attention heads")
    num_kv_heads: int | None = option(None, "key and value heads (default: num_heads)")
    intermediate_size: int | None = option(None, "width of the MLP (default: 8/3 of hidden_size, rounded up to 32)")
    rope_theta: float = option(1000.0, "base of the rotary frequencies")
    tie_embeddings: bool = option(False, "one matrix for embedding and head")
    matrix_std: float = option(0.07, "initial standard deviation of the trunk's matrices")
    embedding_std: float = option(0.4, "initial standard deviation of the embedding")
    head_std: float = option(0.002, "initial standard deviation of the head")
    tokens: int = option(2_000_000, "training tokens, padding included")
    easy_share: float = option(0.15, "share of the tokens at the beginning that come from the easy documents, where there are any")
    batch_tokens: int = option(1024, "tokens a step, over all processes")
    micro_batch_rows: int | None = option(None, "rows a forward pass and process; smaller accumulates gradients (default: all)")
    optimizer: Literal["muon", "adamw"] = option("muon", "muon: Muon for matrices and AdamW for the rest; adamw: AdamW for all")
    matrix_lr: float = option(0.02, "peak learning rate of Muon")
    matrix_lr_width: int | None = option(None, "width up to which that holds: beyond, it falls as 1/width (default: it holds at all)")
    learning_rate: float = option(5e-3, "peak learning rate of AdamW")
    embedding_lr_factor: float = option(10.0, "the embedding's learning rate is this many times learning_rate (muon)")
    weight_decay: float = option(0.0, "decoupled weight decay")
    warmup_share: float = option(0.02, "share of the steps with a rising learning rate; it then falls linearly to zero")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    evaluations: int = option(10, "held-out evaluations over the run")
    eval_rows: int = option(96, "held-out rows of each evaluation; the last one takes four times as many")
    logs: int = option(50, "lines of metrics over the run", recorded_only=True)
    checkpoints: int = option(4, "checkpoints over the run")
    attn_implementation: Literal["auto", "documents", "sdpa", "eager"] = option(
        "auto", "the same sums by other ways; auto: documents on CPU, which computes nothing between documents, else sdpa",
        recorded_only=True)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")


def identity(config: PretrainConfig) -> str:
    """Hash of everything but the seed that decides the loss: what a prediction is made for."""
    return hash_data({key: value for key, value in config.fingerprinted().items() if key != "seed"})


class PretrainTrainer(Resumable, Trainer):
    """Trainer on packed rows in their own order, with this project's optimizer and held-out measurement."""

    def __init__(self, *args, config: PretrainConfig, heldout_rows, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_config, self.heldout_rows = config, heldout_rows

    def create_optimizer(self, model=None):
        c = self.run_config
        if c.optimizer == "adamw":
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.optimizer is None:
            width_factor = min(1.0, c.matrix_lr_width / c.hidden_size) if c.matrix_lr_width else 1.0
            self.optimizer = build_optimizer(self.model, matrix_lr=c.matrix_lr * width_factor, lr=c.learning_rate,
                                             embedding_lr_factor=c.embedding_lr_factor, weight_decay=c.weight_decay)
        return self.optimizer

    def evaluate(self, *args, **kwargs):
        measured = heldout(self.model, self.heldout_rows, self.data_collator)
        logs = {"heldout/loss": measured["heldout_loss"]["value"], "heldout/accuracy": measured["heldout_accuracy"]["value"]}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)  # else the epoch's end repeats it
        return logs


def select_rows(tokens: Path, wanted: int, easy_share: float, seed: int) -> datasets.Dataset:
    """`wanted` rows in training order: the easy part first, then the main part, repeated in a new order when it is too short."""
    def take(name: str, count: int) -> datasets.Dataset:
        rows = datasets.load_from_disk(str(tokens / name))
        order = [np.arange(len(rows))]
        rng = np.random.default_rng(seed)
        while sum(map(len, order)) < count:
            order.append(rng.permutation(len(rows)))
        return rows.select(np.concatenate(order)[:count])

    easy = int(wanted * easy_share) if (tokens / "train-easy").exists() else 0
    main = take("train", wanted - easy)
    return datasets.concatenate_datasets([take("train-easy", easy), main]) if easy else main


def pretrain(config: PretrainConfig, *, forecast: dict[str, Any] | None = None) -> Manifest:
    """Train one decoder and measure it.

    `forecast` is what was predicted for this run before it started; it goes into the manifest's notes beside the result.
    Raises ValueError for a batch that does not divide or a tokenizer that does not match the tokens.
    """
    run = Run(config)
    if run.finished:
        return run.manifest
    prepared = run.parents["prepare"]
    tokenizer = AutoTokenizer.from_pretrained(prepared.product("tokenizer"))
    tokens = prepared.product("tokens")
    row_length = prepared.data["notes"]["row_length"]
    if len(tokenizer) != prepared.counts["vocabulary"]:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the rows were made with {prepared.counts['vocabulary']}: "
                         "run make prepare again")
    if config.batch_tokens % row_length:
        raise ValueError(f"batch_tokens {config.batch_tokens} is not a multiple of the row length {row_length}: "
                         f"set it to {max(1, round(config.batch_tokens / row_length)) * row_length}")
    local_rows = share_batch(config.batch_tokens // row_length, world_size(), "batch_tokens / row_length")
    micro = min(config.micro_batch_rows or local_rows, local_rows)
    if local_rows % micro:
        raise ValueError(f"{local_rows} rows a process do not divide into micro batches of {micro}: set micro_batch_rows to a divisor")
    steps = config.tokens // config.batch_tokens
    if steps < 1:
        raise ValueError(f"tokens {config.tokens} is less than one batch of {config.batch_tokens}: give more tokens or a smaller batch")

    decoder = decoder_config(
        tokenizer, architecture=config.architecture, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
        context_length=row_length, rope_theta=config.rope_theta, tie_embeddings=config.tie_embeddings)
    attention: str = config.attn_implementation
    if attention == "auto":
        attention = "sdpa" if torch.cuda.is_available() else DOCUMENTS
    model = build_decoder(decoder, seed=config.seed, matrix_std=config.matrix_std, embedding_std=config.embedding_std,
                          head_std=config.head_std, attn_implementation=attention)
    sizes = count_parameters(decoder)
    say(f"pretrain: {config.architecture} {config.hidden_size} wide, {sizes['total']:,} parameters, {steps:,} steps of "
        f"{config.batch_tokens:,} tokens on {world_size()} process(es)")

    rows = select_rows(tokens, steps * config.batch_tokens // row_length, config.easy_share, config.seed)
    held = datasets.load_from_disk(str(tokens / "heldout"))
    every = math.ceil(steps / config.evaluations)
    arguments = TrainingArguments(**training_arguments(
        run, seed=config.seed, report_to=config.report_to, logging_steps=max(1, steps // config.logs),
        save_steps=max(1, steps // (config.checkpoints + 1)), max_steps=steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=local_rows // micro, learning_rate=config.learning_rate, lr_scheduler_type="linear",
        warmup_steps=max(1, int(steps * config.warmup_share)), max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
        adam_beta2=0.95, eval_strategy="steps", eval_steps=every, train_sampling_strategy="sequential",
        gradient_checkpointing=config.gradient_checkpointing))
    trainer = PretrainTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=held,
        data_collator=PackedCollator(eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id),
        config=config, heldout_rows=held.select(range(min(config.eval_rows, len(held)))))
    trainer.tokens_per_step = config.batch_tokens
    fit(trainer)

    metrics = heldout(model, held.select(range(min(4 * config.eval_rows, len(held)))), trainer.data_collator)
    for folder in sorted((tokens / "heldout-kinds").glob("*")):
        apart = heldout(model, datasets.load_from_disk(str(folder)), trainer.data_collator)
        metrics |= {f"{name}/{folder.name}": value for name, value in apart.items()}
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    export(trainer, tokenizer, run.directory / "model")
    if is_main():
        show(run.directory)
    return run.finish(
        metrics=metrics, products={"model": "model"},
        counts={"parameters": sizes["total"], "matmul_parameters": sizes["matmul"], "non_embedding_parameters": sizes["non_embedding"],
                "tokens": steps * config.batch_tokens, "steps": steps,
                "flops": steps * config.batch_tokens * train_flops_per_token(decoder, row_length, sizes)},
        notes={"epochs": steps * config.batch_tokens / row_length / max(1, prepared.counts["train_rows"]),
               **({"forecast": forecast} if forecast else {})})


def show(directory: Path) -> None:
    """The table and the curve of held-out loss against tokens."""
    logged = read_metrics(directory / "metrics.jsonl")
    held = [row for row in logged if "heldout/loss" in row]
    train = [row for row in logged if "train/loss" in row]
    say(table(["tokens", "held-out loss", "accuracy"],
              [[f"{row['tokens']:,}", f"{row['heldout/loss']:.4f}", f"{row['heldout/accuracy']:.4f}"] for row in held]))
    figures.lines(directory / "figures" / "loss.png", {
        "training": ([r["tokens"] for r in train], [r["train/loss"] for r in train]),
        "held-out": ([r["tokens"] for r in held], [r["heldout/loss"] for r in held])}, x="tokens", y="loss (nats a token)")
