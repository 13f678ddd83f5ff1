"""Implementation details of PPO one by one, where they are not already invariants of the trainer or formulas: docs/ppo.md lists all."""
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from reward.model import score_ids, set_normalization
from stages.data.packing import documents_of
from stages.models.training import fit
from stages.rl import maths
from stages.rl.models import PolicyWithCritic, pad_sequences
from stages.rl.rewards import Response, build_reward
from stages.rl.rollouts import Scored, as_responses, build_experience
from stages.rl.trainer import PPOTrainer
from tests.rl_tiny import END, LM_END, PAD, VOCAB, classifier, corpus, policy, prompts, tokenizer, trainer


def stepped(t: PPOTrainer, number: int) -> list[dict]:
    """What the optimizer step of this number learns from, without learning."""
    t.state.global_step = number
    batches, _ = t.get_batch_samples(iter([{"row": 0}] * 8), t.args.gradient_accumulation_steps, t.args.device)
    return batches


def gradient(t: PPOTrainer, batches: list[dict]) -> dict[str, torch.Tensor]:
    t.model.zero_grad()
    t.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        (t.compute_loss(t.model, batch) / len(batches)).backward()
    return {name: p.grad.clone() for name, p in t.model.named_parameters() if p.grad is not None}


def perturbed(t: PPOTrainer) -> PPOTrainer:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in t.model.policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return t


# ---- rollout ----

def test_a_response_is_cut_after_the_token_that_completes_a_stop_string():
    letters = tokenizer()
    ids = [letters.convert_tokens_to_ids(list("abcdbc")), [2, 3, END], [2, 3, 2]]
    asked = [({"id": str(i)}, [5]) for i in range(3)]
    cut, whole, unfinished = as_responses(asked, ids, letters, eos_ids=(END,), stop_strings=("zz", "b c"))
    assert cut.ids == ids[0][:3] and cut.text == "a b c" and cut.finished
    assert whole.ids == [2, 3, END] and whole.finished and not unfinished.finished
    plain, *_ = as_responses(asked, ids, letters, eos_ids=(END,))
    assert plain.ids == ids[0] and not plain.finished


def test_the_score_is_read_at_the_last_token_before_what_a_stop_string_cut_off(tmp_path):
    model = classifier().eval()
    model.save_pretrained(tmp_path)
    stop = tokenizer().decode([7])
    t = trainer(tmp_path / "ppo", stop_strings=(stop,), reward=build_reward({"model": 1.0}, model_path=tmp_path, vocab_size=VOCAB))
    e = t.rollout(0)
    stopped = [r for r in e.responses if 7 in r.ids]
    assert stopped and all(r.ids.index(7) == len(r.ids) - 1 and r.finished for r in stopped), "nothing stands after the stop string"
    i = e.responses.index(stopped[0])
    with torch.no_grad():
        expected = float(model(torch.tensor([stopped[0].prompt_ids + stopped[0].ids])).logits)
    assert t.reward(e.responses)[i].item() == pytest.approx(expected, abs=1e-5)
    assert e.mask[i].sum() == len(stopped[0].ids) and e.returns[i, -1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad_id", [PAD, END])
def test_the_end_token_is_learned_also_where_it_is_the_padding_token(tmp_path, pad_id):
    """Masks made by comparing ids with the padding id would take the end token out of the loss."""
    t = trainer(tmp_path, pad_id=pad_id, missing_eos_penalty=None, vf_coef=0.0)
    e = t.rollout(0)
    rows = [i for i, r in enumerate(e.responses) if r.finished][:2] + [i for i, r in enumerate(e.responses) if not r.finished][:1]
    inputs = e.inputs(rows, pad_id)
    assert inputs["response_mask"].sum() == sum(len(e.responses[i].ids) for i in rows)
    assert inputs["response_mask"][:2, -1].all() and (inputs["input_ids"][:2, -1] == END).all()
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    inputs["advantages"][:2, -1] = 1.0  # of the end tokens alone
    t.current_gradient_accumulation_steps = 1
    t.compute_loss(t.model, {**inputs, "num_tokens": torch.tensor(8)}).backward()
    assert t.model.policy.lm_head.weight.grad[END].abs().sum() > 1e-3


def test_old_log_probs_of_the_first_minibatch_are_those_of_the_loss(tmp_path):
    """Ratios are 1 within 1e-4, though rows are padded, sorted and batched otherwise than in the rollout."""
    t = trainer(tmp_path, micro_batch=2, minibatches=4, model=PolicyWithCritic(policy(), classifier(), temperature=0.6))
    batches = stepped(t, 0)
    assert len(batches) == 2
    for batch in batches:
        stats = t.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "response_mask")})
        ratio = torch.exp(stats.logprobs - batch["old_logprobs"])[batch["response_mask"]]
        assert (ratio - 1).abs().max() < 1e-4


# ---- reward ----

