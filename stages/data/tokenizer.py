"""Byte-level BPE trained on the run's own corpus, saved with its special tokens and the chat template.

How numbers are split is an option because it decides what arithmetic costs: `whole` keeps a number's digits in one
pre-token (BPE may then learn it as one token), `digits` makes each digit its own. LOG.md has the measurement.
"""
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, numbers: str = "whole", context_length: int = 512,
                    ) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: every byte has a token, so any text is encodable and nothing maps to an unknown.

    The vocabulary may come out smaller than `vocab_size` when the corpus has no more pairs to merge.
    Raises ValueError for an unknown `numbers` or a vocabulary too small for bytes and special tokens.
    """
    if numbers not in NUMBERS:
        raise ValueError(f"unknown numbers {numbers!r}: choose from {', '.join(NUMBERS)}")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is smaller than {smallest}, the bytes and special tokens alone: set it higher")
    tokenizer = Tokenizer(models.BPE())
    pattern = rf" ?\p{{L}}+|{NUMBERS[numbers]}|\s*\n+| ?[^\s\p{{L}}\d]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=context_length, chat_template=CHAT_TEMPLATE,
        padding_side="left", clean_up_tokenization_spaces=False,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END])


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document of the base corpus; a foreign tokenizer's end token."""
    return tokenizer.get_vocab().get(EOS, tokenizer.eos_token_id)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, ask: bool = False) -> list[int]:
    """Token ids of a dialogue; `ask` ends it where the assistant is to speak."""
    return tokenizer(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask),
                     add_special_tokens=False)["input_ids"]
