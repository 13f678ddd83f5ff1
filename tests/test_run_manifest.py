import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.run import manifest
from stages.run.checkpoint import MetricsLog, is_complete, mark_complete, newest_complete, read_metrics, remove_untrusted
from stages.run.config import StageConfig, build_config, option, read_yaml
from stages.run.manifest import MANIFEST, Manifest, Run, check_parents, metric


@dataclass(frozen=True, kw_only=True)
class First(StageConfig):
    STAGE = "first"
    size: int = option(1)


@dataclass(frozen=True, kw_only=True)
class Second(StageConfig):
    STAGE = "second"
    PARENTS = ("first",)


@dataclass(frozen=True, kw_only=True)
class Third(StageConfig):
    STAGE = "third"
    PARENTS = ("first", "second")


def run_first(tmp_path, **values):
    run = Run(build_config(First, {"run_dir": str(tmp_path / "first"), **values}))
    if not run.finished:
        (run.directory / "product.txt").write_text(f"size {values.get('size', 1)}")
        run.finish(metrics={"loss": metric(1.0, n=3, ci95=(0.9, 1.1))}, products={"text": "product.txt"})
    return run


def test_a_finished_run_is_not_repeated_and_says_so(tmp_path, capsys):
    run_first(tmp_path)
    again = Run(build_config(First, {"run_dir": str(tmp_path / "first"), "report_to": "wandb"}))
    assert again.finished and "nothing it depends on has changed" in capsys.readouterr().out
    assert again.manifest.product("text").read_text() == "size 1"
    assert again.manifest.metrics["loss"] == {"value": 1.0, "n": 3, "ci95": [0.9, 1.1]}


def test_a_changed_run_replaces_the_old_one_only_when_it_is_complete(tmp_path, capsys):
    run_first(tmp_path)
    run = Run(build_config(First, {"run_dir": str(tmp_path / "first"), "size": 2}))
    assert "size: 1 -> 2" in capsys.readouterr().out
    assert Manifest(tmp_path / "first").product("text").read_text() == "size 1"  # untouched while the new one is in the making
    (run.directory / "product.txt").write_text("size 2")
    run.finish(metrics={}, products={"text": "product.txt"})
    assert Manifest(tmp_path / "first").product("text").read_text() == "size 2"
    assert [p.name for p in tmp_path.iterdir()] == ["first"]


def test_a_changed_parent_makes_the_child_out_of_date(tmp_path):
    values = {"run_dir": str(tmp_path / "second"), "parents": {"first": str(tmp_path / "first")}}
    run_first(tmp_path)
    Run(build_config(Second, values)).finish(metrics={})
    assert Run(build_config(Second, values)).finished
    run_first(tmp_path, size=2)
    assert not Run(build_config(Second, values)).finished


def test_parents_of_different_pipelines_are_refused_and_the_repair_in_order_is_not(tmp_path):
    folders = {name: str(tmp_path / name) for name in ("first", "second", "third")}
    second = build_config(Second, {"run_dir": folders["second"], "parents": {"first": folders["first"]}})
    third = build_config(Third, {"run_dir": folders["third"], "parents": {name: folders[name] for name in Third.PARENTS}})
    run_first(tmp_path)
    Run(second).finish(metrics={})
    Run(third).finish(metrics={})
    run_first(tmp_path, size=2)
    with pytest.raises(ValueError, match=r"second was made from another first than .*first now holds: run `make second RECIPE=") as error:
        Run(third)
    assert folders["second"] in str(error.value) and folders["first"] in str(error.value) and not (tmp_path / "third.partial").exists()
    Run(second).finish(metrics={})
    Run(third).finish(metrics={})
    assert Run(third).finished
    further = build_config(Second, {"run_dir": str(tmp_path / "further"), "parents": {"first": folders["second"]}})
    Run(further).finish(metrics={})  # a run in the place of what it was made from: the same stage once more on its product
    assert Run(further).finished


def test_the_recipes_that_read_runs_of_another_recipe_agree_about_them(tmp_path, monkeypatch):
    """recipes/hh stands on gsm8k's prepare and SFT, gsm8k's evaluation on its own."""
    made = {"gsm8k/prepare": [], "gsm8k/pretrain": ["gsm8k/prepare"], "gsm8k/sft": ["gsm8k/prepare", "gsm8k/pretrain"],
            "hh/preferences": ["gsm8k/prepare", "gsm8k/sft"]}
    recipes = Path("recipes").resolve()
    monkeypatch.chdir(tmp_path)
    for name, parents in made.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / MANIFEST).write_text(json.dumps({
            "fingerprint": f"sha256:{name}", "parents": {p.split("/")[1]: f"sha256:{p}" for p in parents}}))
    for recipe, stage in (("hh", "preferences"), ("hh", "reward_model"), ("gsm8k", "evaluation")):
        given = read_yaml(recipes / recipe / f"{stage}.yaml").get("parents", {})
        here = {name: given.get(name, f"runs/{recipe}/{name}") for name in ("prepare", "pretrain", "sft", "preferences")}
        found = {name: Manifest(path) for name, path in here.items() if (Path(path) / MANIFEST).is_file()}
        assert {"prepare", "sft"} <= set(found)
        check_parents(found)


