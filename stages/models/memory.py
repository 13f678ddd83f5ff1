"""Memory a device needs to train a decoder, by formula: weights, gradients, optimizer, copies, activations, logits.

Everything here is an estimate for mixed precision in bf16, made to reject what cannot fit before a machine is rented; the
allocator's fragmentation and the libraries' own workspace (about 2 GiB) come on top.

Letters: P parameters, n devices, t tokens of one micro-batch on one device (its rows times their length), h width, q and k the
widths of all query and all key heads, f the width of the MLP that a token visits, L layers, V vocabulary.

Engines, bytes a parameter (Rajbhandari et al. 2020, arXiv 1910.02054, section 3):
    ddp    4 weights + 4 gradients + optimizer; copies: 2 (autocast's bf16 weights), and 4 more in gradient buckets if n > 1
    zero2  2 weights + (2 gradients + 4 master weights + optimizer) / n
    zero3  (2 weights + 2 gradients + 4 master weights + optimizer) / n; copies: up to 1e9 gathered parameters at 2
    fsdp2  (4 weights + 4 gradients + optimizer) / n; copies: the embeddings and two layers at 2, one layer's gradient at 4
The optimizer is 8 (AdamW: two moments in fp32), or for Muon 4 on the matrices of the layers.

Activations, following the count of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) for layers without dropout, with
attention that does not keep its scores (sdpa, flash), and grouped queries: bytes a token and layer
    attention  2 (h + h + q + 2k + q), and 2 (q + k) more with normed queries and keys
    MLP        2 (h + h + 2f), or 2 (h + h + 4f) when gated
For q = k = h and f = 4h that is 32 h: their 34 h less the two dropout masks. transformers keeps more, counted from its layers:
    norms      8 h more, since they work in fp32, and 4 (q + k) where queries and keys have some
    autocast   10 h more (ddp, fsdp2): the residual stream is fp32, and each of q, k, v, gate and up casts its input for itself
With checkpointing 2 h (autocast: 4 h), and one layer in full.
Logits take 12 V a token: log-probabilities in fp32 4, two gradients in fp32 4 each; the bf16 logits are gone when the backward pass begins.
"""
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from stages.models.counts import count_parameters
from stages.models.optimizer import is_matrix

Engine = Literal["ddp", "zero2", "zero3", "fsdp2"]
GATHERED = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size; two are in flight


def state_bytes(engine: Engine, *, devices: int, trainable: int, frozen: int = 0, layer: int = 0, outer: int = 0,
                muon_parameters: int = 0, frozen_width: int = 2) -> dict[str, int]:
    """Bytes on one device that do not depend on the batch: weights, gradients, optimizer, copies.

    `layer` and `outer` are the parameters of one layer and of embedding and head; `muon_parameters` of the trainable ones keep
    one moment in place of two; frozen weights are kept at `frozen_width` bytes. Raises ValueError for an unknown engine.
    """
    moments = 8 * trainable - 4 * muon_parameters
    both = trainable + frozen
    if engine == "ddp":
        copies = 2 * trainable + (4 * trainable if devices > 1 else 0)
        return {"weights": 4 * trainable + frozen_width * frozen, "gradients": 4 * trainable, "optimizer": moments,
                "copies": copies}
    if engine == "zero2":
        copies = 2 * 2 * min(BUCKET, trainable)
        return {"weights": 2 * both, "gradients": -(-2 * trainable // devices),
                "optimizer": -(-(4 * trainable + moments) // devices), "copies": copies}
    if engine == "zero3":
        return {"weights": -(-2 * both // devices), "gradients": -(-2 * trainable // devices),
                "optimizer": -(-(4 * trainable + moments) // devices),
                "copies": 2 * min(GATHERED, both) if devices > 1 else 0}
    if engine == "fsdp2":
        return {"weights": -(-(4 * trainable + frozen_width * frozen) // devices), "gradients": -(-4 * trainable // devices),
                "optimizer": -(-moments // devices), "copies": 2 * (outer + 2 * layer) + (4 * layer if trainable else 0)}
    raise ValueError(f"unknown engine {engine!r}: choose ddp, zero2, zero3 or fsdp2")


def widths(model: PreTrainedModel) -> dict[str, int]:
    """The letters h, q, k, f, L, V of a decoder, and whether its MLP is gated and its queries normed (0 or 1)."""
    config: PretrainedConfig = model.config.get_text_config()
    names = [name for name, _ in model.named_parameters()]
    gated = any("gate_proj" in name or "gate_up" in name for name in names)
    counts = count_parameters(model)
    layers, h = config.num_hidden_layers, config.hidden_size
    size = getattr(config, "head_dim", None) or h // config.num_attention_heads
    idle = counts["total"] - counts["active"]
    f = (counts["mlp"] + counts["experts"] - idle) // ((3 if gated else 2) * h * layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"h": h, "q": config.num_attention_heads * size, "k": heads * size, "f": f, "L": layers, "V": config.vocab_size,
            "gated": int(gated), "normed": int(any("q_norm" in name for name in names))}


def activation_bytes(w: dict[str, int], tokens: int, *, checkpointing: bool, autocast: bool) -> int:
    """Bytes of activations kept for the backward pass of `tokens` tokens; see the head of this file."""
    attention = 2 * (2 * w["h"] + 2 * w["q"] + 2 * w["k"]) + (6 * (w["q"] + w["k"]) if w["normed"] else 0)
    mlp = 2 * (2 * w["h"] + (4 if w["gated"] else 2) * w["f"])
    layer = attention + mlp + (18 if autocast else 8) * w["h"]
    return tokens * (w["L"] * (4 if autocast else 2) * w["h"] + layer if checkpointing else w["L"] * layer)


def logits_bytes(w: dict[str, int], tokens: int) -> int:
    return 12 * w["V"] * tokens


def cache_bytes(w: dict[str, int], tokens: int) -> int:
    """Keys and values of `tokens` tokens in bf16, for generation."""
    return 2 * 2 * w["k"] * w["L"] * tokens


def matrices_of_layers(model: PreTrainedModel) -> int:
    """Parameters that Muon moves: the matrices, stacked or not, inside the decoder layers."""
    outer = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    outer |= {id(head.weight)} if isinstance(head, torch.nn.Module) else set()
    return sum(p.numel() for name, p in model.named_parameters() if is_matrix(name, p) and id(p) not in outer)
