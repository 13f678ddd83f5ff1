import contextlib
import random
from functools import partial
from types import SimpleNamespace

import datasets
import pytest
import torch
from trl import RewardConfig, RewardTrainer

from reward.calibration import accuracy, judged
from reward.losses import ranked_loss
from reward.model import from_language_model, score_groups
from stages.models import ranking
from stages.models.adapters import adapter_config
from stages.models.ranking import (
    RankedCollator,
    RankedRewardTrainer,
    RankingConfig,
    batch_scores,
    check,
    pad_scores,
    peft_settings,
    shared_out,
    trunk_of,
    without_adapters,
)
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


def train(model, tmp_path, name, rows, heldout, muon=None, share=True, loss=None, peft_config=None, **changes):
    trainer = RankedRewardTrainer(
        model=model, args=arguments(tmp_path, name, **changes), processing_class=tokenizer(), data_collator=RankedCollator(PAD, share),
        train_dataset=datasets.Dataset.from_list(rows), heldout=heldout, muon=muon, loss=loss, peft_config=peft_config)
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


def test_every_process_passes_as_often_and_scores_are_those_of_one(model, monkeypatch):
    """Engines that divide the weights hang otherwise. Of 65 responses two processes have 33 and 32, in batches of 8 five and four."""
    torch.nn.init.normal_(model.score.weight)
    groups = [([5, 6], [[7] * n + [1] for n in range(1, k + 1)]) for k in (3, 30, 2, 30)]
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    parts, counts = [], []
    monkeypatch.setattr(ranking, "world_size", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(ranking, "rank", lambda number=number: number)
        monkeypatch.setattr(ranking, "gather", lambda rows: parts.append(rows) or [row for part in parts for row in part])
        passes.clear()
        with contextlib.suppress(KeyError):  # the first has not all
            together = shared_out(model, groups, partial(score_groups, batch_size=8))
        counts.append(len(passes))
    assert counts == [5, 5] and [len(part) for part in parts] == [33, 32]
    torch.testing.assert_close(pad_scores(together), pad_scores(score_groups(model, groups)))


@pytest.mark.parametrize("changes", [{}, {"share_prompts": False, "ensemble": 2, "ensemble_share": "trunk"}])
def test_what_is_not_written_for_weights_in_parts_is_refused_before_training(tmp_path, monkeypatch, changes):
    policy().save_pretrained(tmp_path / "lm")
    monkeypatch.setattr(ranking, "divides_weights", lambda trainer: True)
    monkeypatch.setattr(ranking, "fit", lambda *_: pytest.fail("it trains"))
    rows, run = make_rows(8, seed=1), SimpleNamespace(directory=tmp_path / "run")
    with pytest.raises(ValueError, match="share_prompts to false, or launch with ddp"):
        ranking.train_model(RankingConfig(batch_size=2, **changes), run, tokenizer(), tmp_path / "lm", train=rows, heldout=rows, number=0)


def test_ragged_scores_are_padded():
    assert pad_scores([[1.0], [2.0, 3.0]]).tolist() == [[1.0, 0.0], [2.0, 3.0]]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "rows"])
def test_heads_on_one_trunk_each_learn_from_all_prompts(model, tmp_path, share):
    """The loss of H heads is the mean of their losses alone."""
    heads = from_language_model(tmp_path / "lm", pad_id=PAD, seed=0, heads=3, random_head=True)
    batch = RankedCollator(PAD, share)(make_rows(6, seed=1))
    size, losses = len(batch["ranks"]), []
    for row in heads.score.weight.detach():
        model.score.weight.data.copy_(row[None])
        losses.append(ranked_loss(batch_scores(model, model.base_model, batch), batch["ranks"]).item())
    scores = batch_scores(heads, heads.base_model, batch)
    assert scores.shape == (3 * size, batch["ranks"].size(1)) and len({round(x, 6) for x in losses}) == 3
    assert ranked_loss(scores, batch["ranks"].repeat(3, 1)).item() == pytest.approx(sum(losses) / 3, abs=1e-6)


@pytest.mark.parametrize("loss", [{"kind": "listwise"}, {"margin": 0.5, "label_smoothing": 0.05}], ids=str)
def test_other_losses_teach_the_rule_too(model, tmp_path, loss):
    rows, heldout = make_rows(200, seed=2), make_rows(60, seed=3)
    train(model, tmp_path, "run", rows, heldout, loss=loss)
    scores = score_groups(model, [(r["prompt_ids"], r["response_ids"]) for r in heldout])
    assert accuracy(judged(scores, [r["ranks"] for r in heldout])).value > 0.85


