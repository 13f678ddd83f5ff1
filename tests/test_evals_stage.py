"""Scheduler, local model, stage and study: the same figures whatever batches, kills and processes, recomputed from raw files."""
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prompts import strategies
from prompts.strategies import Request, Result
from prompts.templates import DIRECT, WORKED, Style
from stages import evaluation
from stages.data import curriculum
from stages.data.tokenizer import END, train_tokenizer
from stages.evals import recorded, scoring, study_sc
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.models.sizes import build_decoder, decoder_config
from stages.models.training import save_model

PLAIN = Style(chat=False, cues=curriculum.CUES, max_tokens={WORKED: 24, DIRECT: 8})
CHAT = Style(chat=True, cues=curriculum.CUES, max_tokens={WORKED: 24, DIRECT: 8})


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random two-layer model with the project's tokenizer, saved as stages save theirs. Its answers mean nothing."""
    folder = tmp_path_factory.mktemp("model")
    documents = [d["text"] for d in itertools.islice(curriculum.documents(0), 300)]
    tokenizer = train_tokenizer(documents, vocab_size=500, context_length=256)
    config = decoder_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2, context_length=256)
    model = build_decoder(config, seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():  # zeroed projections would make it a bigram model of nothing
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def rows():
    return [p.as_row() for p in itertools.islice(curriculum.problems(0, split="test", difficulties=(1, 2)), 12)]


def test_solutions_do_not_depend_on_order_or_batches(model_folder, rows):
    def run(order, batch_size):
        backend = LocalModel(model_folder, seed=3, batch_size=batch_size)
        made = [strategies.self_consistency(rows[i], CHAT, n=3, temperature=1.0) for i in order]
        return dict(zip(order, solve(made, backend, batch_size=2 * batch_size), strict=True))

    order = list(range(len(rows)))
    first = run(order, 64)
    random.Random(0).shuffle(order)
    assert run(order, 5) == first
    assert len({sample.text for s in first.values() for sample in s.samples}) > len(rows)  # samples do differ


def test_scheduler_runs_rounds_side_by_side(rows):
    batches = []

    def backend(requests):
        batches.append(len(requests))
        return [Result(text="The answer is 1." if r.key == rows[0]["id"] else f"The answer is {r.sample}.", tokens=1, finished=True)
                for r in requests]

    seen = []
    solved = solve([strategies.self_consistency(row, PLAIN, n=4, temperature=1.0, round_size=2) for row in rows[:2]]
                   + [strategies.direct(rows[2], PLAIN)], backend, batch_size=3, advance=seen.append)
    assert batches == [3, 2, 3, 1] == seen  # 2 + 2 + 1 asked at first, then 2 + 2: two agreeing votes of four settle nothing
    assert [s.answer for s in solved] == ["1", "0", "0"] and [s.tie for s in solved] == [False, True, False]
    with pytest.raises(ValueError, match="1 requests but 0 results"):
        solve([strategies.direct(rows[2], PLAIN)], lambda requests: [], batch_size=3)


def test_answers_end_at_stop_text_and_end_token(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    encode = backend.tokenizer.encode
    end = backend.tokenizer.convert_tokens_to_ids(END)
    assert backend.end_of_turn == [end] and backend.end_of_text == [backend.tokenizer.eos_token_id] != [end]
    answer = encode(" The answer is 7.")
    assert backend.read([*answer, end], [end], ()) == Result(text=" The answer is 7.", tokens=len(answer) + 1, finished=True)
    assert backend.read(answer, [end], ()) == Result(text=" The answer is 7.", tokens=len(answer), finished=False)
    longer = encode(" The answer is 7.\n\nQuestion: Tom")
    assert backend.read(longer, [end], PLAIN.stop) == Result(text=" The answer is 7.", tokens=len(longer), finished=True)
    assert encode("\n\n")[0] in backend.stop_ids(PLAIN.stop) and encode(" Tom")[0] not in backend.stop_ids(PLAIN.stop)


def test_prompt_without_room_is_not_cut_but_counted(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    short, long = (Request(prompt="Tom has 1. " * n, key=str(n), max_tokens=4) for n in (1, 200))
    results = backend([long, short])
    assert results[0] == Result(text="", tokens=0, finished=False) and results[1].tokens > 0 and backend.too_long == 1


def test_chat_needs_a_template(model_folder):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    backend.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="evaluate it as `base`"):
        backend([Request(prompt=({"role": "user", "content": "Hi"},), key="a")])


@pytest.fixture
def stage(model_folder, tmp_path):
    """A config of the stage over parents that all hold the random model."""
    problems = tmp_path / "prepare" / "problems"
    problems.mkdir(parents=True)
    for split, drawn_from in (("sft", "train"), ("test", "test")):
        made = {p.id: p.as_row() for p in itertools.islice(curriculum.problems(0, split=drawn_from, difficulties=(1, 2)), 200)}
        (problems / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made.values()))
    own = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for parent, product in [("prepare", {"problems": {"path": "problems"}}), *((name, {"model": {"path": str(model_folder)}})
                                                                              for name in ("pretrain", "sft", "ppo"))]:
        (tmp_path / parent).mkdir(exist_ok=True)
        (tmp_path / parent / "manifest.json").write_text(json.dumps(
            {"stage": parent, "fingerprint": f"sha256:{parent}", "products": product}))
    settings = {"models": {"base": ["direct", "few_shot_cot"], "sft": ["zero_shot_cot", "self_consistency"], "ppo": ["zero_shot_cot"]},
                "tasks": ["word_problems", f"own=gsm8k:{tmp_path / 'own.jsonl'}"], "difficulties": [1, 2], "num_problems": 7, "shots": 1,
                "num_samples": 3, "max_tokens_worked": 12, "max_tokens_direct": 6, "batch_size": 16, "seed": 5,
                "parents": {name: str(tmp_path / name) for name in evaluation.EvaluationConfig.PARENTS}}
    return lambda name="evaluation", **more: evaluation.EvaluationConfig(run_dir=str(tmp_path / name), **settings | more)


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
    same = next(c for c in pooled if c["a"] == "ppo/zero_shot_cot")  # both are the same model here
    assert same["difference"] == 0 and same["p"] == 1.0 and same["n"] == 14
    assert evaluation.main(stage()).fingerprint == manifest.fingerprint  # finished: nothing runs again


def test_other_words_in_a_prompt_are_another_run(stage, monkeypatch):
    config = stage(models={"base": ["direct"]})
    before = evaluation.main(config).fingerprint
    monkeypatch.setattr(strategies, "render", lambda question, *more: f"Q: {question}")
    assert evaluation.main(config).fingerprint != before


def test_an_interrupted_run_continues_where_it_was(stage, monkeypatch):
    whole = evaluation.main(stage("whole"))
    write, written = scoring.write_records, []

    def write_and_stop(path, records):
        write(path, records)
        written.append(path.name)
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "write_records", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(stage("killed"))
    continued = evaluation.main(stage("killed"))
    assert len(written) == 10  # 4 cells before, the other 6 after, none twice
    assert continued.metrics == whole.metrics


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(stage, tmp_path):
    config = stage("two")
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps({k: v for k, v in vars(config).items() if k != "recipe"}))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541",
                           "-m", "stages.evaluation", "--config", str(recipe)], cwd=Path(__file__).parents[1], timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert evaluation.main(config).metrics == evaluation.main(stage("one")).metrics


