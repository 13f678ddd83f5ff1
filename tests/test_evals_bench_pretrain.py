"""The benchmark of pretraining times what it says it times, and its ratios are of the same work."""
import json
import subprocess
import time

import pytest
import torch
from torch import nn

from stages.evals import bench_pretrain
from stages.evals.bench_pretrain import PHASES, VARIANTS, Clocks, Rates, arguments, bench, launcher, make_trainer, one, summary
from stages.models.attention import FastAttention
from stages.models.counts import train_flops_per_token
from stages.models.sizes import of_size

TINY = ["--threads", "1", "--steps", "2", "--warmup", "1", "--row-length", "32", "--batch-tokens", "128"]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(bench_pretrain, "SQUARE", 64)


@pytest.mark.parametrize("variant", ["muon", "adamw", "adamw, sdpa", "adamw, eager", "adamw, bf16", "transformers"])
def test_the_parts_of_a_step_are_the_whole(variant, tmp_path):
    given = arguments(TINY)
    found = one(variant, "32x1", given)
    assert tuple(found["shares"]) == (*PHASES, "rest") and min(found["shares"].values()) > 0
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["backward"] > found["shares"]["data"]
    trainer, flops, tokens = make_trainer(variant, "32x1", given, str(tmp_path))
    assert found["flops_per_token"] == flops == train_flops_per_token(trainer.model.config, 32)
    assert found["tokens_a_step"] == tokens == 128 and found["devices"] == 1 and found["peak_bytes"] > 2**27
    assert found["tflops_a_device"] == pytest.approx(found["tokens_per_wall_s"] * flops / 1e12)
    rate = found["tokens_per_processor_s"] * flops / found["mfu_processor"]
    assert rate == pytest.approx(found["square_flops_per_processor_s"])
    assert 2 < found["loss"] < 7 and found["threads"] == 1


def test_variants_are_what_they_say(tmp_path):
    given = arguments(TINY)
    made = {name: make_trainer(name, "32x1", given, str(tmp_path))[0] for name in VARIANTS}
    attention = {name: trainer.model.config._attn_implementation for name, trainer in made.items()}
    assert attention == dict.fromkeys(VARIANTS, "documents") | dict.fromkeys(
        ("adamw, sdpa", "adamw, sdpa, compile", "transformers"), "sdpa") | {"adamw, eager": "eager"}
    fast = {name: any(isinstance(m, FastAttention) for m in trainer.model.modules()) for name, trainer in made.items()}
    assert fast == dict.fromkeys(VARIANTS, True) | {"transformers": False}
    assert {name for name, trainer in made.items() if trainer.args.torch_compile} == {name for name in VARIANTS if "compile" in name}
    assert {name for name, trainer in made.items() if trainer.args.bf16} == {name for name in VARIANTS if "bf16" in name}
    assert {name for name, trainer in made.items() if type(trainer.create_optimizer()).__name__ == "MuonAdamW"} == {"muon", "muon, bf16"}
    first = {name: next(iter(trainer.get_train_dataloader()))["input_ids"] for name, trainer in made.items()}
    assert all(torch.equal(rows, first["muon"]) for rows in first.values())  # the same rows for all


