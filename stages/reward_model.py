"""A reward model from the SFT model, trained on rankings, and how good it is where PPO will use it.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.reward_model --config recipes/tiny/reward_model.yaml
"""
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from reward import preferences
from reward.calibration import Accuracy, accuracy, accuracy_by_distance, accuracy_difference, calibration, judged
from reward.losses import centring_penalty, preferred, ranked_loss
from reward.model import from_language_model, min_token_logprobs, normalize, pad_right, score_groups, set_normalization
from reward.verifiers import dense_ranks, gold_score
from stages.data.curriculum import WORKED, user_turn
from stages.data.tokenizer import chat_ids
from stages.models.optimizer import build_optimizer
from stages.models.sampling import prompt_key, sample
from stages.models.training import Resumable, export, fit, gather, rank, share_batch, training_arguments, world_size
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, is_main, metric, say


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(StageConfig):
    STAGE = "reward_model"
    PARENTS = ("prepare", "sft", "preferences")

    extra_layers: int = option(0, "fresh decoder layers on top of the SFT model's, which at first change nothing")
    heldout_share: float = option(0.1, "share of the prompts held out, with all their responses")
    epochs: float = option(2.0, "passes over the training prompts")
    batch_size: int = option(8, "prompts a step, each with all its responses, over all processes")
    micro_batch_size: int | None = option(None, "prompts a forward pass and process (default: all)")
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
    fresh_problems: int = option(300, "validation problems on whose fresh samples the model is measured and normalised")
    fresh_samples: int = option(8, "samples of the SFT model for each of them")
    fresh_temperature: float = option(1.0, "of that sampling: the policy's at the start of PPO")


