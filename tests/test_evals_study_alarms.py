"""The study of the alarms: what it starts, and its figures by hand. No stage runs here."""
import itertools
import json
import subprocess
from pathlib import Path

import pytest

from reward.alarms import STATISTICS, Limits
from stages.evals import studies, study_alarms
from stages.evals.study_alarms import SOUND, WEAK, arguments, calibrated, first, halves, judged, report, told
from stages.ppo import PpoConfig
from stages.preferences import PreferencesConfig
from stages.reward_model import RewardModelConfig
from stages.run.config import load_config

COMPARED = {"preferences": (PreferencesConfig, {"max_responses", "error_rate", "run_dir", "seed"}),
            "reward_model": (RewardModelConfig, {"method", "lora_rank", "lora_alpha", "optimizer", "run_dir", "parents", "seed"}),
            "ppo": (PpoConfig, {"run_dir", "parents", "kl_coef", "reward", "on_alarm", "alarm_limits", "score_clip", "length_penalty",
                                "par_samples", "seed"})}


def logged(golds: list[float]) -> list[dict]:
    return [{"step": 4 * (i + 1), "objective/score": i / 10, "objective/gold": gold, "objective/gold_se": 0.02, "objective/kl": float(i)}
            for i, gold in enumerate(golds)]


def test_runs_differ_in_what_is_compared_alone(monkeypatch, tmp_path, capsys):
    calls = []

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        calls.append((command[2].split(".")[1], flags))
        run = Path(flags["--run_dir"])
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged([0.5] * 6 + [0.1] * 6)))
        (run / "manifest.json").write_text(json.dumps({
            "metrics": {name: {"value": 0.5, "n": 9, "ci95": [0.4, 0.9]} for name in ("gain/gold", "gain/score", "after/kl")},
            "notes": {"kept_step": 20, "last_step": 48}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    study_alarms.study(arguments(["--runs", str(tmp_path), "--remedy-seeds", "0", "1"]))
    assert [stage for stage, _ in calls[:4]] == ["pretrain", "sft", "preferences", "reward_model"]
    for kind, (config_class, compared) in COMPARED.items():
        configs = [vars(load_config(config_class, ["--config", f"recipes/tiny/{kind}.yaml", *itertools.chain(*flags.items())]))
                   for stage, flags in calls if stage == kind]
        assert {key for config in configs for key in config if config[key] != configs[0][key]} == compared, kind
    runs = [flags for stage, flags in calls if stage == "ppo"]
    assert len(runs) == len(WEAK) + len(SOUND) + 2 * len(study_alarms.REMEDIES) and min(len(WEAK), len(SOUND)) >= 12
    assert len({flags["--run_dir"] for flags in runs}) == len(runs)
    # the second reward model never gives the reward, and the remedies are for the worst of the weak models
    assert all(Path(flags["--second_reward"]).parent.name != Path(flags["--parents.reward_model"]).name for flags in runs)
    assert {Path(flags["--parents.reward_model"]).name for flags in runs[len(WEAK) + len(SOUND):]} == {"reward-4000-0-full"}
    priced = [flags["--kl_coef"] for flags in runs[len(WEAK) + len(SOUND)::2]]
    assert priced == ["0.0", "0.01", "0.05", "0.2", *["0.0"] * (len(study_alarms.REMEDIES) - 4)]
    lines = [json.loads(line) for line in (tmp_path / "study_alarms.jsonl").read_text().splitlines()]
    assert len(lines) == len(runs) and all(line["overoptimised"] for line in lines if "made_to_be" in line)
    out = capsys.readouterr().out
    assert "budget: a base, 17 reward models, 28 runs of PPO and 22 with remedies" in out and "| early stop, without one |" in out


def test_what_is_told_of_a_run():
    """Gold climbs to its best in iterations 4 to 8 and falls: the peak is their middle."""
    found = told(logged([0.1, 0.2, 0.3, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6, 0.3, 0.1, 0.1, 0.1, 0.1]))
    assert found["peak"] == 6 and found["overoptimised"] and found["lost"] == pytest.approx((0.6 - 0.14) / (0.02 * (2 / 5) ** 0.5))
    assert found["statistics"]["kl"][:5] == [None] * 4 + [2.0] and set(found["statistics"]) == set(STATISTICS)
    assert not told(logged([0.1 * i for i in range(12)]))["overoptimised"]


def line(overoptimised: bool, kl: list[float | None], peak: int = 5) -> dict:
    return {"overoptimised": overoptimised, "peak": peak, "statistics": {**{name: [None] * len(kl) for name in STATISTICS}, "kl": kl},
            "made_to_be": "weak" if overoptimised else "sound", "responses": 250, "error_rate": 0.4, "capacity": "full", "kl_coef": 0.0,
            "gold": {"value": -0.1, "ci95": [-0.2, 0.0]}, "proxy": 1.0, "kl": 9.0}


def test_calibration_and_test_by_hand():
    runs = [line(True, [None, 3, 9]), line(False, [1, 2, 1]), line(True, [None, 2, 4], peak=1), line(False, [None, 5, 5]),
            line(True, [1, 1, 1]), line(False, [4, 1, 1]), line(True, [9, 1, 1])]
    learned, tested = halves(runs)
    assert learned == [runs[0], runs[4], runs[1], runs[5]] and tested == [runs[2], runs[6], runs[3]]
    assert calibrated(learned) == {"kl": 4}  # of the sound ones, the highest of 1 2 1 and 4 1 1
    assert [first(runs[i], {"kl": limit}, ["kl"]) for i, limit in ((0, 4), (4, 4), (0, None))] == [2, None, None]
    assert judged(tested, {"kl": 3.5}, ["kl"]) == ["2/2 [0.34, 1.00]", "1/1 [0.21, 1.00]", "+2 (-1 to +5)", "-"]
    assert judged(tested, {"kl": 99.0}, ["kl", "gold_falls"]) == ["0/2 [0.00, 0.66]", "0/1 [0.00, 0.79]", "-", "-"]
    runs[2]["statistics"]["gold_falls"] = [None, 0.0, 4.5]  # a judge sees it where kl is 4, and is never there for the other
    assert judged(tested, {"kl": 1.5}, ["kl"])[2:] == ["+2.5 (+0 to +5)", "+1 (+1 to +1)"]


def test_a_table_by_hand():
    runs = [line(True, [None, 3, 9]), line(False, [1, 2, 1]), line(True, [None, 2, 4], peak=1), line(False, [None, 1, 1])]
    remedies = [{"remedy": "KL .05", "seed": seed, "gold": {"value": 0.1 * seed}, "proxy": 1.0, "kl": 2.0, "kept_step": 20, "last_step": 40}
                for seed in (1, 2)]
    shown = report(runs + remedies)
    assert "| 250 | 0.4 | full | 0 | 9.0 | +1.00 | -0.100 [-0.200, +0.000] | 5 | yes (made to be weak) |" in shown
    limit = f"{Limits().kl:g}"
    never = "0/2 [0.00, 0.66] | 0/2 [0.00, 0.66] | - | -"
    assert f"| kl | 2 | 1/1 [0.21, 1.00] | 0/1 [0.00, 0.79] | -1 (-1 to -1) | - | {limit} | {never} |" in shown
    assert "| any without a judge |  | 1/1" in shown and "| gold_falls |" not in shown  # what no run has measured has no row
    assert "| KL .05 | 0.150 [" in shown and "| 1.00 | 2.0 | 20/40, 20/40 |" in shown
