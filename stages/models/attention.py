"""Attention over packed rows that never computes what lies between documents.

Rows of `PackedCollator` hold many short documents. The block-diagonal mask that transformers builds for them is exact but costs T^2
a row. Here the documents of a batch are taken out, grouped by length, padded at the right and attended to causally, for which no
mask is needed: what pads a document comes after all of it. In half precision on a GPU one kernel reads documents where they lie
(FlashAttention, Dao et al. 2022).

Letters: B rows, T tokens a row, H heads, d their width; a group holds n documents, padded to the longest of them, of L tokens.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from stages.models.norms import norm_gradients, scale_of, speed_up_norms

DOCUMENTS = "documents"
ONLY_PACKED = "documents attention takes packed rows: position_ids, no mask and no cache"
NOT_COMPUTED = "documents attention has no sliding windows, capped scores or sinks: set attn_implementation to sdpa or eager"
GROUPS = (1, *range(8, 129, 8), 192, 256)  # tokens up to which documents are grouped; single tokens are mostly padding
SAME = ("LlamaAttention", "Qwen3Attention", "Qwen3MoeAttention")  # what `FastAttention` stands in for, by name: tested one by one


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, in M places: `index` (M,) the token at each place, `padding` the places that hold none of their
    own, `back` (B T,) the place of each token, `shapes` (n, L) of each group in the order of their places."""

    index: Tensor
    padding: Tensor
    back: Tensor
    shapes: list[tuple[int, int]]


def edges(position_ids: Tensor) -> Tensor:
    """Where the documents of packed rows begin, and where the last ends, among all tokens, (documents + 1,) int32; each begins where its
    position is 0. `position_ids` (B, T)."""
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).int()


def documents(position_ids: Tensor) -> Documents:
    """Documents of packed rows in groups of like length. `position_ids` (B, T)."""
    ends = edges(position_ids).long()
    starts, lengths = ends[:-1], ends.diff()
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
    return Documents(index, (~real).nonzero().flatten(), back, shapes)


class _Rearrange(torch.autograd.Function):
    """Rows of `x` at `there`, and gradients back by `back`: each row goes to one place that is real, and padding has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.back, ctx.padding = back, padding
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        grad = grad.index_select(0, ctx.back)
        return grad if ctx.padding is None else grad.index_fill_(0, ctx.padding, 0), None, None, None


_last: tuple[Tensor, Callable, Any] | None = None  # every layer of a forward pass is given the same tensor


def places(position_ids: Tensor | None, attention_mask: Tensor | None, rows: int, length: int, sliding_window: int | None,
           find: Callable[[Tensor], Any] = documents) -> Any:
    """Where documents lie in rows that are packed, as `find` has it. Raises ValueError for others, and for windows shorter than a row."""
    global _last
    if position_ids is None or attention_mask is not None:
        raise ValueError(ONLY_PACKED)
    if sliding_window is not None and sliding_window < length:
        raise ValueError(NOT_COMPUTED)
    if _last is None or _last[0] is not position_ids or _last[1] is not find:
        _last = position_ids, find, find(position_ids.expand(rows, -1))
    return _last[2]


def within(query: Tensor, key: Tensor, value: Tensor, where: Documents, scaling: float | None, dropout: float) -> Tensor:
    """Heads (M, H or fewer, d) at the places of documents to their attention (B T, H, d)."""
    if query.device.type == "cpu":  # the backward pass of bf16 takes four times as long
        query, key, value = (x.float() if x.dtype == torch.bfloat16 else x for x in (query, key, value))
    made = []
    sizes = [n * length for n, length in where.shapes]
    for (n, length), *parts in zip(where.shapes, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(0, (n, length)).transpose(1, 2) for part in parts)
        with torch.autocast("cpu", enabled=False):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=q.size(1) != k.size(1))
        made.append(out.transpose(1, 2).flatten(0, 1))
    return _Rearrange.apply(torch.cat(made), where.back, where.index, where.padding)


def of_kernel(device_type: str, dtype: torch.dtype, size: int) -> torch.dtype | None:
    """The type in which a kernel reads heads of `size` where documents lie, None where there is none."""
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    known = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256
    return dtype if known else None


def by_kernel(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None) -> Tensor:
    """Heads (N, H or fewer, d) in half precision to their attention (N, H, d) within documents that `edges` has found."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))  # type: ignore[return-value]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # how documents lie differs from batch to batch
