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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward.folders import trusted
from reward.verifiers import STEP_WEIGHT
from stages.data.curriculum import CUES, WORKED
from stages.data.problems import read_problems
from stages.rl.measure import answers
from stages.rl.peers import Terms, load_policy, our_ppo, trl_grpo, trl_ppo
from stages.rl.questions import asked
from stages.rl.rewards import gold_scores
from stages.run.entry import run_program

BEST = 1.0 + STEP_WEIGHT  # the highest gold score: the answer right, and every step
IN_SUCCESSION = 2  # evaluations that must be at the threshold or above it; the first of them counts
EVAL_SEED = 1000  # of the draws of the held-out problems: the same noise at each evaluation of each run


@dataclass(frozen=True, kw_only=True)
class Race(Terms):
    """What is the same for all trainers, and the run's own learning rate and seed. `share`: of the way from the start's gold score to
    the highest there is, at which the threshold lies. `iterations`: the most that a run has."""

    sft: str
    reward_model: str
    problems: str  # folder with ppo.jsonl and validation.jsonl
    learning_rate: float
    seed: int
    share: float
    iterations: int = 30
    max_new_tokens: int = 96
    vf_coef: float = 0.5
    tasks: Sequence[str] = ("word_problems",)
    difficulties: Sequence[int] = (3, 4, 5)
    eval_problems: int = 300


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
    model: Any = AutoModelForSequenceClassification.from_pretrained(trusted(path), num_labels=1, dtype=torch.float32)
    head = nn.Linear(model.score.in_features, 1)
    mean, std = getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    model.score, model.config.score_mean, model.config.score_std = head, 0.0, 1.0
    return model


def make(variant: str, race: Race, tokenizer: Any, questions: Sequence[tuple[dict[str, Any], list[int]]],
         common: dict[str, Any]) -> tuple[Any, Any]:
    """The trainer and the policy that it trains. `questions`: problem rows with their prompts' ids."""
    policy, ids = load_policy(race.sft, dtype=torch.float32), [ids for _, ids in questions]
    more: dict[str, Any] = {"tokenizer": tokenizer, "common": common}
    if variant == "trl-ppo":
        return trl_ppo(race, policy, load_policy(race.sft, dtype=torch.float32), reward=unit_classifier(race.reward_model),
                       critic=unit_classifier(race.reward_model), ids=ids, response_length=race.max_new_tokens, stop_token="eos",
                       vf_coef=race.vf_coef, **more), policy
    if variant == "trl-grpo":
        chats = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row, _ in questions]
        return trl_grpo(race, policy, unit_classifier(race.reward_model), chats=chats, ids=ids,
                        max_completion_length=race.max_new_tokens, **more), policy
    from stages.rl.rewards import load_critic, model_reward

    same: dict[str, Any] = {"vocab_size": policy.config.vocab_size, "tokenizer": tokenizer}
    critic = None if variant == "trunk" else load_critic(Path(race.reward_model), **same)
    return our_ppo(race, policy, critic, prompts=questions, reward=model_reward(race.reward_model, **same), critic_learning_rate=3e-4,
                   linear_decay=False, vf_coef=race.vf_coef, seed=race.seed, max_new_tokens=race.max_new_tokens,
                   eos_ids=(tokenizer.eos_token_id,), **more), policy


def run(variant: str, race: Race) -> dict[str, Any]:
    """Train until the threshold or the last iteration. Returns the start's gold score, the threshold, the history, the iteration at
    which it was reached with the seconds up to its end (None where it was not), and how the run ended."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(trusted(race.sft))
    learned, measured = (asked(read_problems(Path(race.problems) / f"{split}.jsonl", list(race.tasks), list(race.difficulties))[:count],
                               CUES[WORKED], tokenizer)
                         for split, count in (("ppo", race.iterations * race.batch_size), ("validation", race.eval_problems)))

    def gold(policy: Any) -> float:
        drawn = answers(policy, tokenizer, measured, 1, seed=EVAL_SEED, temperature=1.0, max_new_tokens=race.max_new_tokens,
                        eos_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id)
        return statistics.fmean(each.score for each in gold_scores(drawn))

    transformers.set_seed(race.seed)
    ended = "the last iteration"
    with tempfile.TemporaryDirectory() as folder:
        trainer, policy = make(variant, race, tokenizer, learned, {
            "output_dir": folder, "learning_rate": race.learning_rate, "lr_scheduler_type": "constant", "seed": race.seed, "bf16": False,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no",
            "logging_steps": 10**6})
        start = gold(policy)
        threshold = start + race.share * (BEST - start)
        referee = Referee(lambda: gold(policy), threshold, 1 if variant == "trl-ppo" else race.steps)  # TRL's PPO counts iterations
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
    run_program(lambda argv: print(json.dumps(run(argv[0], Race(**json.loads(argv[1]))))))
