"""Byte-level BPE trained on the run's own corpus, saved with its special tokens and the chat template.

How numbers are split is an option because it decides what arithmetic costs: `whole` keeps a number's digits in one
pre-token (BPE may then learn it as one token), `digits` makes each digit its own. LOG.md has the measurement.
"""
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.data.corpora import known_revision
from stages.run.manifest import hash_data, hash_path

PAD, EOS, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, EOS, SYSTEM, USER, ASSISTANT, END)
NUMBERS = {"whole": r" ?\d+", "digits": r" ?\d"}
# The generation markers let TRL put the loss on the assistant's turns alone (end-of-turn included).
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %} {{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- elif message['role'] in ('system', 'user') -%}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{%- else -%}{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}")

CACHED = 1 << 22  # characters of the words whose ids are kept
_JOINED = ("  ", " \n", "\n ", "\n\n\n")  # white space that may be one piece


def pieces(numbers: str) -> str:
    """The pattern of what BPE never merges across: a word, a number or digit, newlines, signs, spaces."""
    return rf" ?\p{{L}}+|{NUMBERS[numbers]}|\s*\n+| ?[^\s\p{{L}}\d]+|\s+"


def check_vocabulary(vocab_size: int) -> None:
    """Raises ValueError for a vocabulary that the bytes and special tokens alone exceed."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is smaller than {smallest}, the bytes and special tokens alone: set it higher")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, numbers: str = "whole", context_length: int = 512,
                    ) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: every byte has a token, so any text is encodable and nothing maps to an unknown.

    The vocabulary may come out smaller than `vocab_size` when the corpus has no more pairs to merge.
    Raises ValueError for an unknown `numbers` or a vocabulary too small for bytes and special tokens.
    """
    if numbers not in NUMBERS:
        raise ValueError(f"unknown numbers {numbers!r}: choose from {', '.join(NUMBERS)}")
    check_vocabulary(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces(numbers)), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=context_length, chat_template=CHAT_TEMPLATE,
        padding_side="left", clean_up_tokenization_spaces=False,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END])


def encoder(tokenizer: PreTrainedTokenizerBase, *, own: bool) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """A function from texts to token ids (int32). `own` says that the tokenizer is one of `train_tokenizer`.

    Of ours it gives what the tokenizer gives, several times as fast. Nothing is merged across a space or a newline, and words come again
    and again, so their ids are kept. A special token that stands in a text is plain text.
    """
    if not own:
        return lambda texts: [np.array(ids, dtype=np.int32) for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    ids = _Ids(tokenizer)

    def encode(text: str) -> bytes:
        if any(map(text.__contains__, _JOINED)) or not text.replace("\n", " ").isprintable():
            return ids.of(text)
        return b"".join(map(ids.__getitem__, f"\1{text}".replace("\n\n", " \0").replace("\n", " \n").split(" ")))
    return lambda texts: [np.frombuffer(encode(text), dtype=np.int32) for text in texts]


class _Ids(dict):
    """The ids (int32) of a word as it stands in a text: after a space, a newline, two (marked \\0), nothing (\\1). Full, it forgets all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        self.plain.encode_special_tokens = True
        self.merged = self.plain.model.tokenize
        self.chars = 0

    def of(self, text: str) -> bytes:
        return array("i", self.plain.encode(text, add_special_tokens=False).ids).tobytes()

    def __missing__(self, word: str) -> bytes:
        if self.chars > CACHED:
            self.clear()
            self.chars = 0
        self.chars += len(word)
        if word.isascii() and word.isalpha():  # one piece: the model alone takes a third of the time
            found = array("i", [token.id for token in self.merged(f"\u0120{word}")]).tobytes()
        else:
            found = self.of({"\0": "\n\n", "\1": "", "\n": "\n"}.get(word[:1], f" {word[:1]}") + word[1:])
        self[word] = found
        return found


def fertility(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, int, int]:
    """(tokens with a digit in them, numbers, digits) of texts: how finely numbers are cut. A number is a run of digits."""
    tokens = numbers = digits = 0
    for text in texts:
        is_digit = np.array([character.isdigit() for character in text], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(is_digit)])
        spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
        starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        tokens += int((before[ends] > before[starts]).sum())
        numbers += int((np.diff(is_digit, prepend=0) == 1).sum())
        digits += int(before[-1])
    return tokens, numbers, digits


def hash_tokenizer(source: str | None) -> dict[str, str | None]:
    """What a tokenizer's folder or hub id holds, for the fingerprint. Weights beside it do not count: they can be gigabytes."""
    if source is None:
        return {}
    folder = Path(source)
    if not folder.is_dir():
        return {"tokenizer": known_revision(source, "model")}
    return {"tokenizer": hash_data({str(p.relative_to(folder)): hash_path(p) for p in sorted(folder.rglob("*"))
                                    if p.is_file() and p.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf")})}


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document of the base corpus; a foreign tokenizer's end token."""
    return tokenizer.get_vocab().get(EOS, tokenizer.eos_token_id)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, ask: bool = False) -> list[int]:
    """Token ids of a dialogue; `ask` ends it where the assistant is to speak."""
    return tokenizer(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask),
                     add_special_tokens=False)["input_ids"]
