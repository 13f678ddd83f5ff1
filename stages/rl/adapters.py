"""PPO's models on one frozen base: policy, critic and the run's own reward model as adapters (LoRA), the reference as the base alone.

Whoever calls says which adapter is meant: the policy's is active unless a `Seen` puts another in its place for one call. Switching
leaves `requires_grad` alone, which peft's own `set_adapter` does not. Only adapters and heads train, and only they are in checkpoints.
"""
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from reward.folders import trusted
from stages.models.adapters import BASE_FILE
from stages.rl.models import recomputes
from stages.run.manifest import Manifest, hash_path, say

POLICY, CRITIC, REWARD = "default", "critic", "reward"  # peft saves the first without a folder of its own
HEAD = "score.weight"
BASE_STAYS = (True, False, "gaussian", "orthogonal")  # ways to begin of peft's that leave the base as it is; pissa, olora and others do not


class Seen:
    """`model` as it is with one of its adapters, or with None of them, when it is called; all else is the model's own.

    Raises ValueError where activations would be recomputed in the backward pass, when another adapter is active.
    """

    def __init__(self, model: Any, adapter: str | None):
        self.model, self.adapters = model, [adapter] if adapter else []
        self._tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and recomputes(self.model):
            raise ValueError("two adapters on one base and gradient checkpointing: activations would be recomputed with the policy's "
                             "adapter, whichever they are of; turn checkpointing off, or set value_trunk to separate or shared")
        with self._active():
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @contextmanager
    def _active(self) -> Iterator[None]:
        before = [layer._active_adapter for layer in self._tuned]
        for layer in self._tuned:
            layer._active_adapter = self.adapters
        try:
            yield
        finally:
            for layer, old in zip(self._tuned, before, strict=True):
                layer._active_adapter = old


class AdapterClassifier(nn.Module):
    """A score head on the decoder as one adapter makes it. Takes a sequence classifier's place; owns, as a module, its head alone.

    The adapter is among the parameters of the policy, so that each is in a checkpoint once.
    """

    def __init__(self, policy: PreTrainedModel, adapter: str, head: Tensor, config: Any):
        super().__init__()
        self.adapter, self.config, self.base_model = adapter, config, Seen(policy.base_model, adapter)
        config._attn_implementation = policy.config._attn_implementation
        self.score = nn.Linear(head.size(1), 1, bias=False)
        self.score.weight.data.copy_(head)
        self.set_attn_implementation = policy.set_attn_implementation

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    @property
    def is_gradient_checkpointing(self) -> bool:
        return recomputes(self.base_model.model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        """`logits` (N, 1): the score at the last real token of rows padded at the right."""
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        read = hidden[torch.arange(len(last), device=last.device), last]
        return SimpleNamespace(logits=self.score(read.to(self.score.weight.dtype)))  # an engine may have cast the base


def adapt(policy: PreTrainedModel, *, rank: int, alpha: int, seed: int) -> PeftModel:
    """Freeze `policy` and put an adapter on all its linear layers but the head. It changes in place and goes on as the policy.

    Its first outputs are the base's: B is zero (Hu et al. 2022, section 4.1). No dropout: the ratio would be noise.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(policy, _settings(rank, alpha), adapter_name=POLICY)


def add_classifier(adapted: PeftModel, name: str, folder: Path | None = None, scorer: Path | None = None, *, rank: int, alpha: int,
                   seed: int) -> AdapterClassifier:
    """A critic (trains) or the reward model (frozen) as another adapter on the policy's base.

    From `folder`, the reward model's adapter and head, with the constants of the config in `scorer`; without one the adapter is new
    and the head zero, a critic without an opinion. Raises ValueError for an adapter that changes more than layers and head.
    """
    policy: Any = adapted.get_base_model()
    settings, state = _settings(rank, alpha), {}
    head = torch.zeros(1, policy.config.get_text_config().hidden_size)
    config = copy.deepcopy(policy.config)
    if folder is not None and scorer is not None:
        settings, config = LoraConfig.from_pretrained(trusted(str(folder))), AutoConfig.from_pretrained(trusted(scorer))
        if more := sorted({*(settings.modules_to_save or [])} - {"score", "classifier"}):  # peft names both
            raise ValueError(f"the reward model's adapter in {folder} has {', '.join(more)} of its own beside its layers, which a shared "
                             "base cannot hold: train it with modules_to_save left alone, or give PPO method: full")
        if settings.init_lora_weights not in BASE_STAYS:
            raise ValueError(f"the reward model's adapter in {folder} began with init_lora_weights {settings.init_lora_weights!r}, which "
                             "changes the base, here the policy's and the reference's, too: train it without, or give PPO method: full")
        settings.modules_to_save, settings.inference_mode, settings.task_type, settings.lora_dropout = None, False, "CAUSAL_LM", 0.0
        state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        (key,) = (key for key in state if key.endswith(HEAD))
        head = state.pop(key)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted.add_adapter(name, settings)
    if state:
        result: Any = set_peft_model_state_dict(adapted, state, adapter_name=name)
        assert not result.unexpected_keys, f"{folder} does not fit the base: {result.unexpected_keys[:3]}"
    for path, parameter in policy.named_parameters():  # peft has switched gradients as it added
        parameter.requires_grad_(bool({POLICY, CRITIC} & set(path.split("."))))
    made = AdapterClassifier(policy, name, head, config)
    return made.requires_grad_(name == CRITIC)


def _settings(rank: int, alpha: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)


def reward_adapter(reward_model: Manifest, sft_model: Path) -> Path | None:
    """The folder with the reward model's adapter, if it has one on this very SFT model; else None, and it says why and what follows."""
    instead = "as a reward it is loaded whole, and a critic with value_trunk adapter begins without an opinion"
    if "adapter" not in reward_model.data["products"]:
        say(f"ppo: the reward model has no adapter on the SFT model (method lora saves one): {instead}")
        return None
    folder = reward_model.product("adapter")
    if json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))["sha256"] != hash_path(sft_model):
        say(f"ppo: the reward model's adapter belongs to another SFT model than this: {instead}")
        return None
    return folder


def save_adapters(adapted: PeftModel, critic: nn.Module | None, directory: Path, sft_model: Path) -> None:
    """The policy's adapter in `adapter/`; in `critic/` that of a critic on the same base, if it is one, and its head."""
    adapted.save_pretrained(str(directory / "adapter"), selected_adapters=[POLICY])
    (directory / "adapter" / BASE_FILE).write_text(json.dumps({"sha256": hash_path(sft_model)}) + "\n", encoding="utf-8")
    if isinstance(critic, AdapterClassifier):
        adapted.save_pretrained(str(directory), selected_adapters=[CRITIC])  # peft adds the name to the path
        (directory / "README.md").unlink()  # and its page to a folder that is not the adapter's
        safetensors.torch.save_file({HEAD: critic.score.weight.detach().contiguous()}, directory / "critic" / "value_head.safetensors")
