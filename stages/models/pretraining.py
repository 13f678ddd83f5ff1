"""One pretraining run, from a config to a manifest. `stages.pretrain` runs one, `stages.scaling` runs a ladder of them."""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from reward.folders import trusted
from stages.data.packing import PackedCollator
from stages.models.attention import DOCUMENTS
from stages.models.branching import OwnSteps, keep, learning_rate_schedule, start_from
from stages.models.counts import count_parameters, train_flops_per_token
from stages.models.heldout import heldout, measured
from stages.models.optimizer import build_optimizer
from stages.models.router_health import draw, health
from stages.models.routing import BiasUpdate, Routers, churn
from stages.models.sizes import build_decoder, decoder_of
from stages.models.training import Resumable, TrainingConfig, export, fit, share_batch, training_arguments, world_size
from stages.models.upcycling import upcycle
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import option
from stages.run.manifest import Manifest, Run, hash_data, hash_path, is_main, precision, say


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    STAGE = "pretrain"
    PARENTS = ("prepare",)

    architecture: str = option("qwen3", "model type of transformers: qwen3, llama, ...")
    hidden_size: int = option(128, "width")
    num_layers: int = option(4, "decoder layers")
    num_heads: int = option(4, "attention heads")
    num_kv_heads: int | None = option(None, "key and value heads (default: num_heads)")
    intermediate_size: int | None = option(None, "width of the MLP (default: 8/3 of hidden_size, rounded up to 32)")
    num_experts: int | None = option(None, "experts of each layer, where architecture is olmoe, qwen3_moe, qwen2_moe, mixtral or dots1",
                                     added=True)
    experts_per_token: int = option(2, "experts that a token visits", added=True)
    expert_size: int | None = option(None, "width of an expert (default: intermediate_size over the experts that a token visits)",
                                     added=True)
    shared_expert_size: int | None = option(None, "width of the expert that every token visits: qwen2_moe, dots1 (default: expert_size)",
                                            added=True)
    balance_coef: float = option(0.01, "coefficient of the load-balancing loss, the mean over layers", added=True)
    router_z_coef: float = option(0.001, "coefficient of the router z-loss, the mean over layers", added=True)
    balance_bias_rate: float = option(0.0, "step of the bias that balances without a loss (dots1; with it, set balance_coef to 0 or near)",
                                      added=True)
    upcycle: str | None = option(None, "folder of a dense model to start from: every expert begins as its MLP", added=True)
    rope_theta: float = option(1000.0, "base of the rotary frequencies")
    tie_embeddings: bool = option(False, "one matrix for embedding and head")
    matrix_std: float = option(0.07, "initial standard deviation of the trunk's matrices")
    embedding_std: float = option(0.4, "initial standard deviation of the embedding")
    head_std: float = option(0.002, "initial standard deviation of the head")
    tokens: int = option(2_000_000, "training tokens, padding included")
    easy_share: float = option(0.15, "share of the tokens at the beginning that come from the easy documents, where there are any")
    easy_tokens: int | None = option(None, "tokens of these, instead of easy_share: the same for every budget", added=True)
    batch_tokens: int = option(1024, "tokens a step, over all processes")
    micro_batch_rows: int | None = option(None, "rows a forward pass and process; smaller accumulates gradients (default: all)")
    optimizer: Literal["muon", "adamw"] = option("muon", "muon: Muon for matrices and AdamW for the rest; adamw: AdamW for all")
    matrix_lr: float = option(0.02, "peak learning rate of Muon")
    matrix_lr_width: int | None = option(None, "width up to which that holds: beyond, it falls as 1/width (default: it holds at all)")
    learning_rate: float = option(5e-3, "peak learning rate of AdamW")
    embedding_lr_factor: float = option(10.0, "the embedding's learning rate is this many times learning_rate (muon)")
    weight_decay: float = option(0.0, "decoupled weight decay")
    schedule: Literal["linear", "wsd", "wsd-linear"] = option(
        "linear", "the learning rate after the warmup. linear: it falls to zero all the way; wsd: it is constant, then falls to zero over "
        "the last part, by 1 - sqrt, so that a ladder's budgets share one beginning; wsd-linear: by a line", added=True)
    cooldown_share: float = option(0.2, "share of the steps, the last, over which wsd falls (0: it never does)", added=True)
    warmup_share: float = option(0.02, "share of the steps with a rising learning rate")
    warmup_tokens: int | None = option(None, "tokens of the warmup, instead of warmup_share: the same for every budget", added=True)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    evaluations: int = option(10, "held-out evaluations over the run")
    eval_rows: int = option(96, "held-out rows of each evaluation; the last one takes four times as many")
    logs: int = option(50, "lines of metrics over the run", recorded_only=True)
    checkpoints: int = option(4, "checkpoints over the run")
    keep_at: list[int] = option([], "training tokens at which checkpoints are kept, for runs to branch off", recorded_only=True)
    branch_from: str | None = option(None, "finished run of the same settings but for tokens, schedule wsd: go on from its last checkpoint "
                                     "at which the rate of both was constant, instead of training the same once more", recorded_only=True)
    attn_implementation: Literal["auto", "documents", "sdpa", "eager"] = option(
        "auto", "the same sums by other ways; auto: documents on CPU, which computes nothing between documents, else sdpa",
        recorded_only=True)
    torch_compile: bool = option(False, "compile the model: the same sums, a minute before the first step, and on a GPU more than twice as "
                                 "fast after it (docs/gpus.md)", recorded_only=True)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")


