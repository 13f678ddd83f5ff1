"""A stand-in for TRL's VLLMGeneration: it samples with transformers from weights of its own, which `sync_weights` brings up to date but
for a little noise, as another precision would. It draws with the keys that PPO's own sampler has: without noise it says the same."""
import copy

import torch

from stages.models.sampling import prompt_key, sample
from stages.rl import _trl
from stages.rl.models import pad_sequences, policy_stats
from stages.rl.rollouts import draws
from tests.rl_tiny import PAD, prompts

MADE: list["FakeVLLM"] = []


class FakeVLLM:
    noise = 0.0
    reported_temperature: float | None = None  # other than that of the sampling: a server's raw_logprobs
    unknown = False  # the first token's log-probability of each response, as vLLM may have it

    def __init__(self, model, accelerator, processing_class, mode, server_base_url, gpu_memory_utilization, max_model_length, temperature,
                 max_completion_length, logprobs, generation_kwargs):
        self.model, self.accelerator, self.mode, self.max_model_length = model, accelerator, mode, max_model_length
        self.server_base_url, self.gpu_memory_utilization = server_base_url, gpu_memory_utilization
        self.temperature, self.max_completion_length, self.logprobs = temperature, max_completion_length, logprobs
        self.eos_ids = generation_kwargs["stop_token_ids"]
        self.policy = copy.deepcopy(model).eval()
        for parameter in self.policy.parameters():
            torch.nn.init.zeros_(parameter)  # whoever forgets to synchronise samples nonsense
        self.rollouts = 0
        MADE.append(self)

    def sync_weights(self):
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for own, trained in zip(self.policy.parameters(), self.model.parameters(), strict=True):
                own.copy_(trained + self.noise * torch.randn(trained.shape, generator=random))

    @torch.no_grad()
    def generate(self, given, images, num_generations):
        assert images is None and num_generations == 1 and self.logprobs == 0
        assert all(len(prompt) + self.max_completion_length <= self.max_model_length for prompt in given)
        rows, processes = prompts(), self.accelerator.num_processes
        chosen = draws(self.rollouts, count=len(given) * processes, num_prompts=len(rows), seed=0)[
            self.accelerator.process_index * len(given):][:len(given)]
        assert [rows[i][1] for i, _ in chosen] == given
        self.rollouts += 1
        ids = sample(self.policy, given, keys=[(prompt_key(rows[i][0]["id"]), number) for i, number in chosen], seed=0,
                     temperature=self.temperature, max_new_tokens=self.max_completion_length, eos_ids=self.eos_ids, pad_id=PAD)
        logprobs = []
        for prompt, response in zip(given, ids, strict=True):
            found, _, _ = policy_stats(self.policy, pad_sequences([prompt], [response], PAD), self.reported_temperature or self.temperature)
            logprobs.append([[x] for x in found[0].tolist()])
            if self.unknown:
                logprobs[-1][0] = [None]
        return given, ids, logprobs, [[[token] for token in response] for response in ids]


def install(monkeypatch=None, **behaviour) -> type[FakeVLLM]:
    """Puts a fake of this behaviour in vLLM's place; without a monkeypatch for the rest of the process."""
    MADE.clear()
    fake = type("FakeVLLM", (FakeVLLM,), behaviour)
    put = monkeypatch.setattr if monkeypatch else setattr
    put(_trl, "VLLMGeneration", fake)
    put(_trl, "is_vllm_available", lambda: True)
    return fake
