"""Improve the tuned model by PPO with a critic, for the scores of the reward model, and measure what that did.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.ppo --config recipes/tiny/ppo.yaml
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from stages.data.curriculum import user_turn
from stages.data.problems import read_problems
from stages.data.tokenizer import chat_ids
from stages.models.training import barrier, fit, save_model, training_arguments, world_size
from stages.rl.measure import differences, measure, summarise
from stages.rl.models import PolicyWithCritic
from stages.rl.rewards import build_reward, gold_scores
from stages.rl.trainer import PpoSettings, PPOTrainer
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import Manifest, Run, is_main, say


@dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    STAGE = "ppo"
    PARENTS = ("prepare", "sft", "reward_model")

    tasks: list[str] = option([], "tasks of the problems (default: all)")
    difficulties: list[int] = option([], "difficulties of the problems (default: all)")
    style: Literal["worked", "direct"] = option("worked", "which answers the prompts ask for")
    reward: dict[str, float] = option({"model": 1.0}, "sources of the score and weights: `model`, module:function, or a model's folder")
    iterations: int = option(40, "rollouts; each is learned from in epochs x minibatches steps")
    rollout_batch: int = option(192, "responses an iteration, over all processes")
    epochs: int = option(1, "passes over an iteration's responses")
    minibatches: int = option(4, "optimizer steps a pass")
    micro_batch_size: int = option(48, "responses a forward pass and process")
    learning_rate: float = option(1e-4, "of the policy")
    critic_learning_rate: float = option(3e-4, "of the critic")
    critic_warmup: int = option(0, "iterations in which the critic learns alone")
    schedule: Literal["linear", "constant"] = option("linear", "linear: both learning rates fall to zero over the run")
    kl_coef: float = option(0.05, "price of a nat of KL to the reference, in scores")
    kl_target: float | None = option(None, "nats a response that an adaptive kl_coef aims at (default: fixed)")
    gamma: float = option(1.0, "discount a token")
    lam: float = option(0.95, "lambda of the advantage estimates")
    cliprange: float = option(0.2, "clipping of the probability ratio")
    cliprange_value: float = option(0.2, "clipping of the value around the old one, in scores: how far it moves in one iteration")
    vf_coef: float = option(0.5, "weight of the value loss")
    max_grad_norm: float = option(1.0, "gradient norm of each model")
    temperature: float = option(1.0, "of the sampling")
    max_new_tokens: int = option(96, "longest response")
    missing_eos_penalty: float | None = option(-1.0, "score of a response that does not end (null: keep its score)")
    value_trunk: Literal["separate", "shared"] = option("separate", "critic from the reward model, or a value head on the policy")
    save_iterations: int = option(5, "iterations between checkpoints")
    eval_problems: int = option(300, "validation problems measured before and after")
    eval_samples: int = option(4, "draws for each of them")


def main(config: PpoConfig) -> Manifest:
    check(config)
    run = Run(config)
    if run.finished:
        return run.manifest
    source = run.parents["sft"].product("model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stops = policy.config.eos_token_id
    eos_ids = tuple(stops) if isinstance(stops, list) else (stops,)
    pad_id = tokenizer.pad_token_id
    settings = PpoSettings(
        rollout_batch=config.rollout_batch, epochs=config.epochs, minibatches=config.minibatches, micro_batch=config.micro_batch_size,
        critic_learning_rate=config.critic_learning_rate, critic_warmup=config.critic_warmup, linear_decay=config.schedule == "linear",
        gamma=config.gamma, lam=config.lam, cliprange=config.cliprange, cliprange_value=config.cliprange_value, vf_coef=config.vf_coef,
        kl_target=config.kl_target, missing_eos_penalty=config.missing_eos_penalty, max_new_tokens=config.max_new_tokens,
        eos_ids=eos_ids, pad_id=pad_id, seed=config.seed)
    accumulation = settings.accumulation(world_size())
    folder = run.parents["prepare"].product("problems")
    prompts = read(folder / "ppo.jsonl", config, tokenizer, limit=config.iterations * config.rollout_batch)
    held_out = read(folder / "validation.jsonl", config, tokenizer, limit=config.eval_problems)
    check_lengths([*prompts, *held_out], config, policy)
    say(f"ppo: {len(prompts):,} problems to learn from, {len(held_out)} to measure on; {config.iterations} iterations of "
        f"{config.rollout_batch} responses, {settings.steps_per_iteration} steps each")

    scorer = run.parents["reward_model"].product("model")
    critic = None
    if config.value_trunk == "separate":
        critic = AutoModelForSequenceClassification.from_pretrained(scorer, num_labels=1, dtype=torch.float32)
    model = PolicyWithCritic(policy, critic, temperature=config.temperature, kl_coef=config.kl_coef)
    arguments = TrainingArguments(**training_arguments(
        run, seed=config.seed, report_to=config.report_to, logging_steps=settings.steps_per_iteration, logging_first_step=False,
        save_steps=config.save_iterations * settings.steps_per_iteration, max_steps=config.iterations * settings.steps_per_iteration,
        per_device_train_batch_size=config.micro_batch_size, gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate, max_grad_norm=config.max_grad_norm, weight_decay=0.0))
    reward = build_reward(config.reward, model_path=scorer, vocab_size=policy.config.vocab_size, device=arguments.device)
    trainer = PPOTrainer(model, arguments, settings, prompts=prompts, reward=reward, tokenizer=tokenizer, judge=gold_scores)

    def look() -> dict[str, list[float]]:
        return measure(model, trainer.reference, tokenizer, held_out, reward=reward, samples=config.eval_samples, seed=config.seed + 1,
                       max_new_tokens=config.max_new_tokens, eos_ids=eos_ids, pad_id=pad_id)

    before = look()
    report("before", before)
    fit(trainer)
    after = look()
    report("after", after)

    if is_main():
        save_model(model.policy, tokenizer, run.directory / "model")
        if model.critic is not None:
            save_model(model.critic, tokenizer, run.directory / "critic")
        elif model.value_head is not None:
            (run.directory / "critic").mkdir(exist_ok=True)
            safetensors.torch.save_file(model.value_head.state_dict(), run.directory / "critic" / "value_head.safetensors")
        show(run.directory)
    barrier()
    gains = differences(before, after)
    metrics = summarise(before, "before") | summarise(after, "after") | summarise(gains, "gain")
    return run.finish(metrics=metrics, products={"model": "model", "critic": "critic"}, counts={
        "responses": config.iterations * config.rollout_batch, "tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step, "parameters": sum(p.numel() for p in model.parameters())})


def read(path: Path, config: PpoConfig, tokenizer, *, limit: int) -> list[tuple[dict, list[int]]]:
    """The first `limit` problem rows of the tasks and difficulties asked for, with the token ids of their prompts."""
    rows = read_problems(path, config.tasks, config.difficulties)[:limit]
    return [(r, chat_ids(tokenizer, [{"role": "user", "content": user_turn(r["question"], config.style)}], ask=True)) for r in rows]


def check(config: PpoConfig) -> None:
    for name, smallest in (("iterations", 1), ("rollout_batch", 1), ("epochs", 1), ("minibatches", 1), ("micro_batch_size", 1),
                           ("save_iterations", 1), ("eval_problems", 2), ("eval_samples", 1)):
        if getattr(config, name) < smallest:
            raise ValueError(f"{name} is {getattr(config, name)}: set it to {smallest} or more")
    if config.temperature <= 0:
        raise ValueError(f"temperature is {config.temperature}: PPO learns from samples, so set it above 0, usually to 1")


def check_lengths(prompts: list[tuple[dict, list[int]]], config: PpoConfig, policy) -> None:
    longest, context = max(len(ids) for _, ids in prompts), policy.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise ValueError(f"the longest prompt has {longest} tokens, which leaves {context - longest} of the model's context of {context}: "
                         f"set max_new_tokens to that or less, not {config.max_new_tokens}")


def report(group: str, values: dict[str, list[float]]) -> None:
    def text(m: dict) -> str:
        return f"{m['value']:.3f}" + (f" [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]" if "ci95" in m else "")

    measured = {name.split("/")[1]: m for name, m in summarise(values, group).items()}
    say(f"{group} (n={len(values['gold'])}): " + "  ".join(f"{name} {text(m)}" for name, m in measured.items()))


def show(directory: Path) -> None:
    logged = read_metrics(directory / "metrics.jsonl")
    axes = (("scores", "step", "step"), ("scores-against-kl", "objective/kl", "KL to the start (nats a response)"))
    for name, column, label in axes:
        x = [row[column] for row in logged]
        figures.lines(directory / "figures" / f"{name}.png", {
            legend: (x, [row[key] for row in logged]) for legend, key in
            (("reward (proxy)", "objective/score"), ("gold score", "objective/gold"), ("sampled accuracy", "objective/accuracy"))},
            x=label, y="mean of an iteration")


if __name__ == "__main__":
    launch(main, PpoConfig)
