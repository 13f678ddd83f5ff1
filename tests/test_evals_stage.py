"""Scheduler, local model, stage and study: the same figures whatever batches, kills and processes, recomputed from raw files."""
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prompts import strategies
from prompts.critique import critique_redo, self_refine
from prompts.records import Request, Result
from prompts.search import Search, tree_of_thought
from prompts.templates import DIRECT, WORKED, Style
from prompts.thoughts import worked_steps
from stages import evaluation
from stages.data import curriculum
from stages.data.corpora import read_rows
from stages.data.problems import load_problems
from stages.data.tokenizer import END
from stages.evals import asking, journal, recorded, scoring, study_sc
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.run.manifest import hash_data

PLAIN = Style(chat=False, cues=curriculum.CUES, max_tokens={WORKED: 24, DIRECT: 8})
CHAT = Style(chat=True, cues=curriculum.CUES, max_tokens={WORKED: 24, DIRECT: 8})


@pytest.fixture(scope="session")
def rows():
    return [p.as_row() for p in itertools.islice(curriculum.problems(0, split="test", difficulties=(1, 2)), 12)]


def test_solutions_do_not_depend_on_order_batches_or_processes(model_folder, rows):
    """Every kind of strategy, on a model: a draw belongs to (seed, task, question, stage, sample) and to nothing else."""
    def judge(asked):
        return [Result(text="", prompt_tokens=1, generated_tokens=0, finish="stop", score=float(len(a.response) % 7)) for a in asked]

    def make(row):
        puzzle = worked_steps(row, PLAIN, step_tokens=6)
        return [strategies.self_consistency(row, CHAT, n=3, temperature=1.0),
                strategies.self_consistency(row, PLAIN, n=4, temperature=1.0, stop="beta:0.9"),
                strategies.two_stage_cot(row, PLAIN), strategies.best_of_n(row, CHAT, n=3, temperature=1.0),
                self_refine(row, CHAT, rounds=1), critique_redo(row, CHAT, rounds=1, temperature=1.0, find=lambda steps: len(steps) // 2),
                tree_of_thought(row, PLAIN, puzzle, Search(judge="value", width=2, beam=2, depth=2, judgements=2))]

    def run(order, batch_size, seed=3):
        backend = LocalModel(model_folder, seed=seed, batch_size=batch_size)
        solved = solve([s for i in order for s in make(rows[i])], backend, batch_size=2 * batch_size, judge=judge)
        return {i: solved[7 * at:7 * at + 7] for at, i in enumerate(order)}

    order = list(range(6))
    first = run(order, 64)
    random.Random(0).shuffle(order)
    assert run(order, 3) == first
    assert run(order[0::2], 64) | run(order[1::2], 64) == first  # as two processes share them
    assert run(order, 64, seed=4) != first
    assert len({sample.text for s in first.values() for sample in s[0].samples}) > len(order)  # samples do differ
    requests = [step.asked for solved in first.values() for s in solved for step in s.trace if isinstance(step.asked, Request)]
    sampled = {(r.key, r.sample): r.prompt for r in requests if r.temperature}
    assert all(sampled[r.key, r.sample] == r.prompt or isinstance(r.prompt, str) != isinstance(sampled[r.key, r.sample], str)
               for r in requests if r.temperature)  # no two prompts of one style share a draw


def test_scheduler_runs_rounds_side_by_side(rows):
    batches = []

    class Backend:
        def generate(self, requests):
            batches.append(len(requests))
            return [Result(text="The answer is 1." if r.question == rows[0]["id"] else f"The answer is {r.sample}.", prompt_tokens=2,
                           generated_tokens=1, finish="stop") for r in requests]

    seen = []
    solved = solve([strategies.self_consistency(row, PLAIN, n=4, temperature=1.0, round_size=2) for row in rows[:2]]
                   + [strategies.direct(rows[2], PLAIN)], Backend(), batch_size=3, advance=seen.append)
    assert batches == [3, 3, 3] == seen  # 2 + 1, then the second round of the first beside the rest, then what is left
    assert [s.answer for s in solved] == ["1", "0", "0"] and [s.tie for s in solved] == [False, True, False]
    with pytest.raises(ValueError, match="1 requests but 0 results"):
        solve([strategies.direct(rows[2], PLAIN)], SimpleNamespace(generate=lambda requests: []), batch_size=3)


def test_answers_end_at_stop_text_and_end_token(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    encode = backend.tokenizer.encode
    end = backend.tokenizer.convert_tokens_to_ids(END)
    assert backend.end_of_turn == [end] and backend.end_of_text == [backend.tokenizer.eos_token_id] != [end]
    answer = encode(" The answer is 7.")

    def said(tokens, finish):
        return Result(text=" The answer is 7.", prompt_tokens=0, generated_tokens=tokens, finish=finish)

    assert backend.read([*answer, end], [end], ()) == said(len(answer) + 1, finish="stop")
    assert backend.read(answer, [end], ()) == said(len(answer), finish="length")
    longer = encode(" The answer is 7.\n\nQuestion: Tom")
    assert backend.read(longer, [end], PLAIN.stop) == said(len(longer), finish="stop")
    assert encode("\n\n")[0] in backend.stop_ids(PLAIN.stop) and encode(" Tom")[0] not in backend.stop_ids(PLAIN.stop)


def test_prompt_without_room_is_not_cut_but_counted(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    short, long = (Request(prompt="Tom has 1. " * n, question=str(n), max_tokens=4) for n in (1, 200))
    results = backend.generate([long, short])
    assert results[0] == Result(text="", prompt_tokens=0, generated_tokens=0, finish="too_long")
    assert results[1].generated_tokens > 0 and results[1].prompt_tokens == len(backend.encode(short.prompt))
    assert backend.too_long == 1


def test_chat_needs_a_template(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    backend.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="evaluate it as `base`"):
        backend.generate([Request(prompt=({"role": "user", "content": "Hi"},), question="a")])


def test_every_figure_recomputes_from_the_items(stage):
    manifest = evaluation.main(stage())
    results = json.loads(manifest.product("results").read_text())
    assert len(results["cells"]) == 2 * 5 + 2  # one sampled chain stands beside each vote
    for cell in results["cells"]:
        name = f"{cell['model']}/{cell['task']}/{cell['strategy']}"
        assert manifest.metrics[name]["value"] == cell["accuracy"] and manifest.metrics[name]["n"] == cell["n"] == 7
        if cell["strategy"] == scoring.SAMPLED:
            continue
        file = manifest.path / cell["items"]
        scored = recorded.score(file)
        assert {key: scored[key] for key in ("accuracy", "wilson95", "n", "unparsed", "ties", "tokens_mean")} == \
            {key: cell[key] for key in ("accuracy", "wilson95", "n", "unparsed", "ties", "tokens_mean")}
        assert {len(json.loads(line)["samples"]) for line in file.read_text().splitlines()} == \
            {3 if cell["strategy"] == "self_consistency" else 1}
    pooled = [c for c in results["comparisons"] if c["task"] == "all"]
    assert {(c["a"], c["b"]) for c in pooled} == {("sft/self_consistency", "sft/zero_shot_cot"), ("ppo/zero_shot_cot", "sft/zero_shot_cot"),
                                                 ("sft/self_consistency", "sft/sampled_cot")}
    assert {(of["model"], of["task"]) for of in results["frontier"]} == {(m, t) for m in ("base", "sft") for t in ("word_problems", "own")}
    vote = next(of for of in results["frontier"] if of["model"] == "sft")["points"]
    assert [(p["strategy"], p["k"]) for p in vote] == [("zero_shot_cot", None), *[("self_consistency", k) for k in (1, 2, 3)]]
    assert vote[1]["accuracy"] == next(c for c in results["cells"] if c["strategy"] == scoring.SAMPLED)["accuracy"]
    assert len(results["pairs"]) == 2 * (1 + 3 + 1)  # base, sft with its single chains, ppo against sft
    same = next(c for c in pooled if c["a"] == "ppo/zero_shot_cot")  # both are the same model here
    assert same["difference"] == 0 and same["p"] == 1.0 and same["n"] == 14
    assert results["contamination"] == {}  # all text is the curriculum's
    assert evaluation.main(stage()).fingerprint == manifest.fingerprint  # finished: nothing runs again


@pytest.mark.parametrize(("looked_for", "unknown"), [
    ((), ["word_problems", "own"]), (("problems/test",), ["own"]), (("quiz",), ["word_problems"]), (("problems/test", "quiz"), [])])
def test_sets_that_prepare_did_not_look_for_are_named(stage, tmp_path, capsys, looked_for, unknown):
    """A set is known by its rows: prepare called it quiz, and the evaluation calls it own."""
    config, file = stage(models={"base": ["direct"]}), tmp_path / "prepare" / "manifest.json"
    counted = {"questions": 7, "found": 2, "documents": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "config": {"sources": ["curriculum", "web.txt"]},
        "notes": {"contamination": {name: counted | {"examples": []} for name in looked_for}},
        "inputs": {"evaluation set quiz": hash_data(load_problems(config.tasks[1], hub_split="test"))}}))
    results = json.loads(evaluation.main(config).product("results").read_text())
    assert results["contamination"] == {name: None if name in unknown else counted for name in ("word_problems", "own")}
    said = [line for line in capsys.readouterr().out.splitlines() if "was not searched" in line]
    assert bool(said) == bool(unknown) and all(f"the questions of {', '.join(unknown)}, so" in line for line in said)


def test_other_words_in_a_prompt_are_another_run(stage, monkeypatch):
    config = stage(models={"base": ["direct"]})
    before = evaluation.main(config).fingerprint
    monkeypatch.setattr(strategies, "render", lambda question, *more: f"Q: {question}")
    assert evaluation.main(config).fingerprint != before


def test_an_interrupted_run_keeps_every_finished_question(stage, monkeypatch):
    generate, requests = LocalModel.generate, []
    monkeypatch.setattr(LocalModel, "generate", lambda self, batch: requests.extend(batch) or generate(self, batch))
    whole = evaluation.main(stage("whole"))
    in_all = len(requests)
    append, kept = journal.Journal.append, []

    def append_and_stop(self, record):
        append(self, record)
        kept.append(record)
        if len(kept) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "append", append_and_stop)
    killed = stage("killed")
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(killed)
    [*_, part] = sorted(Path(f"{killed.run_dir}.partial").glob("asked/*/*/*.jsonl"), key=lambda path: path.stat().st_mtime)
    with part.open("a") as file:
        file.write('{"id": "cut off in the mid')  # what a kill in the middle of a write leaves
    requests.clear()
    continued = evaluation.main(killed)
    assert len(requests) == in_all - sum(record["cost"]["requests"] for record in kept[:20])  # none of these is asked again
    assert len(kept) == 2 * 5 * 7 and continued.metrics == whole.metrics
    assert not (continued.path / "asked").exists()


