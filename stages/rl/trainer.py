"""PPO with a critic on transformers.Trainer and plain Accelerate.

One step of the Trainer is one optimizer step on one global minibatch. The dataset only counts: at the first step of an iteration
the rollout happens, every process samples its share with the keyed sampler, and after a gather all of them hold the same
experience, from which each cuts its part of every minibatch. So nothing depends on the number of processes, on accumulation,
or on anything that a checkpoint at the end of an iteration does not hold: a resumed run equals an uninterrupted one. Where vLLM
samples instead (stages/rl/generation.py), the responses depend on it, and all else stays.
"""
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
from stages.models import engines
from stages.models.sampling import prompt_key, sample
from stages.models.training import Resumable, gather, rank, share_batch, world_size
from stages.rl import maths
from stages.rl.adapters import Seen
from stages.rl.alarms import Watch
from stages.rl.checks import warn_once
from stages.rl.generation import VLLM, Engine, check_engine, cut, generate, make_engine
from stages.rl.models import PolicyWithCritic
from stages.rl.rewards import Response, Reward, Row
from stages.rl.rollouts import Experience, Scored, as_responses, build_experience, draws, minibatch_rows, token_numbers
from stages.run.checkpoint import is_complete
from stages.run.manifest import is_main, say

Judge = Callable[[Sequence[Response]], list[GoldScore]]
CONSOLE = ("objective/score", "objective/gold", "objective/accuracy", "objective/kl", "objective/entropy", "response/length",
           "response/eos_rate", "policy/clip_fraction", "value/explained_variance")
