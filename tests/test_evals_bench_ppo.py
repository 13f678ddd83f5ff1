"""The benchmark of PPO times what it says it times, and all variants do the same work."""
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.evals import bench_ppo
from stages.evals.bench_ppo import PEER, PHASES, VARIANTS, arguments, bench, summary, work
from stages.rl import timed
from stages.rl.peers import load_policy
from stages.rl.timed import Work, one, questions
from stages.run.phases import Phases

ROOT = Path(__file__).resolve().parent.parent
TINY = Work(batch_size=8, epochs=2, minibatches=2, response_tokens=5, generations=4, iterations=1, vocab_size=300, threads=1)


def check(found: dict) -> None:
    split = found["seconds_an_iteration"]
    assert tuple(split) == PHASES and min(split.values()) > 0
    assert found["samples_per_s"] == pytest.approx(8 / sum(split.values())) and found["peak_bytes"] > 2**20
    assert split["update"] > split["score"]  # two epochs of forward and backward against one forward


@pytest.mark.parametrize("variant", ["critic", "trunk", "lora", "trl-grpo"])
def test_the_time_of_an_iteration_is_the_sum_of_its_phases(variant):
    from stages.rl import trainer as module

    before = module.sample, module.token_numbers
    check(one(variant, "32x1", TINY))
    assert (module.sample, module.token_numbers) == before, "the functions of the module are timed during the run alone"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("variant", ["trunk", "trl-grpo"])
def test_all_train_in_the_precision_asked_for(variant, bf16, monkeypatch):
    """TRL's own configs switch bf16 on by themselves."""
    made, make = [], timed.make_trainer
    monkeypatch.setattr(timed, "make_trainer", lambda *given: made.append(make(*given)) or made[0])
    one(variant, "32x1", replace(TINY, bf16=bf16))
    assert made[0].args.bf16 == bf16


class Engine:
    """In vLLM's place: as many tokens as are asked for, whatever the end token."""

    def __init__(self, *_, max_completion_length, **__):
        self.length, self.generation_kwargs = max_completion_length, {"stop_token_ids": [-1]}

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations):
        assert self.generation_kwargs == {"ignore_eos": True}
        ids = [[5] * self.length for _ in prompts]
        return prompts, ids, [[[-1.0]] * self.length for _ in prompts], None


def test_rollouts_by_vllm_are_timed(monkeypatch):
    from stages.rl import _trl

    monkeypatch.setattr(_trl, "is_vllm_available", lambda: True)
    monkeypatch.setattr(_trl, "VLLMGeneration", Engine)
    found = one("vllm", "32x1", TINY)
    assert found["samples_per_s"] > 0 and 0 < found["seconds_an_iteration"]["rollout"] < found["seconds_an_iteration"]["update"]


@pytest.mark.skipif(not PEER.exists(), reason=".venv-trl112 is missing: `make bench-ppo` makes it")
def test_the_last_ppo_of_trl_does_the_same_work():
    done = subprocess.run([str(PEER), "-m", "stages.rl.timed", "trl-ppo", "32x1", json.dumps(asdict(TINY))], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    check(found)
    assert found["trl"] == re.search(r"^trl==(\S+)", (ROOT / "requirements-trl112.lock").read_text(), re.MULTILINE)[1]


def test_a_variant_that_does_other_work_is_no_result(monkeypatch):
    from stages.rl import trainer as module

    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda *args, **kwargs: [ids[:4] for ids in sample(*args, **kwargs)])
    with pytest.raises(ValueError, match=r"critic did other work: responses of \[4\] tokens"):
        one("critic", "32x1", TINY)


def test_peers_generate_with_a_cache(tmp_path):
    """This project's decoders say `use_cache` false, and generation without one made TRL ten times slower than it is."""
    from transformers import GenerationConfig

    from stages.data.tokenizer import train_tokenizer
    from stages.models.sizes import build_decoder, decoder_config

    bpe = train_tokenizer(["How many pens does Tom have?"], vocab_size=300)
    build_decoder(decoder_config(bpe, hidden_size=32, num_layers=1), seed=0).save_pretrained(tmp_path / "lm")
    policy = load_policy(tmp_path / "lm")
    policy.generation_config.eos_token_id, read = None, []
    policy.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    policy.generate(torch.tensor([[5, 6, 7]]), generation_config=GenerationConfig(max_new_tokens=4, do_sample=True))
    assert read == [3, 1, 1, 1]


def test_questions_are_the_same_as_text_and_as_ids():
    from stages.data.tokenizer import train_tokenizer

    bpe = train_tokenizer(["How many pens does Tom have?"], vocab_size=300)
    asked = questions(bpe, 5)
    assert len({row["id"] for row in asked}) == 5 and all(bpe(row["text"])["input_ids"] == row["ids"] for row in asked)


