"""A few iterations of PPO in this process, timed by phase: this project's, or a peer's on the same models, questions and settings.

    python -m stages.rl.timed critic 128x4 '{"iterations": 3}'

For `make bench-ppo` (stages/evals/bench_ppo.py), which runs the peer in an interpreter with another TRL: each trainer is imported where
it is made, because no TRL has them all. Prints one JSON line.
"""
import itertools
import json
import resource
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import trl
from transformers import AutoModelForSequenceClassification

from reward.folders import trusted
from reward.model import from_language_model
from stages.data import curriculum
from stages.data.tokenizer import chat_ids, train_tokenizer
from stages.models.sizes import build_decoder, decoder_config, of_size
from stages.rl.peers import Terms, load_policy, our_ppo, trl_grpo, trl_ppo
from stages.run.entry import run_program, take_one_gpu
from stages.run.phases import Phases

PHASES = ("rollout", "score", "forward", "update")  # forward: log-probabilities of policy and reference, and values, before the update
LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Work(Terms):
    """What every variant does; `iterations` are those that are timed, after one that warms up."""

    response_tokens: int = 40
    vocab_size: int = 1024
    threads: int = 2
    bf16: bool = False


def questions(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Problems of the curriculum, each with its chat as `text` and as `ids`."""
    asked = []
    for problem in itertools.islice(curriculum.problems(0, split="ppo"), count):
        messages = [{"role": "user", "content": curriculum.user_turn(problem.question, curriculum.WORKED)}]
        asked.append({**problem.as_row(), "ids": chat_ids(tokenizer, messages, ask=True),
                      "text": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)})
    return asked


class Bench(NamedTuple):
    """What the trainers are made of: saved models, questions, the clock, and arguments that all take."""

    work: Work
    folder: str
    tokenizer: Any
    asked: list[dict[str, Any]]
    phases: Phases
    common: dict[str, Any]

    @property
    def terms(self) -> Terms:
        return replace(self.work, iterations=self.work.iterations + 1)

    def policy(self) -> Any:
        return load_policy(f"{self.folder}/lm")

    def classifier(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(trusted(f"{self.folder}/reward"), num_labels=1)


def our_trainer(bench: Bench, critic: Any) -> Any:
    from stages.rl import trainer as module
    from stages.rl.adapters import CRITIC, adapt, add_classifier
    from stages.rl.rewards import model_reward

    policy, vllm = bench.policy(), critic == "vllm"
    if critic == "lora":
        critic = add_classifier(adapt(policy, rank=16, alpha=32, seed=0), CRITIC, rank=16, alpha=32, seed=1)
    elif vllm:
        critic = bench.classifier()
        bench.tokenizer.save_pretrained(f"{bench.folder}/lm")  # where the engine starts from
    trainer = our_ppo(bench.terms, policy, critic, prompts=[(row, row["ids"]) for row in bench.asked], tokenizer=bench.tokenizer,
                      reward=model_reward(f"{bench.folder}/reward", vocab_size=policy.config.vocab_size, device=device()),
                      common=bench.common, max_new_tokens=bench.work.response_tokens, eos_ids=(-1,),
                      rollout_engine="vllm" if vllm else "transformers")
    if vllm:
        trainer.engine.generation_kwargs = {"ignore_eos": True}
    bench.phases.time(module, "generate" if vllm else "sample", "rollout", lambda found, *_: map(len, found[0] if vllm else found))
    bench.phases.time(module, "token_numbers", "forward")
    bench.phases.time(trainer, "reward", "score")
    return trainer


def trl_ppo_trainer(bench: Bench) -> Any:
    from trl.experimental.ppo import ppo_trainer

    reward = bench.classifier()
    trainer = trl_ppo(bench.terms, bench.policy(), bench.policy(), reward=reward, critic=bench.classifier(),
                      ids=[row["ids"] for row in bench.asked], tokenizer=bench.tokenizer, common=bench.common,
                      response_length=bench.work.response_tokens)
    bench.phases.time(ppo_trainer, "batch_generation", "rollout", lambda found, _, queries, *__: {found[0].size(1) - queries.size(1)})
    bench.phases.time(ppo_trainer, "get_reward", lambda model, *_: "score" if model is reward else "forward")
    bench.phases.time(ppo_trainer, "forward", learning)
    bench.phases.time(ppo_trainer, "selective_log_softmax", learning)
    bench.phases.time(trainer.accelerator, "backward", "update")
    bench.phases.time(trainer.optimizer, "step", "update")
    return trainer


def trl_grpo_trainer(bench: Bench) -> Any:
    trainer = trl_grpo(bench.terms, bench.policy(), bench.classifier().to(device()), chats=[row["text"] for row in bench.asked],
                       ids=[row["ids"] for row in bench.asked], tokenizer=bench.tokenizer, common=bench.common,
                       max_completion_length=bench.work.response_tokens,
                       generation_kwargs={"suppress_tokens": [bench.tokenizer.eos_token_id]})
    bench.phases.time(trainer, "_generate", "rollout", lambda found, *_: map(len, found[1]))
    bench.phases.time(trainer, "_calculate_rewards", "score")
    bench.phases.time(trainer, "_get_per_token_logps_and_entropies", learning)
    return trainer


def learning(*_: Any) -> str:
    return "update" if torch.is_grad_enabled() else "forward"


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_trainer(variant: str, bench: Bench) -> Any:
    if variant == "trl-ppo":
        return trl_ppo_trainer(bench)
    critics = {"critic": bench.classifier, "trunk": lambda: None, "lora": lambda: "lora", "vllm": lambda: "vllm"}
    trainer = trl_grpo_trainer(bench) if variant == "trl-grpo" else our_trainer(bench, critics[variant]())
    bench.phases.time(trainer, "training_step", "update")
    bench.phases.time(trainer, "_clip_grad_norm", "update")
    return trainer


def one(variant: str, size: str, work: Work) -> dict[str, Any]:
    """Seconds of an iteration by phase, and the process's highest memory (GPU: allocated). Raises ValueError where it did other work."""
    class Watch(transformers.TrainerCallback):
        """Ends iterations, the first of which warms up, and times the optimizer where the trainer calls back."""

        def on_pre_optimizer_step(self, *_, **__):
            phases.start("update")

        def on_optimizer_step(self, *_, **__):
            phases.stop()

        def on_step_end(self, args, state, control, **__):
            if state.global_step == steps:
                phases.restart()
            elif state.global_step % steps == 0:
                phases.ends.append(phases.turn())

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(work.threads)
    cpu, of = device() == "cpu", of_size(size)
    phases = Phases(PHASES) if cpu else Phases(PHASES, torch.cuda.synchronize)
    steps = 1 if variant == "trl-ppo" else work.steps  # TRL's PPO counts iterations
    tokenizer: Any = train_tokenizer((row["text"] for row in itertools.islice(curriculum.documents(0), 300)), vocab_size=work.vocab_size)
    asked = questions(tokenizer, (work.iterations + 1) * work.batch_size)
    with tempfile.TemporaryDirectory() as folder, phases.undo:
        names = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        build_decoder(decoder_config(tokenizer, **{name: of[name] for name in names if name in of}), seed=0).save_pretrained(f"{folder}/lm")
        from_language_model(f"{folder}/lm", pad_id=tokenizer.pad_token_id, seed=0, random_head=True).save_pretrained(f"{folder}/reward")
        trainer = make_trainer(variant, Bench(work, folder, tokenizer, asked, phases, {
            "output_dir": f"{folder}/checkpoints", "learning_rate": LEARNING_RATE, "use_cpu": cpu, "report_to": "none",
            "disable_tqdm": True, "dataloader_pin_memory": not cpu, "save_strategy": "no", "logging_steps": 10**6,
            "bf16": work.bf16}))
        trainer.add_callback(Watch())
        trainer.train()
    if phases.lengths != {work.response_tokens} or len(phases.ends) != work.iterations + 1:
        raise ValueError(f"{variant} did other work: responses of {sorted(phases.lengths)} tokens, {len(phases.ends) - 1} timed "
                         f"iterations; expected {work.response_tokens} and {work.iterations}")
    seconds = phases.ends[-1] - phases.ends[0]
    split = phases.seconds | {"rest": seconds - sum(phases.seconds.values())}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if cpu else torch.cuda.max_memory_allocated()
    return {"variant": variant, "size": size, "samples_per_s": work.iterations * work.batch_size / seconds, "peak_bytes": memory,
            "seconds_an_iteration": {phase: each / work.iterations for phase, each in split.items()},
            "mean_prompt_tokens": statistics.fmean(len(row["ids"]) for row in asked), **asdict(work), "threads": torch.get_num_threads(),
            "device": device(), "trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    take_one_gpu()
    run_program(lambda argv: print(json.dumps(one(argv[0], argv[1], Work(**json.loads(argv[2]))))))