def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
           dropout: float = 0.0, position_ids: Tensor | None = None, sliding_window: int | None = None, softcap: float | None = None,
           s_aux: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """Attention function of transformers: `query` (B, H, T, d), `key` and `value` (B, H or fewer, T, d) to (B, T, H, d).

    Raises ValueError without position ids, with a mask or with a cache, since rows that are not packed want another attention, and
    for what it does not compute: windows shorter than a row, capped scores, sinks.
    """
    rows, length = query.size(0), query.size(2)
    if length != key.size(2):
        raise ValueError(ONLY_PACKED)
    if softcap is not None or s_aux is not None:
        raise ValueError(NOT_COMPUTED)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if not dropout and (half := of_kernel(query.device.type, query.dtype, query.size(-1))):
        ends = places(position_ids, attention_mask, rows, length, sliding_window, edges)
        return by_kernel(q.to(half), k.to(half), v.to(half), ends, length, scaling).unflatten(0, (rows, length)), None
    where = places(position_ids, attention_mask, rows, length, sliding_window)
    q, k, v = (_Rearrange.apply(x, where.index, where.back, None) for x in (q, k, v))
    return within(q, k, v, where, scaling, dropout).unflatten(0, (rows, length)).to(query.dtype), None


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The mask of `attend`: none. Raises ValueError for one that is given."""
    if attention_mask is not None:
        raise ValueError(ONLY_PACKED)


def paired(rows: Tensor, size: int) -> Tensor:
    """Rows of a projection's weight (or a norm's) in another order: within each head of `size`, those that rotary positions turn together
    (i and i + size / 2) become neighbours. Scores of queries and keys, both so ordered, stay what they are."""
    return rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


class Turned(torch.autograd.Function):
    """Heads at their documents' places: normalised where there is a `weight` (d,), then turned by their positions; (N, H, d) to (M, H, d).

    In pairs a turn is one product of complex numbers, `turn` (N, 1, d/2) (Su et al. 2021, equation 12); transformers writes it as five
    operations. All of it is done in one buffer, since new memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, turn: Tensor, epsilon: float, where: Documents) -> Tensor:  # type: ignore[override]
        scale = None if weight is None else scale_of(x, epsilon)
        ctx.where = where
        ctx.save_for_backward(None if weight is None else x, weight, scale, turn)
        turned = x.clone() if weight is None or scale is None else (x * weight).mul_(scale)
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(turn)
        return turned.index_select(0, where.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale, turn = ctx.saved_tensors
        grad = grad.index_select(0, ctx.where.back)
        torch.view_as_complex(grad.unflatten(-1, (-1, 2))).mul_(turn.conj())
        if weight is None:
            return grad, None, None, None, None
        return *norm_gradients(grad * weight, grad, x, weight, scale, ctx.needs_input_grad[1]), None, None, None


class FastAttention(nn.Module):
    """Put before a class of `SAME`; whatever is not attention within documents, of float32 on a CPU by plain projections, goes on to it.

    Under autocast the projections are in bf16 and what lies between them, norms and positions included, in float32.
    """

    config: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    head_dim: int
    scaling: float
    attention_dropout: float

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
                past_key_values: Any = None, position_ids: Tensor | None = None, **more: Any) -> tuple[Tensor, None]:
        projections = self.q_proj, self.k_proj
        cos, sin = position_embeddings
        if (torch.compiler.is_compiling() or self.config._attn_implementation != DOCUMENTS or past_key_values is not None
                or any(type(p) is not nn.Linear or p.bias is not None for p in projections)
                or hidden_states.device.type != "cpu" or not hidden_states.dtype == self.q_proj.weight.dtype == torch.float32):
            return super().forward(hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                                   past_key_values=past_key_values, position_ids=position_ids, **more)
        rows, length, size = *hidden_states.shape[:2], self.head_dim
        where = places(position_ids, attention_mask, rows, length, getattr(self, "sliding_window", None))
        turn = torch.complex(cos, sin)[..., :size // 2].expand(rows, -1, -1).reshape(rows * length, 1, -1)
        flat = hidden_states.flatten(0, 1)
        norms: list[Any] = [getattr(self, "q_norm", None), getattr(self, "k_norm", None)]
        query, key = (Turned.apply(linear(flat, paired(p.weight, size)).float().unflatten(-1, (-1, size)),
                                   None if norm is None else paired(norm.weight, size), turn,
                                   0.0 if norm is None else norm.variance_epsilon, where)
                      for p, norm in zip(projections, norms, strict=True))
        value = _Rearrange.apply(self.v_proj(flat).unflatten(-1, (-1, size)), where.index, where.back, None)
        out = within(query, key, value, where, self.scaling, self.attention_dropout if self.training else 0.0)
        return self.o_proj(out.reshape(rows, length, -1)), None


def speed_up(model: nn.Module) -> None:
    """Have norms and attention of `model` that are known computed by the faster forms of this project. Parameters, their names and what is
    saved stay as they are."""
    speed_up_norms(model)
    for module in model.modules():
        if type(module).__name__ in SAME and not isinstance(module, FastAttention):
            module.__class__ = type(type(module).__name__, (FastAttention, type(module)), {})


AttentionInterface.register(DOCUMENTS, attend)
AttentionMaskInterface.register(DOCUMENTS, no_mask)