ALL = {"models": {"sft": list(asking.STRATEGIES)}, "tasks": ["word_problems"], "budget": 20, "refine_rounds": 1,
       "tree": {"width": 2, "depth": 3}, "step_tokens": 6}


def test_every_strategy_runs_and_costs_no_more_than_announced(stage, capsys):
    config = stage(**ALL)
    manifest = evaluation.main(config)
    said = capsys.readouterr().out
    results = json.loads(manifest.product("results").read_text())
    cells = {cell["strategy"]: cell for cell in results["cells"]}
    assert set(cells) == {*asking.STRATEGIES, scoring.SAMPLED}
    rows = {row["id"]: row for _, row in read_rows(Path(config.parents["prepare"]) / "problems" / "test.jsonl")}
    for name in asking.STRATEGIES:
        records = [json.loads(line) for line in (manifest.path / cells[name]["items"]).read_text().splitlines()]
        requests, tokens = asking.at_most(config, rows[records[0]["id"]], name)
        [line] = [line.split() for line in said.splitlines() if line.split()[2:4] == [name, "7"]]  # of the announcement
        assert line[4] == f"{7 * requests:,}" and line[6] == f"{7 * tokens:,}"
        if name in ("direct", "self_consistency"):  # nothing is added to their prompts on the way
            assert int(line[5]) == pytest.approx(sum(r["cost"]["prompt_tokens"] for r in records), abs=1)
        assert cells[name]["tokens_mean"] <= tokens and all(r["cost"]["requests"] <= requests for r in records)
        for r in records:  # the ledger holds the samples and everything else that was asked
            own = [s for s in r["samples"] if s["prompt_tokens"]] + r.get("steps", [])
            assert r["cost"] == {"requests": len(own), "prompt_tokens": sum(s["prompt_tokens"] for s in own),
                                 "generated_tokens": sum(s["tokens"] for s in own)}, name
    both = [cells[name] for name in ("best_of_n", "self_consistency")]
    assert both[0]["tokens_mean"] == both[1]["tokens_mean"]  # the same chains, asked by two strategies
    again = evaluation.main(stage("again", batch_size=3, **ALL))
    assert again.metrics == manifest.metrics


