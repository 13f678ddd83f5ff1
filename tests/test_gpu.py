"""On GPUs, with the launch configs that ship: pretraining of the smoke recipe as on a CPU, compiled too; the benchmark for GPUs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.run.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def stage(name: str, launch: str, *flags: str, count: int = 1, **environment: str) -> None:
    run("accelerate.commands.launch", "--config_file", f"recipes/accelerate/{launch}.yaml", "--num_processes", str(count), "-m",
        f"stages.{name}", "--config", f"recipes/smoke/{name}.yaml", *flags, **environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The smoke recipe pretrained on the CPU, in fp32, with AdamW."""
    folder = tmp_path_factory.mktemp("runs")
    hidden = {"PLUMBLINE_RUNS": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    stage("prepare", "cpu", **hidden)
    stage("pretrain", "cpu", "--optimizer", "adamw", "--run-dir", str(folder / "cpu"), **hidden)
    return folder


@pytest.mark.parametrize(("launch", "attention"), [("gpu", "auto"), ("gpu", "documents"), ("ddp", "auto"), ("fsdp2", "auto"),
                                                   ("fsdp2", "documents")])
def test_pretraining_in_bf16_learns_what_it_learns_on_a_cpu(launch, attention, runs):
    count, folder = 1 if launch == "gpu" else torch.cuda.device_count(), runs / f"{launch}-{attention}"
    stage("pretrain", launch, "--optimizer", "adamw", "--attn-implementation", attention, "--run-dir", str(folder), count=count,
          PLUMBLINE_RUNS=str(runs))
    found, wanted = Manifest(folder), Manifest(runs / "cpu")
    assert found.metrics["heldout_loss"]["value"] == pytest.approx(wanted.metrics["heldout_loss"]["value"], rel=0.02)
    assert found.counts == wanted.counts and found.data["provenance"]["world_size"] == count
    assert all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(found.product("model")).parameters())


@pytest.mark.parametrize("launch", ["gpu", "fsdp2"])
def test_the_benchmark_runs_compiled_and_in_parts_and_learns_alike(launch):
    """Compiled it learns alike; slower than the card's own products, in more memory than weights and AdamW take."""
    printed = run("stages.evals.bench_pretrain", "--launch", launch, "--sizes", "256x4", "--variants", "adamw", "adamw, compile",
                  "adamw, documents, compile", "--rounds", "1", "--steps", "4", "--batch-tokens", "16384")
    plain, *others = (json.loads(line) for line in printed.splitlines() if line.startswith('{"'))
    assert [found["loss"] for found in others] == [pytest.approx(plain["loss"], rel=0.01)] * 2
    for found in (plain, *others):
        assert 0 < found["mfu_wall"] < 1 and found["peak_bytes"] > 3_600_000 * 12 / found["devices"] and "cuda" in found["device"]
