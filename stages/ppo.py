"""Improve the tuned model by PPO with a critic, for the scores of the reward model, and measure what that did.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.ppo --config recipes/tiny/ppo.yaml
"""
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from prompts.templates import BENCHMARK_CUES
from reward.alarms import Limits
from reward.folders import trusted
from stages.data.curriculum import CUES
from stages.data.packing import PackedCollator
from stages.data.problems import read_problems
from stages.data.tokenizer import document_end
from stages.evals.battery import changes, exam, summary
from stages.models.engines import gathered, load_whole_models
from stages.models.forgetting import base_text
from stages.models.training import TrainingConfig, barrier, fit, save_model, training_arguments, world_size
from stages.models.verdict import forgotten
from stages.rl.adapters import CRITIC, POLICY, REWARD, adapt, add_classifier, reward_adapter, save_adapters
from stages.rl.alarms import Watch, build_watchers
from stages.rl.costs import ppo_flops, price
from stages.rl.curves import compare, draw_best_of_n, show
from stages.rl.gating import pass_gate
from stages.rl.generation import check_engine
from stages.rl.measure import differences, measure, report, reward_drift, summarise
from stages.rl.models import PolicyWithCritic
from stages.rl.questions import QuestionConfig, asked, check_lengths, check_questions, embedded_problems, fitting, own_problems
from stages.rl.rewards import build_reward, gold_scores, load_critic, needs_model, scorers
from stages.rl.rollouts import draws
from stages.rl.trainer import PpoSettings, PPOTrainer
from stages.run.config import fill, option
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, Run, hash_data, hash_path, is_main, say, write_json

SHOWN = 4  # questions whose answers are shown as the policy changes
BEST_OF_PROBLEMS = 100  # of those measured, for the curve of best-of-n


@dataclass(frozen=True, kw_only=True)
class PpoConfig(QuestionConfig, TrainingConfig):
    STAGE = "ppo"
    PARENTS = ("prepare", "sft", "reward_model")

    # Rollout. More under QuestionConfig: reward, temperature, max_new_tokens. docs/ppo.md has the source of each default.
    iterations: int = option(40, "rollouts; each is learned from in epochs x minibatches steps")
    rollout_batch: int = option(192, "responses an iteration, over all processes")
    stop_strings: list[str] = option([], "texts that end a response as its end token does")
    rollout_engine: Literal["transformers", "vllm"] = option("transformers", "what samples; vllm wants `pip install trl[vllm]` and a GPU")
    vllm_mode: Literal["colocate", "server"] = option("colocate", "vLLM in each process, or as a server", recorded_only=True)
    vllm_server_url: str = option("http://localhost:8000", "of the server, with vllm_mode server", recorded_only=True)
    vllm_gpu_memory: float = option(0.3, "share of each GPU that vLLM takes, with vllm_mode colocate", recorded_only=True)
    # Reward, in this order: score, PAR or clipping, length, missing end, and the KL a token.
    score_clip: float | None = option(None, "scores are held within +- this")
    par_samples: int = option(0, "above 0: PAR, the score as the chance of being preferred to so many responses of the reference")
    length_penalty: float = option(0.0, "price of a token, in scores")
    missing_eos_penalty: float | None = option(-1.0, "score of a response that does not end (null: keep its score)")
    kl_coef: float = option(0.05, "price of a nat of KL to the reference (k1), in scores")
    kl_target: float | None = option(None, "nats a response that an adaptive kl_coef aims at (default: fixed)")
    kl_horizon: float = option(10_000, "responses in which an adaptive kl_coef changes by what its error is, 20 % at most")
    kl_limit: float | None = option(500.0, "nats a response at which the run saves and stops (null: never)", recorded_only=True)
    gamma: float = option(1.0, "discount a token")
    lam: float = option(0.95, "lambda of the advantage estimates")
    # Loss.
    cliprange: float = option(0.2, "clipping of the probability ratio")
    cliprange_value: float = option(0.2, "clipping of the value around the old one, in scores: how far it moves in one iteration")
    vf_coef: float = option(0.5, "weight of the value loss")
    kl_loss_coef: float = option(0.0, "weight of k2, the KL to the reference in the loss (with kl_coef: 0 there alone)")
    ptx_coef: float = option(0.0, "weight of the loss on prepare's corpus, a packed row for each response (PPO-ptx)")
    value_trunk: Literal["separate", "shared", "adapter"] = option("separate", "critic from the reward model, a value head on the policy, "
                                                                   "or (method lora) an adapter of its own on the policy's base")
    # What trains of the policy.
    method: Literal["full", "lora"] = option("full", "full: all weights; lora: adapters on all linear layers of the frozen SFT model, "
                                             "which is the reference, too")
    lora_rank: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "scale of the adapters")
    # Optimiser.
    epochs: int = option(1, "passes over an iteration's responses")
    minibatches: int = option(4, "optimizer steps a pass")
    micro_batch_size: int = option(48, "responses a forward pass and process")
    learning_rate: float = option(1e-4, "of the policy")
    critic_learning_rate: float = option(3e-4, "of the critic")
    critic_warmup: int = option(0, "iterations in which the critic learns alone")
    schedule: Literal["linear", "constant"] = option("linear", "linear: both learning rates fall to zero over the run")
    max_grad_norm: float = option(1.0, "gradient norm of each model")
    save_iterations: int = option(5, "iterations between checkpoints")
    on_alarm: Literal["warn", "stop", "rollback"] = option("warn", "signs of reward hacking: warn, stop there, or stop and go back to the "
                                                           "best checkpoint (docs/reward-hacking.md)")
    alarm_limits: dict[str, float | None] = option({}, "thresholds of alarms other than their own, such as {kl: 20}; null turns one off")
    second_reward: str | None = option(None, "folder of a reward model that scores without rewarding: an alarm where its scores fall",
                                       recorded_only=True)
    sample_iterations: int = option(10, "iterations between tables of a few fixed questions' answers (0: none)", recorded_only=True)
    forgetting_rows: int = option(96, "held-out rows of the base corpus measured before and after, the alignment tax (0: none)")
    probe_prompts: int = option(200, "validation problems of all tasks answered greedily before and after, the same (0: none)")
    best_of: int = option(8, "samples a problem for the curve of best-of-n at equal KL, of the start (0: none)")