def test_normalised_scores_of_the_reference_samples_have_mean_zero_and_variance_one(tmp_path):
    model = classifier().eval()
    samples = [Response({"id": "x"}, p, [3 + i, 4, END], "", True) for i, (_, p) in enumerate(prompts())]
    raw = score_ids(model, [r.prompt_ids + r.ids for r in samples])
    assert abs(sum(raw) / len(raw)) > 1e-2, "the case needs scores off the mark"
    set_normalization(model, raw)
    model.save_pretrained(tmp_path)
    scores = build_reward({"model": 1.0}, model_path=tmp_path, vocab_size=VOCAB)(samples)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.var(correction=0).item() == pytest.approx(1, abs=1e-4)


def one(ids, score, finished=True, reference=(), entropy=1.0):
    n = len(ids)
    return Scored(Response({"id": "x"}, [5, 6], ids, "", finished), score, None, torch.zeros(n), torch.zeros(n), torch.full((n,), entropy),
                  torch.zeros(n), {}, reference)


def shaped(*scored, **changes):
    e = build_experience(scored, **{"kl_coef": 0.0, "gamma": 1.0, "lam": 1.0, "missing_eos_penalty": None, **changes})
    return e.returns[:, -1].tolist(), e.metrics


def test_scores_are_shaped_in_the_stated_order():
    returns, metrics = shaped(one([3, END], 9.0), one([4], -7.0), score_clip=2.0, length_penalty=0.25)
    assert returns == pytest.approx([1.5, -2.25])  # clipped, then two tokens and one
    assert metrics["objective/score"] == 1.0 and metrics["objective/shaped_score"] == pytest.approx(-0.375)  # the proxy itself is kept
    returns, _ = shaped(one([3, END], 2.0, reference=(2.0, 2.0)), one([4], 0.0, reference=(math.log(3), math.log(3))), length_penalty=0.25)
    assert returns == pytest.approx([0.5 - 0.5, 0.25 - 0.25])
    returns, _ = shaped(one([3, END], 9.0, finished=False), one([4], 1.0), length_penalty=0.25, missing_eos_penalty=-1.0)
    assert returns == pytest.approx([-1.0, 0.75])  # what replaces the score pays for no length


