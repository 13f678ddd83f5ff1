"""Policy and critic as one module, and the layout of the batches they read.

One module because DDP, DeepSpeed and FSDP wrap one: both models get their gradients in one backward pass.

A sequence is a prompt and its response. Rows are padded on the left, so responses end together at the right edge and the last R
columns, the response window, hold every response token. Masks come from lengths: a pad id that is also the end token is harmless.
On a CPU the models never see the padding: it costs as much as tokens do, and one long response pads all others (docs/performance.md).

Letters: B rows, T tokens of the longest prompt + response, R tokens of the longest response, N response tokens, V vocabulary.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.models.attention import DOCUMENTS, speed_up
from stages.rl.logprobs import token_logprobs

# Architectures that tell their attention the position ids, and nothing else that `DOCUMENTS` does not know; tested one by one.
UNPADDED = ("gpt2", "gpt_neox", "llama", "mistral", "mixtral", "phi", "qwen2", "qwen3", "qwen3_moe")


class TokenStats(NamedTuple):
    """What the models say about each response token; (B, R) float32 in the response window, 0 at padding.

    `ptx_loss`: negative log-likelihoods of packed corpus rows, one a predicted token in one dimension, where there were any.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    ptx_loss: Tensor | None = None


def pad_sequences(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> dict[str, Tensor]:
    """The inputs of the models: `input_ids`, `attention_mask`, `position_ids` (B, T) int64 and `response_mask` (B, R) bool."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    window = max(map(len, responses))
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    mask = (torch.arange(width) >= width - lengths).long()
    response_lengths = torch.tensor([len(r) for r in responses])[:, None]
    # Positions count real tokens: with learned or absolute positions a left-padded row is otherwise read as a later text.
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "response_mask": torch.arange(window) >= window - response_lengths}


def align_right(rows: Sequence[Tensor]) -> Tensor:
    """(B, R) from one-dimensional tensors, in the columns in which `pad_sequences` has the response tokens; 0 elsewhere."""
    window = max(map(len, rows))
    return torch.stack([nn.functional.pad(row, (window - len(row), 0)) for row in rows])


def remove_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turn every kind of dropout off for good, also in training mode, which gradient checkpointing and MoE routers need.

    With dropout the ratio of new to old probabilities is noise before anything was learned (Huang et al. 2024).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):  # attention_dropout, router_jitter_noise
                setattr(module, name, 0.0)
    return model


@contextmanager
def read_by(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Arguments of a forward pass over `inputs`, and where in its flattened rows the N states lie that predict response tokens.

    Where `unpadded`, the rows lie behind one another in a single one and each is attended to alone (stages/models/attention.py).
    """
    real, mask = inputs["attention_mask"].bool(), inputs["response_mask"]
    before = nn.functional.pad(mask, (real.size(1) - mask.size(1) - 1, 1))  # (B, T): the next token is one of a response
    if not unpadded(model, real):
        yield {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}, before.flatten().nonzero().flatten()
        return
    attention, read = model.config._attn_implementation, before[real].nonzero().flatten()
    model.set_attn_implementation(DOCUMENTS)
    # Nobody reads what the last feed-forward network would make of the prompts. It works on each position alone.
    trunk: Any = model.base_model
    network = (trunk.layers if hasattr(trunk, "layers") else trunk.h)[-1].mlp
    width = int(real.sum())
    hooks = [network.register_forward_pre_hook(lambda _, args: (args[0][:, read], *args[1:])),
             network.register_forward_hook(lambda _, args, out: out.new_zeros(1, width, out.size(-1)).index_copy(1, read, out))]
    try:
        yield {name: inputs[name][real][None] for name in ("input_ids", "position_ids")}, read
    finally:
        model.set_attn_implementation(attention)
        for hook in hooks:
            hook.remove()


def unpadded(model: PreTrainedModel, real: Tensor) -> bool:
    """Whether `model` reads rows without their padding, where `real` (B, T) is False: on a CPU, one of the architectures tested for it.

    Not with windows, which that attention has not, nor when activations are recomputed, which happens when it is no longer set.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (real.device.type == "cpu" and config.model_type in UNPADDED and config._attn_implementation == "sdpa"
            and not recomputes(model) and (window is None or window >= int(real.sum())))


def recomputes(model: Any) -> bool:
    """Whether activations are recomputed in the backward pass."""
    found = getattr(model, "is_activation_checkpointing", None)  # an older transformers has the name below
    return model.is_gradient_checkpointing if found is None else found


def policy_stats(policy: PreTrainedModel, inputs: dict[str, Tensor], temperature: float, *, hidden: bool = False,
                 ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and entropies (B, R) at the sampling temperature, and, if asked for, the last hidden states (N, d) from which
    the response tokens are predicted.

    The temperature is part of the policy that acted; leaving it out makes the ratio wrong from the first step. Logits are
    computed for the response window alone, and their softmax, in float32, for its real tokens. The entropy has no gradient.
    """
    mask = inputs["response_mask"]
    window = mask.size(1)
    with read_by(policy, inputs) as (arguments, before):
        flat = "attention_mask" not in arguments
        out = policy(**arguments, use_cache=False, logits_to_keep=before if flat else window + 1, output_hidden_states=hidden)
    # What predicts each response token: all that is there, or all but a padding's, which is not copied to leave it out.
    rows = torch.arange(len(before), device=mask.device) if flat else nn.functional.pad(mask, (0, 1)).flatten().nonzero().flatten()
    chosen = inputs["input_ids"][:, -window:][mask]
    logprobs, entropy = (scatter(each, mask) for each in token_logprobs(out.logits.flatten(0, 1), rows, chosen, temperature))
    return logprobs, entropy, out.hidden_states[-1].flatten(0, 1)[before] if hidden else None


def scatter(real: Tensor, mask: Tensor) -> Tensor:
    """(B, R) with the values of the real tokens in their places and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=real.dtype, device=real.device).masked_scatter(mask, real)


def policy_alone(policy: PreTrainedModel, temperature: float) -> Callable[..., TokenStats]:
    """What PolicyWithCritic says about each response token of its inputs, of a policy without a critic: the values are 0."""
    def stats(**inputs: Tensor) -> TokenStats:
        logprobs, entropy, _ = policy_stats(policy, inputs, temperature)
        return TokenStats(logprobs, entropy, torch.zeros_like(logprobs))

    return stats


class PolicyWithCritic(nn.Module):
    """The policy, the critic and the KL coefficient, which is state of the training and so travels in its checkpoints.

    `critic` is a sequence classifier with one output, usually a copy of the reward model: its head then reads a value before
    every response token where it read a score at the last (Huang et al. 2024), normalised by the same constants. Without one,
    a value head stands on the policy's own last hidden states. Both can be adapters on one base (stages/rl/adapters.py).
    """

    _keys_to_ignore_on_save = None  # Trainer asks for it where a checkpoint lacks what is frozen

    def __init__(self, policy: PreTrainedModel, critic: Any, *, temperature: float = 1.0,
                 kl_coef: float = 0.0):
        super().__init__()
        for model in (policy, critic):
            if model is not None:
                speed_up(model)
        self.policy = remove_dropout(policy)
        self.critic = remove_dropout(critic) if critic is not None else None
        self.value_head: nn.Linear | None = None
        if critic is None:
            self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)  # no opinion at first, whatever the generator's state
            nn.init.zeros_(self.value_head.bias)
        self.temperature = temperature
        self.kl_coef: Tensor
        self.register_buffer("kl_coef", torch.tensor(kl_coef))
        # Layers that an engine which divides the weights gathers one by one; Accelerate looks for the names here.
        named = {name for model in (policy, critic) if model is not None for name in getattr(model, "_no_split_modules", None) or ()}
        self._no_split_modules = sorted(named & {type(module).__name__ for module in self.modules()})

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What trains: of the policy, and of the critic, whose adapter may lie among the policy's parameters under its own name."""
        adapter = getattr(self.critic, "adapter", None)
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[not name.startswith("policy.") or adapter in name.split(".")].append(parameter)
        return groups

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, response_mask: Tensor,
                ptx: dict[str, Tensor] | None = None) -> TokenStats:
        """`ptx` has packed corpus rows as PackedCollator makes them. In the same call, so that DDP sees one forward a backward."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                  "response_mask": response_mask}
        logprobs, entropy, hidden = policy_stats(self.policy, inputs, self.temperature, hidden=self.value_head is not None)
        if self.critic is not None:
            values = classifier_values(self.critic, inputs)
        else:
            assert self.value_head is not None and hidden is not None
            values = self.value_head(hidden).squeeze(-1)
        return TokenStats(logprobs, entropy, scatter(values.float(), response_mask),
                          language_losses(self.policy, **ptx) if ptx else None)


def language_losses(policy: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label but those of -100, in one dimension, float32, at temperature 1.

    Position ids that begin anew at each document, and no mask: transformers then keeps the documents of a row apart.
    """
    logits = policy(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    rows = (following != -100).nonzero().flatten()
    return -token_logprobs(logits.flatten(0, 1), rows, following[rows], 1.0)[0]


def classifier_values(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """(N,) float32: the score head read before each response token, normalised by the config's `score_mean` and `score_std` if any."""
    with read_by(model, inputs) as (arguments, before):
        hidden = model.base_model(**arguments, use_cache=False).last_hidden_state
    raw = model.get_submodule("score")(hidden.flatten(0, 1)[before]).squeeze(-1).float()
    return (raw - getattr(model.config, "score_mean", 0.0)) / getattr(model.config, "score_std", 1.0)
