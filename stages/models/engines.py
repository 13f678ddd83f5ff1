"""Engines that divide the weights over the processes (FSDP2, DeepSpeed ZeRO-3): whole weights from parts, and what they would round.

What PPO needs to know of them is here; on any other engine each function is the plain thing.
A gather is a collective: call `refresh` and `gathered` on every process.
"""
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from stages.run.manifest import is_main


def zero_stage(trainer: Trainer) -> int:
    """The stage of DeepSpeed's ZeRO, 0 without DeepSpeed."""
    return getattr(getattr(trainer.accelerator.state, "deepspeed_plugin", None), "zero_stage", 0)


def divides_weights(trainer: Trainer) -> bool:
    return trainer.is_fsdp_enabled or zero_stage(trainer) == 3


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of the whole, which FSDP2's parts have and ZeRO-3's keep by another name."""
    return getattr(parameter, "ds_shape", parameter.shape)


def load_whole_models() -> None:
    """Models loaded or built from here until a Trainer is made stay whole.

    Under ZeRO-3 transformers divides each once there are TrainingArguments, whatever `zero3_init_flag` says; nothing would gather a
    reward model, and one on the meta device cannot be divided at all.
    """
    unset_hf_deepspeed_config()


def adapt_fsdp(trainer: Trainer) -> None:
    """Let FSDP2 return what a module returns; call before training wraps the model. Nothing on other engines.

    In bf16 Accelerate has each module's output rounded, the outermost one's, too: log-probabilities of three digits, so ratios that
    are off by percents.
    Raises ValueError for FSDP 1, and where only the first process would load weights, since a model that is not trained (a
    reference, a reward model) never gets them on the others.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(f"the launch config has fsdp_version {plugin.fsdp_version}: set it to 2 (recipes/accelerate/fsdp2.yaml)")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("the launch config has fsdp_cpu_ram_efficient_loading: set it to false, or all processes but one start from "
                         "empty weights")
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def as_computed(model: PreTrainedModel, trainer: Trainer) -> PreTrainedModel:
    """A frozen whole copy that rounds as the engine does: in bf16 FSDP2 and DeepSpeed cast parameters, where others autocast.

    Else the distance of a model to its own copy would not be 0. Buffers stay: positions in bf16 would be another model.
    """
    model = copy.deepcopy(model).requires_grad_(False).eval().to(trainer.args.device)
    if trainer.accelerator.mixed_precision == "bf16" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def rounding(trainer: Trainer) -> AbstractContextManager:
    """Autocast where the engine trains under it: not FSDP2, whose weights are cast, and whose training step Accelerate leaves alone."""
    return nullcontext() if trainer.is_fsdp_enabled else trainer.accelerator.autocast()


@contextmanager
def whole(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor` with all its parts. A collective where it is divided."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()  # reduces a norm that is known in parts, too
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor


@torch.no_grad()
def refresh(copied: nn.Module, module: nn.Module) -> None:
    """Bring a whole copy up to date with the weights of `module`, one tensor at a time."""
    for old, new in zip(copied.parameters(), module.parameters(), strict=True):
        with whole(new) as gathered_one:
            old.copy_(gathered_one)


@torch.no_grad()
def gathered(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module` with whole tensors on the CPU, on the main process; empty on the others. Tied weights stay tied."""
    seen: dict[int, Tensor] = {}
    state: dict[str, Any] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            with whole(tensor) as one:
                seen[id(tensor)] = one.detach().cpu().clone() if is_main() else tensor
        state[name] = seen[id(tensor)]
    return state if is_main() else {}
