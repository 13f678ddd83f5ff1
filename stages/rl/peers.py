"""This project's PPO trainer and its peers made alike: TRL's last PPO, and the GRPO of the TRL that is installed.

For `make bench-ppo` (timed.py) and `make study-ppo-peers` (raced.py). Each trainer is imported where it is made, because no TRL has
them all.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import AutoModelForCausalLM, TrainingArguments

from reward.folders import trusted
from reward.model import score_ids


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is the same for all trainers: responses an iteration, the optimizer steps they are learned from in, the price of KL.
    `generations` are GRPO's responses to one question."""

    iterations: int = 3
    batch_size: int = 64
    epochs: int = 4
    minibatches: int = 4
    generations: int = 8
    kl_coef: float = 0.05

    @property
    def micro_batch(self) -> int:
        return self.batch_size // self.minibatches

    @property
    def steps(self) -> int:
        """Optimizer steps of an iteration."""
        return self.epochs * self.minibatches


def load_policy(folder: str, **more: Any) -> Any:
    """The decoder. Its config says no cache, for training, with which `generate` would read all of the text for each token."""
    policy: Any = AutoModelForCausalLM.from_pretrained(trusted(folder), **more)
    policy.generation_config.use_cache = True
    return policy


def our_ppo(terms: Terms, policy: Any, critic: Any, *, prompts: Sequence[Any], tokenizer: Any, reward: Any, common: dict[str, Any],
            **settings: Any) -> Any:
    """`common` is what TrainingArguments and TRL's configs all take, with `bf16`, which TRL's switch on themselves; `settings` goes to
    PpoSettings."""
    from stages.rl.models import PolicyWithCritic
    from stages.rl.trainer import PpoSettings, PPOTrainer

    return PPOTrainer(
        PolicyWithCritic(policy, critic, kl_coef=terms.kl_coef),
        TrainingArguments(per_device_train_batch_size=terms.micro_batch, max_steps=terms.iterations * terms.steps, save_steps=terms.steps,
                          remove_unused_columns=False, **common),
        PpoSettings(rollout_batch=terms.batch_size, epochs=terms.epochs, minibatches=terms.minibatches, micro_batch=terms.micro_batch,
                    missing_eos_penalty=None, pad_id=tokenizer.pad_token_id, **settings),
        prompts=prompts, tokenizer=tokenizer, reward=reward)


def trl_ppo(terms: Terms, policy: Any, reference: Any, *, reward: Any, critic: Any, ids: Sequence[list[int]], tokenizer: Any,
            common: dict[str, Any], **config: Any) -> Any:
    """`reward` and `critic` are sequence classifiers with one label; `ids` the questions' tokens."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    return PPOTrainer(
        PPOConfig(per_device_train_batch_size=terms.batch_size, num_mini_batches=terms.minibatches, num_ppo_epochs=terms.epochs,
                  total_episodes=terms.iterations * terms.batch_size, temperature=1.0, kl_coef=terms.kl_coef, num_sample_generations=0,
                  gradient_checkpointing=False, **common, **config),
        tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=critic,
        train_dataset=datasets.Dataset.from_list([{"input_ids": each} for each in ids]))


def trl_grpo(terms: Terms, policy: Any, judge: Any, *, chats: Sequence[str], ids: Sequence[list[int]], tokenizer: Any,
             common: dict[str, Any], **config: Any) -> Any:
    """`judge` is a sequence classifier; `chats` the questions as text, `ids` as tokens."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids: list[list[int]], ids: list[list[int]], **_: Any) -> list[float | None]:
        return [*score_ids(judge, [[*prompt, *response] for prompt, response in zip(ids, completion_ids, strict=True)])]

    rows = [{"prompt": chat, "ids": each} for chat, each in zip(chats, ids, strict=True)]
    return GRPOTrainer(policy, reward, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows), args=GRPOConfig(
        per_device_train_batch_size=terms.micro_batch, steps_per_generation=terms.minibatches, num_iterations=terms.epochs,
        num_generations=terms.generations, temperature=1.0, beta=terms.kl_coef, max_steps=terms.iterations * terms.steps,
        gradient_checkpointing=False, **common, **config))
