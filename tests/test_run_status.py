"""Where a recipe stands, by folders that are as runs leave them."""
import dataclasses
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.run import status
from stages.run.checkpoint import mark_complete
from stages.run.config import StageConfig, build_config
from stages.run.manifest import Run, unlock, write_json
from stages.run.status import ORDER, UNKNOWN, as_table, declared, look

ROOT = Path(__file__).resolve().parent.parent
LOCK = ("import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0); "
        "f.write('process 7 on host'); f.flush(); print(1, flush=True); input()")


def config_class(stage: str) -> type[StageConfig]:
    found = vars(importlib.import_module(f"stages.{stage}")).values()
    return next(c for c in found if isinstance(c, type) and issubclass(c, StageConfig) and stage == c.STAGE)


@pytest.mark.parametrize("stage", [*ORDER, "plan", "export", "adopt", "chat"])
def test_settings_read_from_the_source_are_those_of_the_class(stage):
    cls, found = config_class(stage), declared(stage)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    assert found.parents == cls.PARENTS and set(found.settings) == set(fields)
    for name, (default, recorded_only, added) in found.settings.items():
        field = fields[name]
        assert (recorded_only, added) == (bool(field.metadata.get("recorded_only")), bool(field.metadata.get("added"))), name
        own = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert default is UNKNOWN or default == own, name
    assert sum(default is UNKNOWN for default, _, _ in found.settings.values()) <= 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder with recipes of three stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLUMBLINE_RUNS", raising=False)
    for stage, text in (("prepare", "vocab_size: 300\n"), ("pretrain", "tokens: 1e5\nlearning_rate: 1e-3\n"), ("sft", "")):
        (tmp_path / "recipes/r").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"recipes/r/{stage}.yaml").write_text(text)
    return tmp_path


def begin(stage: str, **settings) -> Run:
    """A run as the stage begins it, with the recipe's settings."""
    cls = config_class(stage)
    return Run(build_config(cls, {**status.read_yaml(f"recipes/r/{stage}.yaml"), **settings}, recipe="r"))


def finish(stage: str, **settings) -> None:
    run = begin(stage, **settings)
    (run.directory / "product").write_text("x" * 2**20)
    run.finish(metrics={}, counts={}, products={"product": "product"})


def states(recipe="r") -> dict[str, str]:
    return {row.stage: row.state for row in look(recipe)}


def why(stage: str) -> str:
    return next(row.why for row in look("r") if row.stage == stage)


def test_from_nothing_to_finished(home):
    assert states() == dict.fromkeys(("prepare", "pretrain", "sft"), "missing")
    assert why("prepare") == "`make prepare RECIPE=r` makes it" and why("sft") == "waits for prepare, pretrain"
    finish("prepare")
    finish("pretrain")
    assert states() == {"prepare": "finished", "pretrain": "finished", "sft": "missing"} and "makes it" in why("sft")
    finish("sft")
    text = as_table(look("r")).splitlines()
    assert [line.split()[:2] for line in text[2:5]] == [[s, "finished"] for s in ("prepare", "pretrain", "sft")]
    assert text[5].startswith("sum")
    assert all("1.0 MiB" in line and "GiB" in line for line in text[2:5]) and "3.0 MiB" in text[5]


def test_a_changed_recipe_and_what_was_made_from_it_are_stale(home):
    for stage in ("prepare", "pretrain", "sft"):
        finish(stage)
    (home / "recipes/r/pretrain.yaml").write_text("tokens: 1e5\nlearning_rate: 0.002\n")
    assert states() == {"prepare": "finished", "pretrain": "stale", "sft": "stale"}
    assert why("pretrain") == "learning_rate: 0.001 -> 0.002" and why("sft") == "pretrain is stale"
    finish("pretrain")
    assert states() == {"prepare": "finished", "pretrain": "finished", "sft": "stale"} and why("sft") == "pretrain was made again"
    (home / "recipes/r/pretrain.yaml").write_text("tokens: 1e5\n")  # a key left out: its default counts
    assert why("pretrain").startswith("learning_rate: 0.002 -> ")
    finish("pretrain", report_to="tensorboard", parents={"prepare": "runs/r/prepare"})  # neither changes the numbers
    assert states()["pretrain"] == "finished"
    finish("pretrain", seed=3)
    assert states()["pretrain"] == "stale" and why("pretrain") == "seed: 3 -> 0"  # made by a flag: the recipe alone would make another