class RankedCollator:
    """Prompts with all their responses to one batch in which each response stands once, however many pairs it is in.

    Gives `input_ids` and `attention_mask` (R, T), `slots` (B, K), the row of each response, and `ranks` (B, K), 0 for padding.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_right([row["prompt_ids"] + response for row in rows for response in row["response_ids"]], self.pad_id)
        ranks, _ = pad_right([row["ranks"] for row in rows], 0)
        slots = torch.zeros_like(ranks)
        slots[ranks > 0] = torch.arange(len(ids))
        return {"input_ids": ids, "attention_mask": mask.long(), "slots": slots, "ranks": ranks}


class RankedRewardTrainer(Resumable, RewardTrainer):
    """TRL's RewardTrainer with the loss over all pairs of K ranked responses in place of one pair's."""

    def __init__(self, *args, config: RewardModelConfig, **kwargs):
        self.run_config = config
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # token ids already, and as they were sampled

    def create_optimizer(self, model=None):
        c = self.run_config
        if c.optimizer == "adamw":
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, matrix_lr=c.matrix_lr, lr=c.learning_rate,
                                             embedding_lr_factor=c.embedding_lr_factor, weight_decay=c.weight_decay)
            head = self.model.score.weight  # one row: orthogonalised it would move by its full length at every step
            matrices, _, rest = self.optimizer.param_groups
            matrices["params"] = [p for p in matrices["params"] if p is not head]
            rest["params"] = [*(p for p in rest["params"] if p is not head), head]
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores, ranks = outputs.logits[:, 0].float()[inputs["slots"]], inputs["ranks"]
        loss = ranked_loss(scores, ranks)
        if self.run_config.centring:
            loss = loss + self.run_config.centring * centring_penalty(scores, ranks)
        with torch.no_grad():
            pairs = preferred(ranks)
            right = (scores[:, :, None] > scores[:, None, :]) & pairs
            counts = self.accelerator.gather(torch.stack([right.sum(), pairs.sum()])[None]).sum(0)
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["accuracy"].append((counts[0] / counts[1].clamp_min(1)).item())
        return (loss, outputs) if return_outputs else loss


def main(config: RewardModelConfig) -> Manifest:
    run = Run(config)
    if run.finished:
        return run.manifest
    sft, preferred_run = run.parents["sft"], run.parents["preferences"]
    tokenizer = AutoTokenizer.from_pretrained(sft.product("model"))
    records, _ = preferences.read(preferred_run.product("preferences"))
    records = [r if r.get("response_ids") else preferences.encode(r, lambda m, ask: chat_ids(tokenizer, m, ask=ask)) for r in records]
    train, heldout = split(records, config)
    simulated = sum(bool(r["simulated"]) for r in records)
    say(f"reward_model: {len(train):,} prompts with {sum(len(r['ranks']) for r in train):,} ranked responses to learn from, "
        f"{len(heldout):,} prompts held out; {'simulated annotator' if simulated else 'ranked by people'}")

    model = from_language_model(sft.product("model"), pad_id=tokenizer.pad_token_id, seed=config.seed, extra_layers=config.extra_layers)
    local_batch = share_batch(config.batch_size, world_size(), "batch_size")
    micro = min(config.micro_batch_size or local_batch, local_batch)
    if len(train) < config.batch_size or local_batch % micro:
        raise ValueError(f"batch_size {config.batch_size} with {len(train)} training prompts and micro_batch_size {micro}: it must be at "
                         "most the number of prompts, and each process's share a multiple of micro_batch_size")
    steps = max(1, int(len(train) // config.batch_size * config.epochs))
    columns = ("prompt_ids", "response_ids", "ranks")
    train_set, heldout_set = (datasets.Dataset.from_list([{c: r[c] for c in columns} for r in part]) for part in (train, heldout))
    trainer = RankedRewardTrainer(
        config=config, model=model, processing_class=tokenizer, data_collator=RankedCollator(tokenizer.pad_token_id),
        train_dataset=train_set, eval_dataset=heldout_set,
        args=TrlRewardConfig(**training_arguments(
            run, seed=config.seed, report_to=config.report_to, logging_steps=max(1, steps // 30), save_steps=max(1, steps // 5),
            per_device_train_batch_size=micro, per_device_eval_batch_size=micro, gradient_accumulation_steps=local_batch // micro,
            max_steps=steps, learning_rate=config.learning_rate, lr_scheduler_type="linear", dataloader_drop_last=True,
            warmup_steps=max(1, int(steps * config.warmup_share)), max_grad_norm=config.max_grad_norm, weight_decay=config.weight_decay,
            eval_strategy="steps", eval_steps=max(1, steps // config.evaluations), prediction_loss_only=True,
            gradient_checkpointing=config.gradient_checkpointing)))
    fit(trainer)

    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    metrics = measure_heldout(trained, heldout)
    metrics |= measure_fresh(trained, config, run, tokenizer, train, heldout)
    export(trainer, tokenizer, run.directory / "model")
    if is_main():
        show(run.directory)
    for name in ("heldout_accuracy", "fresh_accuracy", "baseline_min_logprob_accuracy", "baseline_length_accuracy"):
        if name in metrics:
            low, high = metrics[name]["ci95"]
            say(f"{name}: {metrics[name]['value']:.3f} [{low:.3f}, {high:.3f}], {metrics[name]['n']:,} pairs")
    return run.finish(metrics=metrics, products={"model": "model"}, notes={"simulated_annotator": bool(simulated)}, counts={
        "parameters": sum(p.numel() for p in trained.parameters()), "steps": steps, "train_prompts": len(train),
        "train_responses": sum(len(r["ranks"]) for r in train), "heldout_prompts": len(heldout)})


def split(records: list[dict], config: RewardModelConfig) -> tuple[list[dict], list[dict]]:
    """Training and held-out records. Prompts are split, never pairs: one prompt's pairs share responses. Equal prompts stay together."""
    groups: dict[tuple[int, ...], list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record["prompt_ids"]), []).append(record)
    order = sorted(groups)
    random.Random(f"split:{config.seed}").shuffle(order)
    count = max(1, round(config.heldout_share * len(order)))
    if count >= len(order):
        raise ValueError(f"{len(order)} prompts leave none to train on with heldout_share {config.heldout_share}: give more preferences")
    parts = ([r for key in keys for r in groups[key]] for keys in (order[count:], order[:count]))
    train, heldout = parts
    return train, heldout


def scores_of(model, groups: list[tuple[list[int], list[list[int]]]], function=score_groups) -> list[list[float]]:
    """Scores of every prompt's responses, each process doing its share."""
    mine = list(range(len(groups)))[rank()::world_size()]
    part = function(model, [groups[i] for i in mine])
    together = dict(gather(list(zip(mine, part, strict=True))))
    return [together[i] for i in range(len(groups))]


def as_metric(a: Accuracy) -> dict[str, Any]:
    return metric(a.value, n=a.n, ci95=(a.low, a.high))


