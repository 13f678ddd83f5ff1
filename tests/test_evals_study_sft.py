"""The study of fine-tuning: arms differ in what they compare alone, runs are made once, tables by hand. No stage runs here."""
import itertools
import json
import subprocess
from pathlib import Path

import pytest

from stages.evals import studies, study_sft
from stages.evals.study_sft import ARMS, BASELINE, GROUPS, SHOWN, arguments, report
from stages.run.config import load_config
from stages.sft import SftConfig
from tests.rl_tiny import policy

REMEDIES = {"replay": {"replay_share"}, "KL": {"kl_coef"}, "average": {"average"}, "rank": {"lora_rank", "lora_alpha"},
            "LR": {"learning_rate"}}


def launched(monkeypatch, folder: Path, *given: str) -> dict[str, dict[str, str]]:
    """Flags of each stage that the study starts, by run folder, with manifests of made-up figures in these."""
    calls: dict[str, dict[str, str]] = {}

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        run = Path(flags["--run_dir"])
        calls[run.name] = flags
        run.mkdir(parents=True)
        keys = {key for shown in SHOWN.values() for key in shown}
        (run / "manifest.json").write_text(json.dumps({
            "metrics": {key: {"value": len(calls)} for key in keys}, "provenance": {"wall_s": 1}, "counts": {"flops": 1},
            "products": {"model": {"path": "model", "sha256": ""}}, "notes": {"watch": {"share_of_training": 0.05}}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    monkeypatch.setattr(study_sft, "update", lambda base, tuned: {})
    study_sft.study(arguments(["--runs", str(folder), "--seeds", "0", *given]))
    return calls


def test_each_remedy_differs_from_none_in_itself_alone(monkeypatch, tmp_path):
    calls = launched(monkeypatch, tmp_path, "--arms", "remedies")
    assert len(calls) == 1 + len(GROUPS["remedies"])  # the base, and the arms
    configs = {}
    for flags in list(calls.values())[1:]:
        configs[flags["--run_dir"]] = load_config(SftConfig, ["--config", "recipes/tiny/sft.yaml", *itertools.chain(*flags.items())])
        for compared in set.union(*REMEDIES.values()) - {"lora_rank", "lora_alpha", "kl_coef", "average"}:
            assert f"--{compared}" in flags, compared  # said by the study: what the tiny recipe says may change
    baseline = configs.pop(str(tmp_path / f"{BASELINE}-0"))
    for folder, config in configs.items():
        changed = {key for key in config.__dict__ if getattr(config, key) != getattr(baseline, key)} - {"run_dir"}
        assert changed <= next(keys for name, keys in REMEDIES.items() if Path(folder).name.startswith(name)) and changed, folder


def test_the_size_of_an_update_by_hand(tmp_path):
    model = policy()
    for weight in model.state_dict().values():
        if weight.ndim == 2:
            weight.zero_().fill_diagonal_(2.0)
    model.save_pretrained(tmp_path / "base")
    for name, weight in model.state_dict().items():
        if weight.ndim == 2:
            weight[0, 0] += 0.5 if ".layers." in name else 9.0
            weight[1, 1] += 0.5 if ".layers." in name else 9.0
    model.save_pretrained(tmp_path / "tuned")
    assert study_sft.update(tmp_path / "base", tmp_path / "tuned") == pytest.approx({"update/spectral": 0.25, "update/rank": 2.0})


def test_groups_stand_for_their_arms():
    assert arguments([]).arms == list(ARMS)
    assert arguments(["--arms", BASELINE, "sequence", "in turn, LoRA"]).arms == [BASELINE, *GROUPS["sequence"]]
    with pytest.raises(SystemExit):
        arguments(["--arms", "remedy"])


def test_one_line_a_run_and_the_frontier(monkeypatch, tmp_path, capsys):
    launched(monkeypatch, tmp_path, "--arms", "methods")
    lines = [json.loads(line) for line in (tmp_path / "study_sft.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == list(GROUPS["methods"]) and (tmp_path / "frontier.svg").is_file()
    assert "budget: 1 bases and 10 fine-tuning runs" in capsys.readouterr().out


def test_a_run_that_fails_stops_the_study(monkeypatch, tmp_path):
    monkeypatch.setattr(studies.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 2))
    with pytest.raises(ValueError, match="base-64-1100000-0 stopped, see above; the same command continues there"):
        study_sft.study(arguments(["--runs", str(tmp_path)]))


def test_tables_by_hand():
    def line(arm, seed, value):
        return {"arm": arm, "seed": seed, "figures": dict.fromkeys(SHOWN["remedies"], value)}

    shown = report([line(BASELINE, 0, 0.4), line(BASELINE, 1, 0.6), line("rank 4", 0, 0.3), line("rank 4", 1, 0.4)])
    none, less = "0.500 [-0.771, 1.771]", "-0.150 [-0.785, 0.485]"  # t(1) = 12.706 times .1, and times .05: paired, not .35 - .5 apart
    assert f"| {BASELINE} | {' | '.join([none] * len(SHOWN['remedies']))} |" in shown
    assert f"| rank 4 | {' | '.join([less] * len(SHOWN['remedies']))} |" in shown
