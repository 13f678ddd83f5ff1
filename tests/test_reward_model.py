import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from reward.model import from_language_model, min_token_logprobs, normalize, score_groups, score_ids, set_normalization
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
