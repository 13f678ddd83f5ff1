"""The study of PPO's curves: what it starts, its ranges by hand, and the page made from it. No stage runs here."""
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest

from reward.alarms import STATISTICS
from reward.verifiers import GoldScore
from stages.evals import studies, study_curves
from stages.evals.study_curves import BROKEN, METRICS, arguments, bands, curve, left, noise, number, report, split
from stages.models.training import fit
from stages.ppo import PpoConfig
from stages.rl.alarms import Watch
from stages.run.checkpoint import read_metrics
from stages.run.config import load_config
from tests.rl_tiny import corpus, trainer
from tests.rl_vllm import install

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "reading-ppo-curves.md").read_text(encoding="utf-8")


def logged(value: float, alarm: bool = False) -> list[dict]:
    return [dict.fromkeys(METRICS, value + at / 100) | ({"alarm/kl": 101.0} if alarm and at == 6 else {}) for at in range(8)]


def test_each_run_breaks_one_thing_of_the_sound_one(monkeypatch, tmp_path, capsys):
    calls = []

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        calls.append((command[2].split(".")[1], flags))
        run = Path(flags["--run_dir"])
        run.mkdir(parents=True, exist_ok=True)
        rows = logged(0.1 * int(flags["--seed"]) ** 2, alarm=flags.get("--kl_coef") == "2.0")
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        measured = {f"{when}/{key}": {"value": 0.5, "n": 9} for when in ("before", "after") for key in ("gold", "greedy_accuracy")}
        (run / "manifest.json").write_text(json.dumps({"metrics": measured}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    study_curves.study(arguments(["--runs", str(tmp_path)]))
    assert [stage for stage, _ in calls[:6]] == ["pretrain", "sft", *["preferences", "reward_model"] * 2]
    configs = [vars(load_config(PpoConfig, ["--config", "recipes/tiny/ppo.yaml", *itertools.chain(*flags.items())]))
               for stage, flags in calls if stage == "ppo"]
    sound, broken = configs[:4], configs[4:]
    assert [config["seed"] for config in sound] == [0, 1, 2, 3] and len(broken) == len(BROKEN) >= 9
    for name, config in zip(BROKEN, broken, strict=True):
        other = {key for key in config if config[key] != sound[0][key]} - {"run_dir"}
        assert other == set(BROKEN[name]) | ({"parents"} if name.startswith("weak") else set()), name
    assert {Path(config["parents"]["reward_model"]).name for config in sound} == {"reward-sound"}
    assert len({config["run_dir"] for config in configs}) == len(configs)
    lines = [json.loads(line) for line in (tmp_path / "study_curves.jsonl").read_text().splitlines()]
    assert len(lines) == len(configs) and [line["alarms"] for line in lines if line["run"] == "KL 40 times as dear"] == [{"kl": 7}]
    assert f"budget: a base, 2 reward models, 4 sound and {len(BROKEN)} broken runs" in capsys.readouterr().out
    drawn = len(list((tmp_path / "figures").glob("sound--another-seed-*.svg")))
    assert drawn == len(METRICS) - len(study_curves.LOGARITHMIC)  # .9 is outside what 0, .1 and .4 span, but not by their logarithms
    with pytest.raises(ValueError, match=r"--seeds has 2 of the three"):
        study_curves.study(arguments(["--runs", str(tmp_path), "--seeds", "0", "1"]))


def line(values: list[float], run: str = "sound", **settings) -> dict:
    return {"run": run, "seed": 0, "settings": settings, "alarms": {}, "rows": dict.fromkeys(METRICS, values),
            "before": {"gold": {"value": 0.7}, "greedy_accuracy": {"value": 0.4}},
            "after": {"gold": {"value": 1.0, "ci95": [0.9, 1.1]}, "greedy_accuracy": {"value": 0.5}}}


def test_the_range_by_hand():
    """At the first iteration the sound runs span 1 to 4 within two iterations, and 1.5 more on either side; at the last 3 to 6."""
    sound = [line([1, 2, 3, 4, 5]), line([2, 3, 4, 5, 6])]
    assert bands(sound, "objective/kl") == [(-0.5, 5.5), (-1, 7), (-1.5, 8.5), (0, 8), (1.5, 7.5)]
    assert left(line([5.6, 7, 8.6, 8.1, 8]), sound, "objective/kl") == 3  # once outside is chance, twice running is not
    assert left(line([-0.6, -1.1, 3, 3, 3]), sound, "objective/kl") == 1
    assert left(line([5.6, 7, 8.6, 8, 8]), sound, "objective/kl") is None
    far = [line([1e-4] * 5), line([1e-3] * 5)]  # compared by their logs: from 10 ** -4.5 to 10 ** -2.5
    assert left(line([4e-5] * 5), far, "policy/approx_kl") is None and left(line([3e-5] * 5), far, "policy/approx_kl") == 1
    other = line([99] * 5, "noise", reward={"verifier": 0.0})
    assert left(other, sound, "objective/score") is None and left(other, sound, "objective/gold") == 1


def test_the_last_sound_run_is_held_against_the_others():
    lines = [line([1.0, 2.0]), line([1.0, 2.0]), line([9.0, 9.0]), line([1.0, 1.5], "broken")]
    sound, others = split(lines)
    assert sound == lines[:2] and others == lines[2:]
    shown, came_to = report(lines), "| 0.700 -> 1.000 [0.900, 1.100] | 0.400 -> 0.500 [0.500, 0.500] |"
    assert shown["runs"].splitlines()[2:4] == [
        f"| sound | - | - | - {came_to}",
        "| sound, another seed | " + ", ".join(f"`{m}`" for m in METRICS if m not in study_curves.JUDGED)
        + f" at 1 | 1 | - {came_to}"]
    assert shown["objective/kl"].splitlines()[2:] == ["| sound, 2 seeds | 1 | ▅ | - |", "| sound, another seed | 9 | █ | 1 |", "",
                                                      "Within the range: broken."]


def test_curves_and_numbers_by_hand():
    assert curve([0, 0, 4, 4, 8, 8, 2], []) == "▁▅█▃" and curve([1, 1, 1], [1]) == "▁▁" and curve([1, 1, 2, 2], [0, 2]) == "▅█"
    assert [number(x) for x in (0.12345, 1234.0, -2.5e6)] == ["0.123", "1.23k", "-2e+06"]


def test_noise_knows_the_response_alone():
    problems = [{"id": str(i)} for i in range(400)]
    scores = noise(problems, ["a"] * 400, [True] * 400)
    assert noise(problems[:3], ["a"] * 3, [False] * 3) == scores[:3] and noise(problems[:1], ["b"], [True]) != scores[:1]
    assert len(set(scores)) == 400
    assert 0 <= min(scores) < 0.1 and 0.9 < max(scores) < 1


def test_the_pages_tables_are_made_from_the_lines_beside_it():
    lines = [json.loads(text) for text in (DOCS / "reading-ppo-curves.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["run"] for line in lines} == {"sound", *BROKEN}
    assert {line["run"]: line["settings"] for line in lines} == {"sound": {}, **BROKEN}
    for name, table in report(lines).items():
        assert f"\n{table}\n" in PAGE, name


def test_every_figure_that_the_trainer_logs_has_a_section(tmp_path, monkeypatch):
    """And no section is about a figure that is not logged. Alarms share one, which names each."""
    watch = Watch(watchers={name: lambda responses: [0.5] * len(responses) for name in ("second", "disagreement", "feature_distance")})
    install(monkeypatch)
    fit(trainer(tmp_path, iterations=1, rollout_engine="vllm", ptx_coef=1.0, watch=watch,
                judge=lambda responses: [GoldScore(1.0, True, 1.0, ())] * len(responses), **corpus()))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    sections = [name for heading in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE) for name in re.findall(r"`([\w/]+)`", heading)]
    assert len(sections) == len(set(sections)) and set(sections) == set(row) - {"step"} | {"alarm/"}
    (alarms,) = re.findall(r"^## [^\n]*`alarm/`.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert all(f"`{name}`" in alarms for name in STATISTICS)
