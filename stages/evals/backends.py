"""Where requests are answered: a local transformers model behind the one sampler."""
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from prompts.strategies import Request, Result
from prompts.templates import Prompt
from stages.data.tokenizer import END
from stages.models.sampling import prompt_key, sample


class LocalModel:
    """Answers requests with the model and the tokenizer saved in one folder, or (`of`) already in memory.

    Plain prompts end at the tokenizer's end of text or at a stop text; chat prompts at the end-of-turn token. A prompt that
    leaves no room for its answer in the model's context is not cut: it gets an empty, unfinished result, counted in `too_long`.
    """

    def __init__(self, path: str | Path, *, seed: int, batch_size: int, device: str = "cpu", dtype: str = "float32"):
        disable_progress_bar()  # of loading weights: it would cut through the bar of the answers
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._take(model.to(device), AutoTokenizer.from_pretrained(path), seed, batch_size)
        configured = self.model.generation_config.eos_token_id
        own = configured if isinstance(configured, int) else self.tokenizer.eos_token_id
        self.end_of_text = [self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else own]
        self.end_of_turn = [self.tokenizer.get_vocab().get(END, own)]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, stop_ids: Sequence[int], seed: int, batch_size: int) -> "LocalModel":
        """A backend over a model where it is, as it is; every answer, plain or chat, ends at one of `stop_ids`."""
        backend = cls.__new__(cls)
        backend._take(model, tokenizer, seed, batch_size)
        backend.end_of_text = backend.end_of_turn = list(stop_ids)
        return backend

    def _take(self, model: Any, tokenizer: Any, seed: int, batch_size: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.seed, self.batch_size, self.too_long = seed, batch_size, 0
        self.context = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, requests: list[Request]) -> list[Result]:
        """One result for each request, in order."""
        results: dict[int, Result] = {}
        groups: dict[tuple, list[int]] = defaultdict(list)
        prompts = [self.encode(request.prompt) for request in requests]
        for i, request in enumerate(requests):
            if len(prompts[i]) + request.max_tokens > self.context:
                self.too_long += 1
                results[i] = Result(text="", tokens=0, finished=False)
            else:
                groups[(isinstance(request.prompt, str), request.temperature, request.max_tokens, request.stop)].append(i)
        for (plain, temperature, max_tokens, stop), rows in groups.items():
            ends = self.end_of_text if plain else self.end_of_turn
            drawn = sample(self.model, [prompts[i] for i in rows], seed=self.seed, temperature=temperature,
                           keys=[(prompt_key(requests[i].key), requests[i].sample) for i in rows], max_new_tokens=max_tokens,
                           eos_ids=[*ends, *self.stop_ids(stop)], pad_id=self.pad_id, batch_size=self.batch_size)
            for i, ids in zip(rows, drawn, strict=True):
                results[i] = self.read(ids, ends, stop)
        return [results[i] for i in range(len(requests))]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a plain or chat prompt. Raises ValueError for chat without a chat template."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if self.tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template: evaluate it as `base`, with plain prompts")
        text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own special tokens

    @cached_property
    def _pieces(self) -> list[str]:
        return self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])

    def stop_ids(self, stop: Sequence[str]) -> list[int]:
        """Tokens whose text holds a whole stop text, so that decoding ends there instead of being cut afterwards."""
        return [i for i, piece in enumerate(self._pieces) if any(text in piece for text in stop)] if stop else []

    def read(self, ids: list[int], ends: Sequence[int], stop: Sequence[str]) -> Result:
        """The text before the first end, how many tokens were drawn for it, and whether there was an end."""
        ended = bool(ids) and ids[-1] in ends
        text = str(self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False))
        cuts = [text.find(mark) for mark in stop if mark in text]
        return Result(text=text[:min(cuts)] if cuts else text, tokens=len(ids), finished=ended or bool(cuts))