PROBE_ROWS, CHOICES = 8, "choices.npy"  # held-out rows whose tokens' experts are compared between checkpoints


def identity(config: PretrainConfig) -> str:
    """Hash of everything but the seed that decides the loss: what a prediction is made for."""
    return hash_data({key: value for key, value in config.fingerprinted().items() if key != "seed"})


class PretrainTrainer(Resumable, Trainer):
    """Trainer on packed rows in their own order, with this project's optimizer, held-out measurement and, where there are `routers`, their
    losses and health."""

    def __init__(self, *args, config: PretrainConfig, heldout_rows, routers: Routers | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_config, self.heldout_rows, self.routers = config, heldout_rows, routers
        self.choices: np.ndarray | None = None  # experts that tokens of the probe visited at the last checkpoint
        if routers:
            self.add_callback(BiasUpdate(routers))

    def create_optimizer(self, model=None):
        c = self.run_config
        if c.optimizer == "adamw":
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.optimizer is None:
            width_factor = min(1.0, c.matrix_lr_width / c.hidden_size) if c.matrix_lr_width else 1.0
            self.optimizer = build_optimizer(self.model, matrix_lr=c.matrix_lr * width_factor, lr=c.learning_rate,
                                             embedding_lr_factor=c.embedding_lr_factor, weight_decay=c.weight_decay,
                                             bf16=self.args.bf16)
        return self.optimizer

    def evaluate(self, *args, **kwargs):
        measured = heldout(self.model, self.heldout_rows, self.data_collator)
        logs = {"heldout/loss": measured["heldout_loss"]["value"], "heldout/accuracy": measured["heldout_accuracy"]["value"]}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)  # else the epoch's end repeats it
        return logs

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.routers:
            self.routers.begin_step(self.model_wrapped, batches, device)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.routers:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.routers.recording() as seen:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Both are parts of a sum over micro-batches and processes, whose gradients are averaged over processes: Trainer multiplies its
        # own part by their number.
        loss = loss + world_size() * self.routers.loss(seen, inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        means, layers = self.routers.health() if self.routers and "loss" in logs else ({}, {})
        super().log(logs | means, start_time)
        if layers and is_main():
            self._note({"router/layers": layers})

    def _note(self, figures: dict[str, Any]) -> None:
        """Add figures of layers to the metrics, which trackers and the console line do without."""
        step = self.state.global_step
        self.metrics_log.append({"step": step, "tokens": step * self.run_config.batch_tokens, **figures})

    def probe(self) -> np.ndarray:
        """(N, L, k): the experts that tokens of a few held-out rows visit."""
        assert self.routers is not None
        rows = self.heldout_rows.select(range(min(PROBE_ROWS, len(self.heldout_rows))))
        assert self.model is not None
        found = measured(self.model, rows, self.data_collator, measure=self.routers.chosen)
        return np.array([row for row, in found], dtype=np.uint16).reshape(-1, len(self.routers.modules), self.routers.top_k)

    def _save_checkpoint(self, model, trial):
        if self.routers:
            now = self.probe()
            if is_main():
                if self.choices is not None:
                    pair = [torch.from_numpy(each.astype(np.int64)) for each in (self.choices, now)]
                    self._note({"router/churn": churn(*pair).tolist()})
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / CHOICES, now)
            self.choices = now
        super()._save_checkpoint(model, trial)
        self._keep(self.state.global_step)

    def _keep(self, step: int) -> None:
        if is_main() and step > 0 and step in {kept // self.run_config.batch_tokens for kept in self.run_config.keep_at}:
            checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
            keep(checkpoint, checkpoint.parents[1])

    def rewind(self, step):
        self._keep(step)  # which a kill may have prevented
        if self.routers and step > 0:
            self.choices = np.load(Path(self.args.output_dir) / f"checkpoint-{step}" / CHOICES)
        super().rewind(step)


def attention_of(config: PretrainConfig) -> str:
    if config.attn_implementation != "auto":
        return config.attn_implementation
    return "sdpa" if torch.cuda.is_available() else DOCUMENTS


def select_rows(tokens: Path, wanted: int, easy: int, seed: int) -> datasets.Dataset:
    """`wanted` rows in training order: up to `easy` easy ones first, then the main part, repeated in a new order when it is too short.

    With as many easy ones, fewer rows are the beginning of more."""
    def take(name: str, count: int) -> datasets.Dataset:
        rows = datasets.load_from_disk(str(tokens / name))
        order = [np.arange(len(rows))]
        rng = np.random.default_rng(seed)
        while sum(map(len, order)) < count:
            order.append(rng.permutation(len(rows)))
        return rows.select(np.concatenate(order)[:count])

    easy = min(easy, wanted) if (tokens / "train-easy").exists() else 0
    main = take("train", wanted - easy)
    return datasets.concatenate_datasets([take("train-easy", easy), main]) if easy else main


def pretrain(config: PretrainConfig, *, forecast: dict[str, Any] | None = None) -> Manifest:
    """Train one decoder and measure it.

    `forecast` is what was predicted for this run before it started; it goes into the manifest's notes beside the result.
    Raises ValueError for a batch that does not divide or a tokenizer that does not match the tokens.
    """
    run = Run(config, inputs={"upcycle": hash_path(Path(config.upcycle))} if config.upcycle and Path(config.upcycle).exists() else None)
    if run.finished:
        return run.manifest
    prepared = run.parents["prepare"]
    tokenizer = AutoTokenizer.from_pretrained(trusted(prepared.product("tokenizer")))
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
    if config.torch_compile and config.num_experts:
        raise ValueError("torch_compile with experts has not been tried: set it to false, or num_experts to null")
    steps = config.tokens // config.batch_tokens
    if steps < 1:
        raise ValueError(f"tokens {config.tokens} is less than one batch of {config.batch_tokens}: give more tokens or a smaller batch")

    decoder = decoder_of(config, tokenizer, row_length)
    model = build_decoder(decoder, seed=config.seed, matrix_std=config.matrix_std, embedding_std=config.embedding_std,
                          head_std=config.head_std, attn_implementation=attention_of(config))
    if config.upcycle:
        upcycle(model, config.upcycle)
    routers = Routers(model, balance_coef=config.balance_coef, z_coef=config.router_z_coef,
                      bias_rate=config.balance_bias_rate) if config.num_experts else None
    sizes = count_parameters(decoder)
    say(f"pretrain: {config.architecture} {config.hidden_size} wide, {sizes['total']:,} parameters"
        + ("" if precision() == "no" else f" in {precision()}") + (f" ({sizes['active']:,} visited by a token)" if routers else "")
        + f", {steps:,} steps of {config.batch_tokens:,} tokens on {world_size()} process(es)")

    schedule, wanted = learning_rate_schedule(config), steps * config.batch_tokens // row_length
    easy = int(wanted * config.easy_share) if config.easy_tokens is None else config.easy_tokens // row_length
    rows = select_rows(tokens, wanted, easy, config.seed)
    held = datasets.load_from_disk(str(tokens / "heldout"))
    every = math.ceil(steps / config.evaluations)
    arguments = TrainingArguments(**training_arguments(
        run, seed=config.seed, report_to=config.report_to, logging_steps=max(1, steps // config.logs),
        save_steps=max(1, steps // (config.checkpoints + 1)), max_steps=steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=local_rows // micro, learning_rate=config.learning_rate, **schedule,
        max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
        adam_beta2=0.95, eval_strategy="steps", eval_steps=every, train_sampling_strategy="sequential",
        gradient_checkpointing=config.gradient_checkpointing, torch_compile=config.torch_compile))
    trainer = PretrainTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=held,
        data_collator=PackedCollator(eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id),
        config=config, routers=routers, heldout_rows=held.select(range(min(config.eval_rows, len(held)))))
    trainer.tokens_per_step = config.batch_tokens
    trainer.add_callback(OwnSteps({kept // config.batch_tokens for kept in config.keep_at}))
    branched = start_from(config, run) if config.branch_from and is_main() else 0
    fit(trainer, config)

    measured_rows = min(4 * config.eval_rows, len(held))
    metrics = heldout(model, held.select(range(measured_rows)), trainer.data_collator)
    say(f"held-out loss {metrics['heldout_loss']['value']:.4f} over {measured_rows} rows, the run's measure; over the first "
        f"{len(trainer.heldout_rows)} of them in the lines above")
    kinds = {folder.name: datasets.load_from_disk(str(folder)) for folder in sorted((tokens / "heldout-kinds").glob("*"))}
    for kind, rows in kinds.items():
        metrics |= {f"{name}/{kind}": value for name, value in heldout(model, rows, trainer.data_collator).items()}
    experts: dict[str, Any] = {}
    if routers:
        experts, measures = health(routers, model, trainer.data_collator, held.select(range(min(config.eval_rows, len(held)))), kinds)
        metrics |= measures
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    export(trainer, tokenizer, run.directory / "model")
    if is_main():
        show(run.directory)
        if experts:
            draw(run.directory / "figures", read_metrics(run.directory / "metrics.jsonl"), experts)
    return run.finish(
        metrics=metrics, products={"model": "model"},
        counts={"parameters": sizes["total"], "matmul_parameters": sizes["matmul"],
                "active_parameters": sizes["active"], "non_embedding_parameters": sizes["non_embedding"],
                "tokens": steps * config.batch_tokens, "steps": steps, "skipped_steps": trainer.num_skipped,
                **({"branched_step": branched} if branched else {}),
                "flops": steps * config.batch_tokens * train_flops_per_token(decoder, row_length, sizes)},
        notes={"epochs": steps * config.batch_tokens / row_length / max(1, prepared.counts["train_rows"]),
               **({"forecast": forecast} if forecast else {}), **({"routers": experts} if experts else {})})


def show(directory: Path) -> None:
    """The curve of held-out loss against tokens."""
    logged = read_metrics(directory / "metrics.jsonl")
    held = [row for row in logged if "heldout/loss" in row]
    train = [row for row in logged if "train/loss" in row]
    figures.lines(directory / "figures" / "loss.png", {
        "training": ([r["tokens"] for r in train], [r["train/loss"] for r in train]),
        "held-out": ([r["tokens"] for r in held], [r["heldout/loss"] for r in held])}, x="tokens", y="loss (nats a token)")
