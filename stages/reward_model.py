"""A reward model from the SFT model, trained on rankings, and how good it is where PPO will use it.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.reward_model --config recipes/tiny/reward_model.yaml
"""
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reward import preferences
from reward.calibration import Bin, reliability
from reward.folders import trusted
from reward.model import (
    Ensemble,
    Group,
    build_ensemble,
    combined_groups,
    mean_and_std,
    members_groups,
    plain_model,
    set_normalization,
    write_ensemble,
)
from stages.data.curriculum import WORKED, user_turn
from stages.data.problems import read_problems
from stages.data.tokenizer import chat_ids
from stages.models.adapters import save_adapter
from stages.models.engines import load_whole_models, shape_of
from stages.models.quality import measure_fresh, quality, shortcuts
from stages.models.ranking import RankingConfig, check, shared_out, train_model, without_adapters
from stages.models.responses import draw_responses, stop_ids
from stages.models.training import barrier, export, save_model
from stages.rl.costs import ranking_flops
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import option
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_path, is_main, metric, say


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(RankingConfig):
    STAGE = "reward_model"
    PARENTS = ("prepare", "sft", "preferences")

    criterion: str | None = option(None, "criterion of the rankings to learn; needed where they are by several (all: all alike)")
    heldout_share: float = option(0.1, "share of the prompts held out, with all their responses")
    fresh_problems: int = option(300, "validation problems on whose fresh samples the model is measured and normalised")
    fresh_samples: int = option(8, "samples of the SFT model for each of them")
    fresh_temperature: float = option(1.0, "of that sampling: the policy's at the start of PPO")


def main(config: RewardModelConfig) -> Manifest:
    run = Run(config)
    if run.finished:
        return run.manifest
    sft = run.parents["sft"]
    tokenizer = AutoTokenizer.from_pretrained(trusted(sft.product("model")))
    records, _ = preferences.read(run.parents["preferences"].product("preferences"))
    records = by_criterion(records, config.criterion)
    train, heldout = split([preferences.encode(r, partial(chat_ids, tokenizer)) for r in records], config)
    simulated = any(r["simulated"] for r in records)
    say(f"reward_model: {len(train):,} prompts with {sum(len(r['ranks']) for r in train):,} ranked responses to learn from, "
        f"{len(heldout):,} prompts held out; ranked by {', '.join(sorted({r['annotator'] for r in records}))[:200]}")

    check(config, train, heldout, AutoConfig.from_pretrained(trusted(sft.product("model"))), tokenizer.pad_token_id)
    models: list[Any] = []
    skipped = 0
    adapter = config.method == "lora" and config.ensemble == 1  # saved beside the model: PPO can put it on the policy's own base
    for number in range(config.ensemble if config.ensemble_share == "none" else 1):
        trainer = train_model(config, run, tokenizer, sft.product("model"), train=train, heldout=heldout, number=number)
        if adapter and is_main():
            adapted = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            save_adapter(adapted, run.directory / "adapter", hash_path(sft.product("model")))
        models.append(without_adapters(trainer, config))
        steps, skipped = trainer.state.global_step, skipped + trainer.num_skipped
        if config.ensemble > 1:
            del trainer  # and with it the optimizer's state, twice the size of the model
    parameters = sum(shape_of(p).numel() for model in models for p in model.parameters())

    lm, problems, groups = fresh_samples(config, run, tokenizer, heldout, models[0].device)
    ensemble: Ensemble | None = None
    raw: list[list[float]] = []
    judge: Callable[[list[Group]], list[list[float]]] = partial(shared_out, models[0])
    if config.ensemble > 1:
        raw = [of for group in shared_out(models, groups, members_groups) for of in group]
        ensemble = build_ensemble(models, raw, combination=config.combination, std_coef=config.std_coef)
        judge = partial(shared_out, ensemble, function=combined_groups)
    ranks, keys = [r["ranks"] for r in heldout], [tuple(r["prompt_ids"]) for r in heldout]
    held = judge([(r["prompt_ids"], r["response_ids"]) for r in heldout])
    fresh = combined_groups(ensemble, groups, raw) if ensemble else judge(groups)
    metrics = quality(held, ranks, "heldout", keys, {
        "annotator": [r["annotator"] for r in heldout], "criterion": [r.get("criterion") or "overall" for r in heldout],
        "source": [str((r.get("origin") or {}).get("model", "unknown")) for r in heldout]})
    flat = [score for group in fresh for score in group]
    mean, std = mean_and_std(flat)
    unit = [(score - mean) / std for score in flat]
    metrics |= {"score_mean": metric(math.fsum(unit) / len(unit), n=len(unit)),
                "score_std": metric(math.sqrt(math.fsum(s * s for s in unit) / len(unit)), n=len(unit))}
    bins = {"heldout": reliability(held, ranks)}
    if problems:
        measured, gold = measure_fresh(judge, fresh, std, lm, tokenizer, problems, groups)
        bins["fresh"] = reliability(fresh, gold)
    else:
        lengths = [[len(ids) for ids in r["response_ids"]] for r in heldout]
        measured = shortcuts(held, ranks, [r["responses"] for r in heldout], lengths, keys,
                             train=([r["responses"] for r in train], [r["ranks"] for r in train]))
    metrics |= measured
    if ensemble:
        metrics["member_disagreement"] = metric(ensemble.disagreement(raw), n=len(raw))
        if is_main():
            write_ensemble(ensemble, run.directory / "model")
        models[0] = plain_model(ensemble, raw)
    else:
        set_normalization(models[0], flat)
    if config.method == "full" and not ensemble:
        export(trainer, tokenizer, run.directory / "model")
    for number, model in enumerate(models if config.method != "full" or ensemble else []):
        save_model(model, tokenizer, run.directory / "model" / (f"members/{number}" if number else "."))
    barrier()
    if is_main():
        show(run.directory, bins)
    for name in ("heldout_accuracy", "fresh_accuracy", "baseline_min_logprob_accuracy", "baseline_length_accuracy"):
        if name in metrics:
            low, high = metrics[name]["ci95"]
            say(f"{name}: {metrics[name]['value']:.3f} [{low:.3f}, {high:.3f}], {metrics[name]['n']:,} pairs")
    return run.finish(metrics=metrics, products={"model": "model"} | (
        {"adapter": "adapter"} if adapter else {}), notes={
        "simulated_annotator": simulated, "reliability": {name: [b._asdict() for b in of] for name, of in bins.items()}}, counts={
        "parameters": parameters, "steps": steps, "skipped_steps": skipped, "flops": ranking_flops(
            lm.config, train, passes=steps * config.batch_size / len(train), share_prompts=config.share_prompts,
            adapters=config.method == "lora", members=config.ensemble if config.ensemble_share == "none" else 1),
        "train_prompts": len(train),
        "train_responses": sum(len(r["ranks"]) for r in train), "heldout_prompts": len(heldout)})