def main(config: PpoConfig) -> Manifest:
    check_questions(config, iterations=1, rollout_batch=1, epochs=1, minibatches=1, micro_batch_size=1, save_iterations=1,
                    sample_iterations=0, best_of=0)
    if config.value_trunk == "adapter" and config.method != "lora":
        raise ValueError("value_trunk adapter puts the critic on the policy's frozen base: set method to lora, or value_trunk to separate")
    check_engine(config.rollout_engine, config.method)
    limits = Limits(**fill(Limits, config.alarm_limits, where="alarm_limits"))
    config = without_reward_model(config)
    own = own_problems(config)
    run = Run(config, inputs=({"problems": hash_data([own, BENCHMARK_CUES[config.style]])} if own else {}) | (
        {"second_reward": hash_path(Path(config.second_reward))} if config.second_reward else {}))
    if run.finished:
        return run.manifest
    source = run.parents["sft"].product("model")
    scorer = run.parents["reward_model"].product("model") if "reward_model" in run.parents else None
    notes = pass_gate(config, scorer)
    tokenizer = AutoTokenizer.from_pretrained(trusted(source))
    policy = AutoModelForCausalLM.from_pretrained(trusted(source), dtype=torch.float32)
    stops = policy.config.eos_token_id
    eos_ids = tuple(stops) if isinstance(stops, list) else (stops,)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]  # masks come from lengths
    same = {field.name: getattr(config, field.name) for field in fields(PpoSettings) if hasattr(config, field.name)}
    settings = PpoSettings(**same | {"stop_strings": tuple(config.stop_strings)}, micro_batch=config.micro_batch_size,
                           linear_decay=config.schedule == "linear", eos_ids=eos_ids, pad_id=pad_id)
    accumulation = settings.accumulation(world_size())
    learned, measured = own or embedded_problems(config, run.parents["prepare"].product("problems"))
    cue = (BENCHMARK_CUES if own else CUES)[config.style]
    prompts, held_out = (asked(rows, cue, tokenizer) for rows in (learned[:config.iterations * config.rollout_batch], measured))
    given, to_measure = len(prompts), len(held_out)
    if own:
        prompts, held_out = (fitting(some, config, policy, policy.config.max_position_embeddings) for some in (prompts, held_out))
    check_lengths([*prompts, *held_out], config, policy)
    say(f"ppo: {len(prompts):,} problems to learn from{f' ({given - len(prompts)} left out, too long)' if given > len(prompts) else ''}, "
        f"{len(held_out)} to measure on{f' ({to_measure - len(held_out)} too long)' if to_measure > len(held_out) else ''}; "
        f"{config.iterations} iterations of {config.rollout_batch} responses, {settings.steps_per_iteration} steps each")

    adapters: dict[str, Any] = {"rank": config.lora_rank, "alpha": config.lora_alpha}
    adapted = adapt(policy, **adapters, seed=config.seed) if config.method == "lora" else None
    scoring = reward_adapter(run.parents["reward_model"], source) if adapted and (
        config.value_trunk == "adapter" or "model" in config.reward) else None
    critic: Any = None
    shared = None
    if adapted and scoring and "model" in config.reward:
        shared = add_classifier(adapted, REWARD, scoring, scorer, **adapters, seed=config.seed)
    if adapted and config.value_trunk == "adapter":
        critic = add_classifier(adapted, CRITIC, scoring, scorer, **adapters, seed=config.seed + 1)
    elif config.value_trunk == "separate":
        assert scorer is not None
        critic = load_critic(scorer, vocab_size=policy.config.vocab_size, tokenizer=tokenizer)
    model = PolicyWithCritic(policy, critic, temperature=config.temperature, kl_coef=config.kl_coef)
    arguments = TrainingArguments(**training_arguments(
        run, seed=config.seed, report_to=config.report_to, logging_steps=settings.steps_per_iteration, logging_first_step=False,
        save_steps=config.save_iterations * settings.steps_per_iteration, max_steps=config.iterations * settings.steps_per_iteration,
        per_device_train_batch_size=config.micro_batch_size, gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate, max_grad_norm=config.max_grad_norm, weight_decay=0.0,
        save_total_limit=3))  # the best, the last, and the one before it, until the last is known to be complete
    load_whole_models()
    reward = build_reward(config.reward, model_path=scorer, vocab_size=policy.config.vocab_size, device=arguments.device,
                          tokenizer=tokenizer, shared=shared.to(arguments.device) if shared else None)
    ptx: Any = load_from_disk(str(run.parents["prepare"].product("tokens") / "train")) if config.ptx_coef else ()
    sampling: dict[str, Any] = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens, "eos_ids": eos_ids,
                                "pad_id": pad_id, "stop_strings": config.stop_strings}
    model.to(arguments.device)
    parameters = sum(p.numel() for p in model.parameters())  # before an engine divides them
    watchers = build_watchers(config.reward, limits, model_path=scorer, second=config.second_reward, reference=policy, tokenizer=tokenizer,
                              prompts=prompts, device=arguments.device, vocab_size=policy.config.vocab_size, seed=config.seed + 2,
                              **sampling)
    watch = Watch(limits, config.on_alarm, watchers=watchers, shown=held_out[:SHOWN], every=config.sample_iterations)
    trainer = PPOTrainer(model, arguments, settings, prompts=prompts, reward=reward, tokenizer=tokenizer, judge=gold_scores, watch=watch,
                         ptx=ptx, ptx_collator=PackedCollator(eos_id=document_end(tokenizer), pad_id=pad_id))

    def look() -> dict[str, list[float]]:
        return measure(trainer.whole_policy(), trainer.reference, tokenizer, held_out, reward=reward, samples=config.eval_samples,
                       seed=config.seed + 1, **sampling)

    prepared = run.parents["prepare"]
    probes = read_problems(prepared.product("problems") / "validation.jsonl")[:config.probe_prompts] if config.probe_prompts else []

    def examine() -> dict[str, list[float]]:
        """What the policy could do before, on all the tasks and not only on those that it is rewarded for."""
        return exam(trainer.whole_policy(), tokenizer, chat=True, stop_ids=eos_ids, problems=probes, seed=config.seed,
                    max_new_tokens=config.max_new_tokens) if probes else {}

    before, able = look(), examine()
    neutral = base_text(prepared, trainer.whole_policy(), tokenizer, rows=config.forgetting_rows, pad_id=pad_id)
    report("before", before)
    fit(trainer, config)
    notes |= watch.settle()
    after, still_able = look(), examine()
    report("after", after)
    best = draw_best_of_n(trainer.reference, tokenizer, held_out[:BEST_OF_PROBLEMS], reward=reward, judge=gold_scores,
                          samples=config.best_of, seed=config.seed + 3, **sampling) if config.best_of else None
    curves, compared = compare(watch.rows(), best, notes["kept_step"] + settings.steps_per_iteration)

    products = {"model": "model", "critic": "critic", "overoptimization": "overoptimization.json"}
    if adapted:
        products["adapter"] = "adapter"
        if is_main():
            save_adapters(adapted, critic, run.directory, source)
        adapted.merge_and_unload(adapter_names=[POLICY])
    valued: Any = model.critic if config.value_trunk == "separate" else model.value_head
    policy_state, critic_state = gathered(model.policy), gathered(valued) if valued is not None else {}
    if is_main():
        save_model(model.policy, tokenizer, run.directory / "model", state_dict=policy_state)
        if config.value_trunk == "separate":
            save_model(critic, tokenizer, run.directory / "critic", state_dict=critic_state)
        elif model.value_head is not None:
            (run.directory / "critic").mkdir(exist_ok=True)
            safetensors.torch.save_file(critic_state, run.directory / "critic" / "value_head.safetensors")
        write_json(run.directory / "overoptimization.json", curves)
        show(run.directory)
    barrier()
    gains = differences(before, after)
    metrics = summarise(before, "before") | summarise(after, "after") | summarise(gains, "gain") | reward_drift(before, after) | compared
    metrics |= summary(able, "before") | summary(still_able, "after") | changes(able, still_able)
    metrics |= forgotten(neutral.before, neutral.look(trainer.whole_policy())) if neutral else {}
    for name in able:
        if name in ("worked_accuracy", "direct_accuracy") or name.startswith("worked_accuracy/"):
            say(f"{name} on all tasks: {metrics[f'before/{name}']['value']:.3f} before, {metrics[f'after/{name}']['value']:.3f} after")
    asked_of = [prompts[i][1] for iteration in range(trainer.state.global_step // settings.steps_per_iteration) for i, _ in
                draws(iteration, count=config.rollout_batch, num_prompts=len(prompts), seed=config.seed)]
    load_whole_models()  # the counts are those of models on the meta device
    tokens = trainer.state.num_input_tokens_seen
    judges = [AutoConfig.from_pretrained(trusted(path)) for path in scorers(config.reward, scorer)]
    counts = {"responses": len(asked_of), "prompts_too_long": given - len(prompts), "held_out_too_long": to_measure - len(held_out),
              "tokens": tokens, "steps": trainer.state.global_step, "parameters": parameters,
              "skipped_steps": trainer.num_skipped,
              "flops": ppo_flops(policy.config, critic.config if critic is not None else None, judges, responses=len(asked_of),
                                 prompt_tokens=sum(map(len, asked_of)), tokens=tokens, epochs=config.epochs,
                                 adapters=config.method == "lora", critic_adapter=config.value_trunk == "adapter",
                                 par_samples=config.par_samples, ptx_row=(row := len(ptx[0]["input_ids"]) if len(ptx) else 1),
                                 ptx_tokens=len(asked_of) * config.epochs * row if len(ptx) else 0)}
    say(price(metrics["gain/gold"]["value"], counts))
    return run.finish(metrics=metrics, products=products, counts=counts, notes=notes)


def without_reward_model(config: PpoConfig) -> PpoConfig:
    """The config without that parent where neither the reward nor the critic reads it. Raises ValueError where the critic alone does and
    there is none."""
    if needs_model(config.reward):
        return config
    if config.value_trunk == "shared":
        return replace(config, parents={name: path for name, path in config.parents.items() if name != "reward_model"})
    if not (Path(config.parents["reward_model"]) / MANIFEST).is_file():
        raise ValueError(f"with value_trunk {config.value_trunk} the critic begins as the reward model, of which "
                         f"{config.parents['reward_model']} has no finished run: set value_trunk to shared, for the reward needs none, "
                         "or run `make reward_model` first")
    return config


if __name__ == "__main__":
    launch(main, PpoConfig)