def test_a_killed_budget_goes_on_with_the_chains_it_had_drawn(stage, monkeypatch):
    settings = {"models": {"sft": ["budgeted"]}, "tasks": ["word_problems"], "budget": 60, "batch_size": 1}
    generate, asked = LocalModel.generate, []

    def generate_and_stop(self, requests):
        if len(asked) >= 20:
            raise KeyboardInterrupt
        asked.extend((r.key, r.sample) for r in requests)
        return generate(self, requests)

    whole = evaluation.main(stage("whole", **settings))
    monkeypatch.setattr(LocalModel, "generate", generate_and_stop)
    killed = stage("killed", **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(killed)
    monkeypatch.setattr(LocalModel, "generate", lambda self, requests: asked.extend(
        (r.key, r.sample) for r in requests) or generate(self, requests))
    assert evaluation.main(killed).metrics == whole.metrics
    total = sum(json.loads(line)["cost"]["requests"] for line in (whole.path / "results/sft/word_problems.budgeted.jsonl").open())
    assert len(asked) <= total + 7 and len(set(asked)) == total  # only the round in flight was lost, not the three before it


def test_game_of_24_is_searched_by_proposals_and_values(stage, tmp_path, monkeypatch):
    """A model that knows the game, in the place of the random one: the tree finds what the task's own judge accepts."""
    def generate(self, requests):
        results = []
        for request in requests:
            numbers = request.prompt[0]["content"].rpartition("Numbers: ")[2].split("\n")[0].split()
            text = "sure" if request.stage.startswith("value") else "\n".join(
                f"{a} {sign} {b} = {eval(a + sign + b)}" for i, a in enumerate(numbers) for j, b in enumerate(numbers)
                if i != j and "/" not in a + b for sign in "*+-")
            if request.stage.startswith("value") and len(numbers) == 1 and numbers != ["24"]:
                text = "impossible"
            results.append(Result(text=text, prompt_tokens=9, generated_tokens=9, finish="stop"))
        return results

    monkeypatch.setattr(LocalModel, "generate", generate)
    (tmp_path / "24.csv").write_text("Rank,Puzzles\n1,1 1 4 6\n2,2 3 4 1\n")
    config = stage(models={"sft": ["tree_of_thought"]}, tasks=[f"game24:{tmp_path / '24.csv'}"], num_problems=0,
                   tree={"width": 40, "beam": 60, "judgements": 1})
    manifest = evaluation.main(config)
    assert "reward_model" not in manifest.data["parents"]
    assert manifest.metrics["sft/game24/tree_of_thought"]["value"] == 1
    record = json.loads((manifest.path / "results/sft/game24.tree_of_thought.jsonl").read_text().splitlines()[0])
    assert record["answer_type"] == "expression" and {step["stage"].partition("/")[0] for step in record["steps"]} == {"thought", "value"}


def test_a_strategy_that_needs_the_reward_model_needs_its_run(stage, tmp_path):
    (tmp_path / "reward_model" / "manifest.json").unlink()
    evaluation.main(stage(models={"sft": ["direct"]}))
    with pytest.raises(ValueError, match=r"no finished run in .*reward_model"):
        evaluation.main(stage(models={"sft": ["best_of_n"]}))


def test_a_whole_file_needs_every_question(tmp_path):
    for process, ids in ((0, "ac"), (1, "b")):
        part = journal.Journal(tmp_path / "parts", process)
        for id in ids:
            part.append({"id": id})
        part.close()
    with pytest.raises(ValueError, match="lacks 1 of 4 questions, 'd' for one"):
        journal.merge(tmp_path / "parts", tmp_path / "whole.jsonl", "abcd")
    journal.merge(tmp_path / "parts", tmp_path / "whole.jsonl", "cba")
    assert [json.loads(line)["id"] for line in (tmp_path / "whole.jsonl").read_text().splitlines()] == ["c", "b", "a"]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jsonl").write_text('{"id": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"0.jsonl, line 2 is not a record"):
        journal.places(tmp_path / "bad")


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(stage, tmp_path):
    config = stage("two", **ALL)
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps({k: v for k, v in vars(config).items() if k != "recipe"}))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541",
                           "-m", "stages.evaluation", "--config", str(recipe)], cwd=Path(__file__).parents[1], timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one = evaluation.main(stage("one", **ALL))
    assert evaluation.main(config).metrics == one.metrics
    for name in asking.STRATEGIES:
        files = [folder / "results" / "sft" / f"word_problems.{name}.jsonl" for folder in (one.path, Path(config.run_dir))]
        lines = [re.sub(r'"score": [^,}]*', "", file.read_text()) for file in files]  # scores differ by float error, with the batch
        assert lines[0] == lines[1], name