def quality(scores: list[list[float]], ranks: list[list[int]], name: str) -> dict[str, dict]:
    """Accuracy overall and by rank distance, and how far sigmoid(difference) can be taken as a probability."""
    fit_ = calibration(scores, ranks)
    metrics = {f"{name}_accuracy": as_metric(accuracy(judged(scores, ranks)))}
    metrics |= {f"{name}_accuracy_distance_{d}": as_metric(a) for d, a in accuracy_by_distance(scores, ranks).items()}
    return metrics | {f"{name}_ece": metric(fit_.ece, n=fit_.n), f"{name}_brier": metric(fit_.brier, n=fit_.n)}


def measure_heldout(model, heldout: list[dict]) -> dict[str, dict]:
    scores = scores_of(model, [(r["prompt_ids"], r["response_ids"]) for r in heldout])
    return quality(scores, [r["ranks"] for r in heldout], "heldout")


def measure_fresh(model, config: RewardModelConfig, run: Run, tokenizer, train: list[dict], heldout: list[dict]) -> dict[str, dict]:
    """Accuracy by gold score on new samples of the SFT model, beside two baselines on the same pairs; sets the normalisation.

    Where the preferences came from a file there is no gold score: held-out prompts are sampled, for the normalisation alone.
    """
    sft, source = run.parents["sft"], run.parents["preferences"].config
    lm = AutoModelForCausalLM.from_pretrained(sft.product("model"), dtype=torch.float32).to(model.device)
    problems: list[dict] = []
    if source["source"] is None:
        problems = preferences.problems(run.parents["prepare"].product("problems") / "validation.jsonl", source["tasks"],
                                        source["difficulties"])[:config.fresh_problems]
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": user_turn(p["question"], WORKED)}], ask=True) for p in problems]
        names = [p["id"] for p in problems]
    else:
        prompts, names = ([r[key] for r in heldout[:config.fresh_problems]] for key in ("prompt_ids", "id"))
    k, stops = config.fresh_samples, lm.config.eos_token_id
    eos_ids = stops if isinstance(stops, list) else [stops]
    mine = list(range(len(prompts)))[rank()::world_size()]
    drawn = sample(lm, [prompts[i] for i in mine for _ in range(k)], keys=[(prompt_key(names[i]), j) for i in mine for j in range(k)],
                   seed=config.seed + 1, temperature=config.fresh_temperature, max_new_tokens=source["max_new_tokens"],
                   eos_ids=eos_ids, pad_id=tokenizer.pad_token_id)
    together = dict(gather([(i, drawn[n * k:(n + 1) * k]) for n, i in enumerate(mine)]))
    groups = [(prompts[i], together[i]) for i in range(len(prompts))]
    scores = scores_of(model, groups)
    flat = [s for group in scores for s in group]
    set_normalization(model, flat)
    spread = normalize(model.config, flat)
    metrics = {"score_mean": metric(sum(spread) / len(spread), n=len(spread)),
               "score_std": metric(math.sqrt(sum(s * s for s in spread) / len(spread)), n=len(spread))}
    if not problems:
        return metrics
    gold = [[gold_score(p, text, finished=ids[-1] in eos_ids).score for text, ids in
             zip(tokenizer.batch_decode(responses, skip_special_tokens=True), responses, strict=True)]
            for p, (_, responses) in zip(problems, groups, strict=True)]
    ranks = [dense_ranks(g) for g in gold]
    surprise = judged(scores_of(lm, groups, min_token_logprobs), ranks)
    seen = judged([[len(ids) for ids in r["response_ids"]] for r in train], [r["ranks"] for r in train])
    direction = 1 if accuracy(seen).value >= 0.5 else -1  # longer or shorter, whichever the training rankings prefer
    length = judged([[direction * len(ids) for ids in responses] for _, responses in groups], ranks)
    difference, low, high = accuracy_difference(judged(scores, ranks), surprise)
    return metrics | quality(scores, ranks, "fresh") | {
        "baseline_min_logprob_accuracy": as_metric(accuracy(surprise)), "baseline_length_accuracy": as_metric(accuracy(length)),
        "gain_over_min_logprob": metric(difference, n=accuracy(surprise).n, ci95=(low, high))}


def show(directory: Path) -> None:
    logged = read_metrics(directory / "metrics.jsonl")
    figures.lines(directory / "figures" / "accuracy.png", {
        label: ([r["step"] for r in logged if key in r], [r[key] for r in logged if key in r])
        for label, key in (("training", "train/accuracy"), ("held out", "eval/accuracy"))}, x="step", y="pairwise accuracy")


if __name__ == "__main__":
    launch(main, RewardModelConfig)
