"""Rows as token ids and labels: loss on the assistant's turns and on the token that ends each, and what the context cuts off.

The chat template says where the assistant speaks ({% generation %}); nothing here knows how any template writes it. A label is -100
where no loss falls. The first token never carries one: nothing stands before it, and in a packed row another text would.
"""
import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

IGNORED = -100
BATCH = 256
PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
QUANTILES = {50: "half", 90: "90 %", 99: "99 %"}
BINS, BAR = 8, 40


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long the rows are, in tokens and before any cut, and what `max_length` does to them.

    `cut_*` count rows that stay but lose their end; `dropped` rows that are left out with a reason. `tokens` and `loss_tokens` are
    what is trained on: after the cut, without what was dropped.
    """

    lengths: tuple[int, ...]  # of every row, sorted
    max_length: int
    dropped: int
    cut_rows: int
    cut_tokens: int
    cut_loss_tokens: int
    tokens: int
    loss_tokens: int

    def quantile(self, percent: int) -> int:
        """The smallest length that at least `percent` of the rows do not exceed (nearest rank)."""
        return self.lengths[max(0, -(-percent * len(self.lengths) // 100) - 1)]

    def histogram(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, rows) of equally wide bins up to the longest row."""
        width = max(1, -(-self.lengths[-1] // BINS))
        edges = [bisect.bisect_right(self.lengths, width * i) for i in range(BINS + 1)]
        return [(width * i + 1, width * (i + 1), edges[i + 1] - edges[i]) for i in range(BINS)]

    def lines(self) -> list[str]:
        """What is said before training starts."""
        if not self.lengths:
            return ["no rows"]
        within = ", ".join(f"{name} within {self.quantile(percent):,}" for percent, name in QUANTILES.items())
        share = self.loss_tokens / self.tokens if self.tokens else 0.0
        bins = [b for b in self.histogram() if b[0] <= self.lengths[-1]]
        most = max(count for _, _, count in bins)
        return [f"{len(self.lengths):,} rows; {within}, longest {self.lengths[-1]:,} tokens",
                *(f"{low:>7,} to {high:<7,}{'#' * -(-BAR * count // most):<{BAR}} {count:,}" for low, high, count in bins),
                f"max_length {self.max_length:,} cuts {self.cut_rows:,} rows by {self.cut_tokens:,} tokens, {self.cut_loss_tokens:,} "
                f"of them with loss; {self.dropped:,} rows dropped",
                f"trained on: {self.tokens:,} tokens, {self.loss_tokens:,} of them ({share:.0%}) with loss"]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that marks the assistant's turns: the tokenizer's own, or TRL's patched one for a family that it knows.

    Raises ValueError when there is none.
    """
    own = tokenizer.chat_template
    if not own:
        raise ValueError("the tokenizer has no chat template: give it one, or take the tokenizer of stages.prepare")
    from trl.chat_template_utils import get_training_chat_template

    try:
        patched = get_training_chat_template(tokenizer)
    except ValueError:  # unknown to TRL; it may still mark the turns and only fail TRL's tests for tools
        patched = None
    return patched or (own["default"] if isinstance(own, dict) else own)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends an assistant's turn: the first special one after the words of a probe dialogue's answer.

    Raises ValueError for a tokenizer without a chat template, a template that does not mark the assistant's turns, and one that
    ends them in no special token: a model trained with it would never learn to stop.
    """
    ids, mask = next(_rendered(tokenizer, [PROBE], training_template(tokenizer)))
    said = [i for i, m in zip(ids, mask, strict=True) if m]
    if not said:
        raise ValueError("the chat template does not mark the assistant's turns, so loss cannot fall on them alone: write "
                         "{% generation %} before each and {% endgeneration %} after its end-of-turn token")
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    last_word = max((at for at, i in enumerate(said) if i not in special and str(tokenizer.decode([i])).strip()), default=-1)
    ends = [i for i in said[last_word + 1:] if i in special]
    if not ends:
        raise ValueError(f"the chat template ends the assistant's turn with {tokenizer.decode(said[-1:])!r}, not with a special token "
                         "inside {% generation %}: the model would never learn to stop; put an end-of-turn token there")
    return ends[0]


def encode_all(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], *, max_length: int, end_of_text: int,
               completion_only: bool = True) -> tuple[list[dict[str, list[int]]], list[dict[str, str]], Lengths]:
    """(`{"input_ids", "labels"}` a row, dropped rows as `{"where", "reason", "source"}`, lengths) of the rows of stages.data.dialogues.

    Loss falls on the assistant's turns from the row's `first` message on, each with its end-of-turn token; on all tokens but the
    first without `completion_only`; on all of a plain text and `end_of_text` after it. A row is cut after `max_length` tokens, and
    dropped when that leaves nothing with loss or when its text holds a special token, which would forge a turn.
    Raises ValueError as `end_of_turn` does.
    """
    encoded: list[dict[str, list[int]]] = []
    dropped: list[dict[str, str]] = []
    lengths: list[int] = []
    cuts: list[tuple[int, int]] = []
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for row, ids, labels in _labelled(tokenizer, rows, end_of_text, completion_only):
        lengths.append(len(ids))
        reason = _forged(row, special)
        kept = labels[:max_length]
        start = next((at for at, label in enumerate(labels) if label != IGNORED), None)
        if not reason and (start is None or start >= max_length):
            reason = "no token with loss" if start is None else \
                f"nothing to learn within max_length {max_length}: the first answer begins after {start} tokens"
        if reason:
            dropped.append({"where": row["id"], "reason": reason, "source": row["source"]})
            continue
        encoded.append({"input_ids": ids[:max_length], "labels": kept, "source": row["source"]})
        if len(ids) > max_length:
            cuts.append((len(ids) - max_length, sum(label != IGNORED for label in labels[max_length:])))
    return encoded, dropped, Lengths(
        lengths=tuple(sorted(lengths)), max_length=max_length, dropped=len(dropped), cut_rows=len(cuts),
        cut_tokens=sum(tokens for tokens, _ in cuts), cut_loss_tokens=sum(loss for _, loss in cuts),
        tokens=sum(len(row["input_ids"]) for row in encoded),
        loss_tokens=sum(label != IGNORED for row in encoded for label in row["labels"]))


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, max_length: int, end_of_text: int,
           completion_only: bool = True) -> dict[str, list[int]] | str:
    """`{"input_ids", "labels"}` of one row, or why it is dropped. As `encode_all`, which is much faster on many."""
    encoded, dropped, _ = encode_all(tokenizer, [row], max_length=max_length, end_of_text=end_of_text, completion_only=completion_only)
    return encoded[0] if encoded else dropped[0]["reason"]


