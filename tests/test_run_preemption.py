"""SIGTERM: what is left, how the end is told from others, and that it comes in bounded time."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGE = """
import os, signal, time
from stages.run import preemption
from stages.run.config import StageConfig
from stages.run.entry import launch
from stages.run.manifest import Run

class Deaf:
    def __del__(self):  # errors in here are ignored, whatever they are
        print("working", flush=True)
        time.sleep(30)

def main(config):
    run = Run(config)
    if MODE == "deaf":
        Deaf()
    if MODE == "error":  # a peer has been told to go and this process's collective fails
        (run.directory / preemption.MARK).write_text("{}")
        raise RuntimeError("connection closed by peer")
    if MODE in ("saves", "hangs"):
        with preemption.deferred():
            print("working", flush=True)
            for _ in range(300):
                time.sleep(0.1)
                if preemption.signalled() and MODE == "saves":
                    raise preemption.Preempted("checkpoint-7 is saved")
    print("working", flush=True)
    time.sleep(30)

preemption.GRACE_S = 0.5
launch(main, StageConfig, distributed=False)
"""


def start(mode: str, folder: Path) -> subprocess.Popen:
    line = [sys.executable, "-c", f"MODE = {mode!r}\n{STAGE}", "--run-dir", str(folder / "run")]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("mode", "number", "what"), [
    ("stands", signal.SIGTERM, "what was finished is on disk"), ("stands", signal.SIGUSR1, "what was finished is on disk"),
    ("deaf", signal.SIGTERM, "what was finished is on disk"), ("saves", signal.SIGTERM, "checkpoint-7 is saved"),
    ("hangs", signal.SIGTERM, "nothing new could be saved in time; the last checkpoint is safe")])
def test_a_stage_that_is_told_to_go_leaves_a_mark_and_says_how_long_it_took(mode, number, what, tmp_path):
    process = start(mode, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(number)
    process.send_signal(number)  # launchers and schedulers both do
    _, error = process.communicate(timeout=20)
    mark = json.loads((tmp_path / "run.partial" / "PREEMPTED").read_text())
    assert process.returncode == 143 and mark["saved"] == what and 0 <= mark["seconds_to_safe"] < 10
    assert error.count("preempted") == 1 and f"s after the signal: {what}; the same command continues" in error and "error" not in error
    again = start("stands", tmp_path)
    assert again.stdout is not None and "continuing the unfinished run" in again.stdout.readline()
    assert again.stdout.readline() == "working\n" and not (tmp_path / "run.partial" / "PREEMPTED").exists()
    again.kill()
    again.communicate()


def test_a_process_whose_peer_was_told_to_go_is_no_failure(tmp_path):
    process = start("error", tmp_path)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 143 and "Traceback" not in error and error.count("preempted") == 1


TWO = """
import os, time
import torch.distributed as dist
from stages.run import manifest
from stages.run.config import StageConfig
from stages.run.entry import launch

def slow(path):
    print("working", flush=True)
    time.sleep(3)
    return "sha256:slow"

def main(config):
    run = manifest.Run(config)
    if manifest.is_main():
        (run.directory / "product").touch()
    dist.barrier()  # the last one of a stage
    if MODE == "draws" and manifest.is_main():
        print("working", flush=True)
        time.sleep(30)
    manifest.hash_path = slow
    run.finish(metrics={}, products={"product": "product"})

launch(main, StageConfig)
"""


@pytest.mark.parametrize(("mode", "ends"), [("draws", [143, 143]), ("finishes", [0, 0])])
def test_two_processes_of_which_one_has_nothing_more_to_do_end_alike(mode, ends, tmp_path):
    """What ends the one at work ends the one that waits for the run to finish; while it is being finished, a signal ends neither."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    line = [sys.executable, "-c", f"MODE = {mode!r}\n{TWO}", "--run-dir", str(tmp_path / "run")]
    both = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    assert both[0].stdout is not None and both[0].stdout.readline() == "working\n"
    time.sleep(1)  # the other has come to where it waits, or would have gone
    both[0].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == ends, errors
    assert (tmp_path / "run.partial" / "PREEMPTED").exists() == (tmp_path / "run.partial").exists() == (mode == "draws")
    assert not any("Traceback" in error for error in errors)


def test_a_mark_that_knows_the_seconds_is_not_written_over(tmp_path, monkeypatch):
    """Processes that leave together: the one that was not signalled saw no mark, and the other's came before its own."""
    from stages.run import preemption

    mark = tmp_path / "PREEMPTED"
    monkeypatch.setitem(preemption._state, "folder", tmp_path)
    preemption.leave("alone")
    assert json.loads(mark.read_text())["saved"] == "alone"
    mark.write_text('{"seconds_to_safe": 1.5}')
    monkeypatch.setattr(preemption, "marked", lambda: False)
    preemption.leave("late")
    assert json.loads(mark.read_text()) == {"seconds_to_safe": 1.5} and list(tmp_path.iterdir()) == [mark]


def test_a_signal_before_the_run_has_begun_leaves_nothing(tmp_path):
    from stages.run import preemption

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        preemption.listen(str(tmp_path / "run"))
        preemption.leave("what was finished is on disk")
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="workers learn of their launcher's end on Linux alone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_launcher_tells_its_workers_to_go(number, tmp_path):
    """With one process `accelerate launch` passes no signal on."""
    worker = f"MODE = 'saves'\n{STAGE}"
    launcher = ("import subprocess, sys\n"
                f"sys.exit(subprocess.run([sys.executable, '-c', {worker!r}, '--run-dir', {str(tmp_path / 'run')!r}]).returncode)")
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"})
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    process.send_signal(number)
    mark, end = tmp_path / "run.partial" / "PREEMPTED", time.monotonic() + 20
    while not mark.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    assert json.loads(mark.read_text())["saved"] == "checkpoint-7 is saved"
    process.communicate()


@pytest.mark.parametrize(("ends", "told"), [("exit 1", "Error 1"), ("touch runs/tiny/sft.partial/PREEMPTED; exit 1", "Error 143"),
                                            ("exit 0", "")])
def test_make_tells_a_preempted_stage_from_a_failed_one(ends, told, tmp_path):
    """With stand-ins for accelerate, which returns 1 whatever its workers did, and for the check of names."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("recipes/accelerate", "runs/tiny/sft.partial", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "recipes/accelerate/cpu.yaml", tmp_path / "recipes/accelerate")
    for name in ("requirements.lock", "requirements-hashes.lock", "pyproject.toml", ".venv/.installed"):
        (tmp_path / name).touch()
    for name, does in (("accelerate", ends), ("python", "exit 0")):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "PLUMBLINE_RUNS")}
    done = subprocess.run(["make", "sft", "ACCELERATE=cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (2 if told else 0) and told in done.stderr, done.stderr


def test_make_gives_a_comparison_to_the_stage_and_not_to_what_follows_it():
    shown = subprocess.run(["make", "-n", "report", "AGAINST=b"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"-m stages\.report --config recipes/tiny/report\.yaml +--against b *\\?\s*\|\| \(test", shown.stdout), shown
