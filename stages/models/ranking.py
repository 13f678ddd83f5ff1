"""Training on K ranked responses a prompt: a small subclass of TRL's RewardTrainer and its batches.

Letters: B prompts, K responses a prompt (at most), R responses of the batch, P and T tokens of prompts and responses, H heads (one,
but for an ensemble on one trunk).
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig
from trl import RewardConfig, RewardTrainer

from reward.calibration import accuracy, judged
from reward.losses import centring_penalty, preferred, reward_loss
from reward.model import Group, from_language_model, grouped, pad_right, score_groups
from stages.models.adapters import MethodConfig, adapter_config, check_undivided, merged
from stages.models.attention import speed_up
from stages.models.engines import divides_weights
from stages.models.optimizer import build_optimizer
from stages.models.training import Resumable, fit, gather, rank, share_batch, training_arguments, world_size
from stages.run.config import option
from stages.run.manifest import Run


@dataclass(frozen=True, kw_only=True)
class RankingConfig(MethodConfig):
    """How a reward model is trained on rankings, or an ensemble of them."""

    method: Literal["full", "lora"] = option("full", "full: all weights; lora: adapters on all linear layers, and the score head whole")
    loss: Literal["pairs", "listwise"] = option("pairs", "pairs: Bradley-Terry over all pairs; listwise: Plackett-Luce with ties")
    margin: float = option(0.0, "difference of scores asked for a rank of distance (pairs)")
    label_smoothing: float = option(0.0, "probability at which a pair is taken to be the other way round (pairs)")
    ensemble: int = option(1, "members that differ by seed: head, and order of the prompts where each has a trunk")
    ensemble_share: Literal["none", "trunk"] = option("none", "none: each member is a model of its own; trunk: heads on one trunk")
    combination: Literal["mean", "min", "mean_std"] = option("mean", "the members' one score: mean, worst case, or mean less std_coef "
                                                             "standard deviations")
    std_coef: float = option(1.0, "that coefficient")
    epochs: float = option(2.0, "passes over the training prompts")
    batch_size: int = option(8, "prompts a step, each with all its responses, over all processes")
    micro_batch_size: int | None = option(None, "prompts a forward pass and process (default: all)")
    share_prompts: bool = option(True, "read each prompt once for all its responses (not with sharded engines or checkpointed gradients)")
    optimizer: Literal["muon", "adamw"] = option("muon", "muon: Muon for matrices and AdamW for the rest; adamw: AdamW for all")
    matrix_lr: float = option(0.01, "peak learning rate of Muon")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    embedding_lr_factor: float = option(1.0, "the embedding's learning rate is this many times learning_rate (muon)")
    weight_decay: float = option(0.0, "decoupled weight decay")
    warmup_share: float = option(0.05, "share of the steps with a rising learning rate; it then falls linearly to zero")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    centring: float = option(0.01, "weight of the penalty that keeps scores near zero")
    evaluations: int = option(5, "held-out evaluations over the run")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    @property
    def loss_settings(self) -> dict[str, Any]:
        return {"kind": self.loss, "margin": self.margin, "label_smoothing": self.label_smoothing}


class RankedCollator:
    """Prompts with all their responses to one batch, in which each response stands once, however many pairs it is in.

    Gives `ranks` (B, K), 0 for padding; `slots` (B, K), the row of each response; and either `input_ids` and
    `attention_mask` (R, P + T) or, with `share_prompts`, `prompt_ids`, `prompt_mask` (B, P), padded left, `owner` (R,), the
    prompt of each response, and `input_ids`, `attention_mask` (R, T) of the responses alone.
    """

    def __init__(self, pad_id: int, share_prompts: bool):
        self.pad_id, self.share_prompts = pad_id, share_prompts

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ranks, real = pad_right([row["ranks"] for row in rows], 0)
        slots = torch.zeros_like(ranks)
        slots[real] = torch.arange(int(real.sum()))
        if not self.share_prompts:
            ids, mask = pad_right([row["prompt_ids"] + response for row in rows for response in row["response_ids"]], self.pad_id)
            return {"ranks": ranks, "slots": slots, "input_ids": ids, "attention_mask": mask.long()}
        ids, mask = pad_right([response for row in rows for response in row["response_ids"]], self.pad_id)
        prompts, prompt_mask = pad_right([row["prompt_ids"][::-1] for row in rows], self.pad_id)
        owner = torch.arange(len(rows)).repeat_interleave(real.sum(1))
        return {"ranks": ranks, "slots": slots, "input_ids": ids, "attention_mask": mask.long(), "owner": owner,
                "prompt_ids": prompts.flip(1), "prompt_mask": prompt_mask.flip(1).long()}


def batch_scores(model: torch.nn.Module, trunk: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(H x B, K) float32 scores of a batch of `RankedCollator`, padding included; one head after another.

    With shared prompts the trunk reads each prompt once and its responses continue from that cache: the same scores and
    gradients at about two thirds of the time. The second forward pass goes through `model`, so that a wrapper sees it.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "owner" in batch:
        owner, mask = batch["owner"], batch["prompt_mask"]
        cache = trunk(input_ids=batch["prompt_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                      use_cache=True).past_key_values
        cache.batch_select_indices(owner)
        positions = mask.sum(1)[owner][:, None] + torch.arange(inputs["input_ids"].size(1), device=owner.device)
        inputs |= {"attention_mask": torch.cat([mask[owner], batch["attention_mask"]], dim=1), "position_ids": positions,
                   "past_key_values": cache}
    logits = model(**inputs, use_cache="owner" in batch).logits.float()  # (R, H)
    return logits.T[:, batch["slots"]].flatten(0, 1)


def trunk_of(model: Any) -> Any:
    """The decoder below the score head, which reads prompts for `batch_scores`; adapters that it carries stay in it."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


