"""The race of PPO trainers: the same reward and evaluation for all, the clock stopped meanwhile, bounds where the goal was not reached."""
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.evals import study_ppo_peers
from stages.evals.study_ppo_peers import PEER, VARIANTS, arguments, best, finished, ratio, report, study, summarised
from stages.rl import raced
from stages.rl.peers import load_policy
from stages.rl.raced import Race, Reached, Referee

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def terms(tmp_path_factory):
    """A random decoder and reward model of width 32, problems of the curriculum, two iterations."""
    from reward.model import from_language_model
    from stages.data import curriculum
    from stages.data.tokenizer import train_tokenizer
    from stages.models.sizes import build_decoder, decoder_config

    folder = tmp_path_factory.mktemp("race")
    bpe = train_tokenizer([row["text"] for _, row in zip(range(100), curriculum.documents(0), strict=False)], vocab_size=400)
    build_decoder(decoder_config(bpe, hidden_size=32, num_layers=1), seed=0).save_pretrained(folder / "sft")
    bpe.save_pretrained(folder / "sft")
    model = from_language_model(folder / "sft", pad_id=bpe.pad_token_id, seed=0, random_head=True)
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    model.save_pretrained(folder / "reward")
    for split in ("ppo", "validation"):
        rows = [problem.as_row() for _, problem in zip(range(300), curriculum.problems(0, split=split), strict=False)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Race(sft=str(folder / "sft"), reward_model=str(folder / "reward"), problems=str(folder), learning_rate=1e-3, seed=0, share=0.7,
                 iterations=2, batch_size=8, epochs=3, minibatches=2, max_new_tokens=6, generations=4, tasks=(), difficulties=(),
                 eval_problems=5)


def check(found: dict) -> None:
    assert found["reached"] is None and found["seconds"] is None and found["ended"] == "the last iteration"
    assert found["threshold"] == pytest.approx(0.3 * found["start"] + 0.7 * 1.5)
    assert len(found["history"]) == 2 and found["held_out"] == 5 and found["questions"] == 16
    first, second = found["history"]
    assert 0 < first["seconds"] < second["seconds"] and 0 < first["cpu_seconds"] < second["cpu_seconds"]


@pytest.mark.parametrize("variant", ["critic", "trunk", "trl-grpo"])
def test_each_trainer_runs_to_its_last_iteration(variant, terms):
    check(raced.run(variant, terms))


@pytest.mark.skipif(not PEER.exists(), reason=".venv-trl112 is missing: `make study-ppo-peers` makes it")
def test_the_last_ppo_of_trl_runs_on_the_same_terms(terms):
    done = subprocess.run([str(PEER), "-m", "stages.rl.raced", "trl-ppo", json.dumps(asdict(terms))], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    check(found)
    assert found["trl"] == "1.12.0" and found["start"] == raced.run("trunk", replace(terms, iterations=1))["start"]


def test_the_reward_of_peers_is_that_of_the_project(terms):
    from reward.model import score_ids
    from stages.rl.rewards import Response, model_reward

    rows = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14])]
    model = raced.unit_classifier(terms.reward_model)
    ours = model_reward(terms.reward_model, vocab_size=model.config.vocab_size)([Response({}, *row, "", True) for row in rows])
    assert torch.allclose(torch.tensor(score_ids(model, [p + r for p, r in rows])), ours, atol=1e-5) and float(ours.abs().max()) > 1e-3


def test_a_run_ends_at_the_threshold_whatever_the_trainers_loop(terms, monkeypatch):
    monkeypatch.setattr(raced, "gold_scores", lambda responses: [SimpleNamespace(score=1.6) for _ in responses])
    found = raced.run("trl-grpo", replace(terms, iterations=4))
    assert (found["ended"], found["reached"], len(found["history"])) == ("the threshold", 1, 2)
    assert found["seconds"] == found["history"][0]["seconds"]


def test_a_policy_that_cannot_be_sampled_from_is_a_result_and_other_errors_are_not(terms, monkeypatch):
    class Broken:
        def __init__(self, error):
            self.error = error

        def add_callback(self, _):
            pass

        def train(self):
            raise self.error

    policy = load_policy(terms.sft)
    monkeypatch.setattr(raced, "make", lambda *_: (Broken(RuntimeError("probability tensor contains either `inf`, `nan`")), policy))
    found = raced.run("trl-ppo", terms)
    assert found["ended"].startswith("divergence") and found["history"] == [] and found["highest"] == found["start"]
    monkeypatch.setattr(raced, "make", lambda *_: (Broken(RuntimeError("out of memory")), policy))
    with pytest.raises(RuntimeError, match="out of memory"):
        raced.run("trl-ppo", terms)


def test_the_clock_stands_while_the_policy_is_measured(monkeypatch):
    now, golds = {"wall": 0.0, "cpu": 0.0}, iter([1.0, 2.0, 1.0, 2.0, 2.0])

    def spend(seconds):
        now["wall"] += seconds
        now["cpu"] += seconds / 2

    def look():
        spend(100)
        return next(golds)

    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    referee = Referee(look, threshold=1.5, steps=2)
    referee.on_train_begin()
    with pytest.raises(Reached):
        for step in range(1, 11):
            spend(1)
            referee.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert [row["seconds"] for row in referee.history] == [2, 4, 6, 8, 10] and referee.history[-1]["cpu_seconds"] == 5
    assert referee.reached == 4, "one evaluation above the threshold alone is not enough, and the first of two counts"


