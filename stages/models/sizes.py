"""Decoders of transformers at the sizes of the ladder, and the initialisation from which the small ones learn.

`WIDTH x depth` says a size: `d128` is 128 wide and four layers deep. Larger ones give `hidden_size` and the rest in the recipe.
Mixtures of experts (docs/mixture-of-experts.md) are those of transformers, too: what they save, plain transformers loads.
"""
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.attention import speed_up
from stages.models.optimizer import is_matrix
from stages.run.config import read_yaml

# Architectures whose MLPs are experts: what their configs call the number of experts and the width of one. `olmoe` and `qwen3_moe`
# differ in the attention's norms alone; `qwen2_moe` and `dots1` have an expert that every token visits, and `dots1` a bias on the choice.
MIXTURES = {"olmoe": ("num_experts", "intermediate_size"), "qwen3_moe": ("num_experts", "moe_intermediate_size"),
            "qwen2_moe": ("num_experts", "moe_intermediate_size"), "mixtral": ("num_local_experts", "intermediate_size"),
            "dots1": ("n_routed_experts", "moe_intermediate_size")}
EXPERTS = "grouped_mm"  # a sort and two grouped products: faster on a CPU than a loop or gathered weights (docs/performance.md)


def mixture(architecture: str, *, num_experts: int | None, experts_per_token: int, expert_size: int | None,
            shared_expert_size: int | None, intermediate_size: int) -> dict[str, Any]:
    """What a config of transformers needs for its experts; nothing for a dense architecture.

    By default a token visits as many MLP parameters as in the dense decoder: `intermediate_size` is divided among the experts that it
    visits, a shared one among them where the architecture has one. Weights of the chosen experts are made to sum to one, so the scale of
    a layer does not depend on their number; with a single expert a token they are not, as it alone teaches the router.
    Raises ValueError for experts in a dense architecture, none in a mixture, and numbers that no router can choose from.
    """
    if architecture not in MIXTURES:
        if num_experts is not None:
            raise ValueError(f"architecture {architecture} has no experts: leave num_experts out, or choose {', '.join(MIXTURES)}")
        return {}
    if num_experts is None:
        raise ValueError(f"architecture {architecture} is a mixture of experts: set num_experts, for instance to 8")
    if not 1 <= experts_per_token < num_experts:
        raise ValueError(f"experts_per_token is {experts_per_token} of {num_experts} experts: set it below their number")
    shares = architecture == "qwen2_moe" or (architecture == "dots1" and shared_expert_size != 0)
    if shared_expert_size and not shares:
        raise ValueError(f"architecture {architecture} has no shared expert: leave shared_expert_size out, or choose qwen2_moe")
    size = expert_size or intermediate_size // (experts_per_token + shares)
    shared = size if shared_expert_size is None else shared_expert_size
    number, width = MIXTURES[architecture]
    found: dict[str, Any] = {number: num_experts, width: size, "num_experts_per_tok": experts_per_token}
    if architecture == "mixtral":  # it always makes them one
        if experts_per_token == 1:
            raise ValueError("mixtral gives a single expert the weight 1, from which its router learns nothing: set experts_per_token to 2 "
                             "or more, or choose olmoe")
    else:
        found["norm_topk_prob"] = experts_per_token > 1
    if architecture == "qwen2_moe":
        if not shared:
            raise ValueError("qwen2_moe always has a shared expert: set shared_expert_size above 0, or choose qwen3_moe or olmoe")
        found["shared_expert_intermediate_size"] = shared
    if architecture == "dots1":
        if shares and shared % size:
            raise ValueError(f"shared experts of dots1 are as wide as the others: shared_expert_size {shared} is not a multiple of {size}")
        found |= {"n_shared_experts": shared // size if shares else 0, "first_k_dense_replace": 0, "sliding_window": None}
    return found


def decoder_config(tokenizer: PreTrainedTokenizerBase, *, architecture: str = "qwen3", hidden_size: int, num_layers: int = 4,
                   num_heads: int = 4, num_kv_heads: int | None = None, intermediate_size: int | None = None,
                   context_length: int = 512, rope_theta: float = 1000.0, tie_embeddings: bool = False, num_experts: int | None = None,
                   experts_per_token: int = 2, expert_size: int | None = None, shared_expert_size: int | None = None,
                   **extra) -> PretrainedConfig:
    """Config of a decoder, dense or with experts (`mixture`). The vocabulary is padded to a multiple of 16.

    Raises ValueError when the width does not divide into heads of even size, and for experts that do not go with the architecture.
    """
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} does not divide into {num_heads} heads: choose a multiple of {num_heads}")
    if hidden_size // num_heads % 2:
        raise ValueError(f"hidden_size {hidden_size} over {num_heads} heads makes heads of {hidden_size // num_heads}, and rotary "
                         f"positions turn pairs: choose a multiple of {2 * num_heads}")
    wide = intermediate_size or -(-8 * hidden_size // 3 // 32) * 32
    mlp: dict[str, Any] = {"intermediate_size": wide} | mixture(
        architecture, num_experts=num_experts, experts_per_token=experts_per_token, expert_size=expert_size,
        shared_expert_size=shared_expert_size, intermediate_size=wide)
    return AutoConfig.for_model(
        architecture, vocab_size=-(-len(tokenizer) // 16) * 16, hidden_size=hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads or num_heads, head_dim=hidden_size // num_heads,
        max_position_embeddings=context_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=tie_embeddings, use_cache=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **mlp, **extra)


def of_size(size: str) -> dict[str, Any]:
    """Settings of the decoder that `WIDTHxLAYERS` names, with heads of 32; or all of a recipe's pretraining, by the recipe's name, with
    `row_length` and `vocab_size` of its text. Raises ValueError for what is neither."""
    if found := re.fullmatch(r"(\d+)x(\d+)", size):
        width, layers = map(int, found.groups())
        if width and layers and not width % 32:
            return {"hidden_size": width, "num_layers": layers, "num_heads": width // 32}
    recipe = Path("recipes", size)
    if found or not (recipe / "pretrain.yaml").is_file():
        raise ValueError(f"size {size!r}: expected width x layers, for example 128x4, the width a multiple of 32, or the name of a recipe")
    text = read_yaml(recipe / "prepare.yaml")
    return read_yaml(recipe / "pretrain.yaml") | {"row_length": text.get("row_length", 512), "vocab_size": text.get("vocab_size", 1024)}


def decoder_of(config: Any, tokenizer: PreTrainedTokenizerBase, row_length: int) -> PretrainedConfig:
    """The decoder that a pretraining config asks for over this vocabulary."""
    return decoder_config(
        tokenizer, architecture=config.architecture, hidden_size=config.hidden_size, num_layers=config.num_layers,
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, intermediate_size=config.intermediate_size,
        context_length=row_length, rope_theta=config.rope_theta, tie_embeddings=config.tie_embeddings, num_experts=config.num_experts,
        experts_per_token=config.experts_per_token, expert_size=config.expert_size, shared_expert_size=config.shared_expert_size)


def build_decoder(config: PretrainedConfig, *, seed: int, matrix_std: float = 0.07, embedding_std: float = 0.4,
                  head_std: float = 0.002, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A fresh decoder, initialised so that each layer starts as the identity and the logits start at zero.

    Wide embeddings, a narrow head and zeroed output projections took a 0.9M model off the plateau (LOG.md); zeroed
    projections follow Zhang et al. 2019 (Fixup), section 3.2.
    """
    torch.manual_seed(seed)
    experts = {"experts_implementation": EXPERTS} if config.model_type in MIXTURES else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation, **experts)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight").endswith(("o_proj", "down_proj")):
            nn.init.zeros_(parameter)
        elif is_matrix(name, parameter):
            nn.init.normal_(parameter, std=matrix_std)
    nn.init.normal_(model.get_input_embeddings().weight, std=embedding_std)
    if not config.tie_word_embeddings:
        nn.init.normal_(model.get_output_embeddings().weight, std=head_std)
    speed_up(model)
    return model
