"""Log-probabilities of chosen tokens and entropies from logits, without another tensor of their size in float32.

With a large vocabulary these tensors are the peak of PPO's memory: 640 tokens of 50,000 words are 128 MB in float32, and a softmax
written plainly holds five of them at once (scaled logits, log-softmax, its exponential, their product, the gradient). Here the
softmax is taken of a few tokens at a time, and again in the backward pass, which keeps the model's own logits and nothing else.

Letters: L rows of logits, N tokens, V vocabulary.
"""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22  # elements of float32 scratch, 16 MB: below it a GPU is busy launching kernels, above it a CPU is no faster


def chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    """Slices of the tokens, each of `CHUNK` elements of logits at most but of one token at least."""
    step = max(1, CHUNK // vocab_size)
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


class TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`."""

    @staticmethod
    def forward(ctx, logits: Tensor, rows: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropy = (torch.empty(len(rows), dtype=torch.float32, device=logits.device) for _ in range(2))
        for part in chunks(len(rows), logits.size(-1)):
            scaled = logits.index_select(0, rows[part]).float().div_(temperature)
            normalised = scaled.log_softmax(dim=-1)
            logprobs[part] = normalised.gather(-1, chosen[part, None]).squeeze(-1)
            entropy[part] = torch.exp(normalised, out=scaled).mul_(normalised).sum(-1).neg_()
        ctx.save_for_backward(logits, rows, chosen)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        """d log p(chosen) / d logits = (1 at the chosen token, 0 elsewhere, - softmax) / temperature."""
        logits, rows, chosen = ctx.saved_tensors
        given = torch.zeros_like(logits) if len(rows) < len(logits) else torch.empty_like(logits)
        for part in chunks(len(rows), logits.size(-1)):
            weight = gradient[part, None] / ctx.temperature
            scaled = logits.index_select(0, rows[part]).float().div_(ctx.temperature)
            change = torch.softmax(scaled, dim=-1).mul_(-weight)
            change.scatter_add_(-1, chosen[part, None], weight)
            given.index_copy_(0, rows[part], change.to(given.dtype))
        return given, None, None, None


def token_logprobs(logits: Tensor, rows: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N,) float32 log-probabilities of the tokens `chosen` (N,), and entropies (N,), which have no gradient, of the softmax of
    logits / temperature.

    `logits` (L, V) in any floating type, of which `rows` (N,) int64, none twice, are read: so padding needs no copy that leaves it
    out. The arithmetic is float32; the gradient comes in the type of the logits.
    """
    return TokenLogprobs.apply(logits, rows, chosen, temperature)