def _labelled(tokenizer, rows: Sequence[dict[str, Any]], end_of_text: int, completion_only: bool,
              ) -> Iterator[tuple[dict[str, Any], list[int], list[int]]]:
    """Every row in order with all its ids and labels."""
    talks = any("messages" in row for row in rows)
    template, end = (training_template(tokenizer), end_of_turn(tokenizer)) if talks else ("", -1)
    for at in range(0, len(rows), BATCH):
        batch = rows[at:at + BATCH]
        dialogues = _rendered(tokenizer, [row["messages"] for row in batch if "messages" in row], template)
        texts = iter(_texts(tokenizer, [row["text"] for row in batch if "messages" not in row]))
        for row in batch:
            if "messages" in row:
                ids, mask = next(dialogues)
                learned = _learned(mask, ids, end, row) if completion_only else [True] * len(ids)
            else:
                ids = next(texts)
                ids = ids if ids[-1:] == [end_of_text] else [*ids, end_of_text]
                learned = [True] * len(ids)
            yield row, ids, [i if on and position else IGNORED for position, (i, on) in enumerate(zip(ids, learned, strict=True))]


def _rendered(tokenizer, dialogues: list[list[dict[str, str]]], template: str) -> Iterator[tuple[list[int], list[int]]]:
    if dialogues:
        out = tokenizer.apply_chat_template(dialogues, chat_template=template, return_dict=True, return_assistant_tokens_mask=True,
                                            tokenizer_kwargs={"verbose": False})
        yield from zip(out["input_ids"], out["assistant_masks"], strict=True)


def _texts(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def _learned(mask: list[int], ids: list[int], end: int, row: dict[str, Any]) -> list[bool]:
    """The template's mask without the turns before `first`, and of each turn nothing after its end-of-turn token."""
    starts = [i for i, m in enumerate(mask) if m and (i == 0 or not mask[i - 1])]
    turns = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    if len(starts) != len(turns):
        raise ValueError(f"{row['id']}: the chat template marks {len(starts)} turns of the assistant's {len(turns)}, not each once")
    learned = [False] * len(ids)
    for start, number in zip(starts, turns, strict=True):
        stop = next((i for i in range(start, len(ids)) if not mask[i]), len(ids))
        last = max((i for i in range(start, stop) if ids[i] == end), default=stop - 1)
        if number >= row["first"]:
            learned[start:last + 1] = [True] * (last + 1 - start)
    return learned


def _forged(row: dict[str, Any], special: list[str]) -> str:
    texts = [message["content"] for message in row["messages"]] if "messages" in row else [row["text"]]
    held = next((token for token in special if any(token in text for text in texts)), None)
    return f"its text holds the special token {held!r}" if held else ""