def test_a_report_may_stand_on_runs_of_different_pipelines(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Report(Third):
        STAGE = "report"

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(json.dumps({"fingerprint": name, "parents": {"first": "another"}}))
    parents = {name: str(tmp_path / name) for name in Report.PARENTS}
    assert not Run(build_config(Report, {"run_dir": str(tmp_path / "report"), "parents": parents})).finished


def test_an_input_that_cannot_be_known_now_counts_as_that_of_the_finished_run(tmp_path):
    config = build_config(First, {"run_dir": str(tmp_path / "first")})
    Run(config, inputs={"org/corpus": "revision 1"}).finish(metrics={})
    assert Run(config, inputs={"org/corpus": None}).finished
    assert not Run(config, inputs={"org/corpus": "revision 2"}).finished
    fresh = Run(build_config(First, {"run_dir": str(tmp_path / "fresh")}), inputs={"org/corpus": None})
    assert not fresh.finished and fresh.inputs == {}


def test_unfinished_work_is_found_again_and_that_of_another_config_is_not(tmp_path):
    values = {"run_dir": str(tmp_path / "first")}
    run = Run(build_config(First, values))
    (run.directory / "half").write_text("done")
    assert (Run(build_config(First, values)).directory / "half").exists()
    assert not (Run(build_config(First, {**values, "size": 5})).directory / "half").exists()


@pytest.mark.parametrize("moment", ["old moved away", "new moved in"])
def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, moment):
    run_first(tmp_path)
    run = Run(build_config(First, {"run_dir": str(tmp_path / "first"), "size": 2}))
    (run.directory / "product.txt").write_text("size 2")
    run.finish(metrics={}, products={"text": "product.txt"})
    final, old, partial = tmp_path / "first", tmp_path / "first.old", tmp_path / "first.partial"
    if moment == "old moved away":
        final.rename(partial)
    (tmp_path / "first.old").mkdir()
    (old / MANIFEST).write_text("{}")
    assert Run(build_config(First, {"run_dir": str(final), "size": 2})).finished
    assert not old.exists() and not partial.exists()


def test_a_missing_parent_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="run `make first RECIPE=tiny` first"):
        Run(build_config(Second, {"run_dir": str(tmp_path / "s"), "parents": {"first": "runs/tiny/first"}}))


def make_checkpoint(folder, step, world_size=1, engine="NO"):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    (path / "optimizer.pt").write_bytes(b"y" * 10)
    mark_complete(path, world_size=world_size, engine=engine)
    return path


def test_only_complete_checkpoints_count(tmp_path):
    make_checkpoint(tmp_path, 5)
    newer = make_checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path, world_size=1) == newer
    (newer / "model.safetensors").write_bytes(b"x" * 50)  # cut off by a kill or a full disk
    assert not is_complete(newer) and newest_complete(tmp_path, world_size=1).name == "checkpoint-5"
    remove_untrusted(tmp_path)
    assert not newer.exists()
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    assert newest_complete(tmp_path, world_size=1) is None


def test_a_checkpoint_whose_bytes_have_changed_is_removed_aloud(tmp_path, capsys):
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    (newer / "model.safetensors").write_bytes(b"x" * 99 + b"y")  # of the same size
    remove_untrusted(tmp_path)
    assert older.exists() and not newer.exists() and "checkpoint-10 is damaged (model.safetensors): removed" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_checkpoint_in_parts_of_another_launch_is_refused(tmp_path, engine):
    folder = make_checkpoint(tmp_path, 5, world_size=2, engine=engine)
    assert newest_complete(tmp_path, world_size=2, engine=engine) == folder
    for world_size, other in ((1, "NO"), (2, "MULTI_GPU"), (4, engine)):
        with pytest.raises(ValueError, match=f"written by 2 processes under {engine}, this launch has {world_size} under {other}"):
            newest_complete(tmp_path, world_size=world_size, engine=other)


def test_a_checkpoint_of_whole_weights_goes_on_anywhere_and_says_so(tmp_path, capsys):
    folder = make_checkpoint(tmp_path, 5, world_size=2, engine="MULTI_GPU")
    assert newest_complete(tmp_path, world_size=1) == folder
    assert "written by 2 processes and goes on with 1" in capsys.readouterr().out


