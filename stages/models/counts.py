"""What a decoder costs: parameters by kind and training FLOPs a token, from its config, without allocating it.

Three conventions of N are in use and move a scaling exponent by as much as .15 (Porian et al. 2024, arXiv 2406.19146), so each
has its name here: `total`, `non_embedding` (Kaplan et al. 2020: without embeddings, positions and an untied head) and `matmul`
(what multiplies every token: no embedding, but the head, tied or not, and of experts those a token visits).

A token costs 6 FLOPs for each matmul parameter (2 forward, 4 backward) and 12 L h d T for attention over T tokens, L layers, h
heads of d (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the whole square, causal or not, as published MFU has it.
Norms, softmax and activations are left out.
"""
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stages.models.engines import shape_of
from stages.models.sizes import decoder_of

CONVENTIONS = {
    "total": "all parameters, a tied head once", "non_embedding": "all but token and position embeddings and an untied head",
    "matmul": "parameters that multiply each token: no embeddings or norms, the head (tied or not), experts visited only"}
FLOPS = "6 x matmul parameters + 12 x layers x heads x head size x attended tokens, for each token (forward and backward)"


def build_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: PretrainedConfig | PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters of any decoder of transformers, built or as a config.

    Keys: total, non_embedding, matmul, active (total less the experts a token does not visit), and by kind embedding, head
    (0 when tied), attention, mlp, experts, router, norm (with all other vectors: biases, sinks).
    """
    if isinstance(model, PretrainedConfig):
        model = build_meta(model)
    config = model.config.get_text_config()
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head_module = model.get_output_embeddings()
    head_weight = head_module.weight if head_module is not None else None
    kinds = dict.fromkeys(("embedding", "head", "attention", "mlp", "experts", "router", "norm"), 0)
    for name, parameter in model.named_parameters():  # a tied weight is listed once, as the embedding
        kinds[_kind(name, parameter, parameter is head_weight, id(parameter) in embeddings)] += shape_of(parameter).numel()
    total = sum(kinds.values())
    idle = 0
    if kinds["experts"]:
        num_experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
        idle = kinds["experts"] * (num_experts - _first(config, "num_experts_per_tok", "top_k")) // num_experts
    head = shape_of(head_weight).numel() if head_weight is not None else 0
    matmul = sum(kinds[kind] for kind in ("attention", "mlp", "experts", "router")) - idle + head
    non_embedding = total - kinds["embedding"] - kinds["head"]
    return {"total": total, "non_embedding": non_embedding, "matmul": matmul, "active": total - idle, **kinds}


def _kind(name: str, parameter: nn.Parameter, is_head: bool, is_embedding: bool) -> str:
    if is_embedding:
        return "embedding"
    if is_head:
        return "head"
    if len(shape_of(parameter)) < 2:
        return "norm"
    if re.search(r"\bexperts\b", name):
        return "experts"
    if re.search(r"\b(router|gate)\.weight$|\brouter\b", name):
        return "router"
    return "attention" if re.search(r"attn|attention", name) else "mlp"


def _first(config: PretrainedConfig, *names: str) -> int:
    for name in names:
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"the config of {config.model_type} has none of {', '.join(names)}: its experts cannot be counted")


def attention_flops(config: PretrainedConfig, sequence_length: int) -> int:
    """Training FLOPs a token spends on scores and weighted sums: 12 h d T in each layer; sliding layers see their window only."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys, values = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
    window = getattr(config, "sliding_window", None) or sequence_length
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attended = sum(min(sequence_length, window) if kind == "sliding_attention" else sequence_length for kind in kinds)
    return 6 * heads * (keys + values) * attended


def train_flops_per_token(config: PretrainedConfig, sequence_length: int, counts: dict[str, int] | None = None) -> int:
    """FLOPs of forward and backward for one token in rows of `sequence_length`. A third of it is the forward pass."""
    counts = counts or count_parameters(config)
    return 6 * counts["matmul"] + attention_flops(config, sequence_length)


def forward_flops(config: PretrainedConfig, *, tokens: int, predicted: int, sequence_length: int) -> int:
    """FLOPs of reading `tokens` tokens in rows of `sequence_length` where the head is asked at `predicted` of them alone.

    Sampling asks at the response's tokens, a reward model, which has no such head, at none. 2 a matmul parameter and token.
    """
    text = config.get_text_config()
    head = text.vocab_size * text.hidden_size
    each = 2 * (count_parameters(config)["matmul"] - head) + attention_flops(config, sequence_length) // 3
    return each * tokens + 2 * head * predicted


class _Vocabulary:
    """What a config needs of a tokenizer that does not exist yet: its length."""

    pad_token_id = eos_token_id = None

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def planned_decoder(config: Any, *, vocabulary: int, row_length: int) -> PretrainedConfig:
    """The decoder that a pretraining config would build over a vocabulary of this many tokens, before either exists."""
    return decoder_of(config, _Vocabulary(vocabulary), row_length)  # type: ignore[arg-type]
