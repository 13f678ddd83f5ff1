"""The benchmark of evaluation times generation alone, asks both sides the same, and compares with lm-eval at its best."""
import json
from types import SimpleNamespace

import pytest

from prompts.records import Result
from stages.evals import bench_eval
from stages.evals.bench_eval import PEER, arguments, bench, judged, memory, one, plan, rightness, summary


@pytest.fixture
def small(stage, tmp_path):
    """Flags of a run over a random model, small enough for a test."""
    return ["--runs", str(tmp_path), "--difficulties", "1", "2", "--questions", "6", "--num-samples", "4", "--max-tokens", "8",
            "--batch-size", "8", "--threads", "1"]


def run(variant="all", batch_size=8, *, wall=1.0, processor=1.0, chains=(1.0, 0.5), votes=(True, True), prompts="same"):
    return {"variant": variant, "batch_size": batch_size, "questions": 60, "wall_s": wall, "processor_s": processor, "prompts": prompts,
            "chains": list(chains), "votes": list(votes), "unparsed": 0.25, "samples_mean": 16.0, "characters_mean": 40.0,
            "peak_bytes": 2**29}


def test_the_clock_runs_while_answers_are_drawn_and_not_while_the_model_is_loaded(small, monkeypatch):
    from stages.evals import backends, scheduler

    now, load, solve = [0.0], backends.LocalModel.__init__, scheduler.solve

    def later(seconds, work):
        def slow(*arguments, **settings):
            now[0] += seconds
            return work(*arguments, **settings)
        return slow

    monkeypatch.setattr(bench_eval, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 3 * now[0]))
    monkeypatch.setattr(backends.LocalModel, "__init__", later(100, load))
    monkeypatch.setattr(scheduler, "solve", later(2, solve))
    found = one("all", 0, 8, arguments(small))
    assert (found["wall_s"], found["processor_s"]) == (2, 6)


def test_adaptive_stopping_draws_fewer_chains_of_the_same_prompts(small, monkeypatch):
    from stages.evals.backends import LocalModel

    agreed = Result(text="The answer is 4.", prompt_tokens=9, generated_tokens=6, finish="stop")
    monkeypatch.setattr(LocalModel, "generate", lambda self, requests: [agreed] * len(requests))
    given = arguments([*small, "--stop", "window:2"])
    full, adaptive = (one(variant, 3, 8, given) for variant in ("all", "adaptive"))
    assert full["samples_mean"] == 4 and adaptive["samples_mean"] == 2
    assert full["prompts"] == adaptive["prompts"] and len(full["votes"]) == len(adaptive["votes"]) == 6
    assert one("all", 3, 8, arguments([*small, "--task", "chained_variables"]))["prompts"] != full["prompts"]


def test_prompts_that_do_not_fit_are_no_result(small):
    with pytest.raises(ValueError, match="24 chains have no room for 240 tokens"):
        one("all", 0, 8, arguments([*small, "--max-tokens", "240"]))


def test_chains_and_votes_are_judged_by_question():
    rows = [{"id": "a", "answer": "4"}, {"id": "b", "answer": "5"}]
    texts = [["The answer is 4.", "The answer is 7."], ["no idea", "The answer is 6.", "The answer is 5.0."]]
    found = judged(rows, texts, ["4", "6"])
    assert found["chains"] == [0.5, pytest.approx(1 / 3)] and found["votes"] == [True, False]
    assert found["unparsed"] == 0.2 and found["samples_mean"] == 2.5 and found["characters_mean"] == (16 + 16 + 7 + 16 + 18) / 5
    assert bench_eval.voted(rows[0], ["The answer is 7.", "no idea", "The answer is 4.", "The answer is 4"]) == "4"


