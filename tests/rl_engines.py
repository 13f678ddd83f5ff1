"""One process of a PPO run on an engine, for tests/test_rl_engines.py: `train` the tiny trainer or run the `stage`.

    python -m tests.rl_engines one|ddp|fsdp2|zero2|zero3 train|stage FOLDER [flags of the stage]

On a CPU the engines need what no product may do: Accelerate takes FSDP for plain data parallelism there unless its state says
otherwise, and DeepSpeed wants not to be told of the CPU.
"""
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from stages import ppo
from stages.models import engines
from stages.models.training import fit, save_model, world_size
from stages.rl import rollouts
from stages.run.config import load_config
from stages.run.entry import stop_processes
from tests.rl_tiny import VOCAB, corpus, early_letters, trainer

# What `accelerate launch` puts into the environment of its workers.
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
ENGINES = {"fsdp2": FSDP2, **{f"zero{stage}": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (2, 3)}}
LOOSE = 1e3  # DeepSpeed clips one norm over both models, so what it shall do as other engines do is done without clipping


def join(engine: str) -> dict[str, Any]:
    """Joins the other processes; the arguments with which the Trainer finds the engine."""
    if engine in ("one", "ddp"):
        return {}
    if engine == "fsdp2":
        PartialState(cpu=True, backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return {"accelerator_config": {"use_configured_state": True}}
    PartialState(backend="gloo")
    return {"use_cpu": False, "ddp_backend": "gloo"}


def train(folder: Path, arguments: dict[str, Any], engine: str) -> None:
    """Two iterations, and back to the checkpoint of the first. With STOP set the second one's reward fails, as a killed run would end
    there. With BF16 one step each, in bf16."""
    sampled: dict[str, torch.Tensor] = {}
    rollouts.LOGITS = 16 * VOCAB  # so few that how many passes a process needs depends on the lengths of its responses

    def reward(responses):
        if t.state.global_step:  # the second iteration
            if "STOP" in os.environ:
                raise ValueError("stopped")
            sampled.update({name: p.detach().clone() for name, p in (t.policy_copy or t.model.policy).named_parameters()})
        return early_letters(None, [response.text for response in responses], None)

    changes: dict[str, Any] = {"epochs": 1, "minibatches": 1} if "BF16" in os.environ else {}
    t = trainer(folder, world=int(os.environ.get("WORLD_SIZE", "1")), micro_batch=4, kl_target=0.05, kl_horizon=100, par_samples=1,
                ptx_coef=0.5, kl_loss_coef=0.1, reward=reward, arguments={**arguments, "bf16": "BF16" in os.environ}, **changes, **corpus())
    assert engines.divides_weights(t) == (engine in ("fsdp2", "zero3"))
    assert (engines.zero_stage(t), t.is_fsdp_enabled) == (int(engine[-1]) if "zero" in engine else 0, engine == "fsdp2")
    fit(t)
    state = engines.gathered(t.model.policy)
    if state:
        save_model(t.model.policy, t.tokenizer, folder / "model", state_dict=state)
    t.load_step(t.settings.steps_per_iteration)
    assert all(torch.equal(p, sampled[name]) for name, p in t.whole_policy().named_parameters())


def stage(folder: Path, arguments: dict[str, Any], flags: list[str]) -> None:
    common = ppo.training_arguments
    ppo.training_arguments = lambda run, **more: {**common(run, **more), **arguments, "bf16": "BF16" in os.environ}
    ppo.main(load_config(ppo.PpoConfig, [*flags, "--run-dir", str(folder)]))


if __name__ == "__main__":
    engine, what, folder, *flags = sys.argv[1:]
    code, arguments = 0, {"max_grad_norm": LOOSE} | join(engine)
    try:
        train(Path(folder), arguments, engine) if what == "train" else stage(Path(folder), arguments, flags)
        assert world_size() == int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        code = 3
    stop_processes()
    sys.stdout.flush()
    os._exit(code)  # as stages leave: gloo threads can abort a finished process on its way out
