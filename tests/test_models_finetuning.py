"""Fine-tuning: batches without padding equal separate rows, the pull to the base is what it says, adapters, early stop, resumption."""
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from stages.models import finetuning
from stages.models.attention import DOCUMENTS
from stages.models.finetuning import FineTuner, average, in_blocks
from stages.models.forgetting import Watch
from stages.run.checkpoint import read_metrics
from tests.sft_tiny import base_of, config_of, dialogues, shake, tiny_tokenizer, tune


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def log_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- one loss, however the dialogues are laid out ----


def separate(model, base, rows, kl_coef):
    """Loss of the definition, one dialogue at a time, and gradients."""
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    total, count = torch.zeros(()), sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            known = base(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        total = total + cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + kl_coef * (known.exp() * (known - logits)).sum()
    (total / count).backward()
    return (total / count).item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def in_batches(trainer, change):
    """Loss and gradients of the trainer's own batches of all its rows."""
    trainer.model.train()
    trainer.model.zero_grad()
    batches = list(trainer.get_train_dataloader())
    count, total = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches), 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, change(batch), num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, batches


def laid_out(monkeypatch, tmp_path, tokenizer, config, *, tied=False, change=lambda batch: batch):
    """(trainer's loss, gradients, batches), and those of separate dialogues, of a model that is no longer its base."""
    rows, found = dialogues(24, seed=3), {}

    def instead_of_training(trainer, guard):
        shake(trainer.model, 0.05)
        found["batched"] = in_batches(trainer, change)
        trainer.evaluate()

    monkeypatch.setattr(finetuning, "fit", instead_of_training)
    trainer = tune(monkeypatch, tmp_path, tokenizer, config, tied=tied, train=rows)
    return found["batched"], separate(trainer.model, base_of(tokenizer, tied=tied), rows, config.kl_coef)


