"""The one sampler: batched decoding over transformers' own forward, with noise that belongs to the sample and not to the run.

A draw is `argmax(logits / temperature + Gumbel noise)`, which is a draw from the softmax (Gumbel 1954; Maddison et al. 2014).
The noise is a hash of (seed, prompt key, sample index, position, token id), so a response does not depend on which batch, order,
rank or attempt it was drawn in, except where two candidates tie within float error.

Letters: B rows, V vocabulary, T positions so far.
"""
import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step between the counters of splitmix64 (Steele et al. 2014)
MASK64 = (1 << 64) - 1
DROP_SHARE = 8  # finished rows leave batch and cache once they are one in eight: selecting rows copies the whole cache


def prompt_key(id: str) -> int:
    """63-bit key of a prompt's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") >> 1


def mix(word: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit words in which each input bit moves half of the output bits."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK64
    return word ^ (word >> 31)


def row_words(keys: Sequence[tuple[int, int]], seed: int, position: int) -> Tensor:
    """(B, 2) int32: 64 bits for each (prompt key, sample index) at a position of the response, counted from 0."""
    start = mix((seed + GOLDEN) & MASK64)
    mixed = [mix((mix((mix(start ^ prompt) + sample * GOLDEN) & MASK64) + position * GOLDEN) & MASK64) for prompt, sample in keys]
    signed = [half - (1 << 32) if half >> 31 else half for word in mixed for half in (word >> 32, word & 0xFFFFFFFF)]
    return torch.tensor(signed, dtype=torch.int32).view(-1, 2)


def exponential_noise(words: Tensor, tokens: Tensor) -> Tensor:
    """(B, V) float32, standard exponential, one for each row's 64 bits and token id; minus its log is standard Gumbel.

    `words` (B, 2) int32 from `row_words`; `tokens` (V,) int32 ids. Two rounds of murmur3's 32-bit finaliser with the second
    word let in between. int32 products wrap alike on every device; the shift is made logical by masking the sign bits.
    """
    x = (tokens * -0x61C88647)[None, :] ^ words[:, :1]  # 0x9E3779B9 as int32
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB)):  # 0x85EBCA6B, 0xC2B2AE35
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= factor
    x ^= words[:, 1:]
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # lowbias32 (Wellons 2018)
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= factor
    x ^= (x >> 15) & 0x1FFFF
    # 31 bits, small ones exact in float32: the winners of the race are the small noises, so precision is wanted near zero.
    uniform = (x & 0x7FFFFFFF).float().add_(0.5).mul_(0.99999994 * 2.0**-31)
    return uniform.neg_().log1p_().neg_()


def draw(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """(B,) token ids from (B, V) logits; greedy when `noise` is None.

    argmax of logits / temperature + Gumbel, written as a race of exponentials: one logarithm a candidate, not two.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    return (logits.float() / temperature).softmax(dim=-1).div_(noise).argmax(dim=-1)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that grows by `STEP` positions; DynamicLayer copies all of it for each token."""

    STEP = 32

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.size(2)
        if end > self.keys.size(2):
            room = end + self.STEP - self.keys.size(2)
            self.keys, self.values = (torch.cat([old, old.new_empty(*old.shape[:2], room, old.size(3))], dim=2)
                                      for old in (self.keys, self.values))
        self.keys[:, :, self.length:end] = key_states
        self.values[:, :, self.length:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


def make_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache (sliding windows and all) with plain layers replaced by growing ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.inference_mode()
def sample(model: PreTrainedModel, prompts: list[list[int]], *, keys: list[tuple[int, int]], seed: int, temperature: float,
           max_new_tokens: int, eos_ids: Sequence[int], pad_id: int, batch_size: int = 256,
           heard: Callable[[int], None] | None = None, never: Sequence[int] = ()) -> list[list[int]]:
    """One response for each prompt, as token ids without padding; the end token is included if it was drawn.

    `keys` holds (`prompt_key(id)`, sample index) for each row. `temperature` 0 is greedy. `eos_ids` end a response. Equal prompts
    of a batch are read once. The model is in eval mode meanwhile and then as it was. `heard` is told each token as it is drawn, for who
    shows a response while it comes; use it with a single prompt. Tokens of `never` are not drawn.

    Raises ValueError for an empty prompt, keys that do not match the prompts, a negative temperature, or no tokens to draw.
    """
    if len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(keys)} keys: give one (prompt key, sample index) for each prompt")
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(f"temperature {temperature} and max_new_tokens {max_new_tokens}: expected at least 0 and at least 1")
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} has no tokens: a model needs at least one to start from")
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            batch = _decode(model, [prompts[i] for i in rows], [keys[i] for i in rows], seed, temperature, max_new_tokens,
                            eos_ids, pad_id, heard, list(never))
            for i, response in zip(rows, batch, strict=True):
                responses[i] = response
    finally:
        model.train(training)
    return responses


def _decode(model: PreTrainedModel, prompts: list[list[int]], keys: list[tuple[int, int]], seed: int, temperature: float,
            max_new_tokens: int, eos_ids: Sequence[int], pad_id: int, heard: Callable[[int], None] | None,
            never: list[int]) -> list[list[int]]:
    device = model.device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    width = max(map(len, unique))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in unique], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in unique], device=device)
    cache = make_cache(model)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache,
                   use_cache=True, logits_to_keep=1).logits[:, -1]
    place = {prompt: i for i, prompt in enumerate(unique)}
    index = torch.tensor([place[tuple(p)] for p in prompts], device=device)
    if len(unique) < len(prompts):
        cache.batch_select_indices(index)
    logits, mask = logits[index], mask[index]
    positions = mask.sum(1, keepdim=True)
    tokens = torch.arange(logits.size(-1), dtype=torch.int32, device=device)
    ends = torch.tensor(list(eos_ids), device=device)
    live = list(range(len(prompts)))  # which response each row of the batch belongs to
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    responses: list[list[int]] = [[] for _ in prompts]
    for position in range(max_new_tokens):
        if never:
            logits[:, never] = float("-inf")
        noise = exponential_noise(row_words([keys[i] for i in live], seed, position).to(device), tokens) if temperature else None
        drawn = draw(logits, noise, temperature)
        for i, token, finished in zip(live, drawn.tolist(), done.tolist(), strict=True):
            if not finished:
                responses[i].append(token)
                if heard:
                    heard(token)
        done |= torch.isin(drawn, ends)
        left = int((~done).sum())
        if not left or position == max_new_tokens - 1:
            break
        if (len(live) - left) * DROP_SHARE >= len(live):
            keep = (~done).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            drawn, mask, positions, done = drawn[keep], mask[keep], positions[keep], done[keep]
            live = [live[i] for i in keep.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        logits = model(input_ids=drawn[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache,
                       use_cache=True).logits[:, -1]
        positions = positions + 1
    return responses
