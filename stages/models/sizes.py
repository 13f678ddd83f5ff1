"""Decoders of transformers at the sizes of the ladder, and the initialisation from which the small ones learn.

`WIDTH x depth` says a size: `d128` is 128 wide and four layers deep. Larger ones give `hidden_size` and the rest in the recipe.
"""
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from stages.models.norms import speed_up_norms


def decoder_config(tokenizer: PreTrainedTokenizerBase, *, architecture: str = "qwen3", hidden_size: int, num_layers: int = 4,
                   num_heads: int = 4, num_kv_heads: int | None = None, intermediate_size: int | None = None,
                   context_length: int = 512, rope_theta: float = 1000.0, tie_embeddings: bool = False, **extra) -> PretrainedConfig:
    """Config of a dense decoder. The vocabulary is padded to a multiple of 16.

    Raises ValueError when the width does not divide into heads.
    """
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} does not divide into {num_heads} heads: choose a multiple of {num_heads}")
    return AutoConfig.for_model(
        architecture, vocab_size=-(-len(tokenizer) // 16) * 16, hidden_size=hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads or num_heads, head_dim=hidden_size // num_heads,
        intermediate_size=intermediate_size or -(-8 * hidden_size // 3 // 32) * 32, max_position_embeddings=context_length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, tie_word_embeddings=tie_embeddings, use_cache=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **extra)


def build_decoder(config: PretrainedConfig, *, seed: int, matrix_std: float = 0.07, embedding_std: float = 0.4,
                  head_std: float = 0.002, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A fresh decoder, initialised so that each layer starts as the identity and the logits start at zero.

    Wide embeddings, a narrow head and zeroed output projections took a 0.9M model off the plateau (LOG.md); zeroed
    projections follow Zhang et al. 2019 (Fixup), section 3.2.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=matrix_std)
    nn.init.normal_(model.get_input_embeddings().weight, std=embedding_std)
    if not config.tie_word_embeddings:
        nn.init.normal_(model.get_output_embeddings().weight, std=head_std)
    speed_up_norms(model)
    return model