def test_time_counts_for_the_innermost_phase_and_is_not_lost_to_errors(monkeypatch):
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    def outer():
        work(1)
        owner.inner()
        work(2)

    def broken():
        work(16)
        raise KeyError("broken")

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    owner = SimpleNamespace(outer=outer, inner=lambda: work(4), other=lambda kind: work(8), broken=broken)
    phases = Phases(PHASES[:-1])
    phases.time(owner, "outer", "update")
    phases.time(owner, "inner", "rollout", lambda result: {7})
    phases.time(owner, "other", lambda kind: kind)
    phases.time(owner, "broken", "forward")
    with phases.undo:
        owner.outer()
        owner.other("score")
        work(32)
        with pytest.raises(KeyError):
            owner.broken()
    assert phases.seconds == {"rollout": 4, "score": 8, "forward": 16, "update": 3} and phases.lengths == {7}
    owner.inner()
    assert phases.seconds["rollout"] == 4 and not phases.open


def test_ratios_are_within_rounds():
    def run(variant, speed, update):
        split = {"rollout": 1.0, "score": 1.0, "forward": 1.0, "update": update, "rest": 0.5}
        return {"variant": variant, "size": "8x1", "samples_per_s": speed, "seconds_an_iteration": split, "peak_bytes": 2**30}

    runs = [run("trl-ppo", 10, 3), run("critic", 14, 2), run("trl-ppo", 5, 6), run("critic", 10, 4), run("trl-ppo", 20, 1.5),
            run("critic", 24, 1), run("trunk", 30, 1) | {"size": "16x1"}]
    table = summary(runs, "8x1").splitlines()
    assert len(table) == 4
    assert table[2].startswith("| critic | 14.0 | 1.40 (1.20 to 2.00) | 1.00 | 1.00 | 1.00 | 2.00 | 0.50 | 1.00 |")
    assert table[3].startswith("| trl-ppo | 10.0 | 1.00 (1.00 to 1.00) |")
    assert summary(runs, "16x1").splitlines()[2].startswith("| trunk | 30.0 | - |")


@pytest.mark.parametrize(("given", "message"), [
    (["--batch-size", "9", "--generations", "3"], "batch_size 9 is not a multiple of minibatches 4"),
    (["--generations", "5"], "batch_size 64 is not a multiple of generations 5"),
    (["--sizes", "128"], "size '128': expected width x layers"), (["--gpu"], "trl-ppo is not set up for a GPU"),
    (["--sizes", "100x2"], "the width a multiple of 32")])
def test_settings_that_cannot_be_compared(given, message):
    with pytest.raises(ValueError, match=message):
        arguments(given)


def test_each_variant_runs_in_each_round_in_its_own_interpreter(monkeypatch, tmp_path, capsys):
    started = []

    def run(command, **_):
        started.append(command)
        split = dict.fromkeys(PHASES, 1.0)
        line = {"variant": command[3], "size": command[4], "samples_per_s": 12.8, "seconds_an_iteration": split, "peak_bytes": 2**30}
        return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(line)}\n", stderr="")

    peer = tmp_path / "python"
    peer.touch()
    monkeypatch.setattr(bench_ppo, "PEER", peer)
    monkeypatch.setattr(subprocess, "run", run)
    bench(arguments(["--rounds", "2", "--sizes", "32x1", "64x2", "--epochs", "3"]))
    assert [command[3:5] for command in started] == [[name, size] for _ in range(2) for size in ("32x1", "64x2") for name in VARIANTS
                                                   if name != "vllm"]
    assert all(command[0] == (str(peer) if command[3] == "trl-ppo" else sys.executable) for command in started)
    assert Work(**json.loads(started[0][5])) == Work(epochs=3)
    shown = capsys.readouterr().out
    assert shown.startswith("budget: 2 rounds of 5 variants at 2 sizes, about ") and shown.count('"round": 2') == 10
    assert "| size 64x2 | samples/s | times trl-ppo |" in shown


def test_both_halves_agree():
    assert (*timed.PHASES, "rest") == PHASES and Work(**work(arguments([]))) == Work()


def test_on_a_gpu_or_not_at_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none here"):
        bench(arguments(["--gpu", "--variants", "critic"]))
    given = arguments(["--gpu", "--variants", "critic", "lora", "vllm", "--sizes", "100m"])
    assert Work(**work(given)).bf16 and not Work().bf16


def test_without_the_peers_environment_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_ppo, "PEER", tmp_path / "python")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match="run `make bench-ppo`, which makes it, or leave trl-ppo out"):
        bench(arguments([]))


def test_the_peers_lock_pins_trl_alone():
    """The other packages are those of requirements.lock: what differs is TRL."""
    pins = [line for line in (ROOT / "requirements-trl112.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert pins == ["trl==1.12.0"]
    lines = subprocess.run(["make", "-n", "-B", "bench-ppo", "ARGS=--rounds 1"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout
    assert "-m stages.evals.bench_ppo --rounds 1" in lines
    command = next(line for line in lines.splitlines() if "grep" in line)
    merged = subprocess.run(command.split(">")[0], shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in merged.splitlines() if line.startswith("trl")] == pins
    assert merged.count("==") == (ROOT / "requirements.lock").read_text().count("==")
