"""A short pass of the fault harness (tests/faults.py, `make faults`), and of the marks that say where a kill fell."""
import json
import os
import subprocess
import sys

import pytest

from stages.run.manifest import MANIFEST
from tests.conftest import ROOT
from tests.lab import Wrong, differs, kind_of, refused


@pytest.mark.slow
def test_a_run_that_is_disturbed_ends_as_if_nothing_had_happened(smoke, tmp_path):
    """Kills at an event of each kind, SIGTERM to one process and to one of two, damaged checkpoint, parent and manifest, a second start."""
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "prepare").symlink_to(smoke.path("prepare"))  # the others it makes itself: with as many threads, the same sums
    command = [sys.executable, "-m", "tests.faults", "--runs", str(tmp_path), "--stages", "pretrain", "sft", "--kills", "10", "--few-kills",
               "4", "--others", "1"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800)
    lines = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert done.returncode == 0, "\n".join(json.dumps(line) for line in lines if line["result"] == "WRONG") + done.stderr[-2000:]
    results = {(line["fault"], line["result"]) for line in lines}
    assert {("kill", "equal"), ("terminate", "equal"), ("damaged manifest", "refused"), ("twice", "refused")} <= results
    assert {line["at"].split()[0] for line in lines if line["fault"] == "kill" and line["number"] % 2} >= {"checkpoint", "manifest", "swap"}
    again = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and '"fault"' not in again.stdout and "kill" in again.stdout  # the table alone


@pytest.mark.parametrize(("event", "path", "kind"), [
    ("open", "/r/sft.partial/checkpoints/checkpoint-2/.complete.json.tmp", "checkpoint"), ("os.rename", "/r/sft.partial", "swap"),
    ("os.rename", "/r/sft", "swap"), ("os.rmdir", "/r/sft.old/model", "swap"), ("open", "/r/sft.partial/.manifest.json.tmp", "manifest"),
    ("os.mkdir", "/r/sft.partial/model", "product"), ("open", "/r/sft.partial/metrics.jsonl", "other"), ("open", "/r/ppo/x", None)])
def test_an_event_is_told_by_its_path(event, path, kind):
    assert kind_of(event, path, "/r/sft") == kind


def test_other_figures_and_unclear_ends_are_told(tmp_path):
    from types import SimpleNamespace

    for name, value in (("one", 1.0), ("two", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(json.dumps({"products": {}, "metrics": {"loss": {"value": value}}, "counts": {"steps": 1}}))
    assert differs(tmp_path / "one", tmp_path / "one") is None and "loss" in (differs(tmp_path / "one", tmp_path / "two") or "")
    assert refused(SimpleNamespace(codes=(2,), errors=["error: x"], text="error: x")) == "error: x"
    for codes, text in (((0,), ""), ((1,), "Traceback"), ((2,), "error: x\nerror: y")):
        with pytest.raises(Wrong):
            refused(SimpleNamespace(codes=codes, errors=[line for line in text.splitlines() if line.startswith("error")], text=text))