WORKS = """
import time
from stages.run.config import StageConfig, build_config
from stages.run.manifest import Run
Run(build_config(StageConfig, {"run_dir": %r}))
print("working", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_while_the_first_works_and_not_after_its_kill(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", WORKS % str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    config = build_config(StageConfig, {"run_dir": str(tmp_path / "run")})
    try:
        assert first.stdout is not None
        while first.stdout.readline().strip() != "working":
            assert first.poll() is None
        with pytest.raises(ValueError, match=rf"another run works on .*run \(process {first.pid} on .* since .*\): wait for it or end it"):
            Run(config)
    finally:
        first.kill()
        first.wait()
    run = Run(config)
    assert run.attempts == 2
    run.finish(metrics={})
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_written_is_said_and_a_finished_run_in_it_is_read(tmp_path, monkeypatch):
    run_first(tmp_path)

    def unwritable(folder):
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(manifest, "lock", unwritable)
    assert run_first(tmp_path).finished
    with pytest.raises(ValueError, match=r"cannot be written \(.*Read-only file system.*\): make it writable, or set run_dir"):
        Run(build_config(First, {"run_dir": str(tmp_path / "first"), "size": 2}))


@pytest.mark.parametrize("harm", ["a bit", "cut", "a figure"])
def test_a_damaged_manifest_is_refused(tmp_path, harm):
    run_first(tmp_path)
    file = tmp_path / "first" / MANIFEST
    text = file.read_text()
    file.write_text({"a bit": text.replace('"stage"', '"sta\x07e"'), "cut": text[:90],
                     "a figure": text.replace('"value": 1.0', '"value": 1.5')}[harm])
    with pytest.raises(ValueError, match=r"manifest.json is damaged.*: delete .*first and run `make first RECIPE="):
        Manifest(tmp_path / "first")


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_damaged_product_is_refused(tmp_path, harm):
    run_first(tmp_path)
    file = tmp_path / "first" / "product.txt"
    if harm == "gone":
        file.unlink()
    else:
        file.write_text("size 2")
    with pytest.raises(ValueError, match=rf"product.txt is .*{harm}.*: its manifest records other content. Restore it, or delete"):
        Manifest(tmp_path / "first").product("text")


def test_all_that_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"no finished run in \S+/r/first, \S+/r/second: run `make first second RECIPE=r` first"):
        Run(build_config(Third, {"run_dir": str(tmp_path / "r/third"), "parents": {name: str(tmp_path / "r" / name)
                                                                                   for name in ("first", "second")}}))


def test_a_finished_run_of_another_precision_says_so(tmp_path, monkeypatch, capsys):
    run = Run(build_config(First, {"run_dir": str(tmp_path / "first")}))
    (run.directory / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    run.finish(metrics={})
    run_first(tmp_path)
    assert "mixed_precision" not in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_first(tmp_path).finished
    assert "it was trained with mixed_precision 'no', and this launch config has 'bf16': give --run-dir" in capsys.readouterr().out


def test_a_training_does_not_go_on_in_another_precision(tmp_path, monkeypatch):
    config = build_config(First, {"run_dir": str(tmp_path / "first")})
    trained = Run(config).directory / "checkpoints" / "checkpoint-2"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert Run(config).attempts == 2  # nothing is trained yet
    trained.mkdir(parents=True)
    assert Run(config).attempts == 3
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="was trained with mixed_precision 'bf16', and this launch config has 'no': launch it as"):
        Run(config)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_first(tmp_path).manifest.data["provenance"]["precision"] == "bf16"


def test_a_damaged_state_of_an_unfinished_run_is_refused(tmp_path):
    values = {"run_dir": str(tmp_path / "first")}
    state = Run(build_config(First, values)).directory / "run.json"
    state.write_text(state.read_text()[:40])
    with pytest.raises(ValueError, match=r"run.json is damaged .*: delete .*first.partial to start this run over"):
        Run(build_config(First, values))


def test_metrics_continue_without_repeating_a_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step, "train/loss": 1 / step})
    with log.path.open("a") as f:
        f.write('{"step": 4, "tra')  # a kill in the middle of a line
    log.rewind(2)
    log.append({"step": 3, "train/loss": 0.5})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3]
    assert read_metrics(log.path)[-1]["train/loss"] == 0.5


def test_manifest_is_valid_json_with_the_fields_of_the_contract(tmp_path):
    run_first(tmp_path)
    data = json.loads((tmp_path / "first" / MANIFEST).read_text())
    assert {"stage", "recipe", "status", "fingerprint", "config", "parents", "inputs", "products", "seed", "counts", "metrics",
            "provenance"} <= set(data)
    assert {"commit", "dirty", "versions", "hardware", "wall_s", "peak_rss_bytes", "started"} <= set(data["provenance"])
