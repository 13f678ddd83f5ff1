import random

import datasets
import pytest
import torch
from trl import RewardConfig

from reward.calibration import accuracy, judged
from reward.model import from_language_model, score_groups
from stages.models.ranking import RankedCollator, RankedRewardTrainer, batch_scores, pad_scores
from stages.models.training import fit
from tests.rl_tiny import PAD, policy, tokenizer

GOOD = 20  # the rule to be learned: the more of these in a response, the better


def make_rows(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        responses = [[rng.choice([GOOD, 9, 10, 11, 12]) for _ in range(rng.randint(2, 5))] + [1] for _ in range(rng.randint(2, 4))]
        counts = [r.count(GOOD) for r in responses]
        if len(set(counts)) > 1:
            rows.append({"prompt_ids": [2 + rng.randrange(6) for _ in range(rng.randint(1, 4))], "response_ids": responses,
                         "ranks": [1 + sum(other > c for other in counts) for c in counts]})
    return rows


@pytest.fixture
def model(tmp_path):
    policy().save_pretrained(tmp_path / "lm")
    return from_language_model(tmp_path / "lm", pad_id=PAD, seed=0)


def test_each_response_stands_once_in_a_batch():
    rows = [{"prompt_ids": [5, 6], "response_ids": [[7, 1], [8, 9, 1]], "ranks": [2, 1]},
            {"prompt_ids": [3], "response_ids": [[4, 1], [5, 1], [6, 1]], "ranks": [1, 1, 3]}]
    batch = RankedCollator(PAD, share_prompts=False)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 9, 1], [3, 4, 1, 0, 0], [3, 5, 1, 0, 0], [3, 6, 1, 0, 0]]
    assert batch["ranks"].tolist() == [[2, 1, 0], [1, 1, 3]] and batch["slots"].tolist() == [[0, 1, 0], [2, 3, 4]]
    shared = RankedCollator(PAD, share_prompts=True)(rows)
    assert shared["prompt_ids"].tolist() == [[5, 6], [0, 3]] and shared["owner"].tolist() == [0, 0, 1, 1, 1]


def test_shared_prompts_give_the_scores_and_gradients_of_separate_rows(model):
    torch.nn.init.normal_(model.score.weight)
    rows = make_rows(6, seed=1)
    results = []
    for share in (False, True):
        model.zero_grad()
        batch = RankedCollator(PAD, share)(rows)
        scores = batch_scores(model, model.base_model, batch)
        real = batch["ranks"] > 0
        (scores[real] * torch.arange(int(real.sum()))).sum().backward()
        results.append((scores[real].detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    expected = score_groups(model, [(r["prompt_ids"], r["response_ids"]) for r in rows])
    torch.testing.assert_close(results[1][0], torch.tensor([s for group in expected for s in group]), atol=1e-5, rtol=1e-4)


def arguments(tmp_path, name, **changes):
    return RewardConfig(**{
        "output_dir": str(tmp_path / name / "checkpoints"), "use_cpu": True, "bf16": False, "max_steps": 60,
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 20, "save_steps": 60,
        "eval_strategy": "steps", "eval_steps": 30, "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, "dataloader_drop_last": True, "remove_unused_columns": False,
        "dataloader_pin_memory": False, "seed": 0, "data_seed": 0, **changes})


def train(model, tmp_path, name, rows, heldout, muon=None, share=True, **changes):
    trainer = RankedRewardTrainer(
        model=model, args=arguments(tmp_path, name, **changes), processing_class=tokenizer(), data_collator=RankedCollator(PAD, share),
        train_dataset=datasets.Dataset.from_list(rows), heldout=heldout, muon=muon)
    fit(trainer)
    return trainer


@pytest.mark.parametrize("muon", [None, {"matrix_lr": 0.01, "lr": 3e-3, "embedding_lr_factor": 1.0}], ids=["adamw", "muon"])
def test_training_on_rankings_teaches_the_rule(model, tmp_path, muon):
    rows, heldout = make_rows(200, seed=2), make_rows(60, seed=3)

    def measured():
        return accuracy(judged(score_groups(model, [(r["prompt_ids"], r["response_ids"]) for r in heldout]),
                               [r["ranks"] for r in heldout])).value

    assert measured() == 0.5  # a zero head ties everything
    trainer = train(model, tmp_path, "run", rows, heldout, muon)
    assert measured() > 0.85
    logged = trainer.metrics_log.path.read_text()
    assert '"heldout/accuracy"' in logged and '"train/accuracy"' in logged


def test_a_finished_training_resumed_trains_no_further(model, tmp_path):
    """Of an epoch and a half: Trainer itself would ask only after one more step whether it had come to the end."""
    rows = make_rows(70, seed=4)[:40]
    settings = {"max_steps": 7, "save_steps": 7, "eval_steps": 7}
    first = train(model, tmp_path, "run", rows, rows[:4], **settings)
    weights = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    again = train(model, tmp_path, "run", rows, rows[:4], **settings)
    assert again.state.global_step == 7
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())


def test_accumulation_does_not_change_the_step(model, tmp_path):
    rows = make_rows(40, seed=4)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    trained = []
    for name, size, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        model.load_state_dict(state)
        train(model, tmp_path, name, rows, rows[:4], max_steps=3, per_device_train_batch_size=size, optim="sgd", learning_rate=0.1,
              gradient_accumulation_steps=accumulation, max_grad_norm=0.0)
        trained.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_ragged_scores_are_padded():
    assert pad_scores([[1.0], [2.0, 3.0]]).tolist() == [[1.0, 0.0], [2.0, 3.0]]
