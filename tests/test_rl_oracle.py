"""Our policy loss against TRL's GRPO loss on the same tokens: an independent implementation of the clipped surrogate, its
temperature, its padding and its normalisation (`bnpo` divides by the tokens of the batch, as ours does)."""
import copy

import datasets
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from stages.rl.models import PolicyWithCritic
from stages.rl.trainer import IMPORTANCE_CAP, PPOTrainer
from tests.rl_tiny import PAD, classifier, policy, tokenizer, trainer


def left(rows, pad):
    width = max(map(len, rows))
    return torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])


def right(rows, pad):
    width = max(map(len, rows))
    return torch.tensor([list(r) + [pad] * (width - len(r)) for r in rows])


@pytest.mark.parametrize(("loss_type", "accumulation", "engine"), [
    ("bnpo", 1, False), ("dapo", 1, False), ("dapo", 2, False), ("dapo", 2, True)])
def test_policy_loss_and_gradient_equal_trls(tmp_path, loss_type, accumulation, engine):
    """`bnpo` divides by the tokens of a micro-batch and so agrees at accumulation 1 alone; `dapo` by those of the whole batch.

    With the log-probabilities of an `engine` that is not the trainer, its tokens have the same weights in both.
    """
    model = PolicyWithCritic(policy(), classifier(), temperature=0.8)
    t: PPOTrainer = trainer(tmp_path / "ppo", model=model, vf_coef=0.0)
    e = t.rollout(0)
    rows = [0, 3, 5, 9]
    torch.manual_seed(1)
    sampled_by = e.logprobs + 0.5 * torch.randn_like(e.logprobs)
    if engine:
        e = e._replace(engine_logprobs=sampled_by)
    parts = [rows[i::accumulation] for i in range(accumulation)]
    torch.manual_seed(0)
    with torch.no_grad():  # a few updates later: some ratios lie outside the clipping range
        for p in t.model.policy.parameters():
            p.add_(0.03 * torch.randn_like(p))

    grpo = GRPOTrainer(
        model=copy.deepcopy(t.model.policy), reward_funcs=lambda **_: [0.0], processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 4),
        args=GRPOConfig(output_dir=str(tmp_path / "grpo"), use_cpu=True, bf16=False, loss_type=loss_type, beta=0.0,
                        temperature=0.8, epsilon=0.2, per_device_train_batch_size=4 // accumulation, num_generations=4,
                        gradient_accumulation_steps=accumulation, report_to="none"))
    grpo.model.train()
    grpo.use_vllm = engine
    assert grpo.vllm_importance_sampling_correction, "TRL's own default"
    grpo.current_gradient_accumulation_steps = t.current_gradient_accumulation_steps = accumulation
    assert len({len(e.responses[i].ids) for i in rows}) > 1 and len({len(e.responses[i].prompt_ids) for i in rows}) > 1, "needs padding"
    num_tokens = sum(len(e.responses[i].ids) for i in rows)
    sums = [0.0, 0.0]
    for part in parts:
        prompts, responses = [e.responses[i].prompt_ids for i in part], [e.responses[i].ids for i in part]
        tokens = {"prompt_ids": left(prompts, PAD), "prompt_mask": left([[1] * len(p) for p in prompts], 0),
                  "completion_ids": right(responses, PAD), "completion_mask": right([[1] * len(r) for r in responses], 0)}
        numbers = {key: right([values[i, -len(r):].tolist() for i, r in zip(part, responses, strict=True)], 0.0)
                   for key, values in (("advantages", e.advantages), ("old_per_token_logps", e.logprobs),
                                       ("importance_sampling_ratio", (e.logprobs - sampled_by).exp().clamp(max=IMPORTANCE_CAP)))}
        theirs = grpo._compute_loss(grpo.model, tokens | numbers | {"num_items_in_batch": torch.tensor(float(num_tokens))})
        theirs.backward()
        ours = t.compute_loss(t.model, {**e.inputs(part, PAD), "num_tokens": torch.tensor(num_tokens)}) / accumulation  # as Trainer does
        ours.backward()
        sums = [sums[0] + ours.item(), sums[1] + theirs.item()]
    assert float(t.sums["policy/clip_fraction"]) > 0.02, "the case needs clipped tokens"
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    for (name, a), b in zip(t.model.policy.named_parameters(), grpo.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