LAYOUTS = {"padded": {"attn_implementation": "sdpa"}, "flat": {"attn_implementation": DOCUMENTS}, "packed": {"packing": True},
           "packed under a mask": {"packing": True, "attn_implementation": "sdpa"}}


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
@pytest.mark.parametrize(("method", "tied"), [("full", False), ("lora", False), ("lora", True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_loss_and_gradients_of_separate_dialogues(monkeypatch, tmp_path, tokenizer, layout, method, tied, kl_coef):
    config = config_of(method=method, kl_coef=kl_coef, batch_size=4, **LAYOUTS[layout])
    (loss, gradients, batches), (expected, wanted) = laid_out(monkeypatch, tmp_path, tokenizer, config, tied=tied)
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    assert [rows for rows, _ in shapes] == ([4] * 6 if layout == "padded" else [1] * len(shapes))
    assert len(shapes) == 6 if not config.packing else len(shapes) < 6
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys() and any(g.abs().max() > 1e-3 for g in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", ["flat", "packed"])
def test_dialogues_that_see_one_another_would_be_noticed(monkeypatch, tmp_path, tokenizer, layout):
    def contaminated(batch):
        return batch | {"position_ids": torch.arange(batch["input_ids"].size(1))[None]}

    (loss, gradients, _), (expected, wanted) = laid_out(monkeypatch, tmp_path, tokenizer, config_of(batch_size=4, **LAYOUTS[layout]),
                                                        change=contaminated)
    assert abs(loss - expected) > 1e-3
    assert max(float((gradients[name] - wanted[name]).abs().max()) for name in wanted) > 1e-3


# ---- the pull to the base ----


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_division_into_micro_batches_changes_nothing(monkeypatch, tmp_path, tokenizer, method):
    runs = {}
    for micro in (8, 2):
        config = config_of(method=method, kl_coef=0.5, micro_batch_size=micro)
        trainer = tune(monkeypatch, tmp_path / str(micro), tokenizer, config)
        runs[micro] = log_of(tmp_path / str(micro)), weights_of(trainer.model)
    (log, weights), (other_log, other_weights) = runs[8], runs[2]
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    for one, two in zip(log, other_log, strict=True):
        for key in ("train/loss", "eval/loss"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), rel=1e-4), (one["step"], key)
    moved = max(float((weights[name] - p).abs().max()) for name, p in base_of(tokenizer).named_parameters() if name in weights) \
        if method == "full" else max(float(p.abs().max()) for name, p in weights.items() if "lora_B" in name)
    assert moved > 0.01
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_kl_is_zero_at_first_and_pulls_back(monkeypatch, tmp_path, tokenizer, method):
    far = {}
    for coef in (1e-6, 5.0):
        tune(monkeypatch, tmp_path / str(coef), tokenizer, config_of(method=method, kl_coef=coef, learning_rate=0.03))
        kl = [row["train/kl_to_base"] for row in log_of(tmp_path / str(coef)) if "train/kl_to_base" in row]
        assert abs(kl[0]) < 1e-5 and len(kl) == 4
        far[coef] = kl[-1]
    assert far[5.0] < 0.8 * far[1e-6]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_base_is_asked_without_noise(monkeypatch, tmp_path, tokenizer, method):
    """NEFTune's noise falls on the embeddings of the model in training, which adapters share with their base."""
    asked = []

    def twice(self, inputs, once=FineTuner._base_logits):
        asked.append((once(self, inputs), once(self, inputs)))
        return asked[-1][0]

    monkeypatch.setattr(FineTuner, "_base_logits", twice)
    trainer = tune(monkeypatch, tmp_path, tokenizer, config_of(method=method, kl_coef=0.5, neftune_alpha=50.0))
    assert len(asked) == 4 and all(torch.equal(one, two) for one, two in asked)
    assert log_of(tmp_path)[1]["train/kl_to_base"] > 1e-3  # the noise is in the model that learns
    assert trainer.model.training


# ---- NEFTune ----


@pytest.mark.parametrize("method", ["full", "lora"])
def test_noise_on_embeddings_is_for_training_alone(monkeypatch, tmp_path, tokenizer, method):
    logs = {}
    for alpha in (0.0, 50.0):
        trainer = tune(monkeypatch, tmp_path / str(alpha), tokenizer, config_of(method=method, neftune_alpha=alpha, learning_rate=0.0))
        logs[alpha] = log_of(tmp_path / str(alpha))
        ids = torch.arange(6, 30)[None]
        trainer.model.train()
        assert torch.equal(trainer.model(ids).logits, trainer.model(ids).logits)  # the noise ends with the training
    assert logs[0.0][1]["train/loss"] != pytest.approx(logs[50.0][1]["train/loss"], rel=1e-3)
    assert [row["eval/loss"] for row in logs[0.0]] == [row["eval/loss"] for row in logs[50.0]]


# ---- small parts, by hand ----


def test_average_by_hand():
    model = torch.nn.Linear(2, 1)
    base = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([4.0])}
    model.load_state_dict({"weight": torch.tensor([[3.0, -2.0]]), "bias": torch.tensor([0.0])})
    average(model, base, 1.0)
    assert model.weight.tolist() == [[3.0, -2.0]] and model.bias.tolist() == [0.0]
    average(model, base, 0.5)
    assert model.weight.tolist() == [[2.0, 0.0]] and model.bias.tolist() == [2.0]
    average(model, base, 0.25)  # 1 + .25 x (2 - 1), 2 + .25 x (0 - 2), 4 + .25 x (2 - 4)
    assert model.weight.tolist() == [[1.25, 1.5]] and model.bias.tolist() == [3.5]


def test_average_of_tied_embeddings_is_taken_once(tokenizer):
    base, model = base_of(tokenizer, tied=True), base_of(tokenizer, tied=True)
    shake(model, 0.3)
    before = model.lm_head.weight.detach().clone()
    average(model, {name: weight.clone() for name, weight in base.state_dict().items()}, 0.5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight.detach(), (before + base.lm_head.weight.detach()) / 2)


@pytest.mark.parametrize(("epochs", "ends"), [(1, [4, 7]), (2, [8, 14]), (1.5, [6, 10]), (0.5, [2, 4]), (2.25, [9, 16])])
def test_blocks_in_turn(epochs, ends):  # of 4 and 3 rows; half a row rounds to even
    blocks = [[{"id": f"{block}{i}"} for i in range(size)] for block, size in (("a", 4), ("b", 3))]
    rows, found = in_blocks(blocks, epochs, seed=0)
    assert found == ends and len(rows) == ends[-1]
    said = [row["id"] for row in rows]
    for block, start, end in zip(blocks, [0, *ends], ends, strict=False):
        names = {row["id"] for row in block}
        assert set(said[start:end]) <= names
        for at in range(start, end, len(block)):
            assert len(set(said[at:min(end, at + len(block))])) == min(end, at + len(block)) - at  # no row twice in an epoch
    assert in_blocks(blocks, epochs, seed=0)[0] == rows


def test_each_epoch_of_a_block_is_shuffled_anew():
    rows, _ = in_blocks([[{"id": i} for i in range(20)]], 3, seed=0)
    epochs = [[row["id"] for row in rows[at:at + 20]] for at in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert in_blocks([[{"id": i} for i in range(20)]], 3, seed=1)[0] != rows


# ---- a training, end to end ----

def harm(count):
    """Training on some tokens and validation on others, at a learning rate that forgets these: from the third step on that does harm."""
    return {"train": dialogues(count, high=100), "validation": dialogues(12, seed=9, low=150)}


HARM = {"learning_rate": 0.1, "warmup_share": 0.0}


def checkpoints(folder: Path) -> set[int]:
    return {int(path.name.rsplit("-", 1)[1]) for path in (folder / "checkpoints").glob("checkpoint-*")}


def looked(folder: Path) -> dict[int, dict]:
    return {int(path.stem): json.loads(path.read_text()) for path in (folder / "watch").glob("*.json")}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_earlier_checkpoint_comes_back(monkeypatch, tmp_path, tokenizer, method):
    trainer = tune(monkeypatch, tmp_path, tokenizer, config_of(method=method, **HARM), evaluations=8, **harm(64))
    _, equal = trainer.watch.recommended()
    step = min(step for step in checkpoints(tmp_path))
    assert trainer.state.global_step == 8 and step < 8
    assert {*equal, 8} <= checkpoints(tmp_path) <= {*equal, 7, 8}  # pruned, but for those that can be chosen and the newest
    assert set(looked(tmp_path)) == set(range(9))
    late = weights_of(trainer.model)
    trainer.load_step(8)
    assert all(torch.equal(p, late[name]) for name, p in trainer.model.named_parameters())
    trainer.load_step(step)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, trainer.weights[step][name]), name
    assert any(not torch.equal(late[name], weight) for name, weight in trainer.weights[step].items())
    again = trainer.watch.validation
    point = next(point for point in trainer.watch.points if point["step"] == step)
    measured = Watch(tmp_path / "again", validation=again, sources=["x"] * len(again), collator=trainer.watch.collator,
                                neutral=None, tokens=1e9).look(trainer.model, step)
    assert measured["eval_loss"] == pytest.approx(trainer.watch.logs(point)["eval_loss"], rel=1e-5)


def test_training_stops_when_it_does_harm(monkeypatch, tmp_path, tokenizer):
    for patience, steps in ((0, 10), (2, 4)):
        folder = tmp_path / str(patience)
        trainer = tune(monkeypatch, folder, tokenizer, config_of(**HARM), evaluations=10, patience=patience, **harm(80))
        assert trainer.state.global_step == steps and max(looked(folder)) == steps and steps in checkpoints(folder)
    step, equal = trainer.watch.recommended()
    assert trainer.watch.worse_in_a_row() == 2 and step == 2 and {*equal} <= checkpoints(folder)


def test_rows_in_order_are_visited_in_order(monkeypatch, tmp_path, tokenizer):
    rows = dialogues(21)
    config = config_of(epochs=3.0, micro_batch_size=4)
    trainer = tune(monkeypatch, tmp_path / "a", tokenizer, config, train=rows, in_order=True, look_at=[1], evaluations=1)
    assert list(itertools.chain(*trainer.batches)) == list(itertools.chain(*(row["input_ids"] for row in rows)))
    assert trainer.state.global_step == 3 and {0, 1, 3} <= set(looked(tmp_path / "a")) <= {0, 1, 2, 3}
    assert 3 in checkpoints(tmp_path / "a")
    mixed = tune(monkeypatch, tmp_path / "b", tokenizer, config, train=rows, evaluations=1)
    seen = list(itertools.chain(*mixed.batches))
    assert len(seen) == 3 * sum(len(row["input_ids"]) for row in rows) and seen[:60] != list(itertools.chain(*trainer.batches))[:60]


@pytest.mark.parametrize(("steps", "evaluations", "at"), [(6, 3, [0, 2, 4, 6]), (2, 5, [0, 1, 2]), (9, 5, [0, 2, 4, 6, 8, 9]),
                                                         (7, 3, [0, 3, 6, 7])])
def test_looks_are_spread_over_the_steps(monkeypatch, tmp_path, tokenizer, steps, evaluations, at):
    tune(monkeypatch, tmp_path, tokenizer, config_of(batch_size=2), train=dialogues(2 * steps), evaluations=evaluations)
    assert sorted(looked(tmp_path)) == at


@pytest.mark.parametrize(("method", "given", "rate"), [
    ("lora", None, 2e-3), ("full", None, 2e-4), ("full", 0.0, 0.0), ("lora", 1e-4, 1e-4)])
def test_full_tuning_takes_a_tenth_of_the_rate(monkeypatch, tmp_path, tokenizer, method, given, rate):
    trainer = tune(monkeypatch, tmp_path, tokenizer, config_of(method=method, learning_rate=given), train=dialogues(8), evaluations=1)
    assert trainer.args.learning_rate == pytest.approx(rate)


def test_a_look_takes_nothing_from_what_training_logs(monkeypatch, tmp_path, tokenizer):
    """Logged every second step: what was measured of steps 3 and 4 belongs together, though there was a look between them."""
    logs = []
    for look_at in ([], [3]):
        folder = tmp_path / str(len(look_at))
        tune(monkeypatch, folder, tokenizer, config_of(batch_size=1), train=dialogues(50, longest=8), evaluations=1, look_at=look_at)
        logs.append({row["step"]: row for row in log_of(folder)})
    plain, watched = logs
    assert set(watched) - set(plain) == {3} and set(watched[3]) == {"step", "eval/loss", "eval/mean_token_accuracy"}
    assert watched[4] == plain[4] and "train/entropy" in watched[4]


def test_batches_that_do_not_divide(monkeypatch, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="8 dialogues a process do not divide into micro batches of 3: set micro_batch_size"):
        tune(monkeypatch, tmp_path, tokenizer, config_of(micro_batch_size=3))


RESUMED = {"full": ({}, "half way"), "lora": ({"method": "lora", "neftune_alpha": 5.0}, "half way"),
           "packed": ({"packing": True, "batch_size": 2, "epochs": 2.0}, "at the end"), "in order": ({"micro_batch_size": 4}, "half way"),
           "one epoch and a half": ({"epochs": 1.5}, "afterwards"), "stopped early": (HARM, "half way"), "stopped": (HARM, "afterwards")}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_killed_training_continues_as_if_nothing_had_happened(monkeypatch, tmp_path, tokenizer, kind):
    """Killed at a step before it is logged and saved, or after the training, in what the stage does then."""
    changes, moment = RESUMED[kind]
    stops, ordered = "stopped" in kind, kind == "in order"
    settings = {"config": config_of(**changes), "evaluations": 20 if stops else 3, "in_order": ordered, "look_at": [3] if ordered else [],
                "patience": 2 if stops else 0, **(harm(80) if stops else {"train": dialogues(40)})}
    whole = tune(monkeypatch, tmp_path / "whole", tokenizer, **settings)
    steps = whole.state.global_step
    assert (steps < whole.state.max_steps) == stops
    if moment == "afterwards":
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    else:
        with pytest.raises(KeyboardInterrupt):
            tune(monkeypatch, tmp_path / "killed", tokenizer, dies=steps if moment == "at the end" else max(2, steps // 2 + 1), **settings)
    again = tune(monkeypatch, tmp_path / "killed", tokenizer, **settings)
    assert again.state.global_step == steps and len(again.batches) < len(whole.batches) and bool(again.batches) == (moment != "afterwards")
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, again.model.get_parameter(name)), name
    assert looked(tmp_path / "killed") == looked(tmp_path / "whole") and again.watch.recommended() == whole.watch.recommended()
    assert {*whole.watch.recommended()[1], steps} <= checkpoints(tmp_path / "killed") <= checkpoints(tmp_path / "whole")
    log, whole_log = log_of(tmp_path / "killed"), log_of(tmp_path / "whole")
    assert [row["step"] for row in log] == [row["step"] for row in whole_log]
    assert [row.get("train/loss", 0) for row in log] == pytest.approx([row.get("train/loss", 0) for row in whole_log], rel=1e-5)