@pytest.mark.parametrize("change, message", [
    ({"models": {"bse": ["direct"]}}, "unknown model 'bse' in models: choose from base"),
    ({"models": {"base": ["cot"]}}, "unknown strategy 'cot' for base: choose from direct"),
    ({"models": {"base": []}}, "nothing to evaluate"), ({"tasks": []}, "nothing to evaluate"),
    ({"cues": {"wroked": "x"}}, "unknown cue 'wroked'"),
    ({"models": {"endpoint": ["direct"]}, "endpoint": {"url": "http://x", "model": "m", "timeout": 3}},
     "unknown setting 'timeout' of endpoint"),
    ({"models": {"sft": ["budgeted"]}, "budget": 9, "max_tokens_worked": 24}, "does not pay for one worked answer"),
    ({"tree": {"width": 3, "beem": 2}}, "unknown key 'beem', did you mean 'beam'"), ({"stop": "gamma:1"}, "unknown stopping rule"),
    ({"tasks": ["word_problems", "word_problems"]}, "two tasks are called")])
def test_bad_settings(stage, change, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(stage(**change))


def test_a_cell_without_room_stays_missing(stage, capsys):
    manifest = evaluation.main(stage(max_tokens_worked=250, models={"base": ["direct", "few_shot_cot"]}, tasks=["word_problems"]))
    assert "7 prompts leave no room" in capsys.readouterr().out
    assert "base/word_problems/direct" in manifest.metrics and "base/word_problems/few_shot_cot" not in manifest.metrics


def test_a_search_without_room_stays_missing(stage, capsys):
    tree = {"thoughts": "sample", "judge": "value", "width": 2, "depth": 2, "beam": 1}
    manifest = evaluation.main(stage(step_tokens=250, models={"sft": ["direct", "tree_of_thought"]}, tree=tree, tasks=["word_problems"]))
    assert "tree_of_thought: 14 prompts leave no room" in capsys.readouterr().out
    assert "sft/word_problems/direct" in manifest.metrics and "sft/word_problems/tree_of_thought" not in manifest.metrics


def test_chains_of_the_study_share_their_examples():
    asked = []

    class Backend:
        batch_size, too_long = 8, 0

        def generate(self, requests):
            asked.extend(requests)
            return [Result(text="The answer is 1.", prompt_tokens=3, generated_tokens=4, finish="stop") for _ in requests]

    rows = study_sc.fresh("test", "word_problems", 2, 0, 3)
    made = study_sc.measure(Backend(), PLAIN, rows, 2, 0.5, "", shots=2)
    assert len(asked) == 3 * 3 and len(made["vote"]) == len(made["greedy"]) == 3
    for row in rows:
        prompts = {r.prompt for r in asked if r.question == row["id"]}
        assert len(prompts) == 1 and prompts.pop().count(curriculum.CUES["worked"]) == 3  # two examples and the question


def test_study_continues_and_seeds_have_problems_of_their_own(stage, tmp_path, capsys):
    out = tmp_path / "study.jsonl"
    given = study_sc.arguments(["--runs", stage().parents["sft"], "--seeds", "0", "1", "--problems", "5", "--num-samples", "2",
                                "--tasks", "word_problems", "--difficulties", "1", "2", "--range", "0", "1", "--probe", "3",
                                "--max-tokens", "8", "--out", str(out)])
    study_sc.study(given)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    cells = [line for line in lines if line["kind"] == "cell"]
    assert [(c["seed"], c["difficulty"], c["n"], len(c["vote"]), len(c["sampled"])) for c in cells] == [
        (0, 1, 3, 3, 3), (0, 2, 2, 2, 2), (1, 1, 3, 3, 3), (1, 2, 2, 2, 2)]
    assert capsys.readouterr().out.startswith("budget: 2 x 5 problems x 3 chains")
    out.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))  # as a kill before the last measurement leaves it
    study_sc.study(given)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[:-1] == lines[:-1] and {**again[-1], "wall_s": 0} == {**lines[-1], "wall_s": 0}
    first, second = ({row["id"] for row in study_sc.fresh("test", "word_problems", 2, start, 5)} for start in (0, 5))
    assert len(first) == len(second) == 5 and not first & second
    given.range = [0.98, 0.99]
    with pytest.raises(ValueError, match="nowhere between"):
        study_sc.study(given)
