"""PPO with a critic on transformers.Trainer and plain Accelerate.

One step of the Trainer is one optimizer step on one global minibatch. The dataset only counts: at the first step of an iteration
the rollout happens, every process samples its share with the keyed sampler, and after a gather all of them hold the same
experience, from which each cuts its part of every minibatch. So nothing depends on the number of processes, on accumulation,
or on anything that a checkpoint at the end of an iteration does not hold: a resumed run equals an uninterrupted one.
"""
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from reward.verifiers import GoldScore
from stages.models.sampling import prompt_key, sample
from stages.models.training import Resumable, gather, rank, share_batch, world_size
from stages.rl import maths
from stages.rl.alarms import Watch
from stages.rl.models import PolicyWithCritic, remove_dropout
from stages.rl.rewards import Response, Reward, Row
from stages.rl.rollouts import Experience, Scored, build_experience, draws, minibatch_rows, token_numbers
from stages.run.manifest import is_main

Judge = Callable[[Sequence[Response]], list[GoldScore]]
CONSOLE = ("objective/score", "objective/gold", "objective/accuracy", "objective/kl", "objective/entropy", "response/length",
           "response/eos_rate", "policy/clip_fraction", "value/explained_variance")


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """The algorithm's own numbers; the Trainer's (learning rate of the policy, clipping, checkpoints) stay in TrainingArguments.

    An iteration samples `rollout_batch` responses and learns from them in `epochs` x `minibatches` optimizer steps. The critic
    has its own learning rate and for the first `critic_warmup` iterations learns alone. With `kl_target` (nats a response) the
    KL coefficient adapts. `missing_eos_penalty` replaces the score of a response that did not end; None leaves the score.
    """

    rollout_batch: int
    epochs: int = 1
    minibatches: int = 4
    micro_batch: int = 48
    critic_learning_rate: float = 1e-4
    critic_warmup: int = 0
    linear_decay: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.5
    kl_target: float | None = None
    kl_horizon: float = 10_000
    missing_eos_penalty: float | None = -1.0
    max_new_tokens: int = 96
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    sampling_batch: int = 256
    seed: int = 0

    @property
    def steps_per_iteration(self) -> int:
        return self.epochs * self.minibatches

    def accumulation(self, processes: int) -> int:
        """Gradient accumulation steps. Raises ValueError naming the sizes that divide."""
        minibatch = share_batch(self.rollout_batch, self.minibatches, "rollout_batch (over minibatches)")
        each = share_batch(minibatch, processes, "rollout_batch / minibatches")
        if each % self.micro_batch:
            fitting = [n for n in range(1, each + 1) if each % n == 0]
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the {each} responses that a process has of a "
                             f"minibatch: set micro_batch to one of {', '.join(map(str, fitting))}")
        return each // self.micro_batch