def test_ratios_are_within_rounds_to_the_batch_size_that_is_best_on_each_clock():
    runs = [run("lm-eval", 64, wall=6, processor=20), run("lm-eval", 256, wall=10, processor=12), run(wall=3, processor=4),
            run("lm-eval", 64, wall=12, processor=40), run("lm-eval", 256, wall=20, processor=24), run(wall=3, processor=4),
            run("lm-eval", 64, wall=6, processor=20), run("lm-eval", 256, wall=10, processor=12), run(wall=2, processor=6)]
    table = summary(runs).splitlines()
    assert table[2].startswith("| lm-eval, batch 64 | 10.0 | 1.00 (1.00 to 1.00) | 3.0 | 0.60 (0.60 to 0.60) | 1.000 | 0.750 |")
    assert table[3].startswith("| lm-eval, batch 256 | 6.0 | 0.60 (0.60 to 0.60) | 5.0 | 1.00 (1.00 to 1.00) |")
    assert table[4].startswith("| all, batch 8 | 20.0 | 3.00 (2.00 to 4.00) |")
    assert "| 15.0 | 3.00 (2.00 to 6.00) | 1.000, +0.000 [+0.000, +0.000] |" in table[4]
    assert summary([run()]).splitlines()[2] == "| all, batch 8 | 60.0 | - | 60.0 | - | 1.000 | 0.750 | 16.0 | 40.0 | 0.250 | 0.50 |"


def test_answers_are_compared_question_by_question():
    """Means over rounds .75, .5 against .25, .5: differences .5 and 0, whose deviation is .3536, and t of one degree of freedom 12.706."""
    own = [run(chains=(1.0, 0.5)), run(chains=(0.5, 0.5))]
    theirs = [run(chains=(0.25, 0.75)), run(chains=(0.25, 0.25))]
    assert rightness(own, theirs, "chains") == "0.625, +0.250 [-2.927, +3.427]"


def test_every_round_has_every_variant_in_an_order_of_its_own():
    steps = list(plan(arguments(["--rounds", "4", "--peer-batch-sizes", "8", "16", "--batch-size", "32"])))
    rounds = [[step[1:] for step in steps if step[0] == number] for number in range(4)]
    assert all(sorted(each) == [("adaptive", 32), ("all", 32), ("lm-eval", 8), ("lm-eval", 16)] for each in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_memory_asks_as_many_questions_as_it_says(small):
    found = memory(30, 8, arguments(small))
    assert found["questions"] == 30 and 0 < found["before_bytes"] <= found["peak_bytes"]


@pytest.mark.parametrize(("given", "message"), [
    (["--num-samples", "1"], "num_samples 1: a vote needs at least 2 chains"),
    (["--questions", "0"], "questions is at least 1, got 0"),
    (["--memory", "0"], "numbers of at least 1"),
    (["--stop", "beta:2"], "beta")])
def test_settings_under_which_nothing_can_be_asked(given, message):
    with pytest.raises(ValueError, match=message):
        arguments(given)


def test_other_prompts_are_other_work(monkeypatch, tmp_path):
    peer = tmp_path / "python"
    peer.touch()
    monkeypatch.setattr(bench_eval, "PEER", peer)
    monkeypatch.setattr(bench_eval, "child", lambda python, what, *_: run(what[0], prompts="other" if python == str(peer) else "same"))
    argv = ["--variants", "all", "lm-eval", "--peer-batch-sizes", "8", "--memory"]
    with pytest.raises(ValueError, match="read other prompts than"):
        bench(arguments(argv), argv)


def test_without_the_peers_environment_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_eval, "PEER", tmp_path / "python")
    monkeypatch.setattr(bench_eval, "child", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match="run `make bench-eval`, which makes it, or leave lm-eval out"):
        bench(arguments([]), [])


@pytest.mark.skipif(not PEER.exists(), reason=".venv-lm-eval is missing: `make bench-eval` makes it")
@pytest.mark.slow
@pytest.mark.parametrize("model", ["sft", "base"])
def test_lm_eval_is_asked_the_same_as_often(small, capsys, model):
    argv = [*small, "--model", model, "--rounds", "1", "--variants", "all", "lm-eval", "--peer-batch-sizes", "8", "--memory", "5"]
    bench(arguments(argv), argv)
    lines = capsys.readouterr().out.splitlines()
    found = {made["variant"]: made for line in lines if line.startswith("{") for made in [json.loads(line)]}
    assert lines[0].startswith("budget: 2 runs in 1 rounds, 6 questions of 4 chains each") and "| variant | questions/s |" in "".join(lines)
    assert found["memory"]["questions"] == 5 and "chains" not in found["all"]
    ours, theirs = found["all"], found["lm-eval"]
    assert theirs["prompts"] == ours["prompts"] and theirs["samples_mean"] == ours["samples_mean"] == 4 and theirs["lm_eval"]
    assert min(made[clock] for made in (ours, theirs) for clock in ("wall_s", "processor_s")) > 0
