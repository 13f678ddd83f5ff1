"""PPO on engines that divide optimizer, gradients or weights: two CPU processes do what one does, resume exactly, and save whole models."""
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.models import engines
from tests.rl_engines import ENGINES, FSDP2
from tests.rl_tiny import write_parents

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
FLAGS = {"iterations": 2, "rollout-batch": 8, "minibatches": 2, "micro-batch-size": 2, "max-new-tokens": 8, "save-iterations": 1,
         "eval-problems": 4, "eval-samples": 2, "sample-iterations": 1, "best-of": 0}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINE_NAMES = ["fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]


def launch(engine: str, *arguments: str, codes: tuple[int, ...] = (0, 0), **more: str) -> str:
    """Run tests/rl_engines.py in one process or two; what the first one printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    line = [sys.executable, "-m", "tests.rl_engines", engine, *arguments]
    ranks: list[dict[str, str]] = [{}] if engine == "one" else [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for r in range(2)]
    running = [subprocess.Popen(line, cwd=ROOT, env={**ENVIRONMENT, **ENGINES.get(engine, {}), **rank, **more}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in ranks]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert tuple(process.returncode for process in running) == codes[:len(running)], "\n".join(printed)
    return printed[0]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same_rows(one: list[dict], two: list[dict], *, joint_norm: bool) -> None:
    """A clip fraction may differ by one token that rounding moves over its bound; DeepSpeed has one norm over both models."""
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert set(b) == set(a) - ({"critic/grad_norm"} if joint_norm else set())
        joint = (a["train/grad_norm"] ** 2 + a["critic/grad_norm"] ** 2) ** 0.5
        for key in b:
            expected = joint if joint_norm and key == "train/grad_norm" else a[key]
            assert b[key] == pytest.approx(expected, rel=1e-4, abs=1.5 / 4 / 50 if key.endswith("clip_fraction") else 1e-5), key


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    launch("one", "train", str(folder))
    return folder


@pytest.fixture(scope="module")
def two(request, tmp_path_factory) -> tuple[str, Path]:
    """An engine and what two of its processes made of the same training."""
    folder = tmp_path_factory.mktemp(request.param)
    launch(request.param, "train", str(folder))
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("two", ENGINE_NAMES, indirect=True)
def test_two_processes_of_an_engine_equal_one(two, one):
    """Losses, rollouts and final weights; norms of each model under FSDP2. Back at a checkpoint the policy is what it was there."""
    engine, folder = two
    same_rows(rows(one), rows(folder), joint_norm="zero" in engine)
    ours, theirs = weights(one / "model"), weights(folder / "model")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("two", ENGINE_NAMES, indirect=True)
def test_a_run_on_an_engine_resumes_to_the_same_bits(two, tmp_path):
    engine, whole = two
    assert "stopped" in launch(engine, "train", str(tmp_path), codes=(3, 3), STOP="1")
    assert len(rows(tmp_path)) == 1
    assert "resuming from" in launch(engine, "train", str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_fsdp2_rounds_policy_reference_and_old_policy_alike_in_bf16(tmp_path):
    """At first the policy is its reference, and in an iteration's only step it is the policy that sampled, to the bit. (transformers
    refuses bf16 for DeepSpeed on a CPU.)"""
    launch("fsdp2", "train", str(tmp_path), BF16="1", ACCELERATE_MIXED_PRECISION="bf16")
    logged = rows(tmp_path)
    assert logged[0]["objective/kl"] == 0.0 and abs(logged[1]["objective/kl"]) > 0.01
    assert [row["policy/approx_kl"] for row in logged] == [0.0, 0.0] and logged[1]["objective/entropy"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_the_stage_measures_and_saves_whole_models(engine, tmp_path):
    parents = write_parents(tmp_path / "parents")
    given = FLAGS | {f"parents.{name}": parents / name for name in ("prepare", "sft", "reward_model")}
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    for name in ("one", engine):
        launch(name, "stage", str(tmp_path / name), *flags)
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", engine))
    for key, entry in first["metrics"].items():
        assert second["metrics"][key]["value"] == pytest.approx(entry["value"], rel=2e-3, abs=2e-4), key
    assert second["counts"] == first["counts"] and second["provenance"]["world_size"] == 2
    samples = [(tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("one", engine)]
    assert [[s["response"] for s in json.loads(line)["samples"]] for line in samples[0]] == [
        [s["response"] for s in json.loads(line)["samples"]] for line in samples[1]]
    for product, kind in (("model", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        ours, theirs = (kind.from_pretrained(tmp_path / name / product).state_dict() for name in ("one", engine))
        start = kind.from_pretrained(parents / ("sft" if product == "model" else "reward_model") / "model").state_dict()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
        assert any(not torch.equal(theirs[name], tensor) for name, tensor in start.items())


@pytest.mark.slow
def test_fsdp2_in_bf16_measures_before_and_after_with_the_same_rounding(tmp_path):
    """A policy that learned nothing has lost nothing."""
    parents = write_parents(tmp_path / "parents")
    given = {**FLAGS, "iterations": 1, "learning-rate": 0, **{
        f"parents.{name}": parents / name for name in ("prepare", "sft", "reward_model")}}
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    launch("fsdp2", "stage", str(tmp_path / "ppo"), *flags, BF16="1", ACCELERATE_MIXED_PRECISION="bf16")
    metrics = json.loads((tmp_path / "ppo" / "manifest.json").read_text())["metrics"]
    assert {"after/base_loss", "after/gold", "after/kl"} <= set(metrics)
    for name in metrics:
        if name.startswith("after/") and name.replace("after/", "before/") in metrics:
            assert metrics[name]["value"] == metrics[name.replace("after/", "before/")]["value"], name
    assert metrics["after/kl_to_base"]["value"] == metrics["after/kl"]["value"] == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["ddp", *ENGINE_NAMES])
def test_gpus_measure_what_one_of_them_measures(engine, tmp_path):
    """The stage under the launch configs that ship, in bf16, on all GPUs there are, beside gpu.yaml on one: what is measured before any
    training differs by rounding alone, all runs end, and plain transformers loads what they save."""
    parents = write_parents(tmp_path / "parents")
    given = FLAGS | {f"parents.{name}": parents / name for name in ("prepare", "sft", "reward_model")}
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    gpus = {"gpu": 1, engine: torch.cuda.device_count()}
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "CUDA_VISIBLE_DEVICES"}
    for name, count in gpus.items():
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{name}.yaml"]
        stage = ["-m", "stages.ppo", "--config", "recipes/tiny/ppo.yaml", "--run-dir", str(tmp_path / name), *flags]
        subprocess.run([*launcher, "--num_processes", str(count), *stage], cwd=ROOT, env=environment, check=True, timeout=900)
    alone, together = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in gpus)
    assert together["provenance"]["world_size"] == gpus[engine]
    for key, entry in alone["metrics"].items():
        if key.startswith("before/") and key.endswith(("entropy", "loss")):
            assert together["metrics"][key]["value"] == pytest.approx(entry["value"], rel=0.02), key
    for folder, kind in (("model", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        assert all(torch.isfinite(p).all() for p in kind.from_pretrained(tmp_path / engine / folder).parameters())


@pytest.mark.parametrize(("changes", "message"), [
    ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "has fsdp_cpu_ram_efficient_loading: set it to false"),
    ({"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, "has fsdp_version 1: set it to 2")])
def test_launch_configs_that_cannot_work_are_refused(changes, message, monkeypatch):
    for name, value in {**FSDP2, **changes}.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    with pytest.raises(ValueError, match=message):
        engines.adapt_fsdp(SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))))
