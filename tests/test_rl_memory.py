"""What PPO holds of batch x length x vocabulary, where a large vocabulary makes that the peak of its memory."""
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from stages.models.training import fit
from stages.rl import logprobs, rollouts
from stages.rl.logprobs import chunks, token_logprobs
from stages.rl.models import PolicyWithCritic, language_losses, pad_sequences, policy_stats
from stages.rl.rollouts import groups
from tests.rl_tiny import classifier, corpus, policy, trainer

LARGE = 50_000
TINY = {"vocab_size": LARGE, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "intermediate_size": 8}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, by phase; views and what they view alike."""

    phase = "update"

    def __init__(self):
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements[self.phase] = max(self.elements.get(self.phase, 0), tensor.numel())
        return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # rows without padding, and with
def test_no_tensor_has_the_vocabulary_for_the_whole_rollout_batch(tmp_path, monkeypatch, attention):
    """A whole iteration: sampling, PAR's samples, scores, statistics of both models, update. Nearly all responses have 32 tokens."""
    monkeypatch.setattr(rollouts, "LOGITS", 2 * 33 * LARGE)
    model = PolicyWithCritic(policy(**TINY), classifier(**TINY), kl_coef=0.05)
    model.policy.set_attn_implementation(attention)
    t = trainer(tmp_path, iterations=1, model=model, rollout_batch=16, minibatches=4, micro_batch=4, max_new_tokens=32, par_samples=1)
    found, rollout = Largest(), t.rollout

    def watched(iteration):
        found.phase = "rollout"
        try:
            return rollout(iteration)
        finally:
            found.phase = "update"

    t.rollout = watched
    with found:
        fit(t)
    assert t.experience.mask.sum() > 16 * 30
    assert 16 * LARGE <= found.elements["rollout"] <= 2 * 33 * LARGE  # of 16 x 32: a sixteenth to an eighth
    assert 4 * 30 * LARGE < found.elements["update"] <= 4 * 33 * LARGE  # a micro-batch's logits


def peak(call) -> int:
    """Bytes of all tensors that were alive at once during the call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_statistics_hold_the_logits_and_in_the_update_their_gradient(monkeypatch, attention):
    monkeypatch.setattr(logprobs, "CHUNK", LARGE)
    model = policy(**TINY)
    model.set_attn_implementation(attention)
    inputs = pad_sequences([[5, 6], [7, 8, 9]] * 4, [[3, 4, 5] * 10] * 8, 0)
    logits = 8 * (31 if attention == "eager" else 30) * LARGE * 4
    slack = 30 * LARGE * 4  # chunks of one token, the tiny trunk, and its head's gradient: an eighth of the logits

    def update():
        policy_stats(model, inputs, 0.9)[0].sum().backward()

    update()  # what is made once
    model.zero_grad(set_to_none=False)
    with torch.no_grad():
        assert logits <= peak(lambda: policy_stats(model, inputs, 0.9)) <= logits + slack
    assert 2 * logits <= peak(update) <= 2 * logits + slack


def test_ptx_holds_the_logits_and_their_gradient(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", LARGE)
    model = policy(**TINY)
    given = corpus(8)
    rows = given["ptx_collator"](given["ptx"])
    logits = rows["input_ids"].numel() * LARGE * 4

    def update():
        language_losses(model, **rows).sum().backward()

    update()
    model.zero_grad(set_to_none=False)
    assert 2 * logits <= peak(update) <= 2.25 * logits


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6], [6, 2, 3]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, rows, dtype, tolerance):
    """Against a softmax written plainly in float64, with chunks of two tokens, of which the last has one."""
    monkeypatch.setattr(logprobs, "CHUNK", 2 * 11 + 5)
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 11)).to(dtype).requires_grad_()
    where, chosen = torch.tensor(rows), torch.tensor([3, 0, 10, 3, 5, 1, 2])[:len(rows)]
    found, entropy = token_logprobs(logits, where, chosen, 0.7)
    plain = logits.detach().double().requires_grad_()
    normalised = (plain[where] / 0.7).log_softmax(-1)
    expected = normalised.gather(-1, chosen[:, None])[:, 0]
    assert found.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(normalised.exp() * normalised).sum(-1).detach(), atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 2, len(rows))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), plain.grad, atol=tolerance, rtol=tolerance)


def test_chunks_and_groups_by_hand(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 100)
    assert chunks(5, 40) == [slice(0, 2), slice(2, 4), slice(4, 6)] and len(chunks(3, 1000)) == 3
    assert list(groups([3, 1, 0, 2], [4, 2, 9, 1], 2, 8)) == [[3, 1], [0], [2]]  # 2 x 2; 4, since 2 x 9 is too many; 9 alone
    assert list(groups(range(3), [3, 3, 3], 9, 6)) == [[0, 1], [2]]  # 2 x 3 is just enough
    assert list(groups(range(5), [1] * 5, 3, 99)) == [[0, 1, 2], [3, 4]] and list(groups([], [], 3, 99)) == []
