"""The simplest way to learn from a reward: sample K responses a prompt, keep the best, fine-tune on them, and again. PPO's baseline.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.rejection_sampling --config recipes/tiny/rejection_sampling.yaml
"""
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prompts.templates import BENCHMARK_CUES
from reward.folders import trusted
from stages.data.curriculum import CUES
from stages.models import adapters
from stages.models.attention import speed_up
from stages.models.counts import count_parameters, train_flops_per_token
from stages.models.finetuning import DialogueCollator, TuningConfig, tune
from stages.models.forgetting import STEP_IN_FORWARDS, Neutral, Watch, base_text
from stages.models.responses import draw_responses, stop_ids
from stages.models.training import barrier, export, gather, save_model
from stages.models.verdict import forgotten
from stages.rl.costs import cost_table, price, score_table, spent, totals
from stages.rl.gating import pass_gate
from stages.rl.measure import differences, measure, report, reward_drift, summarise
from stages.rl.models import remove_dropout
from stages.rl.questions import QuestionConfig, asked, check_lengths, check_questions, embedded_problems, fitting, own_problems
from stages.rl.rewards import Reward, build_reward, needs_model, scorers
from stages.rl.rollouts import draws
from stages.rl.selection import dialogues, sift
from stages.run import figures
from stages.run.config import option
from stages.run.console import progress
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, hash_data, is_main, say, write_json

LOOKS, WATCH_SHARE = 2, 0.1  # looks at watched dialogues and base corpus while a round is learned, and their share of its work


@dataclass(frozen=True, kw_only=True)
class RejectionSamplingConfig(TuningConfig, QuestionConfig):
    STAGE = "rejection_sampling"
    PARENTS = ("prepare", "sft", "reward_model")

    rounds: int = option(2, "times to sample, keep and fine-tune")
    prompts_per_round: int = option(480, "prompts sampled in a round, over all processes")
    samples_per_prompt: int = option(8, "K: responses of which the best are kept; equal ones are kept once")
    keep: int = option(1, "responses kept of each prompt, at most")
    min_score: float | None = option(None, "keep only responses that score this or more (of a verifier: 1.0; default: any)")
    from_start: bool = option(False, "each round tunes the SFT model anew on all that was kept so far (default: the model of the round "
                              "before, on what this one kept)")
    learning_rate: float | None = option(5e-4, "peak learning rate of each round")
    epochs: float = option(1.0, "passes over the dialogues of a round")
    forgetting_rows: int = option(96, "held-out rows of the base corpus measured before and after (0: none)")
    chunk_prompts: int = option(64, "prompts sampled at a time, over all processes; a killed run continues after the last chunk")