@pytest.mark.parametrize("change, message", [
    ({"models": {"bse": ["direct"]}}, "unknown model 'bse' in models: choose from base"),
    ({"models": {"base": ["cot"]}}, "unknown strategy 'cot' for base: choose from direct"),
    ({"models": {"base": []}}, "nothing to evaluate"), ({"tasks": []}, "nothing to evaluate"),
    ({"cues": {"wroked": "x"}}, "unknown cue 'wroked'"),
    ({"tasks": ["word_problems", "word_problems"]}, "two tasks are called")])
def test_bad_settings(stage, change, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(stage(**change))


def test_a_cell_without_room_stays_missing(stage, capsys):
    manifest = evaluation.main(stage(max_tokens_worked=250, models={"base": ["direct", "few_shot_cot"]}, tasks=["word_problems"]))
    assert "7 prompts leave no room" in capsys.readouterr().out
    assert "base/word_problems/direct" in manifest.metrics and "base/word_problems/few_shot_cot" not in manifest.metrics


def test_chains_of_the_study_share_their_examples():
    asked = []

    class Backend:
        batch_size, too_long = 8, 0

        def __call__(self, requests):
            asked.extend(requests)
            return [Result(text="The answer is 1.", tokens=4, finished=True) for _ in requests]

    rows = study_sc.fresh("test", "word_problems", 2, 0, 3)
    made = study_sc.measure(Backend(), PLAIN, rows, 2, 0.5, "", shots=2)
    assert len(asked) == 3 * 3 and len(made["vote"]) == len(made["greedy"]) == 3
    for row in rows:
        prompts = {r.prompt for r in asked if r.key == row["id"]}
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
