"""Improve the tuned model by PPO with a critic, for the scores of the reward model, and measure what that did.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.ppo --config recipes/tiny/ppo.yaml
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from prompts.templates import BENCHMARK_CUES
from stages.data.curriculum import CUES
from stages.data.problems import load_problems, read_problems, split_spec
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
from stages.run.manifest import Manifest, Run, hash_data, is_main, say


@dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    STAGE = "ppo"
    PARENTS = ("prepare", "sft", "reward_model")

    problems: str | None = option(None, "problems of your own: [name=]format:source such as gsm8k:data/train.jsonl or a hub id (its "
                                  "train split); the last eval_problems are held out (default: prepare's)", recorded_only=True)
    tasks: list[str] = option([], "tasks of prepare's problems (default: all)")
    difficulties: list[int] = option([], "difficulties of prepare's problems (default: all)")
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
    eval_problems: int = option(300, "problems measured before and after, of prepare's validation split or held out of your own")
    eval_samples: int = option(4, "draws for each of them")


def main(config: PpoConfig) -> Manifest:
    check(config)
    own = own_problems(config)
    run = Run(config, inputs={"problems": hash_data([own, BENCHMARK_CUES[config.style]])} if own else {})
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
    learned, measured = own or embedded_problems(config, run.parents["prepare"].product("problems"))
    cue = (BENCHMARK_CUES if own else CUES)[config.style]
    prompts, held_out = (asked(rows, cue, tokenizer) for rows in (learned[:config.iterations * config.rollout_batch], measured))
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


def own_problems(config: PpoConfig) -> tuple[list[dict], list[dict]] | None:
    """The user's problems to learn from and, the last `eval_problems` of them, to measure on; None without any.

    A question that is held out is not learned from, however often it is there. Benchmarks are judged by answer and form: their
    worked lines are free text, which no response repeats word for word. Raises ValueError when too few are left to learn from.
    """
    if config.problems is None:
        return None
    steps = split_spec(config.problems)[1] == "problems"
    rows = [row if steps else {**row, "solutions": []} for row in load_problems(config.problems, hub_split="train")]
    measured = rows[-config.eval_problems:]
    held_out = {row["question"] for row in measured}
    learned = [row for row in rows[:-config.eval_problems] if row["question"] not in held_out]
    if not learned:
        raise ValueError(f"{config.problems} has {len(rows)} problems, of which eval_problems {config.eval_problems} leave none to learn "
                         f"from: set eval_problems lower")
    return learned, measured


def embedded_problems(config: PpoConfig, folder: Path) -> tuple[list[dict], list[dict]]:
    """prepare's problems to learn from, and those of its validation split to measure on."""
    learned, measured = (read_problems(folder / f"{split}.jsonl", config.tasks, config.difficulties) for split in ("ppo", "validation"))
    return learned, measured[:config.eval_problems]


def asked(rows: list[dict], cue: str, tokenizer) -> list[tuple[dict, list[int]]]:
    """The rows with the token ids of their prompts."""
    return [(r, chat_ids(tokenizer, [{"role": "user", "content": f"{r['question']} {cue}"}], ask=True)) for r in rows]


def check(config: PpoConfig) -> None:
    for name, smallest in (("iterations", 1), ("rollout_batch", 1), ("epochs", 1), ("minibatches", 1), ("micro_batch_size", 1),
                           ("save_iterations", 1), ("eval_problems", 2), ("eval_samples", 1)):
        if getattr(config, name) < smallest:
            raise ValueError(f"{name} is {getattr(config, name)}: set it to {smallest} or more")
    if config.problems is not None and (config.tasks or config.difficulties):
        raise ValueError(f"tasks and difficulties choose among prepare's problems: leave them out (tasks: [], difficulties: []) with "
                         f"problems {config.problems}")
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
    axes: list[tuple[str, str, str, Literal["line", "points"]]] = [
        ("scores", "step", "step", "line"), ("scores-against-kl", "objective/kl", "KL to the start (nats a response)", "points")]
    for name, column, label, look in axes:
        figures.plot(directory / "figures" / f"{name}.png", [
            figures.Series(legend, [row[column] for row in logged], [row[key] for row in logged], look=look) for legend, key in
            (("reward (proxy)", "objective/score"), ("gold score", "objective/gold"), ("sampled accuracy", "objective/accuracy"))],
            x=label, y="mean of an iteration")


if __name__ == "__main__":
    launch(main, PpoConfig)