def by_criterion(records: list[dict], criterion: str | None) -> list[dict]:
    """The rankings by one criterion, or by `all`. Raises ValueError where it is not told which of several, or where there is none by it."""
    found = sorted({r.get("criterion") or "overall" for r in records})
    if criterion == "all":
        return records
    if criterion is None and len(found) > 1:
        raise ValueError(f"the preferences are by several criteria ({', '.join(found)}), which contradict one another in one reward model: "
                         "set criterion to one of them and give each a run_dir of its own, or to all")
    if criterion is not None and criterion not in found:
        raise ValueError(f"no ranking is by the criterion {criterion!r}: there are {', '.join(found)}")
    return [r for r in records if criterion in (None, r.get("criterion") or "overall")]


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


def fresh_samples(config: RewardModelConfig, run: Run, tokenizer, heldout: list[dict], device) -> tuple[Any, list[dict], list[Group]]:
    """The SFT model, validation problems, and new samples of it for each, as PPO will draw them.

    Where the preferences came from a file there is no gold score and no problem: held-out prompts are sampled, for the
    normalisation alone.
    """
    source = run.parents["preferences"].config
    load_whole_models()
    lm = AutoModelForCausalLM.from_pretrained(trusted(run.parents["sft"].product("model")), dtype=torch.float32).to(device)
    problems: list[dict[str, Any]] = []
    if source["source"] is None:
        path = run.parents["prepare"].product("problems") / "validation.jsonl"
        problems = read_problems(path, source["tasks"], source["difficulties"])[:config.fresh_problems]
        names = [p["id"] for p in problems]
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": user_turn(p["question"], WORKED)}], ask=True) for p in problems]
    else:
        prompts, names = ([r[key] for r in heldout[:config.fresh_problems]] for key in ("prompt_ids", "id"))
    drawn = draw_responses(lm, prompts, names, samples=config.fresh_samples, seed=config.seed + 1, temperature=config.fresh_temperature,
                           max_new_tokens=source["max_new_tokens"], eos_ids=stop_ids(lm), pad_id=tokenizer.pad_token_id)
    return lm, problems, list(zip(prompts, drawn, strict=True))


def show(directory: Path, bins: dict[str, list[Bin]]) -> None:
    """Curves of training, and how often pairs are ordered right at each confidence; on the diagonal a score can be taken at its word."""
    logged = read_metrics(directory / "metrics.jsonl")
    figures.lines(directory / "figures" / "accuracy.png", {
        label: ([r["step"] for r in logged if key in r], [r[key] for r in logged if key in r])
        for label, key in (("training", "train/accuracy"), ("held out", "heldout/accuracy"))}, x="step", y="pairwise accuracy")
    figures.plot(directory / "figures" / "calibration.png", [
        figures.Series(name, [b.confidence for b in of], [b.right for b in of]) for name, of in bins.items()],
        x="confidence, sigmoid of the score difference", y="pairs ordered right", diagonal=True)


if __name__ == "__main__":
    launch(main, RewardModelConfig)