class RankedRewardTrainer(Resumable, RewardTrainer):
    """TRL's RewardTrainer with a loss over K ranked responses in place of that of one pair.

    `loss` are settings of reward.losses.reward_loss. `muon` holds the learning rates of stages.models.optimizer.build_optimizer,
    None means the optimizer of the arguments.
    """

    def __init__(self, *, heldout: Sequence[dict[str, Any]], muon: dict[str, float] | None, loss: dict[str, Any] | None = None, **kwargs):
        self.heldout, self.muon, self.loss = heldout, muon, loss or {}
        kwargs["eval_dataset"] = kwargs["train_dataset"]  # asked for but never read: `evaluate` measures `heldout`
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # token ids already, and as they were sampled

    def create_optimizer(self, model=None):
        if self.muon is None:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, **self.muon, bf16=self.args.bf16)
            head = self.model.score.weight  # a row: orthogonalised, it would move by the full rate at every step
            matrices, _, rest = self.optimizer.param_groups
            matrices["params"] = [p for p in matrices["params"] if p is not head]
            rest["params"] = [*(p for p in rest["params"] if p is not head), head]
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = batch_scores(model, trunk_of(self.accelerator.unwrap_model(model)), inputs)
        ranks = inputs["ranks"].repeat(len(scores) // len(inputs["ranks"]), 1)  # every head learns from all prompts
        loss = reward_loss(scores, ranks, **self.loss)
        if self.args.center_rewards_coefficient:
            loss = loss + self.args.center_rewards_coefficient * centring_penalty(scores, ranks)
        with torch.no_grad():
            pairs = preferred(ranks)
            order = torch.sign(scores[:, :, None] - scores[:, None, :])
            counts = torch.stack([((1 + order) / 2)[pairs].sum(), pairs.sum()])  # equal scores are half right, as in `judged`
            right, total = self.accelerator.gather(counts[None]).sum(0).tolist()
            self._metrics["train"]["accuracy"].append(right / max(1, total))
        return (loss, {"scores": scores}) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """Loss and accuracy on the held-out prompts, each of which counts once whatever the number of processes."""
        model = self.accelerator.unwrap_model(self.model)
        scores = shared_out(model, [(r["prompt_ids"], r["response_ids"]) for r in self.heldout])
        ranks = [r["ranks"] for r in self.heldout]
        loss = reward_loss(pad_scores(scores), pad_right(ranks, 0)[0], **self.loss).item()
        logs = {"heldout/loss": loss, "heldout/accuracy": accuracy(judged(scores, ranks)).value}
        model.eval()  # by this RewardTrainer.log tells training from evaluation
        self.log(logs)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs


def pad_scores(scores: Sequence[Sequence[float]]) -> Tensor:
    """(B, K) float32 of ragged scores, zeros to the right."""
    width = max(map(len, scores))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in scores])