def test_par_compares_with_other_draws_of_the_reference_for_the_same_prompts(tmp_path):
    asked = []

    def reward(responses):
        asked.append([(r.problem["id"], r.ids) for r in responses])
        return torch.tensor([float(len(r.ids)) for r in responses])

    t = perturbed(trainer(tmp_path, par_samples=2, reward=reward, missing_eos_penalty=None, model=PolicyWithCritic(policy(), classifier())))
    e = t.rollout(0)
    own, reference = asked
    assert [i for i, _ in reference] == [i for i, _ in own for _ in range(2)]
    assert len({tuple(ids) for _, ids in reference}) > 16 and [ids for _, ids in reference[::2]] != [ids for _, ids in own]
    expected = [sum(1 / (1 + math.exp(len(ref) - len(ids))) for _, ref in reference[2 * i:2 * i + 2]) / 2 for i, (_, ids) in enumerate(own)]
    torch.testing.assert_close(e.returns[:, -1], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    trainer(tmp_path / "again", par_samples=2, reward=reward).rollout(0)
    assert asked[3] == reference, "a resumed run hears the same of the reference"
    trainer(tmp_path / "start", par_samples=1, reward=reward).rollout(0)
    same = sum(a == b for (_, a), (_, b) in zip(asked[4], asked[5], strict=True))
    assert same < 8, "with the policy's own noise the start would be compared with itself"


def test_the_kl_price_is_frozen_over_the_epochs(tmp_path):
    """Rewards, advantages and old log-probs of a response are those of its sampling, whatever the policy has become since."""
    t = trainer(tmp_path, epochs=2, minibatches=1, micro_batch=16)
    (first,) = stepped(t, 0)
    perturbed(t)
    (second,) = stepped(t, 1)
    for name in ("input_ids", "advantages", "returns", "old_logprobs", "ref_logprobs", "old_values"):
        assert torch.equal(first[name].sort(dim=0).values, second[name].sort(dim=0).values), name


# ---- values ----

@pytest.mark.parametrize("critic", [None, *("qwen3", "llama", "gpt2")])
def test_the_value_of_a_token_does_not_see_it(critic):
    model = PolicyWithCritic(policy(), classifier(architecture=critic) if critic else None)
    if critic is None:
        torch.nn.init.normal_(model.value_head.weight)
    t = 2
    first, other = (model(**pad_sequences([[5, 6], [7]], [[8, 9, token, 11], [3, 3]], PAD)).values for token in (10, 20))
    assert torch.equal(first[0, :t + 1], other[0, :t + 1]) and torch.equal(first[1], other[1])
    assert (first[0, t + 1:] - other[0, t + 1:]).abs().max() > 1e-4


# ---- loss ----

def test_k2_in_the_loss_is_its_token_mean_over_the_minibatch(tmp_path):
    losses = []
    for coef in (0.0, 0.5):
        t = trainer(tmp_path / str(coef), kl_loss_coef=coef, minibatches=1, micro_batch=16)
        (batch,) = stepped(t, 0)
        perturbed(t)
        t.current_gradient_accumulation_steps = 1
        losses.append(t.compute_loss(t.model, batch).item())
    stats = t.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "response_mask")})
    k2 = 0.5 * (stats.logprobs - batch["ref_logprobs"])[batch["response_mask"]] ** 2
    assert k2.mean() > 1e-4 and losses[1] - losses[0] == pytest.approx(0.5 * k2.mean().item(), rel=1e-3)


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_ptx_adds_the_gradient_of_the_language_model(tmp_path, micro_batch):
    """g = g_ppo + coefficient x g_lm, where g_lm is the mean over all predicted tokens, each document read alone by transformers."""
    bare = gradient(t := trainer(tmp_path / "bare"), stepped(t, 0))
    t = trainer(tmp_path / "ptx", ptx_coef=3.0, micro_batch=micro_batch, **corpus())
    batches = stepped(t, 0)
    both = gradient(t, batches)
    rows = torch.cat([batch["ptx"]["input_ids"] for batch in batches]).tolist()
    assert len(rows) == 8 and len({tuple(row) for row in rows}) == 8, "as many rows as responses, none twice"
    t.model.zero_grad()
    documents = [document for row in rows for document in documents_of(row, eos_id=LM_END, pad_id=PAD)]
    losses = [t.model.policy(ids := torch.tensor([document]), labels=ids).loss * (len(document) - 1) for document in documents]
    (sum(losses) / sum(len(document) - 1 for document in documents)).backward()
    for name, p in t.model.named_parameters():
        expected = bare[name] + (3.0 * p.grad if p.grad is not None else 0.0)
        torch.testing.assert_close(both[name], expected, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert any((3.0 * p.grad).abs().max() > 1e-2 for p in t.model.policy.parameters()), "the case needs a gradient"


def test_ptx_is_logged_and_other_steps_get_other_rows(tmp_path):
    t = trainer(tmp_path, iterations=1, ptx_coef=1.0, **corpus())
    logged = []
    t.log, log = lambda logs, start=None: (logged.append(dict(t.sums)), log(logs, start)), t.log
    fit(t)
    assert float(logged[0]["loss/ptx"]) / 4 == pytest.approx(math.log(VOCAB), rel=0.3)  # an untrained model knows nothing
    first, second = (torch.cat([b["ptx"]["input_ids"] for b in stepped(t, step)]).tolist() for step in (0, 1))
    assert first != second


def test_metrics_do_not_see_padding(tmp_path):
    """Means over real tokens: garbage at padding changes nothing, and a long row does not dilute a short one's."""
    t = trainer(tmp_path)
    mask = torch.tensor([[False, False, True], [True, True, True]])
    values = torch.tensor([[math.nan, 1e9, 4.0], [1.0, 2.0, 5.0]])
    t.note({"x": values}, mask, mask.sum())
    assert float(t.sums["x"]) == pytest.approx(12 / 4)
    _, metrics = shaped(one([3], 1.0, entropy=4.0), one([3, 4, END], 1.0, entropy=2.0))
    assert metrics["objective/entropy"] == pytest.approx((4 + 3 * 2) / 4) and metrics["response/length"] == 2.0
    assert maths.masked_mean(values, mask).item() == pytest.approx(3.0)


# ---- optimiser ----

def test_an_iteration_is_epochs_times_minibatches_steps_reshuffled_each_epoch(tmp_path):
    """Two iterations of 3 epochs x 2 minibatches, with accumulation: 12 steps, every response once an epoch, in another split each."""
    t = trainer(tmp_path, iterations=2, epochs=3, minibatches=2, micro_batch=2)
    steps, learned = [], []

    class Count(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            steps.append(1)

    take = t.get_batch_samples

    def watched(*args):
        batches, count = take(*args)
        learned.append(sorted(tuple(row) for b in batches for row in b["input_ids"].masked_fill(b["attention_mask"] == 0, -1).tolist()))
        return batches, count

    t.add_callback(Count())
    t.get_batch_samples = watched
    fit(t)
    assert len(steps) == len(learned) == 12

    def rows(minibatch):
        return [tuple(token for token in row if token != -1) for row in minibatch]

    for start in (0, 6):
        epochs = [[rows(learned[start + 2 * e]), rows(learned[start + 2 * e + 1])] for e in range(3)]
        everything = [sorted(first + second) for first, second in epochs]
        assert everything[0] == everything[1] == everything[2] and len(everything[0]) == 16
        assert len({str(sorted(first)) for first, _ in epochs}) == 3, "each epoch has its own split"
    assert sorted(rows(learned[0]) + rows(learned[1])) != sorted(rows(learned[6]) + rows(learned[7]))


def test_where_deepspeed_clips_one_norm_it_is_said_once(tmp_path, monkeypatch, capsys):
    t = trainer(tmp_path)
    t.create_optimizer()
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model: 1.5)
    t.is_deepspeed_enabled = True
    assert [t._clip_grad_norm(t.model) for _ in range(2)] == [1.5, 1.5]
    assert capsys.readouterr().out.count("DeepSpeed clips one norm over policy and critic together") == 1
