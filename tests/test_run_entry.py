"""How a stage ends as a process: one line for what befell all processes, and one from a process that failed alone."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.run import entry
from stages.run.config import StageConfig, build_config, read_yaml
from stages.run.manifest import Run

ROOT = Path(__file__).resolve().parent.parent
STAGE = """
import os, time
from dataclasses import dataclass
from stages.run.config import StageConfig, option
from stages.run.entry import launch

@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    STAGE = "first"
    who: str = option("all")

def main(config):
    os.makedirs(config.run_dir + ".partial", exist_ok=True)  # as a run that has begun
    time.sleep(1 if os.environ["RANK"] == "0" else 0)
    if config.who == "all" or os.environ["RANK"] == config.who:
        raise ValueError("bad rows")
    time.sleep(60)

launch(main, Config)
"""


@pytest.mark.parametrize(("rank", "line", "file"), [("0", "error: bad rows", "run.traceback.txt"),
                                                   ("1", "error (process 1): bad rows", "run.traceback-1.txt")])
def test_another_process_waits_and_names_itself(monkeypatch, capsys, tmp_path, rank, line, file):
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    entry.fail("bad\nrows", build_config(StageConfig, {"run_dir": str(tmp_path / "run")}))
    assert capsys.readouterr().err == f"{line} (traceback in {tmp_path / file})\n"
    assert [path.name for path in tmp_path.iterdir()] == [file] and bool(waited) == (rank != "0")


@pytest.mark.parametrize(("what", "kept"), [("mistyped", False), ("unforeseen", True), ("Singular matrix", True)])
def test_only_what_was_not_foreseen_leaves_a_traceback(monkeypatch, capsys, tmp_path, what, kept):
    def main(config):
        if what == "mistyped":
            read_yaml("recipes/mistyped/sft.yaml")
        if what == "unforeseen":
            int(what)
        np.linalg.inv(np.zeros((2, 2)))

    monkeypatch.setattr(sys, "argv", ["stage", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        entry.launch(main, StageConfig, distributed=False)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and what in said
    assert ("(traceback in " in said) == kept == bool(list(tmp_path.iterdir()))


def test_help_begins_with_what_the_stage_says_of_itself():
    said = subprocess.run([sys.executable, "-m", "stages.scaling", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in ("fit", "predict", "plan", "holdout", "isoflop", "emergence"):
        assert f"python -m stages.scaling {verb} " in said
    assert "--sizes" in said


@pytest.mark.parametrize("own", [None, "COMPATIBLE"])
def test_a_stage_computes_in_one_fixed_way_unless_the_user_has_chosen(monkeypatch, tmp_path, own):
    found = []
    for name in ("MKL_CBWR", "MKL_DYNAMIC"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv("MKL_CBWR", own)
    monkeypatch.setattr(sys, "argv", ["stage", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        entry.launch(lambda config: found.append((os.environ["MKL_CBWR"], os.environ["MKL_DYNAMIC"])), StageConfig, distributed=False)
    assert found == [(own or "AUTO", "FALSE")]


@pytest.mark.parametrize("launched", [False, True])
def test_ctrl_c_is_one_line_and_says_whose_traceback_follows(monkeypatch, capsys, tmp_path, launched):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" * launched)
    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["stage", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as left:
        entry.launch(main, StageConfig, distributed=False)
    said = "interrupted: the same command continues from the last checkpoint"
    assert left.value.code == 130
    assert capsys.readouterr().out == said + " (a traceback beside this line is accelerate's own)" * launched + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(("who", "line"), [("all", "error: bad rows"), ("1", "error (process 1): bad rows")])
def test_two_processes_say_one_line(tmp_path, who, line):
    (tmp_path / "stage.py").write_text(STAGE)
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", "recipes/accelerate/cpu-2.yaml",
               str(tmp_path / "stage.py"), "--run-dir", str(tmp_path / "run"), "--who", f"'{who}'"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    said = [text for text in done.stderr.splitlines() if text.startswith("error")]
    assert done.returncode != 0 and len(said) == 1 and said[0].startswith(line), done.stderr[-2000:]
    assert "preempted" not in done.stderr and not list(tmp_path.rglob("PREEMPTED"))  # the launcher's SIGTERM to the rest is none of that


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_was_refused_before_it_did_anything_leaves_nothing(begun, monkeypatch, tmp_path):
    def main(config):
        run = Run(config)
        if begun:
            (run.directory / "half").touch()
        raise ValueError("no such batch")

    monkeypatch.setattr(entry, "die_with_parent", lambda: None)
    monkeypatch.setattr(sys, "argv", ["stage", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        entry.launch(main, StageConfig, distributed=False)
    assert (tmp_path / "run.partial").exists() == begun


def test_the_run_of_another_process_that_has_just_begun_outlives_a_second_that_is_refused(monkeypatch, tmp_path):
    partial = tmp_path / "run.partial"
    code = f"import time; from stages.run.config import StageConfig, build_config; from stages.run.manifest import Run; " \
           f"Run(build_config(StageConfig, {{'run_dir': {str(tmp_path / 'run')!r}}})); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        monkeypatch.setattr(entry, "die_with_parent", lambda: None)
        monkeypatch.setattr(sys, "argv", ["stage", "--run-dir", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as left:
            entry.launch(Run, StageConfig, distributed=False)
        first.kill()
    assert left.value.code == 2 and [path.name for path in partial.iterdir()] == ["run.json"]


@pytest.mark.parametrize(("precision", "has", "warned"), [("bf16", False, True), ("bf16", True, False), ("no", False, False)])
def test_a_processor_without_bf16_is_named(precision, has, warned, monkeypatch, capsys):
    monkeypatch.setattr(entry, "promised", lambda: {"file": "a.yaml", "num_processes": 1, "mixed_precision": precision})
    monkeypatch.setattr(entry, "cpu_has_bf16", lambda: has)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which is written
    threads = torch.get_num_threads()
    try:
        entry.start_processes()
    finally:
        torch.set_num_threads(threads)
    assert ("no instructions for bf16" in capsys.readouterr().out) is (warned and not torch.cuda.is_available())


@pytest.mark.parametrize(("seen", "processes", "left"), [(None, None, "0"), ("2,3", "1", "2"), ("", None, ""), ("2,3", "2", "2,3")])
def test_a_process_that_is_alone_sees_one_gpu(seen, processes, left, monkeypatch):
    """Over several, transformers' Trainer takes it for DataParallel: batches of another size than the recipe says."""
    for name, value in (("CUDA_VISIBLE_DEVICES", seen), ("WORLD_SIZE", processes)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    entry.take_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
