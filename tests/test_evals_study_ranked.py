"""The study of rankings against pairs: what it starts, and its table by hand. No stage runs here."""
import itertools
import json
import subprocess
from pathlib import Path

import pytest

from stages.evals import studies, study_ranked
from stages.evals.study_ranked import arguments, report
from stages.preferences import PreferencesConfig
from stages.reward_model import RewardModelConfig
from stages.run.config import load_config


def test_models_differ_in_prompts_and_k_alone(monkeypatch, tmp_path):
    calls = []

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        calls.append((command[2].split(".")[1], flags))
        run = Path(flags["--run_dir"])
        run.mkdir(parents=True)
        (run / "manifest.json").write_text(json.dumps({
            "metrics": {key: {"value": 0.5} for key in ("fresh_accuracy", "heldout_accuracy")}, "provenance": {"wall_s": 1},
            "counts": {"asked": 60, "responses": 200, "pairs": 400}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    study_ranked.study(arguments(["--runs", str(tmp_path), "--seeds", "0", "--prompts", "50", "100"]))
    assert [stage for stage, _ in calls] == ["pretrain", "sft", *["preferences", "reward_model"] * 4]
    for kind, config_class, compared in (("preferences", PreferencesConfig, {"max_prompts", "responses_per_prompt", "run_dir"}),
                                         ("reward_model", RewardModelConfig, {"run_dir", "parents"})):
        configs = [vars(load_config(config_class, ["--config", f"recipes/tiny/{kind}.yaml", *itertools.chain(*flags.items())]))
                   for stage, flags in calls if stage == kind]
        assert {key for config in configs for key in config if config[key] != configs[0][key]} == compared
    assert len((tmp_path / "study_ranked.jsonl").read_text().splitlines()) == 4 and (tmp_path / "ranked.svg").is_file()


def test_a_table_by_hand():
    lines = [{"seed": seed, "k": k, "prompts": 100, "pairs": pairs, "fresh_accuracy": value} for seed, k, pairs, value in (
        (1, 8, 1700, 0.8), (0, 2, 100, 0.6), (0, 8, 1500, 0.9), (1, 2, 100, 0.6))]
    table = report(lines).splitlines()
    assert table[0] == "| labelled prompts | K = 2 | K = 8 | K = 8 less K = 2, seed by seed |"
    # t(1) = 12.706 times a standard error of .05
    assert table[2] == "| 100 | 0.600, 100 pairs | 0.850 [0.215, 1.485], 1,600 pairs | 0.250 [-0.385, 0.885] |"
    assert report(lines[:3]).splitlines()[2].endswith("| - |")  # a seed is missing: nothing is compared


def test_prompts_saved_by_hand():
    """Seed 0: at K = 8 .7 is reached halfway between 100 and 400 in their logarithm, at 200; seed 1 reaches .6 with the fewest already."""
    lines = [{"seed": seed, "k": k, "prompts": n, "pairs": n, "fresh_accuracy": value} for seed, k, n, value in (
        (0, 2, 100, 0.5), (0, 2, 400, 0.7), (0, 8, 100, 0.6), (0, 8, 400, 0.8),
        (1, 2, 100, 0.5), (1, 2, 400, 0.6), (1, 8, 100, 0.65), (1, 8, 400, 0.7))]
    assert study_ranked.prompts_for(study_ranked.by_size(lines)[8], 0, 0.7) == pytest.approx(200)
    assert study_ranked.prompts_for(study_ranked.by_size(lines)[8], 1, 0.6) == 100
    assert study_ranked.prompts_for(study_ranked.by_size(lines)[8], 1, 0.9) is None
    told = study_ranked.saved(lines)
    assert "seed 0: 200 (0.700); seed 1: at most 100 (0.600)" in told and "400 prompts with K = 2" in told
    assert "K = 8 less K = 2 over all numbers of prompts, a mean a seed: 0.113 [" in told


def test_the_arguments_name_what_is_compared():
    with pytest.raises(SystemExit):
        arguments(["--prompts", "few"])
    assert arguments([]).responses == [2, 8]
