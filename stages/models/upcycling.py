"""A mixture of experts that begins as a trained dense model (sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055).

Every expert is a copy of the dense MLP, routers are new and draw different tokens to each. Where the weights of the chosen experts sum to
one, as they do here, the mixture says exactly what the dense model said.
"""
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward.folders import trusted

SIBLINGS = {"qwen3": ("qwen3_moe", "dots1"), "qwen2": ("qwen2_moe",), "llama": ("mixtral",), "mistral": ("mixtral",)}  # the same attention


@torch.no_grad()
def upcycle(model: PreTrainedModel, folder: str) -> None:
    """Give a fresh mixture the weights of the dense model saved in `folder`: its outputs are the dense model's until it is trained.

    The projection out of a shared expert is zeroed, as the experts already say all. Raises ValueError for a folder without a model, an
    architecture with another attention, sizes that differ, and a single expert a token, whose weight is not 1.
    """
    try:
        dense = AutoModelForCausalLM.from_pretrained(trusted(folder), dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"upcycle: {folder} has no model that transformers can load ({str(error).splitlines()[0]}): "
                         "name a folder that a dense run saved, as runs/tiny/pretrain/model") from None
    kind, wanted = model.config.model_type, dense.config.model_type
    if kind not in SIBLINGS.get(wanted, ()):
        known = "; ".join(f"{name} becomes {' or '.join(of)}" for name, of in SIBLINGS.items())
        raise ValueError(f"upcycle: {folder} is a {wanted}, which does not become a {kind}, whose attention is another: {known}")
    if model.config.num_experts_per_tok == 1:
        raise ValueError("upcycle: one expert a token has a weight below 1, so the model would not begin as the dense one: "
                         "set experts_per_token to 2 or more")
    for key in ("num_attention_heads", "num_key_value_heads", "rope_parameters", "tie_word_embeddings"):
        mine, given = getattr(model.config, key), getattr(dense.config, key)
        if mine != given:
            raise ValueError(f"upcycle: {key} is {mine} here and {given} in {folder}: give both models the same")
    model.config.rms_norm_eps = dense.config.rms_norm_eps  # architectures have defaults of their own
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = dense.config.rms_norm_eps
    source = dense.state_dict()
    copied = set()
    for name, target in model.named_parameters():
        if ".mlp.experts." in name:
            parts = ["gate_proj", "up_proj"] if name.endswith("gate_up_proj") else ["down_proj"]
            names = [f"{name.split('.experts.')[0]}.{part}.weight" for part in parts]
            value = torch.cat([source[one] for one in names]).expand(target.shape[0], -1, -1)
        elif ".mlp.gate." in name or ".mlp.shared_expert" in name:
            if name.endswith("down_proj.weight"):
                nn.init.zeros_(target)
            continue
        else:
            names, value = [name], source[name]
        if value.shape != target.shape:
            raise ValueError(f"upcycle: {name} is {tuple(target.shape)} here and {tuple(value.shape)} in {folder}: set hidden_size to "
                             f"{dense.config.hidden_size}, num_layers to {dense.config.num_hidden_layers}, expert_size to "
                             f"{dense.config.intermediate_size}, and take its own tokens (a vocabulary of {dense.config.vocab_size})")
        target.copy_(value)
        copied |= set(names)
    assert copied | {"lm_head.weight"} >= set(source), f"left behind: {sorted(set(source) - copied)}"
