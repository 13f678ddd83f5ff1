"""A reward model from the SFT model, trained on rankings, and how good it is where PPO will use it.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.reward_model --config recipes/tiny/reward_model.yaml
"""
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RewardConfig as TrlRewardConfig

from reward import preferences
from reward.calibration import Accuracy, accuracy, accuracy_by_distance, accuracy_difference, calibration, judged
from reward.model import from_language_model, min_token_logprobs, normalize, set_normalization
from reward.verifiers import dense_ranks, gold_score
from stages.data.curriculum import WORKED, user_turn
from stages.data.problems import read_problems
from stages.data.tokenizer import chat_ids
from stages.models.ranking import RankedCollator, RankedRewardTrainer, shared_out
from stages.models.responses import draw_responses, stop_ids
from stages.models.training import export, fit, share_batch, training_arguments, world_size
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, is_main, metric, say


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(StageConfig):
    STAGE = "reward_model"
    PARENTS = ("prepare", "sft", "preferences")

    heldout_share: float = option(0.1, "share of the prompts held out, with all their responses")
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
    fresh_problems: int = option(300, "validation problems on whose fresh samples the model is measured and normalised")
    fresh_samples: int = option(8, "samples of the SFT model for each of them")
    fresh_temperature: float = option(1.0, "of that sampling: the policy's at the start of PPO")


