import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from reward.model import (
    build_ensemble,
    combine,
    from_language_model,
    head_scores,
    load_ensemble,
    member_folders,
    min_token_logprobs,
    normalize,
    plain_model,
    score_groups,
    score_ids,
    set_normalization,
    write_ensemble,
)
from tests.rl_tiny import PAD, policy

ROWS = [[5, 9, 3], [7, 2, 2, 11, 4, 6], [8], [5, 9, 3, 12]]


@pytest.fixture
def folder(tmp_path):
    policy().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def model(folder):
    scorer = from_language_model(folder, pad_id=PAD, seed=0)
    torch.nn.init.normal_(scorer.score.weight)
    return scorer


def test_a_fresh_model_has_no_opinion_and_the_language_models_trunk(folder):
    scorer = from_language_model(folder, pad_id=PAD, seed=0)
    assert score_ids(scorer, ROWS) == [0.0] * len(ROWS)
    expected = dict(policy().base_model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in scorer.base_model.named_parameters())


def test_scores_do_not_depend_on_batch_order_or_padding_side(model):
    alone = [model(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    assert len(set(alone)) == len(ROWS)
    for batch_size in (1, 2, 8):
        assert score_ids(model, ROWS, batch_size) == pytest.approx(alone, abs=1e-5)
    assert score_ids(model, ROWS[::-1]) == pytest.approx(alone[::-1], abs=1e-5)
    width = max(map(len, ROWS))
    left = torch.tensor([[PAD] * (width - len(row)) + row for row in ROWS])
    padded = model(input_ids=left, attention_mask=(left != PAD).long()).logits[:, 0]
    assert padded.tolist() == pytest.approx(alone, abs=1e-5)


def test_groups_come_back_as_they_went_in(model):
    groups = [([5, 9], [[3], [3, 12]]), ([7], [[2, 2, 11, 4, 6]])]
    flat = score_ids(model, [[5, 9, 3], [5, 9, 3, 12], [7, 2, 2, 11, 4, 6]])
    scores = score_groups(model, groups)
    assert [len(s) for s in scores] == [2, 1] and scores[0] + scores[1] == pytest.approx(flat, abs=1e-6)


def test_normalised_scores_have_mean_0_and_variance_1_also_after_loading(model, tmp_path):
    scores = score_ids(model, ROWS)
    set_normalization(model, scores)
    model.save_pretrained(tmp_path / "rm")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    unit = normalize(loaded.config, score_ids(loaded, ROWS))
    assert sum(unit) / len(unit) == pytest.approx(0, abs=1e-6)
    assert sum(u * u for u in unit) / len(unit) == pytest.approx(1, abs=1e-5)


def test_a_model_without_opinions_cannot_be_normalised(folder):
    with pytest.raises(ValueError, match="all 4 samples the score 0"):
        model = from_language_model(folder, pad_id=PAD, seed=0)
        set_normalization(model, score_ids(model, ROWS))


def test_min_token_logprob_is_that_of_the_responses_least_likely_token():
    lm = policy().eval()
    groups = [([5, 9], [[3], [3, 12, 1]]), ([7, 8, 2], [[2, 1]])]
    expected = []
    for prompt, responses in groups:
        for response in responses:
            logprobs = F.log_softmax(lm(torch.tensor([prompt + response])).logits[0].double(), -1)
            expected.append(min(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)))
    found = min_token_logprobs(lm, groups, batch_size=2)
    assert [x for group in found for x in group] == pytest.approx(expected, abs=1e-5)
    assert all(x < 0 and math.isfinite(x) for group in found for x in group)


FAMILIES = [{"architecture": "qwen3"}, {"architecture": "llama", "tie_word_embeddings": True}, {"architecture": "llama"},
            {"architecture": "gpt2"}, {"architecture": "gpt2", "tie_word_embeddings": False}]


@pytest.mark.parametrize("changes", FAMILIES, ids=lambda c: "-".join(map(str, c.values())))
def test_any_causal_language_model_becomes_a_reward_model_that_padding_does_not_move(tmp_path, changes):
    """Alone, in batches of mixed lengths padded right, and padded left with positions that count real tokens."""
    lm = policy(**changes)
    lm.save_pretrained(tmp_path / "lm")
    model = from_language_model(tmp_path / "lm", pad_id=PAD, seed=0)
    expected = dict(lm.base_model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.base_model.named_parameters())
    assert score_ids(model, ROWS) == [0.0] * len(ROWS) and not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    torch.nn.init.normal_(model.score.weight)
    model.eval()
    alone = [model(input_ids=torch.tensor([row])).logits.item() for row in ROWS]
    assert max(alone) - min(alone) > 0.1
    for batch_size in (1, 3, 8):
        assert score_ids(model, ROWS, batch_size) == pytest.approx(alone, abs=1e-5)
        assert score_ids(model, ROWS[::-1], batch_size) == pytest.approx(alone[::-1], abs=1e-5)
    width = max(map(len, ROWS)) + 2
    left = torch.tensor([[PAD] * (width - len(row)) + row for row in ROWS])
    mask = (left != PAD).long()
    padded = model(input_ids=left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits[:, 0]
    assert padded.tolist() == pytest.approx(alone, abs=1e-5)


def test_combinations_worked_by_hand():
    scores = [[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]]
    assert combine(scores, "mean", 9.0) == [3.0, 0.0] and combine(scores, "min", 9.0) == [1.0, 0.0]
    spread = math.sqrt((4 + 1 + 9) / 3)
    assert combine(scores, "mean_std", 0.5) == pytest.approx([3 - 0.5 * spread, 0.0])
    with pytest.raises(ValueError, match="unknown combination 'max'"):
        combine(scores, "max", 1.0)


def test_members_begin_differently_and_by_their_seed(folder):
    def heads(seed, count):
        return from_language_model(folder, pad_id=PAD, seed=seed, heads=count, random_head=True).score.weight

    assert torch.equal(heads(0, 1), heads(0, 1)) and not torch.equal(heads(0, 1), heads(1, 1))
    rows = heads(0, 3)
    assert rows.shape == (3, 32) and rows.std().item() == pytest.approx(33 ** -0.5, rel=0.3)
    assert torch.linalg.matrix_rank(rows) == 3


def jury(folder, shared):
    """Three members, one of them on another scale, and raw scores of rows as samples of the SFT model."""
    if shared:
        models = [from_language_model(folder, pad_id=PAD, seed=0, heads=3, random_head=True)]
        models[0].score.weight.data[1] *= 10
    else:
        models = [from_language_model(folder, pad_id=PAD, seed=seed, random_head=True) for seed in range(3)]
        models[1].score.weight.data *= 10
    raw = [[score for model in models for score in head_scores(model, [row])[0]] for row in ROWS]
    return models, raw


@pytest.mark.parametrize("shared", [True, False], ids=["trunk", "models"])
def test_an_ensemble_compares_members_on_one_scale_and_comes_back_as_it_was(folder, tmp_path, shared):
    models, raw = jury(folder, shared)
    ensemble = build_ensemble(models, raw, combination="min", std_coef=0.7)
    columns = torch.tensor(raw, dtype=torch.float64)
    unit = (columns - columns.mean(0)) / columns.std(0, correction=0)
    worst = unit.amin(1)
    expected = ((worst - worst.mean()) / worst.std(correction=0)).tolist()
    found = ensemble.unit(ensemble.raw(ROWS))
    assert found == pytest.approx(expected, abs=1e-4)
    spread = unit.std(1, correction=0).mean().item()
    assert spread > 0.1 and ensemble.disagreement(raw) == pytest.approx(spread, abs=1e-6)
    write_ensemble(ensemble, tmp_path / "rm")
    plain = plain_model(ensemble, raw)
    for number, model in enumerate([plain, *models[1:]]):
        model.save_pretrained(tmp_path / "rm" / (f"members/{number}" if number else "."))

    folders = member_folders(tmp_path / "rm")
    assert len(folders) == (1 if shared else 3)

    def again(how):
        loaded = [AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval() for path in folders]
        return load_ensemble(tmp_path / "rm", loaded, how)

    loaded = again(None)
    assert loaded.combination == "min" and loaded.std_coef == 0.7
    assert loaded.unit(loaded.raw(ROWS)) == pytest.approx(expected, abs=1e-4)
    mean = again("mean")
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    known = [0] if not shared else [0, 1, 2]  # who knows nothing of ensembles reads the first model, or the mean of the heads
    of_known = unit[:, known].mean(1)
    assert normalize(alone.config, score_ids(alone, ROWS)) == pytest.approx(
        ((of_known - of_known.mean()) / of_known.std(correction=0)).tolist(), abs=1e-4)
    if shared:
        assert mean.unit(mean.raw(ROWS)) == pytest.approx(normalize(alone.config, score_ids(alone, ROWS)), abs=1e-4)
    with pytest.raises(ValueError, match="unknown combination 'max'"):
        again("max")
    with pytest.raises(ValueError, match="not an ensemble"):
        load_ensemble(folder, [alone], "min")
