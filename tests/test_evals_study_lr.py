"""The study of learning rates: the grid around the rule's rate, what it is called with, its table by hand. No stage runs here."""
import json
from types import SimpleNamespace

import pytest

from stages.evals import study_lr


def test_the_rule_is_in_the_middle_of_the_grid(tmp_path, monkeypatch):
    calls = []

    def stage(name, folder, **settings):
        calls.append((name, folder.name, settings))
        loss = 1.0 + abs(settings["matrix_lr"] - 0.02)
        return SimpleNamespace(metrics={"heldout_loss": {"value": loss}}, counts={"tokens": settings["tokens"]})

    monkeypatch.setattr(study_lr, "stage", stage)
    study_lr.study(study_lr.arguments(["--runs", str(tmp_path), "--prepare", "P", "--widths", "64", "128", "--seeds", "0", "1"]))
    lines = [json.loads(line) for line in (tmp_path / "study_lr.jsonl").read_text().splitlines()]
    assert len(lines) == len(calls) == 20 and (tmp_path / "study_lr.svg").is_file()
    # Muon's rate at width 64 is matrix_lr itself, at 128 half of it: the factors span the same on both.
    assert [line["rate"] for line in lines if (line["width"], line["seed"]) == (64, 0)] == pytest.approx([0.005, 0.01, 0.02, 0.04, 0.08])
    assert [line["rate"] for line in lines if (line["width"], line["seed"]) == (128, 1)] == pytest.approx([0.0025, 0.005, 0.01, 0.02, 0.04])
    assert calls[0][1] == "tiny-d64-lr0.005-300000-s0" and calls[0][2]["parents.prepare"] == "P" and calls[5][2]["num_heads"] == 4


def test_another_recipe_brings_its_schedule_and_its_rule(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(study_lr, "stage", lambda name, folder, **settings: calls.append(settings) or SimpleNamespace(
        metrics={"heldout_loss": {"value": 1.0}}, counts={"tokens": 1}))
    study_lr.study(study_lr.arguments(["--runs", str(tmp_path), "--recipe", "branches", "--seeds", "0", "--factors", "2"]))
    assert {call["schedule"] for call in calls} == {"wsd"} and [call["matrix_lr"] for call in calls] == pytest.approx([0.01, 0.02] * 2)
    rates = [json.loads(line)["rate"] for line in (tmp_path / "study_lr.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01, 0.02] * 2)  # it holds up to width 128


def test_the_table_says_how_far_the_rule_is_from_the_best():
    lines = [{"width": 64, "seed": 0, "factor": f, "rate": 0.02 * f, "loss": loss} for f, loss in ((0.5, 0.8), (1.0, 0.84), (2.0, 0.9))]
    assert study_lr.report(lines).splitlines() == [
        "| width | seed | the rule's rate | times 0.5 | times 1 | times 2 | best rate | rule above best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |", "| 64 | 0 | 0.02 | 0.8000 | 0.8400 | 0.9000 | 0.01 | 5.0% |"]


def test_widths_are_whole_heads():
    with pytest.raises(ValueError, match="--widths 48: heads are 32 wide"):
        study_lr.arguments(["--widths", "48"])
