"""Attention over packed rows that never computes what lies between documents.

Rows of `PackedCollator` hold many short documents. The block-diagonal mask that transformers builds for them is exact but costs T^2
a row. Here the documents of a batch are taken out, grouped by length, padded at the right and attended to causally, for which no
mask is needed: what pads a document comes after all of it. GPUs have kernels for this (FlashAttention, Dao et al. 2022); CPUs do not.

Letters: B rows, T tokens a row, H heads, d their width; a group holds n documents, padded to the longest of them, of L tokens.
"""
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

DOCUMENTS = "documents"
ONLY_PACKED = "documents attention takes packed rows: position_ids, no mask and no cache"
GROUPS = (1, 64, 128, 256)  # tokens up to which documents are grouped; single tokens are mostly padding


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, in M places: `index` (M,) the token at each place, `real` (M, 1, 1) whether it is more than
    padding, `back` (B T,) the place of each token, `shapes` (n, L) of each group in the order of their places."""

    index: Tensor
    real: Tensor
    back: Tensor
    shapes: list[tuple[int, int]]


def documents(position_ids: Tensor) -> Documents:
    """Documents of packed rows, each of which begins where its position is 0. `position_ids` (B, T)."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    lengths = starts.diff(append=starts.new_tensor([position_ids.numel()]))
    group_of = torch.bucketize(lengths, lengths.new_tensor(GROUPS))
    indices, reals, shapes = [], [], []
    for group in group_of.unique().tolist():
        start, length = starts[group_of == group, None], lengths[group_of == group, None]
        place = torch.arange(int(length.max()), device=start.device)
        real = place < length
        indices.append(torch.where(real, start + place, start).flatten())
        reals.append(real.flatten())
        shapes.append((real.size(0), real.size(1)))
    index, real = torch.cat(indices), torch.cat(reals)
    back = torch.empty(position_ids.numel(), dtype=torch.long, device=index.device)
    back[index[real]] = real.nonzero().flatten()
    return Documents(index, real[:, None, None], back, shapes)


class _Rearrange(torch.autograd.Function):
    """Rows of `x` at `there`, and gradients back by `back`: each row goes to one place that is real, and padding has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.back, ctx.real = back, real
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        grad = grad.index_select(0, ctx.back)
        return grad if ctx.real is None else grad * ctx.real, None, None, None


_last: tuple[Tensor, Documents] | None = None  # every layer of a forward pass is given the same tensor


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
           dropout: float = 0.0, position_ids: Tensor | None = None, sliding_window: int | None = None, softcap: float | None = None,
           s_aux: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """Attention function of transformers: `query` (B, H, T, d), `key` and `value` (B, H or fewer, T, d) to (B, T, H, d).

    Raises ValueError without position ids, with a mask or with a cache, since rows that are not packed want another attention, and
    for what it does not compute: windows shorter than a row, capped scores, sinks.
    """
    global _last
    if position_ids is None or attention_mask is not None or query.size(2) != key.size(2):
        raise ValueError(ONLY_PACKED)
    if softcap is not None or s_aux is not None or (sliding_window is not None and sliding_window < query.size(2)):
        raise ValueError("documents attention has no sliding windows, capped scores or sinks: set attn_implementation to sdpa or eager")
    if _last is None or _last[0] is not position_ids:
        _last = position_ids, documents(position_ids.expand(query.size(0), -1))
    where = _last[1]
    heads = query.size(1), key.size(1), value.size(1)
    together = torch.cat([query, key, value], dim=1).transpose(1, 2).flatten(0, 1)
    taken = _Rearrange.apply(together, where.index, where.back, None)
    made = []
    for (n, length), part in zip(where.shapes, taken.split([n * length for n, length in where.shapes]), strict=True):
        q, k, v = part.view(n, length, sum(heads), -1).transpose(1, 2).split(heads, dim=1)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=heads[0] != heads[1])
        made.append(out.transpose(1, 2).flatten(0, 1))
    out = _Rearrange.apply(torch.cat(made), where.back, where.index, where.real)
    return out.view(query.size(0), query.size(2), heads[0], -1), None


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The mask of `attend`: none. Raises ValueError for one that is given."""
    if attention_mask is not None:
        raise ValueError(ONLY_PACKED)


AttentionInterface.register(DOCUMENTS, attend)
AttentionMaskInterface.register(DOCUMENTS, no_mask)
