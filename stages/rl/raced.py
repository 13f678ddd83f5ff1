"""One trainer on one reward until the gold score is high enough: this project's PPO, or a peer's on the same models and questions.

    python -m stages.rl.raced critic '{"sft": "runs/tiny/sft/model", "reward_model": "runs/tiny/reward_model/model", ...}'

For `make study-ppo-peers` (stages/evals/study_ppo_peers.py, which says what is held equal), which runs TRL's last PPO in an interpreter
with that TRL: each trainer is imported where it is made. Prints one JSON line.
"""
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import trl
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from reward.model import score_ids
from reward.verifiers import STEP_WEIGHT
from stages.data.curriculum import CUES, WORKED
from stages.data.problems import read_problems
from stages.rl.measure import answers
from stages.rl.questions import asked
from stages.rl.rewards import gold_scores
from stages.run.entry import run_program

BEST = 1.0 + STEP_WEIGHT  # the highest gold score: the answer right, and every step
IN_SUCCESSION = 2  # evaluations that must be at the threshold or above it; the first of them counts
EVAL_SEED = 1000  # of the draws of the held-out problems: the same noise at each evaluation of each run


class Terms(NamedTuple):
    """What is the same for all trainers, and the run's own learning rate and seed. `share`: of the way from the start's gold score to
    the highest there is, at which the threshold lies. `iterations`: the most that a run has. `generations`: GRPO's a question."""

    sft: str
    reward_model: str
    problems: str  # folder with ppo.jsonl and validation.jsonl
    learning_rate: float
    seed: int
    share: float
    iterations: int
    batch_size: int = 64
    epochs: int = 4
    minibatches: int = 4
    max_new_tokens: int = 96
    generations: int = 8
    kl_coef: float = 0.05
    vf_coef: float = 0.5
    tasks: Sequence[str] = ("word_problems",)
    difficulties: Sequence[int] = (3, 4, 5)
    eval_problems: int = 300

    @property
    def micro_batch(self) -> int:
        return self.batch_size // self.minibatches

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.epochs * self.minibatches


class Clock:
    """Wall and processor seconds of this process, of the stretches between `start` and `stop`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def start(self) -> None:
        self.since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter() - self.since[0]
        self.cpu += time.process_time() - self.since[1]


class Reached(Exception):
    """Leaves a trainer whose own loop would go on: TRL's PPO does not look at `should_training_stop`."""


class Referee(transformers.TrainerCallback):
    """Stops the clock after each iteration of `steps` steps, has the policy measured, and ends the run at the threshold."""

    def __init__(self, look: Callable[[], float], threshold: float, steps: int):
        self.look, self.threshold, self.steps, self.clock, self.history = look, threshold, steps, Clock(), []

    history: list[dict[str, float]]  # of each iteration: gold score after it, seconds up to there

    def on_train_begin(self, *_, **__):
        self.clock.start()

    def on_step_end(self, args, state, control, **__):
        if state.global_step % self.steps:
            return
        self.clock.stop()
        self.history.append({"gold": self.look(), "seconds": self.clock.wall, "cpu_seconds": self.clock.cpu})
        if self.reached is not None:
            raise Reached
        self.clock.start()

    @property
    def reached(self) -> int | None:
        """The iteration (from 1) whose score and the next one's are at the threshold or above it; None without any.

        Of one evaluation alone the sampling decides as soon as a run comes near, and the more often it is measured, the sooner.
        """
        above = [row["gold"] >= self.threshold for row in self.history]
        return next((i + 1 for i in range(len(above) - IN_SUCCESSION + 1) if all(above[i:i + IN_SUCCESSION])), None)


def unit_classifier(path: str) -> Any:
    """The reward model with its normalisation inside the score head, since a peer knows nothing of `score_mean` and `score_std`: its
    plain output is what `stages.rl.rewards.model_reward` makes of it."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    head = nn.Linear(model.score.in_features, 1)
    mean, std = getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    model.score, model.config.score_mean, model.config.score_std = head, 0.0, 1.0
    return model


class Race(NamedTuple):
    """What the trainers are made of: the terms, questions with their prompts' ids, and arguments that all take."""

    terms: Terms
    tokenizer: Any
    asked: list[tuple[dict[str, Any], list[int]]]
    common: dict[str, Any]

    def policy(self) -> Any:
        """The SFT model; its config says no cache, for training, with which `generate` would read all of the text for each token."""
        policy: Any = AutoModelForCausalLM.from_pretrained(self.terms.sft, dtype=torch.float32)
        policy.generation_config.use_cache = True
        return policy