def shared_out(model: Any, groups: Sequence[Group], function: Callable[..., list[Any]] = score_groups) -> list[Any]:
    """`function(model, groups)` with every process doing its share of the responses; all of the result on every process."""
    rows = [(prompt, [response]) for prompt, responses in groups for response in responses]
    mine = range(rank(), len(rows), world_size())
    padded = [*mine, *[0] * (-(-len(rows) // world_size()) - len(mine))]  # as many forward passes everywhere, as in heldout.measured
    together = dict(gather(list(zip(mine, function(model, [rows[i] for i in padded]), strict=False))))
    return grouped([together[i][0] for i in range(len(rows))], groups)


def check(config: RankingConfig, train: list[dict], heldout: list[dict], model: PretrainedConfig, pad_id: int) -> None:
    """Raises ValueError for settings that do not go together, batches that do not divide and ids that the model does not have."""
    local = share_batch(config.batch_size, world_size(), "batch_size")
    if config.batch_size > len(train) or local % (config.micro_batch_size or local):
        raise ValueError(f"batch_size {config.batch_size} ({local} a process), micro_batch_size {config.micro_batch_size}: batch_size must "
                         f"be at most the {len(train)} training prompts and each process's share a multiple of micro_batch_size")
    if config.share_prompts and config.gradient_checkpointing:
        raise ValueError("share_prompts keeps a cache that gradient_checkpointing drops: set share_prompts to false")
    if config.method == "lora" and config.optimizer == "muon":
        raise ValueError("method lora trains with AdamW: set optimizer to adamw")
    if config.ensemble < 1 or not 0 <= config.label_smoothing < 0.5 or config.margin < 0:
        raise ValueError(f"ensemble {config.ensemble}, label_smoothing {config.label_smoothing}, margin {config.margin}: ensemble counts "
                         "models from 1, label_smoothing lies below .5, and a margin is not negative")
    if config.ensemble == 1 and (config.ensemble_share == "trunk" or config.combination != "mean"):
        raise ValueError(f"ensemble 1 has nothing to share or combine (ensemble_share {config.ensemble_share}, combination "
                         f"{config.combination}): set ensemble to 2 or more, or leave them out")
    records = [*train, *heldout]
    most = max(records, key=lambda r: len(r["ranks"]))["ranks"]
    reward_loss(torch.zeros(1, len(most)), torch.tensor([most]), **config.loss_settings)  # what the loss refuses, it refuses here
    ids = {i for r in records for part in [r["prompt_ids"], *r["response_ids"]] for i in part}
    size = model.get_text_config().vocab_size
    if max(ids) >= size:
        raise ValueError(f"the preferences hold token {max(ids)}, the model has {size} tokens: "
                         "they come from another tokenizer; drop prompt_ids and response_ids from the records")
    if any(response[-1] == pad_id for r in records for response in r["response_ids"]):
        raise ValueError(f"a response ends with the padding token ({pad_id}), before which a classifier stops reading: give the "
                         "tokenizer a padding token that is not its end token")


def peft_settings(config: RankingConfig) -> RankingConfig:
    """The config with what peft has to know of a classifier: its head is new, so that it trains whole and is saved."""
    saved = sorted({"score", *config.peft.get("modules_to_save", [])})
    return replace(config, peft={"task_type": "SEQ_CLS", **config.peft, "modules_to_save": saved})


def train_model(config: RankingConfig, run: Run, tokenizer: Any, start: Path, *, train: list[dict], heldout: list[dict], number: int,
                ) -> RankedRewardTrainer:
    """Train one model from the language model in `start`, the `number`th of an ensemble, in a folder of its own but for the first."""
    check_undivided(config)
    model = from_language_model(start, pad_id=tokenizer.pad_token_id, seed=config.seed + number,
                                heads=config.ensemble if config.ensemble_share == "trunk" else 1, random_head=config.ensemble > 1)
    speed_up(model)
    peft_config = adapter_config(peft_settings(config), [], tied=True) if config.method == "lora" else None
    local_batch = share_batch(config.batch_size, world_size(), "batch_size")
    micro = min(config.micro_batch_size or local_batch, local_batch)
    steps = max(1, int(len(train) // config.batch_size * config.epochs))
    home = run.directory / f"member_{number}" if number else run.directory
    trainer = RankedRewardTrainer(
        model=model, processing_class=tokenizer, data_collator=RankedCollator(tokenizer.pad_token_id, config.share_prompts),
        train_dataset=datasets.Dataset.from_list([{key: r[key] for key in ("prompt_ids", "response_ids", "ranks")} for r in train]),
        heldout=heldout, peft_config=peft_config, loss=config.loss_settings, muon=None if config.optimizer == "adamw" else {
            "matrix_lr": config.matrix_lr, "lr": config.learning_rate, "embedding_lr_factor": config.embedding_lr_factor,
            "weight_decay": config.weight_decay},
        args=RewardConfig(**training_arguments(
            run, seed=config.seed + number, report_to=config.report_to, logging_steps=max(1, steps // 30), save_steps=max(1, steps // 5),
            output_dir=str(home / "checkpoints"),
            per_device_train_batch_size=micro, gradient_accumulation_steps=local_batch // micro, max_steps=steps,
            learning_rate=config.learning_rate, lr_scheduler_type="linear", dataloader_drop_last=True, max_length=None,
            warmup_steps=max(1, int(steps * config.warmup_share)), max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay, center_rewards_coefficient=config.centring, eval_strategy="steps",
            eval_steps=max(1, steps // config.evaluations), gradient_checkpointing=config.gradient_checkpointing)))
    if (config.method != "full" or config.ensemble > 1 or config.share_prompts) and divides_weights(trainer):
        raise ValueError("this engine holds the weights in parts, for which method lora, an ensemble and share_prompts (which calls the "
                         "trunk alone) are not written: set method to full, ensemble to 1 and share_prompts to false, or launch with "
                         "ddp or zero2")
    fit(trainer, config)
    return trainer


def without_adapters(trainer: RankedRewardTrainer, config: RankingConfig) -> Any:
    """The trained model, adapters merged into it."""
    return merged(trainer.accelerator.unwrap_model(trainer.model_wrapped), config, Path(), Path(), None)
