"""Emergence over a ladder: what is measured of each model is what the model says, once; what smooth scores alone predict."""
import json

import numpy as np
import pytest
import torch

from prompts.templates import Style, example_answer, render
from stages.data import curriculum
from stages.evals import emergence
from stages.evals.backends import LocalModel
from stages.evals.tasks import load_task
from stages.laws.emergence import exact_match

ARGUMENTS = ["--tasks", "word_problems", "--difficulties", "1", "2", "--problems", "6"]


@pytest.fixture
def ladder(stage, model_folder, tmp_path):
    """Five finished runs of a made-up ladder over the problems of `stage`: one random model at five temperatures."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = tmp_path / "scaling"
    points = []
    for i in range(5):
        folder = home / f"d{i}"
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        model.get_output_embeddings().weight.data *= 0.2 * i
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder / "model")
        (folder / "manifest.json").write_text(json.dumps({
            "stage": "pretrain", "fingerprint": f"sha256:{i}", "products": {"model": {"path": "model"}},
            "counts": {"flops": 10.0 ** (9 + i)}, "parents": {"prepare": "sha256:prepare"},
            "config": {"parents": {"prepare": str(tmp_path / "prepare")}}}))
        points.append({"run": f"d{i}", "flops": 10.0 ** (9 + i)})
    (home / "points.jsonl").write_text("".join(json.dumps(p) + "\n" for p in reversed(points)))
    (home / "manifest.json").write_text(json.dumps({"stage": "scaling", "products": {"points": {"path": "points.jsonl"}}}))
    return home


def test_each_model_is_asked_once_and_graded_by_its_own_probabilities(ladder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found"
    emergence.run([str(ladder), "--out", str(out), *ARGUMENTS])
    lines = [json.loads(line) for line in (out / "measured.jsonl").read_text().splitlines()]
    assert [(line["model"], line["kind"]) for line in lines] == [(f"d{i}", kind) for i in range(5) for kind in ("direct", "worked")]
    task = load_task("word_problems", problems=tmp_path / "prepare" / "problems", difficulties=[1, 2], num_problems=6, seed=0)
    backend = LocalModel(ladder / "d4" / "model", seed=0, batch_size=4)
    means = []
    for row in task.rows:
        context = render(row["question"], Style(chat=False, cues=curriculum.CUES, max_tokens={}), "worked")
        before = backend.encode(context)
        after = backend.tokenizer(f" {example_answer(row, 'worked')}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            shares = backend.model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1:-1].softmax(-1)
        target = torch.nn.functional.one_hot(torch.tensor(after), shares.size(1))
        means.append([shares[range(len(after)), after].log().mean().item(), (shares - target).square().sum(-1).mean().item(), len(after)])
    assert [lines[-1][key] for key in ("logprob", "brier", "tokens")] == pytest.approx(np.mean(means, axis=0).tolist(), rel=1e-4)
    uniform = np.log(1 / backend.model.config.vocab_size)
    assert lines[0]["logprob"] == pytest.approx(uniform, rel=1e-5) and lines[0]["n"] == 6  # a head of zeros knows nothing
    assert {path.name for path in out.iterdir()} == {"measured.jsonl", "emergence.json", "emergence.md", "word_problems-direct.svg",
                                                     "word_problems-worked.svg"}
    told = capsys.readouterr().out
    assert "| word_problems, worked |" in told and (out / "emergence.md").read_text().strip() in told
    monkeypatch.setattr(emergence, "measure", lambda *_: pytest.fail("asked again"))
    emergence.run([str(ladder), "--out", str(out), *ARGUMENTS])


def lines_of(accuracy, logprob):
    return [{"model": f"d{i}", "flops": 10.0 ** (9 + i / 4), "task": "t", "kind": "worked", "n": 100, "tokens": 12.0, "accuracy": a,
             "logprob": p, "brier": -p, "wilson95": [a, a]} for i, (a, p) in enumerate(zip(accuracy, logprob, strict=True))]


def test_the_jump_of_schaeffer_is_explained_by_the_smooth_score():
    logprob = np.linspace(-0.6, -0.01, 16)
    jump = emergence.curves(lines_of(exact_match(logprob, 12), logprob))["t, worked"]
    assert jump["logprob"]["r2_smooth"] == pytest.approx(1) and jump["logprob"]["r2_accuracy"] < 0.75
    assert jump["logprob"]["r2_predicted"] > 0.999 and jump["all_tokens_right"]["r2_predicted"] == pytest.approx(1)
    row = emergence.report({"t, worked": jump}).splitlines()[-1]
    assert row.startswith("| t, worked | 12.0 | 0.001 to 0.887 | ") and row.endswith("| 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |")
    real = emergence.curves(lines_of(np.repeat([0.0, 1.0], 8), logprob))["t, worked"]  # learned at once, whatever the tokens' chances
    assert real["all_tokens_right"]["r2_predicted"] < 0.8
    noisy = np.random.default_rng(0).permutation(logprob)  # compute explains nothing, the score everything
    apart = emergence.curves(lines_of(exact_match(noisy, 12), noisy))["t, worked"]
    assert apart["r2_own"] > 0.99 > 0.5 > apart["logprob"]["r2_accuracy"]


def test_a_task_that_no_model_can_do_has_nothing_to_explain():
    cell = emergence.curves(lines_of(np.zeros(6), np.linspace(-2, -1, 6)))["t, worked"]
    table, words = emergence.report({"u, direct": cell, "t, worked": cell}).split("\n\n")
    assert "logprob" not in cell and table.endswith("| t, worked | 12.0 | 0.000 to 0.000 |" + " - |" * 7)
    assert words.startswith("-: no R2, of smooth scores either, where every model has the same accuracy")
    assert ": u, direct (0.000); t, worked (0.000). Ask" in words


def test_what_is_not_asked_for_is_what_the_recipe_has(capsys):
    import argparse

    rows = [{"task": task, "difficulty": d} for task, count in (("word_problems", 4), ("chained_variables", 60)) for d in (1, 2)
            for _ in range(count)]
    given = argparse.Namespace(tasks=None, difficulties=None, problems=None)
    emergence.fill_in(given, rows)
    assert (given.tasks, given.difficulties, given.problems) == (["word_problems", "chained_variables"], [1, 2], 8)
    assert "none of last_letters there" in capsys.readouterr().out
    given = argparse.Namespace(tasks=["chained_variables"], difficulties=[2], problems=9)
    emergence.fill_in(given, rows)
    assert (given.tasks, given.difficulties, given.problems) == (["chained_variables"], [2], 9)
    full = [{"task": task, "difficulty": d} for task in emergence.TASKS for d in (1, 2, 3, 4, 5) for _ in range(50)]
    given = argparse.Namespace(tasks=None, difficulties=None, problems=None)
    emergence.fill_in(given, full)  # of the tiny recipe
    assert (given.tasks, given.difficulties, given.problems) == (list(emergence.TASKS), [3, 4, 5], 150)


def test_models_that_cannot_be_compared_are_refused(ladder, tmp_path):
    with pytest.raises(ValueError, match="1 models: give a ladder, or five pretrain runs or more"):
        emergence.run([str(ladder / "d0"), "--out", str(tmp_path / "x")])
    data = json.loads((ladder / "d3" / "manifest.json").read_text())
    (ladder / "d3" / "manifest.json").write_text(json.dumps(data | {"parents": {"prepare": "sha256:other"}}))
    with pytest.raises(ValueError, match="d3 was trained on other tokens than"):
        emergence.run([str(ladder), "--out", str(tmp_path / "x")])
    (ladder / "manifest.json").write_text(json.dumps({"stage": "sft"}))
    with pytest.raises(ValueError, match=r"is a sft run: give ladders \(scaling\) and pretrain runs"):
        emergence.run([str(ladder), "--out", str(tmp_path / "x")])
