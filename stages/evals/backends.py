"""Where requests are answered: a local model, by transformers behind the one sampler or by vLLM (stages/evals/vllm_engine.py)."""
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from prompts.records import Request, Result
from prompts.templates import Prompt
from reward.folders import trusted
from stages.data.tokenizer import END
from stages.evals.vllm_engine import VllmEngine
from stages.models.sampling import prompt_key, sample


class LocalModel:
    """Answers requests with the model and the tokenizer saved in one folder, or (`of`) already in memory.

    `engine` is transformers or vllm. Plain prompts end at the tokenizer's end of text or at a stop text; chat prompts at the
    end-of-turn token. A prompt that leaves no room for its answer in the model's context is not cut: it gets an empty result that says
    "too_long", counted in `too_long`.
    """

    def __init__(self, path: str | Path, *, seed: int, batch_size: int, device: str = "cpu", dtype: str = "float32",
                 engine: str = "transformers"):
        disable_progress_bar()  # of loading weights: it would cut through the bar of the answers
        self.vllm = VllmEngine(trusted(path), dtype=dtype, seed=seed) if engine == "vllm" else None
        model: Any = None if self.vllm else AutoModelForCausalLM.from_pretrained(trusted(path), dtype=getattr(torch, dtype))
        if model is not None:
            model.to(device)
        self._take(model, AutoTokenizer.from_pretrained(trusted(path)), AutoConfig.from_pretrained(trusted(path)), seed, batch_size)
        has_own = (Path(path) / "generation_config.json").is_file()
        configured = GenerationConfig.from_pretrained(trusted(path)).eos_token_id if has_own else None
        own = configured if isinstance(configured, int) else self.tokenizer.eos_token_id
        self.end_of_text = [self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else own]
        self.end_of_turn = [self.tokenizer.get_vocab().get(END, own)]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, stop_ids: Sequence[int], seed: int, batch_size: int) -> "LocalModel":
        """A backend over a model where it is, as it is; every answer, plain or chat, ends at one of `stop_ids`."""
        backend = cls.__new__(cls)
        backend.vllm = None
        backend._take(model, tokenizer, model.config, seed, batch_size)
        backend.end_of_text = backend.end_of_turn = list(stop_ids)
        return backend

    def _take(self, model: Any, tokenizer: Any, config: Any, seed: int, batch_size: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.seed, self.batch_size, self.too_long = seed, batch_size, 0
        self.context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def generate(self, requests: list[Request]) -> list[Result]:
        """One result for each request, in order. Requests with one prompt share its prefill, where they come together."""
        results: dict[int, Result] = {}
        groups: dict[tuple, list[int]] = defaultdict(list)
        prompts = [self.encode(request.prompt) for request in requests]
        for i, request in enumerate(requests):
            if len(prompts[i]) + request.max_tokens > self.context:
                self.too_long += 1
                results[i] = Result(text="", prompt_tokens=0, generated_tokens=0, finish="too_long")  # nothing was read or drawn
            else:
                groups[(isinstance(request.prompt, str), request.temperature, request.max_tokens, request.stop)].append(i)
        for (plain, temperature, max_tokens, stop), rows in groups.items():
            ends = self.end_of_text if plain else self.end_of_turn
            draw = self.vllm.sample if self.vllm else partial(sample, self.model, seed=self.seed, pad_id=self.pad_id,
                                                              batch_size=self.batch_size)
            drawn = draw([prompts[i] for i in rows], temperature=temperature, max_new_tokens=max_tokens,
                         keys=[(prompt_key(requests[i].key), requests[i].sample) for i in rows], eos_ids=[*ends, *self.stop_ids(stop)])
            for i, ids in zip(rows, drawn, strict=True):
                results[i] = replace(self.read(ids, ends, stop), prompt_tokens=len(prompts[i]))
        return [results[i] for i in range(len(requests))]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a plain or chat prompt; a chat that ends with the assistant's turn leaves it open, for the model to go on with.

        Raises ValueError for chat without a chat template.
        """
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if self.tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template: evaluate it as `base`, with plain prompts")
        begun = prompt[-1]["role"] == "assistant"
        text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=not begun,
                                                  continue_final_message=begun)
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
        return Result(text=text[:min(cuts)] if cuts else text, prompt_tokens=0, generated_tokens=len(ids),
                      finish="stop" if ended or cuts else "length")

    def score(self, context: Prompt, continuation: str) -> list[float]:
        """Log-probability of each token of `continuation` after `context`, at temperature 1.

        Raises ValueError for a continuation without tokens, and for one that does not fit in the model's context.
        """
        before, after = self._parts(context, continuation)
        return self.vllm.logprobs(before + after, len(before)) if self.vllm else self._graded(before, after)[0]

    def grade(self, context: Prompt, continuation: str) -> tuple[list[float], list[float]]:
        """`score`, and each token's Brier score over the vocabulary: sum of (p_v - [v is the token])^2, 0 at best and 2 at worst."""
        return self._graded(*self._parts(context, continuation))

    def _parts(self, context: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        before, after = self.encode(context), self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        if not after or not before:
            raise ValueError(f"nothing to score: the context has {len(before)} tokens and the continuation {len(after)}; both need one")
        if len(before) + len(after) > self.context:
            raise ValueError(f"{len(before)} + {len(after)} tokens do not fit in a context of {self.context}: shorten one of them")
        return before, after

    @torch.inference_mode()
    def _graded(self, before: list[int], after: list[int]) -> tuple[list[float], list[float]]:
        training = self.model.training
        self.model.eval()
        logits = self.model(input_ids=torch.tensor([before + after], device=self.model.device), use_cache=False,
                            logits_to_keep=len(after) + 1).logits[0, :-1].float()
        self.model.train(training)
        logprobs = logits.log_softmax(-1)
        of_token = logprobs.gather(1, torch.tensor(after, device=logits.device)[:, None]).squeeze(1)
        brier = logprobs.exp().square().sum(-1) + 1 - 2 * of_token.exp()
        return of_token.tolist(), brier.tolist()
