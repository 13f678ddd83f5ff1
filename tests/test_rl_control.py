"""A control with a known optimum: with KL in the reward, PPO has to arrive at pi* ~ pi_ref exp(r / beta), and nowhere else."""
import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.models.training import fit
from stages.rl.models import PolicyWithCritic
from tests.rl_tiny import END, classifier, config, trainer

SIZE = 6  # tokens: padding, end, and four letters
BETA = 0.3
RESPONSES = [(END,), *((a, b) for a in range(SIZE) if a != END for b in range(SIZE))]  # all there are of up to two tokens
# Two different tokens: after equal ones a transformer without a start token says the same wherever it is asked, whatever it learned.
PROMPTS = [({"id": f"p{i}"}, [2 + i, 2 + (i + 1) % 4]) for i in range(4)]


def tiny_policy():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(vocab_size=SIZE))


def worth(ids) -> float:
    """A score that is not a sum over tokens: letters that differ are good, and the order matters."""
    if ids == (END,):
        return 0.2
    return math.sin(3.0 * ids[0] + 1.7 * ids[1]) + (0.5 if ids[0] < ids[1] else 0.0)


def reward(responses):
    return torch.tensor([worth(tuple(r.ids)) for r in responses])


def distribution(policy, prompt: list[int]) -> torch.Tensor:
    """(31,) float64 probabilities of every response."""
    with torch.no_grad():
        first = policy(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        after = {a: policy(torch.tensor([[*prompt, a]])).logits[0, -1].double().log_softmax(-1) for a in range(SIZE)}
    logs = [first[r[0]] if len(r) == 1 else first[r[0]] + after[r[0]][r[1]] for r in RESPONSES]
    return torch.stack(logs).exp()


def values(policy, reference, prompt: list[int]) -> tuple[float, float, float]:
    """E[r] - beta KL of the policy, of the reference and of the optimum, beta log E_ref[exp(r / beta)]; exact."""
    p, q = distribution(policy, prompt), distribution(reference, prompt)
    assert p.sum().item() == pytest.approx(1) and q.sum().item() == pytest.approx(1)
    r = torch.tensor([worth(each) for each in RESPONSES], dtype=torch.float64)
    return ((p * (r - BETA * (p / q).log())).sum().item(), (q * r).sum().item(), BETA * (q * (r / BETA).exp()).sum().log().item())


def test_the_optimum_is_that_of_the_exponentially_tilted_reference():
    policy = tiny_policy()
    q = distribution(policy, [2, 3])
    r = torch.tensor([worth(each) for each in RESPONSES], dtype=torch.float64)
    tilted = q * (r / BETA).exp()
    tilted /= tilted.sum()
    best = values(policy, policy, [2, 3])[2]
    assert (tilted * (r - BETA * (tilted / q).log())).sum().item() == pytest.approx(best)
    assert len(RESPONSES) == 31 == len(set(RESPONSES)) and set(itertools.chain(*RESPONSES)) == set(range(SIZE))


def reached(tmp_path, kl_coef: float, **changes) -> tuple[float, float]:
    """Value and its gap to the optimum's gain over the reference, as a share, mean over prompts."""
    model = PolicyWithCritic(tiny_policy(), classifier(vocab_size=SIZE), kl_coef=kl_coef)
    settings = {"iterations": 60, "rollout_batch": 256, "micro_batch": 64, "minibatches": 4, "epochs": 2, "lam": 1.0, "vf_coef": 0.5,
                "learning_rate": 2e-3, "critic_learning_rate": 5e-3, "missing_eos_penalty": None, "max_new_tokens": 2,
                "cliprange_value": 1.0, "save_iterations": 60, "asked": PROMPTS}
    t = trainer(tmp_path, model=model, reward=reward, **settings | changes)
    fit(t)
    each = [values(t.model.policy.eval(), t.reference, ids) for _, ids in t.prompts]
    ours, start, best = (sum(column) / len(each) for column in zip(*each, strict=True))
    return ours / best, (ours - start) / (best - start)


@pytest.mark.slow
def test_ppo_reaches_the_kl_regularised_optimum(tmp_path):
    """Within 2 % of its value, and of what it gains over the reference; a KL priced otherwise leads elsewhere."""
    value, gain = reached(tmp_path / "right", BETA)
    assert value > 0.98 and gain > 0.98
    value, _ = reached(tmp_path / "wrong", 3 * BETA, iterations=30, save_iterations=30)
    assert value < 0.95