IMPORTANCE_CAP = 2.0  # of a token's weight where another engine sampled it (Yao et al. 2025)


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """The algorithm's own numbers; the Trainer's (learning rate of the policy, clipping, checkpoints) stay in TrainingArguments.

    An iteration samples `rollout_batch` responses and learns from them in `epochs` x `minibatches` optimizer steps. The critic
    has its own learning rate and for the first `critic_warmup` iterations learns alone. With `kl_target` (nats a response) the
    KL coefficient adapts. `missing_eos_penalty` replaces the score of a response that did not end; None leaves the score.
    `kl_loss_coef` weighs k2 in the loss, beside or in place of k1 in the reward (the model's `kl_coef`), and `ptx_coef` the loss on
    corpus rows, as many a step as there are responses. `par_samples` above 0 turns scores into PAR against so many responses of the
    reference. A KL above `kl_limit` nats a response saves a checkpoint and stops. `rollout_engine` is transformers or vllm, which then
    runs in this process on a share of `vllm_gpu_memory` of its GPU (`vllm_mode` colocate), or as a server elsewhere.
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
    kl_loss_coef: float = 0.0
    kl_limit: float | None = None
    score_clip: float | None = None
    length_penalty: float = 0.0
    par_samples: int = 0
    ptx_coef: float = 0.0
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = 96
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    sampling_batch: int = 256
    rollout_engine: str = "transformers"
    vllm_mode: str = "colocate"
    vllm_server_url: str = "http://localhost:8000"
    vllm_gpu_memory: float = 0.3
    seed: int = 0

    def __post_init__(self):
        for name in ("kl_loss_coef", "ptx_coef", "length_penalty", "par_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 0 (off) or above")
        for name in ("kl_target", "kl_horizon", "kl_limit"):
            if (number := getattr(self, name)) is not None and number <= 0:
                raise ValueError(f"{name} is {number}: set it above 0" + ("" if name == "kl_horizon" else ", or to null to leave it out"))
        if not 0 < self.vllm_gpu_memory <= 1:
            raise ValueError(f"vllm_gpu_memory is {self.vllm_gpu_memory}: set it to the share of a GPU that vLLM may take, above 0 and at "
                             "most 1")
        if not all(self.stop_strings):
            raise ValueError("stop_strings holds an empty text, which every response contains: leave it out")
        if self.score_clip is not None and (self.score_clip <= 0 or self.par_samples):
            raise ValueError(f"score_clip is {self.score_clip} and par_samples {self.par_samples}: clip above 0, or leave it out with PAR, "
                             "which bounds the scores itself")

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

    The reference is a frozen copy of the policy as it is when the trainer is made; of a policy with adapters, its base. `judge` sees
    every response too, for the logs and alarms of `watch` alone. `ptx` are packed rows of the base corpus (`input_ids`) and
    `ptx_collator` their PackedCollator, for `ptx_coef`. Raises ValueError where `args` do not fit the settings, for empty prompts and
    for launch configs that cannot work.
    """

    model: Any

    def __init__(self, model: PolicyWithCritic, args: TrainingArguments, settings: PpoSettings, *,
                 prompts: Sequence[tuple[Row, list[int]]], reward: Reward, tokenizer: PreTrainedTokenizerBase,
                 judge: Judge | None = None, watch: Watch | None = None, ptx: Sequence[dict] = (),
                 ptx_collator: Callable[[list[dict]], dict[str, Tensor]] | None = None):
        self.settings, self.prompts, self.reward, self.judge, self.tokenizer = settings, prompts, reward, judge, tokenizer
        self.ptx, self.ptx_collator = ptx, ptx_collator
        if not prompts:
            raise ValueError("no prompts to train on: widen tasks or difficulties")
        if empty := [row["id"] for row, ids in prompts if not ids]:
            raise ValueError(f"prompt {empty[0]!r} has no tokens ({len(empty)} of {len(prompts)} have none): leave empty prompts out")
        if settings.ptx_coef and not (len(ptx) and ptx_collator):
            raise ValueError(f"ptx_coef is {settings.ptx_coef} but there are no rows to learn from: give packed rows and their collator, "
                             "or set ptx_coef to 0")
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
        engines.adapt_fsdp(self)
        divided, adapted = engines.divides_weights(self), hasattr(model.policy, "peft_config")
        if divided and adapted:
            raise ValueError("adapters on one base and an engine that divides it (FSDP, ZeRO-3): launch PPO with DDP or ZeRO-2, or set "
                             "method to full")
        self.reference: Any = Seen(model.policy, None) if adapted else engines.as_computed(model.policy, self)
        self.policy_copy: Any = engines.as_computed(model.policy, self) if divided else None
        self.engine: Engine | None = None
        if settings.rollout_engine == VLLM:
            check_engine(VLLM, "lora" if adapted else "full")
            s = settings
            self.engine = make_engine(
                model.policy, self.accelerator, tokenizer, vllm_mode=s.vllm_mode, vllm_server_url=s.vllm_server_url,
                vllm_gpu_memory=s.vllm_gpu_memory, temperature=model.temperature, max_new_tokens=s.max_new_tokens, eos_ids=s.eos_ids,
                longest_prompt=max(len(ids) for _, ids in prompts))
        self.steps_between_saves = settings.steps_per_iteration  # rollouts are not saved
        self.experience: Experience | None = None
        self.warned: set[str] = set()
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
        batches = [{**self.experience.inputs(rows, s.pad_id), "num_tokens": num_tokens} for rows in micro]
        return self._with_ptx(batches) if s.ptx_coef else batches, None

    def _with_ptx(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches with as many corpus rows as they have responses, each row once before any comes again."""
        assert self.ptx_collator is not None
        s, width = self.settings, self.settings.rollout_batch // self.settings.minibatches
        chosen = [row for row, _ in draws(self.state.global_step, count=width, num_prompts=len(self.ptx), seed=s.seed)]
        rows = self.ptx_collator([self.ptx[row] for row in chosen])
        num_tokens = (rows["labels"][:, 1:] != -100).sum()
        mine = {name: tensor[rank()::world_size()].split(s.micro_batch) for name, tensor in rows.items()}
        return [{**batch, "ptx": {name: parts[i] for name, parts in mine.items()}, "num_ptx_tokens": num_tokens}
                for i, batch in enumerate(batches)]

    def whole_policy(self) -> Any:
        """The policy to sample from: an up-to-date copy where the engine divides the weights. Call on every process.

        A token at a time, each forward pass would gather them anew, and as often on every process, whatever the lengths.
        """
        if self.policy_copy is None:
            return self.model.policy
        engines.refresh(self.policy_copy, self.model.policy)
        return self.policy_copy

    def rollout(self, iteration: int) -> Experience:
        """Sample, score, and gather the iteration's experience on every process."""
        s = self.settings
        chosen = draws(iteration, count=s.rollout_batch, num_prompts=len(self.prompts), seed=s.seed)
        share = share_batch(s.rollout_batch, world_size(), "rollout_batch")
        mine = chosen[rank() * share:(rank() + 1) * share]
        problems, prompts = zip(*(self.prompts[index] for index, _ in mine), strict=True)
        keys = [(prompt_key(problem["id"]), number) for problem, (_, number) in zip(problems, mine, strict=True)]
        with engines.rounding(self):  # the reference and the sampler must round as the wrapped policy does
            if self.engine is not None:
                ids, by_engine = generate(self.engine, list(prompts))
            else:
                ids = sample(self.whole_policy(), list(prompts), keys=keys, seed=s.seed, temperature=self.model.temperature,
                             max_new_tokens=s.max_new_tokens, eos_ids=s.eos_ids, pad_id=s.pad_id, batch_size=s.sampling_batch)
            asked = list(zip(problems, prompts, strict=True))
            responses = as_responses(asked, ids, self.tokenizer, eos_ids=s.eos_ids, stop_strings=s.stop_strings)
            scores = self.reward(responses)
            reference_scores = self._reference_scores(asked, keys) if s.par_samples else [()] * len(asked)
            numbers = token_numbers(self.model, self.reference, responses, temperature=self.model.temperature, pad_id=s.pad_id,
                                    batch_size=s.micro_batch, device=self.args.device, in_step=self.policy_copy is not None)
        given = cut(by_engine, [len(r.ids) for r in responses]) if self.engine is not None else [None] * len(responses)
        judged = self.judge(responses) if self.judge else [None] * len(responses)
        watched = self.watch.opinions(responses)
        scored = gather([Scored(response, float(score), opinion, *each, *more)
                         for response, score, opinion, each, more in
                         zip(responses, scores, judged, numbers, zip(watched, reference_scores, given, strict=True), strict=True)])
        kl_coef = float(self.model.kl_coef)
        experience = build_experience(scored, kl_coef=kl_coef, gamma=s.gamma, lam=s.lam,
                                      missing_eos_penalty=s.missing_eos_penalty, score_clip=s.score_clip,
                                      length_penalty=s.length_penalty)
        experience.metrics.update(self.watch.metrics(scored))
        warn_once(experience, s.missing_eos_penalty, self.warned)
        if s.kl_limit is not None and not experience.metrics["objective/kl"] <= s.kl_limit:
            self._stop_for_kl(experience.metrics["objective/kl"])
        if s.kl_target is not None:  # before the iteration's checkpoint, so that a resumed run goes on with the next value
            self.model.kl_coef.fill_(maths.adapt_kl_coef(kl_coef, experience.metrics["objective/kl"], target=s.kl_target,
                                                         horizon=s.kl_horizon, num_responses=s.rollout_batch))
        self.state.num_input_tokens_seen += int(experience.mask.sum())  # kept in trainer_state.json, so it survives a resume
        return experience

    def _reference_scores(self, asked: list[tuple[Row, list[int]]], keys: list[tuple[int, int]]) -> list[tuple[float, ...]]:
        """Scores of `par_samples` responses of the reference to each prompt, other draws than the policy's."""
        s, each = self.settings, self.settings.par_samples
        repeated = [prompt for prompt in asked for _ in range(each)]
        ids = sample(self.reference, [ids for _, ids in repeated], keys=[(key, number * each + i) for key, number in keys for i in
                     range(each)], seed=s.seed + 1, temperature=self.model.temperature, max_new_tokens=s.max_new_tokens,
                     eos_ids=s.eos_ids, pad_id=s.pad_id, batch_size=s.sampling_batch)
        scores = self.reward(as_responses(repeated, ids, self.tokenizer, eos_ids=s.eos_ids, stop_strings=s.stop_strings))
        return [tuple(float(score) for score in scores[i:i + each]) for i in range(0, len(scores), each)]

    def _stop_for_kl(self, kl: float) -> None:
        """Save what there is, which no response of this rollout has changed, and stop. Raises ValueError with the remedy."""
        step = self.state.global_step
        if step and not is_complete(Path(str(self.args.output_dir)) / f"checkpoint-{step}"):
            self._save_checkpoint(self.model, trial=None)
        raise ValueError(f"the KL to the reference is {kl:.4g} nats a response after step {step}, above kl_limit "
                         f"{self.settings.kl_limit:g}: raise kl_coef or lower learning_rate and start anew, or raise kl_limit to go on "
                         "from that step's checkpoint")

    # ---- loss and optimizer ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        s, mask = self.settings, inputs["response_mask"]
        stats = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids", "response_mask", "ptx")
                         if name in inputs})
        old_logprobs = inputs["old_logprobs"]
        policy, policy_clipped = maths.policy_loss(stats.logprobs, old_logprobs, inputs["advantages"], cliprange=s.cliprange)
        if "engine_logprobs" in inputs:
            policy = policy * maths.importance_weights(old_logprobs, inputs["engine_logprobs"], cap=IMPORTANCE_CAP)
        value, value_clipped = maths.value_loss(stats.values, inputs["old_values"], inputs["returns"],
                                                cliprange=s.cliprange_value)
        kl = maths.k2(stats.logprobs, inputs["ref_logprobs"])
        with torch.no_grad():
            self.note({"loss/policy": policy, "loss/value": value, "policy/clip_fraction": policy_clipped,
                       "policy/approx_kl": maths.approx_kl(stats.logprobs, old_logprobs), "value/clip_fraction": value_clipped},
                      mask, inputs["num_tokens"])
        loss = torch.where(mask, policy + s.vf_coef * value + s.kl_loss_coef * kl, 0.0).sum() / inputs["num_tokens"]
        if stats.ptx_loss is not None:
            ptx = stats.ptx_loss.sum() / inputs["num_ptx_tokens"]
            self.sums["loss/ptx"] = self.sums.get("loss/ptx", 0.0) + ptx.detach()
            loss = loss + s.ptx_coef * ptx
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
            policy, critic = self.model.trained()
            self.optimizer = torch.optim.AdamW(
                [{"params": policy, "lr": self.args.learning_rate}, {"params": critic, "lr": self.settings.critic_learning_rate}],
                betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay, fused=True)  # one pass over all of it, on a CPU too
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
        """Clip each model by its own norm: one norm over both would let a bad critic silence the policy. DeepSpeed knows one only."""
        if self.is_deepspeed_enabled:
            if "clipping" not in self.warned:
                self.warned.add("clipping")
                say(f"ppo: DeepSpeed clips one norm over policy and critic together to {self.args.max_grad_norm:g}, not each model's own")
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = []
        for parameters in groups:
            found = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            with engines.whole(found) as norm:  # FSDP2 knows it in parts
                norms.append(norm)
            if norm > self.args.max_grad_norm:  # else all gradients would be multiplied by 1
                torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, found)
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
        """Without what is frozen, which a base's own folder has; tied weights as copies: safetensors refuses one storage twice."""
        seen: set[int] = set()
        frozen = {name for name, parameter in self.model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
        state = {name: tensor for name, tensor in (self.model.state_dict() if state_dict is None else state_dict).items()
                 if name not in frozen}
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        super()._save(output_dir, state)