def line(variant, rate, seed, reached=None, seconds=0.0, highest=1.4):
    history = [{"gold": highest, "seconds": 100.0, "cpu_seconds": 50.0}]
    return {"variant": variant, "learning_rate": rate, "seed": seed, "reached": reached, "highest": highest, "history": history,
            "seconds": seconds if reached else None, "cpu_seconds": seconds / 2 if reached else None, "ended": "the last iteration"}


def test_the_best_rate_needs_the_fewest_iterations_and_else_comes_highest():
    slow, fast, never, higher = line("a", 1, 0, 9, 10), line("a", 2, 0, 5, 30), line("a", 3, 0), line("a", 4, 0, highest=1.45)
    assert best([slow, never, fast, higher]) is fast and best([never, higher]) is higher
    assert best([line("a", 1, 0, 5, 31), fast]) is fast


def test_ratios_to_what_was_not_reached_are_bounds():
    reached, never = line("a", 1, 0, 3, 20.0), line("b", 1, 0)
    assert ratio(reached, line("b", 1, 0, 3, 40.0), "seconds") == ("", 0.5)
    assert ratio(reached, never, "seconds") == ("<", 0.2) and ratio(never, reached, "cpu_seconds") == (">", 5.0)
    assert ratio(never, never, "seconds") is None
    assert summarised([("", 0.25), ("", 1.0)]) == "0.50 (0.25 to 1.00)" and summarised([("", 0.25), ("<", 1.0)]).startswith("<0.50")
    assert summarised([("<", 0.25), (">", 1.0)]) == "-" == summarised([("", 1.0), None])


def test_a_study_tries_rates_at_one_seed_takes_turns_and_is_not_run_twice(monkeypatch, tmp_path, capsys):
    started = []

    def run(command, **settings):
        terms = json.loads(command[4])
        started.append((command[3], terms["learning_rate"], terms["seed"]))
        assert command[0] == (str(peer) if command[3] == "trl-ppo" else sys.executable) and settings["env"]["OMP_NUM_THREADS"] == "1"
        assert Race(**terms).steps == 16 and terms["share"] == 0.7
        at = {"trl-ppo": 20, "trunk": 10, "critic": 8, "trl-grpo": None}[command[3]]
        made = line(command[3], 0, 0, at and at - int(terms["learning_rate"] == 1e-3), 4.0 * (at or 0))
        return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(made)}\n", stderr="")

    peer = tmp_path / "python"
    peer.touch()
    for name, product in (("sft", "model"), ("reward_model", "model"), ("prepare", "problems")):
        (tmp_path / name / product).mkdir(parents=True)
        (tmp_path / name / product / "file").write_text(name)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"products": {product: {"path": product}}}))
    monkeypatch.setattr(study_ppo_peers, "PEER", peer)
    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--learning-rates", "1e-4", "1e-3", "--seeds", "0", "1", "--runs", str(tmp_path / "runs")]
    for name in ("sft", "reward-model", "prepare"):
        flags += [f"--{name}", str(tmp_path / name.replace("-", "_"))]
    study(arguments(flags))
    tried = [(name, rate, 0) for rate in (1e-4, 1e-3) for name in VARIANTS]
    assert started == [*tried, *((name, 1e-4 if name == "trl-grpo" else 1e-3, 1) for name in VARIANTS)]
    shown = capsys.readouterr().out
    assert "budget: 4 trainers, 3 runs each of at most 30 iterations" in shown
    assert "| critic, wall | 0.40 | 0.40 | 0.40 (0.40 to 0.40) |" in shown
    assert "| trl-grpo, wall | >1.25 | >1.25 | >1.25 (1.25 to 1.25) |" in shown
    assert len((tmp_path / "runs" / "study_ppo_peers.jsonl").read_text().splitlines()) == 12
    started.clear()
    study(arguments(flags))
    assert not started
    (tmp_path / "sft" / "model" / "file").write_text("another")
    study(arguments([*flags, "--variants", "trunk"]))
    assert len(started) == 3 and "was made with other settings or models" in capsys.readouterr().out


def test_a_run_that_stops_leaves_no_result(monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr="no memory"))
    with pytest.raises(ValueError, match="stopped: no memory"):
        finished(tmp_path / "run", "trunk", {"learning_rate": 1.0, "seed": 0}, {})
    assert not (tmp_path / "run").exists()


def test_a_report_says_what_was_selected_and_what_was_not_reached():
    shown = report([line("trunk", 1e-4, 0, 3, 20.0), line("trunk", 1e-3, 0), line("trunk", 1e-4, 1, 4, 30.0)])
    assert "seed 0 (selected)" in shown and "seed 1 |" in shown and "not in 1 iterations, the last iteration; highest 1.400" in shown
    assert "0.0001 (an end of those tried)" in shown and "time over" not in shown


def test_both_halves_agree_and_nothing_begins_without_the_peer(monkeypatch, tmp_path):
    given, defaults = arguments([]), Race(sft="", reward_model="", problems="", learning_rate=0, seed=0, share=0)
    assert all(getattr(given, name) == getattr(defaults, name) for name in (
        "iterations", "batch_size", "epochs", "minibatches", "max_new_tokens", "generations", "eval_problems"))
    monkeypatch.setattr(study_ppo_peers, "PEER", tmp_path / "python")
    with pytest.raises(ValueError, match="run `make study-ppo-peers`, which makes it, or leave trl-ppo out"):
        study(given)
    with pytest.raises(ValueError, match="batch_size 64 is not a multiple of generations 5"):
        arguments(["--generations", "5"])
