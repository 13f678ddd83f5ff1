"""The study of the gate: what it starts, and its figures by hand. No stage runs here."""
import itertools
import json
import subprocess
from pathlib import Path

import pytest

from stages.evals import studies, study_gate
from stages.evals.study_gate import arguments, correlation, report
from stages.ppo import PpoConfig
from stages.preferences import PreferencesConfig
from stages.reward_model import RewardModelConfig
from stages.run.config import load_config

COMPARED = {"preferences": (PreferencesConfig, {"max_responses", "error_rate", "run_dir"}),
            "reward_model": (RewardModelConfig, {"method", "lora_rank", "lora_alpha", "optimizer", "run_dir", "parents"}),
            "ppo": (PpoConfig, {"run_dir", "parents"})}


def test_models_differ_in_what_is_compared_alone(monkeypatch, tmp_path, capsys):
    calls = []

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        calls.append((command[2].split(".")[1], flags))
        number, run = len(calls), Path(flags["--run_dir"])
        run.mkdir(parents=True, exist_ok=True)
        names = (*study_gate.FIGURES, "gain/gold", "gain/score", "after/kl")
        (run / "manifest.json").write_text(json.dumps({"metrics": {
            name: {"value": 0.5 + number / 100, "n": 9, "ci95": [0.4, 0.9]} for name in names}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    study_gate.study(arguments(["--runs", str(tmp_path), "--sizes", "250", "1000", "--errors", "0", "0.4"]))
    assert [stage for stage, _ in calls[:5]] == ["pretrain", "sft", "preferences", "reward_model", "ppo"]
    for kind, (config_class, compared) in COMPARED.items():
        configs = [vars(load_config(config_class, ["--config", f"recipes/tiny/{kind}.yaml", *itertools.chain(*flags.items())]))
                   for stage, flags in calls if stage == kind]
        assert {key for config in configs for key in config if config[key] != configs[0][key]} == compared, kind
    assert all(flags["--gate"] == "off" and flags["--iterations"] == "20" for stage, flags in calls if stage == "ppo")
    lines = [json.loads(line) for line in (tmp_path / "study_gate.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["verdict"] for line in lines} <= {"pass", "warn", "fail"} and (tmp_path / "gate.svg").is_file()
    assert "budget: a base, 4 sets of rankings, 8 reward models" in capsys.readouterr().out


def test_correlation_by_hand():
    value, low, high = correlation([1, 2, 3, 4, 5, 6, 7, 8], [2, 1, 4, 3, 6, 5, 8, 7])
    assert value == pytest.approx(1 - 6 * 8 / (8 * 63)) and low < value < high <= 1  # Spearman's formula: eight differences of one
    assert correlation([1, 2, 3], [3, 2, 1]) == (-1, -1, -1)


def test_a_table_by_hand():
    lines = [{"responses": 1000, "error_rate": 0.2, "capacity": "full", "verdict": verdict, "proxy": 0.5, "kl": 1.0,
              "gain": {"value": gain, "ci95": [gain - 0.1, gain + 0.1]}, "figures": {"fresh_accuracy": accuracy}}
             for verdict, gain, accuracy in (("fail", -0.1, 0.5), ("warn", 0.1, 0.7), ("pass", 0.2, 0.9))]
    shown = report(lines)
    assert "| 1,000 | 0.2 | full | 0.700 | warn | +0.50 | +0.100 [+0.000, +0.200] |" in shown
    assert "| fresh_accuracy | +1.00 [+1.00, +1.00] |" in shown and "| verdict | +1.00 [+1.00, +1.00] |" in shown
    assert "the same for all" in report([{**line, "verdict": "warn"} for line in lines])
