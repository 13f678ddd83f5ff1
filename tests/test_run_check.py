"""What a command line names is checked before its first stage begins."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.run.check import check

ROOT = Path(__file__).resolve().parent.parent
MAKE = ("make", "-o", "setup", f"PY={sys.executable}")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLUMBLINE_RUNS", "runs")
    (tmp_path / "recipes/mine").mkdir(parents=True)
    for stage in ("prepare", "pretrain", "sft", "preferences"):
        (tmp_path / f"recipes/mine/{stage}.yaml").write_text("seed: 1\n")
    return tmp_path


@pytest.mark.parametrize(("before", "named", "flags", "message"), [
    ("", "sft", "--learnin-rate 1", "ARGS of sft: unknown key 'learnin_rate', did you mean 'learning_rate'"),
    ("", "sft", "--learnin_rate=1", "ARGS of sft: unknown key 'learnin_rate', did you mean 'learning_rate'"),
    ("", "sft", "--parents.pretain x", "ARGS of sft: parents: unknown key 'pretain', did you mean 'pretrain'"),
    ("", "sft", "--config recipes/mine/none.yaml", "has no none.yaml"),
    ("", "sft", "learning-rate 1", "expected a flag"),
    ("prepare", "pretrain sft preferences", "--learning-rate 1",
     "preferences has no setting 'learning_rate': give it in a command that names pretrain, sft alone"),
    ("", "sft reward_model", "", "recipe 'mine' has no reward_model.yaml; recipes with one: none"),
    ("", "export", "--stge sft", "ARGS of export: unknown key 'stge', did you mean 'stage'")])
def test_what_no_stage_knows_is_said(home, before, named, flags, message):
    with pytest.raises(ValueError, match=message):
        check("mine", before.split(), named.split(), flags.split())


def test_a_recipes_file_is_read_for_every_stage_that_runs_and_for_no_other(home):
    (home / "recipes/mine/prepare.yaml").write_text("vocab_sise: 300\n")
    check("mine", [], ["sft"], [])
    with pytest.raises(ValueError, match=r"recipes/mine/prepare.yaml: unknown key 'vocab_sise', did you mean 'vocab_size'"):
        check("mine", ["prepare"], ["pretrain"], [])


@pytest.mark.parametrize("flags", [
    "--learning_rate 1e-3 --parents.pretrain runs/x --seed=3 --recipe other", "--help", "-h", "",
    "--sources [{data:x.jsonl}] --config recipes/mine/sft.yaml"])
def test_what_the_stages_take_passes(home, flags):
    check("mine", ["prepare"], ["sft"], flags.split())


@pytest.mark.parametrize("named", ["sft", "chat"])
def test_a_recipe_that_is_not_there(home, named):
    with pytest.raises(ValueError, match="unknown recipe 'mien', did you mean 'mine'"):
        check("mien", [], [named], [])


def test_a_program_may_ask_for_runs_without_a_recipe_or_by_their_folders(home):
    (home / "runs/old/sft").mkdir(parents=True)
    check("old", [], ["export"], [])
    check("new", [], ["adopt"], ["--parents.prepare", "elsewhere", "--stage", "sft"])


INHERITED = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "RECIPE", "ARGS", "LADDER", "ACCELERATE")  # of a `make test` with settings


def made(*goals: str, **settings: str) -> subprocess.CompletedProcess:
    return subprocess.run([*MAKE, *goals, *(f"{key}={value}" for key, value in settings.items())], cwd=ROOT, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key not in INHERITED})


def test_make_checks_once_before_the_first_stage_which_get_args_and_which_run_for_others():
    lines = [line for line in made("-n", "pretrain", "sft", "rlhf", ARGS="--seed 1").stdout.splitlines() if "-m stages." in line]
    assert lines[0].endswith('-m stages.run.check "tiny" "prepare scaling" "pretrain sft preferences reward_model ppo" --seed 1')
    assert not any("run.check" in line for line in lines[1:])
    for goals, settings, asked in ((("pretrain",), {"LADDER": "0"}, '"prepare" "pretrain"'), (("evaluate",), {}, '"" "evaluation"'),
                                   (("scaling",), {"RECIPE": "shakespeare"}, '"prepare" ""'), (("chat",), {}, '"" "chat"')):
        assert asked in made("-n", *goals, **settings).stdout, goals
    for goal in ("prepare", "sft", "preferences", "reward_model", "ppo", "rejection_sampling", "report", "plan", "export", "adopt"):
        first = next(line for line in made("-n", goal).stdout.splitlines() if "-m stages." in line)
        assert "run.check" in first and f'"{goal}"' in first
    for goal in ("status", "test", "annotate"):
        assert "run.check" not in made("-n", goal).stdout


@pytest.mark.parametrize(("goal", "settings", "message"), [
    ("sft", {"ARGS": "--learnin-rate 1e-3"}, "did you mean 'learning_rate'?"), ("scaling", {"RECIPE": "smok"}, "did you mean 'smoke'?"),
    ("export", {"RECIPE": "smok"}, "did you mean 'smoke'?"), ("status", {"RECIPE": "smok"}, "did you mean 'smoke'?")])
def test_make_stops_at_once_with_one_line(goal, settings, message, tmp_path):
    done = made(goal, PLUMBLINE_RUNS=str(tmp_path), **settings)
    said = done.stderr.splitlines()
    assert done.returncode == 2 and said[0].startswith("error: ") and message in said[0] and len(said) == 2  # the other is make's own
    assert not list(tmp_path.iterdir())


def test_a_setting_of_another_stage_is_named_as_such():
    with pytest.raises(ValueError, match="ARGS of sft: unknown key 'rollout_batch', a setting of ppo"):
        check("tiny", [], ["sft"], ["--rollout-batch", "8"])