def test_a_setting_of_a_later_version_counts_as_the_fingerprint_has_it(home):
    finish("prepare")
    known = dict(declared("prepare").settings)
    for flag, state in ((True, "finished"), (False, "stale")):
        status.declared = lambda stage, flag=flag: declared(stage)._replace(
            settings=known | {"later": status.Setting(1, False, flag)}) if stage == "prepare" else declared(stage)
        try:
            assert states()["prepare"] == state, flag
        finally:
            status.declared = declared


def test_an_unfinished_run_says_how_far_it_came_and_a_held_lock_that_it_runs(home):
    finish("prepare")
    run = begin("pretrain")
    assert states()["pretrain"] == "interrupted" and why("pretrain") == "`make pretrain RECIPE=r` continues"
    (run.directory / "metrics.jsonl").write_text('{"step": 40}\n')
    now = time.time()
    write_json(run.directory / "progress.json", {"step": 40, "steps": 160, "since": [now - 60, 10]})
    os.utime(run.directory / "progress.json", (now - 10, now - 10))
    assert why("pretrain") == "step 40/160; `make pretrain RECIPE=r` continues"
    for step in (5, 30, 40):
        (run.directory / f"checkpoints/checkpoint-{step}").mkdir(parents=True)
    for step in (5, 30):
        mark_complete(run.directory / f"checkpoints/checkpoint-{step}", world_size=1)  # a kill has cut the last
    assert why("pretrain") == "step 40/160; `make pretrain RECIPE=r` continues from checkpoint-30"
    (run.directory / "PREEMPTED").write_text('{"saved": "step 40 is saved"}\n')
    assert states()["pretrain"] == "preempted" and "step 40 is saved" in why("pretrain")
    lock = home / "runs/r/.pretrain.lock"
    held = subprocess.Popen([sys.executable, "-c", LOCK, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "1\n"
        row = next(row for row in look("r", now=now) if row.stage == "pretrain")
        # 30 steps took 50 s, 120 are left, 10 s have gone by since
        assert (row.state, row.why) == ("running", "step 40/160, ETA 3m10s; process 7 on host") and row.seconds is not None
    finally:
        held.kill()
        held.wait()
    assert states()["pretrain"] == "preempted"  # a lock goes with its process


def test_a_rung_of_the_ladder_is_named(home):
    (home / "recipes/r/scaling.yaml").write_text("")
    finish("prepare")
    run = begin("scaling")
    rung = run.directory / "d32-1000.partial"
    rung.mkdir()
    write_json(rung / "progress.json", {"step": 1, "steps": 9, "since": [0, 1]})
    assert why("scaling") == "d32-1000 step 1/9; `make scaling RECIPE=r` continues"


def test_an_unknown_recipe_names_those_there_are(home):
    with pytest.raises(ValueError, match="unknown recipe 'x': choose from r"):
        look("x")


def test_the_command_is_quick_and_imports_no_torch(home):
    finish("prepare")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['status', 'r']; import runpy; " \
           "runpy.run_module('stages.run.status', run_name='__main__'); assert 'torch' not in sys.modules; " \
           "import time; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "prepare   finished" in done.stdout and float(done.stdout.splitlines()[-1]) < 1.0  # processor seconds: others may be busy


def test_an_unfinished_run_of_other_settings_is_not_said_to_go_on_by_the_recipe(home, capsys):
    """What the recipe's own command would do to it is begin anew."""
    finish("prepare")
    begin("pretrain", tokens=600_000)
    unlock(home / "runs/r/pretrain")
    assert why("pretrain") == ("the command that began it continues it; `make pretrain RECIPE=r` alone would begin anew "
                               "(tokens: 600000 -> '1e5')")
    begin("pretrain")
    assert "was begun with other settings or data, and is removed" in capsys.readouterr().out


def test_an_adopted_run_is_not_held_against_the_settings_of_its_stage(home):
    finish("prepare")
    run = begin("pretrain")
    run.identity["config"] = {"model": "elsewhere"}
    (run.directory / "product").write_text("x")
    run.finish(metrics={}, products={"product": "product"}, notes={"adopted": True})
    assert states()["pretrain"] == "finished" and why("pretrain") == "adopted"
