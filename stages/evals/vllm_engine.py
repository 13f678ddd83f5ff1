"""vLLM in the place of the project's sampler, where it is installed: many times as fast on a GPU, with noise of its own."""
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.models.sampling import prompt_key


def check_installed() -> None:
    """Raises ValueError where vLLM is asked for and is not there."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("engine is vllm, which is not installed: pip install 'trl[vllm]' on a machine with a GPU, or set engine to "
                         "transformers")


class VllmEngine:
    """A model in vLLM, asked with token ids.

    Every draw has a seed made of (seed, key, sample), so it does not depend on what else is in the batch but for float error; it is
    another draw than the project's sampler makes. Raises ValueError where vLLM is not installed.
    """

    def __init__(self, path: str | Path, *, dtype: str, seed: int):
        check_installed()
        import vllm

        self.vllm, self.seed = vllm, seed
        # With the cache of prefixes a prompt is read once for all its samples.
        self.engine: Any = vllm.LLM(model=str(path), dtype=dtype, seed=seed, enable_prefix_caching=True)

    def sample(self, prompts: Sequence[list[int]], *, keys: Sequence[tuple[int, int]], temperature: float, max_new_tokens: int,
               eos_ids: Sequence[int]) -> list[list[int]]:
        """One response for each prompt, as `stages.models.sampling.sample` gives it: token ids with the end token, if it was drawn."""
        settings = [self.vllm.SamplingParams(temperature=temperature, max_tokens=max_new_tokens, stop_token_ids=list(eos_ids),
                                             seed=prompt_key(f"{self.seed}/{key}/{number}") >> 32, detokenize=False)
                    for key, number in keys]
        outputs = self.engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def logprobs(self, ids: list[int], start: int) -> list[float]:
        """Log-probability of each token from `start` on after those before it, at temperature 1."""
        settings = self.vllm.SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0)
        [output] = self.engine.generate([{"prompt_token_ids": ids}], [settings], use_tqdm=False)
        return [output.prompt_logprobs[at][ids[at]].logprob for at in range(start, len(ids))]