class PPOTrainer(Resumable, Trainer):
    """Trains `model.policy` on `prompts` (problem rows with an `id`, and their token ids) for the scores of `reward`.

    The reference is a frozen copy of the policy as it is when the trainer is made. `judge` sees every response too, for the
    logs and alarms of `watch` alone. Raises ValueError where `args` do not fit the settings and for engines that shard parameters.
    """

    model: Any
    critic_grad_norm: float | None = None

    def __init__(self, model: PolicyWithCritic, args: TrainingArguments, settings: PpoSettings, *,
                 prompts: Sequence[tuple[Row, list[int]]], reward: Reward, tokenizer: PreTrainedTokenizerBase,
                 judge: Judge | None = None, watch: Watch | None = None):
        self.settings, self.prompts, self.reward, self.judge, self.tokenizer = settings, prompts, reward, judge, tokenizer
        if not prompts:
            raise ValueError("no prompts to train on: widen tasks or difficulties")
        if args.max_steps <= 0 or args.max_steps % settings.steps_per_iteration or args.save_steps % settings.steps_per_iteration:
            raise ValueError(f"max_steps {args.max_steps} and save_steps {args.save_steps} must be multiples of the "
                             f"{settings.steps_per_iteration} steps of an iteration: rollouts are not saved")
        wanted = (settings.micro_batch, settings.accumulation(world_size()))
        given = (args.per_device_train_batch_size, args.gradient_accumulation_steps)
        if given != wanted:
            raise ValueError(f"per_device_train_batch_size and gradient_accumulation_steps are {given}: set them to {wanted}")
        count = args.max_steps * wanted[0] * wanted[1] * world_size()
        super().__init__(model=model, args=args, train_dataset=range(count),  # type: ignore[arg-type]
                         data_collator=lambda rows: {"row": torch.tensor(rows)})
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError("PPO samples from whole parameters: launch it with DDP or DeepSpeed ZeRO-2, not with FSDP or ZeRO-3")
        self.reference: Any = remove_dropout(copy.deepcopy(model.policy)).requires_grad_(False).eval().to(args.device)
        self.experience: Experience | None = None
        self.sums: dict[str, Tensor] = {}
        self.watch = watch or Watch()
        self.watch.trainer = self
        self.add_callback(self.watch)

    # ---- data ----

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """This process's micro-batches of the coming optimizer step; what the data loader yields only counts."""
        super().get_batch_samples(epoch_iterator, num_batches, device)
        s = self.settings
        iteration, slot = divmod(self.state.global_step, s.steps_per_iteration)
        epoch, minibatch = divmod(slot, s.minibatches)
        if slot == 0:
            self.experience = self.rollout(iteration)
        assert self.experience is not None, "checkpoints are written at the end of iterations only"
        responses = self.experience.responses
        chosen = minibatch_rows(iteration, epoch, minibatch, count=s.rollout_batch, minibatches=s.minibatches, seed=s.seed)
        num_tokens = self.experience.mask[chosen].sum()
        # Which process and which micro-batch a row lands in does not change the sum, so rows of similar length go together.
        chosen.sort(key=lambda i: len(responses[i].prompt_ids) + len(responses[i].ids))
        mine = chosen[rank()::world_size()]
        micro = [mine[i:i + s.micro_batch] for i in range(0, len(mine), s.micro_batch)]
        return [{**self.experience.inputs(rows, s.pad_id), "num_tokens": num_tokens} for rows in micro], None

    def rollout(self, iteration: int) -> Experience:
        """Sample, score, and gather the iteration's experience on every process."""
        s = self.settings
        chosen = draws(iteration, count=s.rollout_batch, num_prompts=len(self.prompts), seed=s.seed)
        share = share_batch(s.rollout_batch, world_size(), "rollout_batch")
        mine = chosen[rank() * share:(rank() + 1) * share]
        problems, prompts = zip(*(self.prompts[index] for index, _ in mine), strict=True)
        keys = [(prompt_key(problem["id"]), number) for problem, (_, number) in zip(problems, mine, strict=True)]
        with self.accelerator.autocast():  # the reference and the sampler must round as the wrapped policy does
            ids = sample(self.model.policy, list(prompts), keys=keys, seed=s.seed, temperature=self.model.temperature,
                         max_new_tokens=s.max_new_tokens, eos_ids=s.eos_ids, pad_id=s.pad_id, batch_size=s.sampling_batch)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            responses = [Response(problem, prompt, response, text, response[-1] in s.eos_ids)
                         for problem, prompt, response, text in zip(problems, prompts, ids, texts, strict=True)]
            scores = self.reward(responses)
            numbers = token_numbers(self.model, self.reference, responses, temperature=self.model.temperature, pad_id=s.pad_id,
                                    batch_size=s.micro_batch, device=self.args.device)
        judged = self.judge(responses) if self.judge else [None] * len(responses)
        watched = self.watch.opinions(responses)
        scored = gather([Scored(response, float(score), opinion, *each, others)
                         for response, score, opinion, each, others in zip(responses, scores, judged, numbers, watched, strict=True)])
        kl_coef = float(self.model.kl_coef)
        experience = build_experience(scored, kl_coef=kl_coef, gamma=s.gamma, lam=s.lam,
                                      missing_eos_penalty=s.missing_eos_penalty)
        experience.metrics.update(self.watch.metrics(scored))
        if s.kl_target is not None:  # before the iteration's checkpoint, so that a resumed run goes on with the next value
            self.model.kl_coef.fill_(maths.adapt_kl_coef(kl_coef, experience.metrics["objective/kl"], target=s.kl_target,
                                                         horizon=s.kl_horizon, num_responses=s.rollout_batch))
        self.state.num_input_tokens_seen += int(experience.mask.sum())  # kept in trainer_state.json, so it survives a resume
        return experience

    # ---- loss and optimizer ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        s, mask = self.settings, inputs["response_mask"]
        stats = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids", "response_mask")})
        old_logprobs = inputs["old_logprobs"]
        policy, policy_clipped = maths.policy_loss(stats.logprobs, old_logprobs, inputs["advantages"], cliprange=s.cliprange)
        value, value_clipped = maths.value_loss(stats.values, inputs["old_values"], inputs["returns"],
                                                cliprange=s.cliprange_value)
        with torch.no_grad():
            self.note({"loss/policy": policy, "loss/value": value, "policy/clip_fraction": policy_clipped,
                       "policy/approx_kl": maths.approx_kl(stats.logprobs, old_logprobs), "value/clip_fraction": value_clipped},
                      mask, inputs["num_tokens"])
        loss = torch.where(mask, policy + s.vf_coef * value, 0.0).sum() / inputs["num_tokens"]
        # Divided by the tokens of the global minibatch, the micro-batches of all processes add up to its mean. What comes later is
        # undone here: Trainer divides by the accumulation steps (no labels, no num_items_in_batch), DDP by the processes.
        loss = loss * self.current_gradient_accumulation_steps * world_size()
        return (loss, stats) if return_outputs else loss

    def note(self, values: dict[str, Tensor], mask: Tensor, num_tokens: Tensor) -> None:
        """Add this micro-batch's share of the minibatch's means to the iteration's sums."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(mask, value, 0.0).sum() / num_tokens

    def create_optimizer(self, model=None):
        """AdamW with two groups: the policy, and the critic (or the value head on a shared trunk)."""
        if self.optimizer is None:
            policy = list(self.model.policy.parameters())
            critic = list((self.model.critic or self.model.value_head).parameters())
            self.optimizer = torch.optim.AdamW(
                [{"params": policy, "lr": self.args.learning_rate}, {"params": critic, "lr": self.settings.critic_learning_rate}],
                betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            s = self.settings

            def decay(step: int) -> float:
                return 1 - step / num_training_steps if s.linear_decay else 1.0

            def policy(step: int) -> float:
                return decay(step) if step >= s.critic_warmup * s.steps_per_iteration else 0.0

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, [policy, decay])
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model):
        """Clip each model by its own norm: one norm over both would let a bad critic silence the policy."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = [torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm) for parameters in groups]
        self.critic_grad_norm = float(norms[1])
        return norms[0]

    # ---- logs and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the iteration's figures; those of the losses are means over its minibatches, summed over processes."""
        if self.sums and self.experience is not None and "loss" in logs:
            totals = self.accelerator.reduce(torch.stack(list(self.sums.values())), reduction="sum").tolist()
            means = {name: total / self.settings.steps_per_iteration for name, total in zip(self.sums, totals, strict=True)}
            logs = {**logs, **self.experience.metrics, **means, "tokens": self.state.num_input_tokens_seen}
            if self.critic_grad_norm is not None:
                logs["critic/grad_norm"] = self.critic_grad_norm
            logs |= self.watch.look({**logs, "step": self.state.global_step})
            self.sums = {}
        super().log(logs, start_time)

    def rewind(self, step: int) -> None:
        super().rewind(step)
        if is_main():
            self.watch.rewind(step)

    def load_step(self, step: int) -> None:
        """Put the weights of a checkpoint of this run into policy and critic, whatever engine holds them."""
        folder = Path(f"{self.args.output_dir}/checkpoint-{step}")
        assert folder.is_dir(), f"{folder} is gone, and Trainer would only warn of it"
        self.state.best_model_checkpoint = str(folder)
        self._load_best_model()

    def _line(self, row: dict[str, Any], steps: int) -> str:
        return super()._line({name: row[name] for name in ("step", *CONSOLE) if name in row}, steps)

    def _save(self, output_dir=None, state_dict=None):
        """Tied weights as copies: safetensors refuses to write one storage under two names."""
        seen: set[int] = set()
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        super()._save(output_dir, state)