def main(config: RejectionSamplingConfig) -> Manifest:
    check(config)
    own = own_problems(config)
    if not needs_model(config.reward):
        config = replace(config, parents={name: path for name, path in config.parents.items() if name != "reward_model"})
    run = Run(config, inputs={"problems": hash_data([own, BENCHMARK_CUES[config.style]])} if own else {})
    if run.finished:
        return run.manifest
    datasets.disable_progress_bars()
    datasets.disable_caching()  # the cache is keyed by the pickled function, not by what it calls
    prepared, start = run.parents["prepare"], run.parents["sft"].product("model")
    folder = run.parents["reward_model"].product("model") if "reward_model" in run.parents else None
    verdicts = pass_gate(config, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(trusted(start))
    policy = load(start)
    eos_ids, pad_id = stop_ids(policy), tokenizer.pad_token_id
    learned, measured = own or embedded_problems(config, prepared.product("problems"))
    cue = (BENCHMARK_CUES if own else CUES)[config.style]
    asking, held_out = (asked(rows, cue, tokenizer) for rows in (learned[:config.rounds * config.prompts_per_round], measured))
    to_measure = len(held_out)
    if own:
        held_out = fitting(held_out, config, policy, policy.config.max_position_embeddings)
    check_lengths(held_out, config, policy)
    prompts = fitting(asking, config, policy, config.max_length)
    too_long = len(asking) - len(prompts)
    reward = build_reward(config.reward, model_path=folder, vocab_size=policy.config.vocab_size, device=policy.device,
                          tokenizer=tokenizer)
    judges = [AutoConfig.from_pretrained(trusted(path)) for path in scorers(config.reward, folder)]
    say(f"rejection_sampling: {len(prompts):,} problems to learn from ({too_long} left out, too long), {len(held_out)} to measure on "
        f"({to_measure - len(held_out)} left out); "
        f"{config.rounds} rounds of {config.prompts_per_round} prompts x {config.samples_per_prompt} responses")

    neutral = base_text(prepared, policy, tokenizer, rows=config.forgetting_rows, pad_id=pad_id)

    def look(model: PreTrainedModel) -> dict[str, list[float]]:
        return measure(model, policy, tokenizer, held_out, reward=reward, samples=config.eval_samples, seed=config.seed + 1,
                       temperature=config.temperature, max_new_tokens=config.max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)

    before = look(policy)
    report("before", before)
    rounds: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    metrics: dict[str, dict] = {}
    path = start
    for number in range(1, config.rounds + 1):
        place = run.directory / f"round-{number}"
        sifted = sample_round(config, place, path, prompts, number, tokenizer, reward, eos_ids)
        kept = [*kept, *sifted] if config.from_start else sifted
        trained = tune_round(config, place, start if config.from_start else path, kept, tokenizer, neutral, number)
        rounds.append(spent(sifted, trained, policy.config, judges))
        metrics |= summarise({name: [row[name] for row in sifted] for name in ("score", "best_score", "gold", "accuracy")}
                             | {"kept_rate": [float(bool(row["kept"])) for row in sifted]}, f"round-{number}")
        say(score_table(rounds))
        path = place / "model"

    product = load(path)
    after = look(product)
    report("after", after)
    gains = differences(before, after)
    metrics |= summarise(before, "before") | summarise(after, "after") | summarise(gains, "gain") | reward_drift(before, after)
    if neutral:
        metrics |= forgotten(neutral.before, neutral.look(product))
    say(cost_table(rounds))
    counts = totals(rounds) | {"prompts_too_long": too_long, "held_out_too_long": to_measure - len(held_out),
                              "parameters": count_parameters(product)["total"]}
    say(price(metrics["gain/gold"]["value"], counts))
    if is_main():
        shutil.copytree(path, run.directory / "model", dirs_exist_ok=True)
        figures.lines(run.directory / "figures" / "scores.png", {
            label: (list(range(1, len(rounds) + 1)), [of.get(key, math.nan) for of in rounds]) for label, key in
            (("sampled", "score"), ("best of K", "best_score"), ("kept", "kept_score"), ("sampled, gold score", "gold"))},
            x="round", y="mean score")
    barrier()
    return run.finish(metrics=metrics, products={"model": "model"}, counts=counts, notes={"rounds": rounds, **verdicts})


def check(config: RejectionSamplingConfig) -> None:
    check_questions(config, rounds=1, prompts_per_round=2, samples_per_prompt=2, keep=1, chunk_prompts=1)
    if config.keep >= config.samples_per_prompt and config.min_score is None:
        raise ValueError(f"keep {config.keep} of samples_per_prompt {config.samples_per_prompt} rejects nothing: lower keep, raise "
                         "samples_per_prompt, or set min_score")


def load(path: Path) -> PreTrainedModel:
    """A model to sample from and to measure, in float32 as PPO has it."""
    model = remove_dropout(AutoModelForCausalLM.from_pretrained(trusted(path), dtype=torch.float32)).eval()
    speed_up(model)
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]