def test_rates_by_hand(monkeypatch):
    """Each product takes a second of either clock: 2 n^3 FLOPs a second of the square, and of the shapes what their layers hold."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6))
    rates = Rates(model, 10, torch.device("cpu"), lambda: None)
    monkeypatch.setattr(rates.clocks, "time", lambda name, work: (work(), rates.clocks.wall.update({name: rates.clocks.wall[name] + 1})))
    rates.measure()
    rates.measure()
    assert rates.square("wall") == 2 * 64**3
    assert rates.own("wall") == 3 * 6 * 10 * 24 / 3  # three layers of 24 weights, 6 FLOPs a weight and token, in three seconds


def test_clocks_tell_waiting_from_work():
    clocks = Clocks(lambda: None)
    clocks.time("nap", lambda: time.sleep(0.2))
    assert clocks.wall["nap"] > 0.19 and clocks.processor["nap"] < 0.1


def test_measuring_the_machine_is_not_part_of_a_step(monkeypatch):
    measure, given = Rates.measure, arguments(TINY)
    plain = one("adamw", "32x1", given)
    monkeypatch.setattr(Rates, "measure", lambda self: (measure(self), self.clocks.time("square", lambda: time.sleep(1.0))))
    slowed = one("adamw", "32x1", given)
    assert slowed["tokens_per_wall_s"] > 128 / 0.5 and slowed["tokens_per_wall_s"] > plain["tokens_per_wall_s"] / 20


def test_each_run_is_a_line_and_each_size_a_table(monkeypatch, capsys):
    calls = []

    def run(command, **_):
        variant, size = command[command.index("--one") + 1:][:2]
        calls.append((variant, size))
        result = {"variant": variant, "size": size, "shares": dict.fromkeys((*PHASES, "rest"), 0.2), "ceiling_processor": 0.9,
                  "tflops_a_device": 1.5, "peak_bytes": 2**30, "tokens_per_wall_s": 10.0 * len(calls), "tokens_per_processor_s": 20.0,
                  "mfu_wall": 0.5, "mfu_processor": len(calls) / 10}
        return type("Done", (), {"returncode": 0, "stdout": json.dumps(result) + "\nlater\n", "stderr": ""})

    monkeypatch.setattr(subprocess, "run", run)
    argv = ["--rounds", "3", "--sizes", "32x1", "64x1", "--variants", "adamw"]
    bench(arguments(argv), argv)
    assert calls == [("adamw", "32x1"), ("adamw", "64x1")] * 3
    out = capsys.readouterr().out
    assert "| adamw | 30 | 20 | 0.50 (0.50 to 0.50) | 0.30 (0.10 to 0.50) | 0.90 | 1.5 | 1.00 | 20.0% |" in out and "| size 64x1 |" in out
    assert summary([], "32x1").count("\n") == 1


@pytest.mark.parametrize(("argv", "message"), [
    (["--sizes", "100x4"], "the width a multiple of 32"), (["--sizes", "d128"], "expected width x layers"),
    (["--sizes", "0x4"], "expected width x layers"), (["--sizes", "accelerate"], "or the name of a recipe"),
    (["--launch", "gpus"], r"launch 'gpus': choose from cpu, cpu-2, cpu-bf16, ddp, fsdp2, gpu"), (["--steps", "0"], "steps is at least 1"),
    (["--row-length", "100"], "batch_tokens 4096 is not a multiple of row_length 100")])
def test_bad_arguments(argv, message):
    with pytest.raises(ValueError, match=message):
        arguments(argv)


def test_a_recipes_shape_is_the_recipes(tmp_path):
    given = arguments([*TINY, "--sizes", "smoke", "--micro-rows", "3"])
    trainer, flops, tokens = make_trainer("adamw", "smoke", given, str(tmp_path))
    config = trainer.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size, config.max_position_embeddings) == (32, 2, 1024, 256)
    assert tokens == 3 * 256 and flops == train_flops_per_token(config, 256)
    assert trainer.args.per_device_train_batch_size == 3 and next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (3, 256)
    large = of_size("100m")
    assert (large["hidden_size"], large["vocab_size"], large["row_length"], large["micro_batch_rows"]) == (768, 32768, 1024, 16)


def test_launches_take_all_gpus_and_refuse_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [launcher(name)[-1] for name in ("cpu", "cpu-bf16", "cpu-2", "gpu", "ddp", "fsdp2")] == ["1", "1", "2", "1", "3", "3"]
    assert launcher("fsdp2")[:4] == ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/fsdp2.yaml"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="launch gpu needs a GPU, and torch sees none here"):
        launcher("gpu")


@pytest.mark.slow
def test_two_processes_share_a_step(capsys):
    argv = ["--launch", "cpu-2", "--sizes", "smoke", "--variants", "adamw", "--rounds", "1", *TINY[:6]]
    bench(arguments(argv), argv)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(next(line for line in lines if line.startswith('{"')))
    assert (found["devices"], found["tokens_a_step"], found["launch"]) == (2, 2 * 4 * 256, "cpu-2")
    assert "| adamw |" in lines[-1] and found["mfu_wall"] > 0 and 2 < found["loss"] < 8
