"""The study over seeds: what it averages and how it goes on. No stage runs here."""
import json
import subprocess

import pytest

from stages.evals import study_seeds


def finished(folder, accuracy, predicted, measured):
    metrics = {"pretrain": {"heldout_loss": measured}, "evaluation": {
        "sft/last_letters/direct": 0.1, "sft/last_letters/zero_shot_cot": accuracy, "sft/last_letters/zero_shot_cot/finished": 1.0}}
    for stage in study_seeds.STAGES:
        (folder / stage).mkdir(parents=True)
        (folder / stage / "manifest.json").write_text(json.dumps({
            "metrics": {name: {"value": value} for name, value in metrics.get(stage, {}).items()},
            "provenance": {"wall_s": 60, "peak_rss_bytes": 1 << 30},
            "notes": {"forecast": {"value": predicted}}}))


def test_seeds_are_averaged_with_an_interval(tmp_path, monkeypatch, capsys):
    given = {0: (0.5, 0.40, 0.40), 1: (0.6, 0.44, 0.40), 2: (0.7, 0.48, 0.40)}
    calls = []

    def make(command, check):
        calls.append(command)
        seed = int(next(word for word in command if word.startswith("ARGS=")).split()[-1])
        if not (tmp_path / str(seed)).exists():
            finished(tmp_path / str(seed) / "tiny", *given[seed])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", make)
    study_seeds.main(["--runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| sft, last letters | 0.100 | - | 0.600 | - | - | - |" in shown
    assert "relative error | 0.100 [-0.148, 0.348] | 0.000, 0.100, 0.200 |" in shown  # t(2) = 4.303, standard error .1 / sqrt(3)
    assert "start-ups left out | 5.000 | 5.000, 5.000, 5.000 |" in shown  # six stages of a minute, one of them the evaluation
    assert "| sft, last letters | 50.0 [25.2, 74.8] | - | - |" in shown
    assert [json.loads(line)["seed"] for line in (tmp_path / "study_seeds.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert all(f"PLUMBLINE_RUNS={tmp_path / str(seed)}" in command for seed, command in enumerate(calls))


def test_a_stage_that_fails_stops_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    with pytest.raises(ValueError, match="seed 0 stopped"):
        study_seeds.main(["--runs", str(tmp_path)])