def ours(race: Race, *, shared: bool) -> tuple[Any, Any]:
    from stages.rl.models import PolicyWithCritic
    from stages.rl.rewards import load_critic, model_reward
    from stages.rl.trainer import PpoSettings, PPOTrainer

    terms, tokenizer, policy = race.terms, race.tokenizer, race.policy()
    same: dict[str, Any] = {"vocab_size": policy.config.vocab_size, "tokenizer": tokenizer}
    critic = None if shared else load_critic(Path(terms.reward_model), **same)
    trainer = PPOTrainer(
        PolicyWithCritic(policy, critic, kl_coef=terms.kl_coef),
        TrainingArguments(per_device_train_batch_size=terms.micro_batch, max_steps=terms.iterations * terms.steps, save_steps=terms.steps,
                          remove_unused_columns=False, **race.common),
        PpoSettings(rollout_batch=terms.batch_size, epochs=terms.epochs, minibatches=terms.minibatches, micro_batch=terms.micro_batch,
                    critic_learning_rate=3e-4, linear_decay=False, vf_coef=terms.vf_coef, missing_eos_penalty=None, seed=terms.seed,
                    max_new_tokens=terms.max_new_tokens, eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id),
        prompts=race.asked, tokenizer=tokenizer, reward=model_reward(terms.reward_model, **same))
    return trainer, policy


def trl_ppo(race: Race) -> tuple[Any, Any]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    terms, policy = race.terms, race.policy()
    race.tokenizer.padding_side = "left"
    trainer = PPOTrainer(
        PPOConfig(per_device_train_batch_size=terms.batch_size, num_mini_batches=terms.minibatches, num_ppo_epochs=terms.epochs,
                  total_episodes=terms.iterations * terms.batch_size, response_length=terms.max_new_tokens, stop_token="eos",
                  temperature=1.0, kl_coef=terms.kl_coef, vf_coef=terms.vf_coef, num_sample_generations=0, bf16=False,
                  gradient_checkpointing=False, **race.common),
        race.tokenizer, model=policy, ref_model=race.policy(), reward_model=unit_classifier(terms.reward_model),
        value_model=unit_classifier(terms.reward_model),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for _, ids in race.asked]))
    return trainer, policy


def trl_grpo(race: Race) -> tuple[Any, Any]:
    from trl import GRPOConfig, GRPOTrainer

    terms, policy, judge = race.terms, race.policy(), unit_classifier(race.terms.reward_model)

    def reward(completion_ids: list[list[int]], ids: list[list[int]], **_: Any) -> list[float | None]:
        return [*score_ids(judge, [[*prompt, *response] for prompt, response in zip(ids, completion_ids, strict=True)])]

    chats = [{"prompt": race.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True), "ids": ids}
             for row, ids in race.asked]
    trainer = GRPOTrainer(
        policy, reward, processing_class=race.tokenizer, train_dataset=datasets.Dataset.from_list(chats), args=GRPOConfig(
            per_device_train_batch_size=terms.micro_batch, steps_per_generation=terms.minibatches, num_iterations=terms.epochs,
            num_generations=terms.generations, max_completion_length=terms.max_new_tokens, temperature=1.0, beta=terms.kl_coef,
            max_steps=terms.iterations * terms.steps, bf16=False, gradient_checkpointing=False, **race.common))
    return trainer, policy


def make(variant: str, race: Race) -> tuple[Any, Any]:
    """The trainer and the policy that it trains."""
    if variant in ("critic", "trunk"):
        return ours(race, shared=variant == "trunk")
    return trl_ppo(race) if variant == "trl-ppo" else trl_grpo(race)


def run(variant: str, terms: Terms) -> dict[str, Any]:
    """Train until the threshold or the last iteration. Returns the start's gold score, the threshold, the history, the iteration at
    which it was reached with the seconds up to its end (None where it was not), and how the run ended."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(terms.sft)
    learned, measured = (asked(read_problems(Path(terms.problems) / f"{split}.jsonl", list(terms.tasks), list(terms.difficulties))[:count],
                               CUES[WORKED], tokenizer)
                         for split, count in (("ppo", terms.iterations * terms.batch_size), ("validation", terms.eval_problems)))

    def gold(policy: Any) -> float:
        drawn = answers(policy, tokenizer, measured, 1, seed=EVAL_SEED, temperature=1.0, max_new_tokens=terms.max_new_tokens,
                        eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id)
        return statistics.fmean(each.score for each in gold_scores(drawn))

    transformers.set_seed(terms.seed)
    ended = "the last iteration"
    with tempfile.TemporaryDirectory() as folder:
        trainer, policy = make(variant, Race(terms, tokenizer, learned, {
            "output_dir": folder, "learning_rate": terms.learning_rate, "lr_scheduler_type": "constant", "seed": terms.seed,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no",
            "logging_steps": 10**6}))
        start = gold(policy)
        threshold = start + terms.share * (BEST - start)
        referee = Referee(lambda: gold(policy), threshold, 1 if variant == "trl-ppo" else terms.steps)  # TRL's PPO counts iterations
        trainer.add_callback(referee)
        try:
            trainer.train()
        except Reached:
            ended = "the threshold"
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # what torch says of a policy that is NaN: no sampling from it
                raise
            ended = f"divergence: {error}"
    at = referee.reached
    return {"variant": variant, "start": start, "threshold": threshold, "reached": at, "ended": ended,
            "highest": max((row["gold"] for row in referee.history), default=start),
            **{name: referee.history[at - 1][name] if at else None for name in ("seconds", "cpu_seconds")},
            "history": referee.history, "questions": len(learned), "held_out": len(measured),
            "trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    run_program(lambda argv: print(json.dumps(run(argv[0], Terms(**json.loads(argv[1]))))))
