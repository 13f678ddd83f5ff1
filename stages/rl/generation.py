"""Rollouts by vLLM, where it is installed: TRL's VLLMGeneration starts it, gives it the policy's weights and asks it for responses.

vLLM samples many times as fast as a forward pass a token, with kernels, precision and noise of its own. So its log-probabilities of
what it samples differ from the trainer's: the difference is measured and weighed (`maths.importance_weights`), and the keyed noise
of stages/models/sampling.py, by which a resumed run repeats its responses, does not apply.
"""
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.rl import _trl

VLLM = "vllm"
SERVE = ("VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{\"backend\": \"nccl\"}' --logprobs-mode processed_logprobs")


class Engine(Protocol):
    """What is asked of an engine: TRL's VLLMGeneration, or what a test puts in its place."""

    def sync_weights(self) -> None: ...

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple: ...


def check_engine(rollout_engine: str, method: str = "full") -> None:
    """Raises ValueError where vLLM is asked for and cannot be had, or cannot sample from what is trained."""
    if rollout_engine != VLLM:
        return
    if not _trl.is_vllm_available():
        raise ValueError("rollout_engine is vllm, which is not installed: pip install 'trl[vllm]' on a machine with a GPU, or set "
                         "rollout_engine to transformers")
    if method != "full":
        raise ValueError(f"rollout_engine is vllm and method {method}: its engine takes whole weights, not adapters on a base that other "
                         "models share; set method to full, or rollout_engine to transformers")


def make_engine(policy: PreTrainedModel, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, *, vllm_mode: str,
                vllm_server_url: str, vllm_gpu_memory: float, temperature: float, longest_prompt: int, max_new_tokens: int,
                eos_ids: Sequence[int]) -> Engine:
    """vLLM with the policy's weights, in this process (`colocate`, one on each device) or as a client of a running server.

    It starts from the files of `policy.name_or_path` and gets the weights at the first `sync_weights`. It samples from the softmax
    at the temperature and nothing else (no top-k, no penalty), so that its log-probabilities are those of what it draws.
    Call on every process. Raises ValueError where vLLM is not installed, and for a server that reports log-probabilities of another
    temperature.
    """
    check_engine(VLLM)
    engine = _trl.VLLMGeneration(
        policy, accelerator, tokenizer, mode=vllm_mode, server_base_url=vllm_server_url, gpu_memory_utilization=vllm_gpu_memory,
        max_model_length=longest_prompt + max_new_tokens, temperature=temperature, max_completion_length=max_new_tokens, logprobs=0,
        generation_kwargs={"stop_token_ids": list(eos_ids)})
    if vllm_mode == "server" and accelerator.is_main_process:
        mode = engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(f"the vLLM server at {vllm_server_url} reports log-probabilities as {mode}, which are not those that it "
                             f"samples from: start it as {SERVE}")
    return engine


def generate(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tensor]]:
    """A response to each prompt from the policy as it is now: token ids with the end token, and float32 log-probabilities on the CPU.

    A log-probability that vLLM does not know is NaN. Call on every process, with as many prompts each. Raises ValueError where the
    engine gives none at all.
    """
    engine.sync_weights()
    _, ids, logprobs, _ = engine.generate(prompts, None, 1)
    if logprobs is None:
        raise ValueError(f"the engine returned no log-probabilities, without which what it samples cannot be weighed: start it as {SERVE}")
    # Of each token that of the one sampled alone; None is a number that vLLM does not have.
    known = [torch.tensor([float("nan") if of_token[0] is None else of_token[0] for of_token in of_response])
             for of_response in logprobs]
    assert all(len(each) == len(given) for each, given in zip(ids, known, strict=True))
    return ids, known


def cut(logprobs: Sequence[Tensor], lengths: Sequence[int]) -> list[Any]:
    """The log-probabilities of what a stop string has left of each response."""
    return [each[:length] for each, length in zip(logprobs, lengths, strict=True)]
