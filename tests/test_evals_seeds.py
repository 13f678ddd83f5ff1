"""The study over seeds: what it averages and how it goes on. No stage runs here."""
import json
import subprocess

import pytest

from stages.evals import study_seeds


def finished(folder, accuracy, predicted, measured):
    metrics = {"pretrain": {"heldout_loss": measured}, "evaluation": {
        "sft/last_letters/direct": 0.1, "sft/last_letters/zero_shot_cot": accuracy, "sft/last_letters/zero_shot_cot/finished": 1.0},
        "ppo": {"after/kl": 0.5, "change/base_loss": 0.02}, study_seeds.PTX: {"after/kl": 0.5, "change/base_loss": -0.05}}
    for stage in study_seeds.STAGES:
        (folder / stage).mkdir(parents=True)
        curve = {"kl": [0, 0.2, 0.6], "gold": [[1, 1, 1], [1.1, 1, 2], [1.3, 1, 2]]}
        (folder / stage / "curve.json").write_text(json.dumps({"best_of_n": curve}))
        (folder / stage / "manifest.json").write_text(json.dumps({
            "metrics": {name: {"value": value} for name, value in metrics.get(stage, {}).items()},
            "products": {"overoptimization": {"path": "curve.json", "sha256": ""}},
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
    assert "start-ups left out | 5.000 | 5.000, 5.000, 5.000 |" in shown  # minutes, without evaluation and PPO-ptx
    assert "| sft, last letters | 50.0 [25.2, 74.8] | - | - |" in shown
    assert [json.loads(line)["seed"] for line in (tmp_path / "study_seeds.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert all(f"PLUMBLINE_RUNS={tmp_path / str(seed)}" in command for seed, command in enumerate(calls))


def test_ppo_with_pretraining_loss_runs_once_more(tmp_path, monkeypatch, capsys):
    calls = []

    def make(command, check):
        calls.append(command)
        if not (tmp_path / "0").exists():
            finished(tmp_path / "0" / "tiny", 0.5, 0.4, 0.4)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", make)
    study_seeds.main(["--runs", str(tmp_path), "--seeds", "0", "--ptx-coef", "1", "--no-evaluation"])
    road, again = calls
    assert "evaluate" not in road and "rlhf" in road
    assert again[1] == "ppo" and again[-1] == f"ARGS=--seed 0 --ptx-coef 1.0 --run-dir {tmp_path / '0' / 'tiny' / 'ppo_ptx'}"
    shown = capsys.readouterr().out
    assert "change by PPO | 0.020 | 0.020 |" in shown and "change by PPO-ptx | -0.050 | -0.050 |" in shown
    assert "best of n at that KL | 1.250 | 1.250 |" in shown  # three quarters of the way from .2 to .6 nats


def test_no_best_of_n_beyond_its_curve(tmp_path):
    file = tmp_path / "curve.json"
    file.write_text(json.dumps({"best_of_n": {"kl": [0, 0.2], "gold": [[1, 1, 1], [1.1, 1, 2]]}}))
    assert study_seeds.best_of_n_at(file, 0.2) == pytest.approx(1.1)
    assert study_seeds.best_of_n_at(file, 0.21) is None
    file.write_text(json.dumps({"best_of_n": None}))
    assert study_seeds.best_of_n_at(file, 0.1) is None


def test_a_stage_that_fails_stops_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    with pytest.raises(ValueError, match="seed 0 stopped"):
        study_seeds.main(["--runs", str(tmp_path)])