def sample_round(config: RejectionSamplingConfig, place: Path, model_path: Path, prompts: list[tuple[dict, list[int]]], number: int,
                 tokenizer: Any, reward: Reward, eos_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Every prompt of the round with what was kept of its samples; chunks that are on disk are read back."""
    chosen = draws(number - 1, count=config.prompts_per_round, num_prompts=len(prompts), seed=config.seed)
    if is_main():
        (place / "chunks").mkdir(parents=True, exist_ok=True)
    model, sifted = None, []
    for at in progress(range(0, len(chosen), config.chunk_prompts), f"round {number}: sampling"):
        file = place / "chunks" / f"{at:07d}.json"
        chunk = gather([json.loads(file.read_text(encoding="utf-8")) if is_main() and file.is_file() else None])[0]
        if chunk is None:
            began = time.time()
            model = model or load(model_path)
            part = chosen[at:at + config.chunk_prompts]
            drawn = draw_responses(model, [prompts[i][1] for i, _ in part], [f"{prompts[i][0]['id']}:{draw}" for i, draw in part],
                                   samples=config.samples_per_prompt, seed=config.seed, temperature=config.temperature,
                                   max_new_tokens=config.max_new_tokens, eos_ids=eos_ids, pad_id=tokenizer.pad_token_id)
            rows = sift([prompts[i] for i, _ in part], drawn, tokenizer, reward, eos_ids=eos_ids, keep=config.keep,
                        min_score=config.min_score)
            chunk = {"rows": rows, "seconds": time.time() - began}
            if is_main():
                write_json(file, chunk)
        sifted += [{**row, "seconds": chunk["seconds"] / len(chunk["rows"])} for row in chunk["rows"]]
    return sifted


def tune_round(config: RejectionSamplingConfig, place: Path, base: Path, sifted: list[dict[str, Any]], tokenizer: Any,
               neutral: Neutral | None, number: int) -> dict[str, int | float]:
    """Tune the base on what was kept, save the model in `place`/model, and return what that took; once done it is not done again.

    The seconds are those of the last attempt. Raises ValueError when nothing was kept.
    """
    mark = place / "trained.json"
    done = gather([json.loads(mark.read_text(encoding="utf-8")) if is_main() and mark.is_file() else None])[0]
    if done is not None:
        return done
    learned, watched = dialogues(sifted)
    began = time.time()
    once = sum(len(row["input_ids"]) for row in learned)
    tokens = int(once * config.epochs)
    model: Any = adapters.load_base(base, config)
    stops, peft = model.config.eos_token_id, config.method != "full"
    watch = Watch(place / "watch", validation=watched, sources=["kept"] * len(watched), collator=DialogueCollator(tokenizer.pad_token_id),
                  neutral=neutral, tokens=WATCH_SHARE * STEP_IN_FORWARDS * tokens / (LOOKS + 1))
    drawn_anew = replace(config, seed=config.seed + number)  # adapters that begin alike in each round would move in the same directions
    trainer = tune(model, tokenizer, drawn_anew, run=SimpleNamespace(directory=place), train=learned, watch=watch, evaluations=LOOKS,
                   peft_config=adapters.adapter_config(config, [], model.config.tie_word_embeddings) if peft else None)
    trained: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if config.method == "qlora" and is_main():
        trained.save_pretrained(str(place / "adapter"))
    barrier()
    product = adapters.merged(trained, config, base, place / "adapter", lambda model: None)
    product.config.eos_token_id = product.generation_config.eos_token_id = stops  # not what the tokenizer calls its end
    if peft:
        save_model(product, tokenizer, place / "model")
    else:
        export(trainer, tokenizer, place / "model")
    per_token = train_flops_per_token(product.config, once // len(learned), count_parameters(product))
    took = {"dialogues": len(learned), "trained_tokens": tokens, "steps": trainer.state.global_step,
            "skipped_steps": trainer.num_skipped, "training_s": time.time() - began,
             "training_flops": tokens * per_token * 2 // 3 if peft else tokens * per_token}  # as stages/sft.py
    if is_main():
        write_json(mark, took)
        shutil.rmtree(place / "checkpoints")
    barrier()
    return took


if __name__ == "__main__":
    launch(main, RejectionSamplingConfig)