@pytest.mark.parametrize("changes", [{}, {"architecture": "gpt2"}], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "rows"])
def test_lora_trains_adapters_and_head_and_merges_to_equal_scores(tmp_path, changes, share):
    policy(**changes).save_pretrained(tmp_path / "lm")
    model = from_language_model(tmp_path / "lm", pad_id=PAD, seed=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = RankingConfig(method="lora", optimizer="adamw", lora_rank=4, lora_alpha=8)
    rows, heldout = make_rows(200, seed=2), make_rows(60, seed=3)
    trainer = train(model, tmp_path, "run", rows, heldout, share=share, learning_rate=1e-2,
                    peft_config=adapter_config(peft_settings(config), [], tied=True))
    adapted = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    moved = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in moved) and any("score" in name for name in moved)
    groups = [(r["prompt_ids"], r["response_ids"]) for r in heldout]
    scores = score_groups(adapted, groups)
    batch = RankedCollator(PAD, True)(heldout[:3])  # the trunk that reads prompts carries the adapters
    adapted.eval()
    with torch.no_grad():
        shared = batch_scores(adapted, trunk_of(adapted), batch)[batch["ranks"] > 0]
    torch.testing.assert_close(shared, torch.tensor([s for group in scores[:3] for s in group]), atol=1e-4, rtol=1e-4)
    assert accuracy(judged(scores, [r["ranks"] for r in heldout])).value > 0.85
    plain = without_adapters(trainer, config)
    assert {name for name, _ in plain.named_parameters()} == set(before)
    assert not torch.equal(plain.score.weight, before["score.weight"])
    for a, b in zip(score_groups(plain, groups), scores, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_one_ranking_of_k_is_trls_loss_on_all_its_pairs_at_a_seventh_of_the_encodings(model, tmp_path):
    """K=8: TRL's RewardTrainer on the 28 pairs has our loss and our gradients."""
    torch.nn.init.normal_(model.score.weight)
    rng = random.Random(0)
    row = {"prompt_ids": [5, 6], "response_ids": [[rng.randrange(2, 20) for _ in range(3)] + [1] for _ in range(8)],
           "ranks": rng.sample(range(1, 9), 8)}
    pairs = [{f"{name}_ids": row["prompt_ids"] + row["response_ids"][i] for name, i in (("chosen", a), ("rejected", b))}
             for a in range(8) for b in range(8) if row["ranks"][a] < row["ranks"][b]]
    assert len(pairs) == 28
    theirs = RewardTrainer(model=model, args=arguments(tmp_path, "theirs", eval_strategy="no"), processing_class=tokenizer(),
                           train_dataset=datasets.Dataset.from_list(pairs))
    batch = theirs.data_collator(pairs)
    expected = theirs.compute_loss(model, batch)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ours = RankedCollator(PAD, share_prompts=True)([row])
    loss = ranked_loss(batch_scores(model, model.base_model, ours), ours["ranks"])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and len(batch["input_ids"]) == 7 * len(ours["input_ids"])
    for a, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, a, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("values", "message"), [
    ({"method": "lora"}, "set optimizer to adamw"), ({"ensemble": 0}, "ensemble 0"), ({"label_smoothing": 0.5}, r"label_smoothing 0\.5"),
    ({"combination": "min"}, "nothing to share or combine"), ({"ensemble_share": "trunk"}, "nothing to share or combine"),
    ({"loss": "listwise", "margin": 0.5}, "belong to pairs")])
def test_settings_that_do_not_go_together(values, message):
    row = {"prompt_ids": [5], "response_ids": [[6, 1], [7, 1]], "ranks": [1, 2]}
    with pytest.raises(ValueError, match=message):
        check(RankingConfig(batch_size=1, **values), [row], [], policy().config, PAD)
    check(RankingConfig(batch_size=1), [row], [], policy().config, PAD)
    with pytest.raises(ValueError, match="ends with the padding token"):
        check(RankingConfig(batch_size=1), [row], [row | {"response_ids": [[6, PAD], [7, 1]]}], policy().config, PAD)