def main(config: RewardModelConfig) -> Manifest:
    run = Run(config)
    if run.finished:
        return run.manifest
    sft = run.parents["sft"]
    tokenizer = AutoTokenizer.from_pretrained(sft.product("model"))
    records, _ = preferences.read(run.parents["preferences"].product("preferences"))
    train, heldout = split([preferences.encode(r, partial(chat_ids, tokenizer)) for r in records], config)
    simulated = any(r["simulated"] for r in records)
    say(f"reward_model: {len(train):,} prompts with {sum(len(r['ranks']) for r in train):,} ranked responses to learn from, "
        f"{len(heldout):,} prompts held out; ranked by {'a simulated annotator' if simulated else 'people'}")

    model = from_language_model(sft.product("model"), pad_id=tokenizer.pad_token_id, seed=config.seed)
    check(config, train, model)
    local_batch = share_batch(config.batch_size, world_size(), "batch_size")
    micro = min(config.micro_batch_size or local_batch, local_batch)
    steps = max(1, int(len(train) // config.batch_size * config.epochs))
    trainer = RankedRewardTrainer(
        model=model, processing_class=tokenizer, data_collator=RankedCollator(tokenizer.pad_token_id, config.share_prompts),
        train_dataset=datasets.Dataset.from_list([{key: r[key] for key in ("prompt_ids", "response_ids", "ranks")} for r in train]),
        heldout=heldout, muon=None if config.optimizer == "adamw" else {
            "matrix_lr": config.matrix_lr, "lr": config.learning_rate, "embedding_lr_factor": config.embedding_lr_factor,
            "weight_decay": config.weight_decay},
        args=TrlRewardConfig(**training_arguments(
            run, seed=config.seed, report_to=config.report_to, logging_steps=max(1, steps // 30), save_steps=max(1, steps // 5),
            per_device_train_batch_size=micro, gradient_accumulation_steps=local_batch // micro, max_steps=steps,
            learning_rate=config.learning_rate, lr_scheduler_type="linear", dataloader_drop_last=True, max_length=None,
            warmup_steps=max(1, int(steps * config.warmup_share)), max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay, center_rewards_coefficient=config.centring, eval_strategy="steps",
            eval_steps=max(1, steps // config.evaluations), gradient_checkpointing=config.gradient_checkpointing)))
    fit(trainer)

    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    scores = shared_out(trained, [(r["prompt_ids"], r["response_ids"]) for r in heldout])
    metrics = quality(scores, [r["ranks"] for r in heldout], "heldout") | measure_fresh(trained, config, run, tokenizer, train, heldout)
    export(trainer, tokenizer, run.directory / "model")
    if is_main():
        show(run.directory)
    for name in ("heldout_accuracy", "fresh_accuracy", "baseline_min_logprob_accuracy", "baseline_length_accuracy"):
        if name in metrics:
            low, high = metrics[name]["ci95"]
            say(f"{name}: {metrics[name]['value']:.3f} [{low:.3f}, {high:.3f}], {metrics[name]['n']:,} pairs")
    return run.finish(metrics=metrics, products={"model": "model"}, notes={"simulated_annotator": simulated}, counts={
        "parameters": sum(p.numel() for p in trained.parameters()), "steps": steps, "train_prompts": len(train),
        "train_responses": sum(len(r["ranks"]) for r in train), "heldout_prompts": len(heldout)})


def split(records: list[dict], config: RewardModelConfig) -> tuple[list[dict], list[dict]]:
    """Training and held-out records. Prompts are split, never pairs: pairs of one prompt share responses. Equal prompts stay together."""
    groups: dict[tuple[int, ...], list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record["prompt_ids"]), []).append(record)
    order = sorted(groups)
    random.Random(f"split:{config.seed}").shuffle(order)
    count = max(1, round(config.heldout_share * len(order)))
    if count >= len(order):
        raise ValueError(f"{len(order)} prompts leave none to train on with heldout_share {config.heldout_share}: give more preferences")
    return [r for key in order[count:] for r in groups[key]], [r for key in order[:count] for r in groups[key]]


def check(config: RewardModelConfig, train: list[dict], model) -> None:
    """Raises ValueError for batches that do not divide, prompts that cannot be shared and ids outside the vocabulary."""
    local = share_batch(config.batch_size, world_size(), "batch_size")
    if config.batch_size > len(train) or local % (config.micro_batch_size or local):
        raise ValueError(f"batch_size {config.batch_size} ({local} a process), micro_batch_size {config.micro_batch_size}: batch_size must "
                         f"be at most the {len(train)} training prompts and each process's share a multiple of micro_batch_size")
    if config.share_prompts and config.gradient_checkpointing:
        raise ValueError("share_prompts keeps a cache that gradient_checkpointing drops: set share_prompts to false")
    ids = {i for r in train for part in [r["prompt_ids"], *r["response_ids"]] for i in part}
    if max(ids) >= model.config.get_text_config().vocab_size:
        raise ValueError(f"the preferences hold token {max(ids)}, the model has {model.config.get_text_config().vocab_size} tokens: "
                         "they come from another tokenizer; drop prompt_ids and response_ids from the records")


def as_metric(a: Accuracy) -> dict[str, Any]:
    return metric(a.value, n=a.n, ci95=(a.low, a.high))


def quality(scores: list[list[float]], ranks: list[list[int]], name: str) -> dict[str, dict]:
    """Accuracy overall and by rank distance, and how far sigmoid(difference) can be taken as a probability."""
    as_probability = calibration(scores, ranks)
    metrics = {f"{name}_accuracy": as_metric(accuracy(judged(scores, ranks)))}
    metrics |= {f"{name}_accuracy_distance_{d}": as_metric(a) for d, a in accuracy_by_distance(scores, ranks).items()}
    return metrics | {f"{name}_ece": metric(as_probability.ece, n=as_probability.n),
                      f"{name}_brier": metric(as_probability.brier, n=as_probability.n)}


def measure_fresh(model, config: RewardModelConfig, run: Run, tokenizer, train: list[dict], heldout: list[dict]) -> dict[str, dict]:
    """Accuracy by gold score on new samples of the SFT model, beside two baselines on the same pairs; sets the normalisation.

    Where the preferences came from a file there is no gold score: held-out prompts are sampled, for the normalisation alone.
    """
    source = run.parents["preferences"].config
    lm = AutoModelForCausalLM.from_pretrained(run.parents["sft"].product("model"), dtype=torch.float32).to(model.device)
    problems: list[dict[str, Any]] = []
    if source["source"] is None:
        path = run.parents["prepare"].product("problems") / "validation.jsonl"
        problems = read_problems(path, source["tasks"], source["difficulties"])[:config.fresh_problems]
        names = [p["id"] for p in problems]
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": user_turn(p["question"], WORKED)}], ask=True) for p in problems]
    else:
        prompts, names = ([r[key] for r in heldout[:config.fresh_problems]] for key in ("prompt_ids", "id"))
    eos_ids = stop_ids(lm)
    drawn = draw_responses(lm, prompts, names, samples=config.fresh_samples, seed=config.seed + 1, temperature=config.fresh_temperature,
                           max_new_tokens=source["max_new_tokens"], eos_ids=eos_ids, pad_id=tokenizer.pad_token_id)
    groups = list(zip(prompts, drawn, strict=True))
    scores = shared_out(model, groups)
    flat = [s for group in scores for s in group]
    set_normalization(model, flat)
    unit = normalize(model.config, flat)
    metrics = {"score_mean": metric(math.fsum(unit) / len(unit), n=len(unit)),
               "score_std": metric(math.sqrt(math.fsum(s * s for s in unit) / len(unit)), n=len(unit))}
    if not problems:
        return metrics
    gold = [[gold_score(problem, text, finished=ids[-1] in eos_ids).score
             for text, ids in zip(tokenizer.batch_decode(responses, skip_special_tokens=True), responses, strict=True)]
            for problem, responses in zip(problems, drawn, strict=True)]
    ranks = [dense_ranks(g) for g in gold]
    surprise = judged(shared_out(lm, groups, min_token_logprobs), ranks)
    seen = judged([[len(ids) for ids in r["response_ids"]] for r in train], [r["ranks"] for r in train])
    direction = 1 if accuracy(seen).value >= 0.5 else -1  # longer or shorter: whichever the training rankings prefer
    length = judged([[direction * len(ids) for ids in responses] for responses in drawn], ranks)
    difference, low, high = accuracy_difference(judged(scores, ranks), surprise)
    return metrics | quality(scores, ranks, "fresh") | {
        "baseline_min_logprob_accuracy": as_metric(accuracy(surprise)), "baseline_length_accuracy": as_metric(accuracy(length)),
        "gain_over_min_logprob": metric(difference, n=sum(map(len, surprise)), ci95=(low, high))}


def show(directory: Path) -> None:
    logged = read_metrics(directory / "metrics.jsonl")
    figures.lines(directory / "figures" / "accuracy.png", {
        label: ([r["step"] for r in logged if key in r], [r[key] for r in logged if key in r])
        for label, key in (("training", "train/accuracy"), ("held out", "heldout/accuracy"))}, x="step", y="pairwise accuracy")


if __name__ == "__main__":
    launch(main, RewardModelConfig)
