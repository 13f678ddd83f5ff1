"""The study of critique: what it starts and asks, on a random model, and its figures by hand. No stage trains here."""
import itertools
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from prompts.records import Result, Solution
from stages import evaluation
from stages.data.corpora import read_rows
from stages.data.curriculum import CUES
from stages.data.planted import TASKS, complete, first_wrong
from stages.evals import studies, study_critique
from stages.evals.study_critique import ARMS, PLAIN, SURPRISE, arguments, below, bought, found, fresh, least_likely, report
from stages.run.config import load_config
from stages.sft import SftConfig

SIZES = ["--critiques", "40", "--replay", "10", "--chains", "4", "--problems", "2", "--num-samples", "2"]


@pytest.fixture
def study(model_folder, tmp_path, monkeypatch):
    """Runs the study on a random model: SFT runs are made up, evaluations are real. Returns the config of each stage started."""
    started, run = [], subprocess.run

    def make(command, **settings):
        if command[1] != "-m":  # a real stage asks git for its commit
            return run(command, **settings)
        name, flags = command[2].split(".")[1], dict(zip(command[5::2], command[6::2], strict=True))
        config = load_config({"sft": SftConfig, "evaluation": evaluation.EvaluationConfig}[name],
                             ["--config", f"recipes/tiny/{name}.yaml", *itertools.chain(*flags.items())])
        started.append((name, config))
        if name == "sft":
            manifest(Path(config.run_dir), "model")
        else:
            evaluation.main(config)
        return subprocess.CompletedProcess(command, 0)

    def manifest(folder, product):
        folder.mkdir(parents=True, exist_ok=True)
        if product == "model":
            shutil.copytree(model_folder, folder / product, dirs_exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({"stage": folder.name, "fingerprint": f"sha256:{folder.name}",
                                                          "products": {product: {"path": product}}, "config": {"sources": ["curriculum"]}}))

    manifest(tmp_path / "prepare", "problems")
    manifest(tmp_path / "sft", "model")
    monkeypatch.setattr(studies.subprocess, "run", make)
    monkeypatch.setattr(study_critique, "REVIEW_TOKENS", {"worked": 8, "direct": 4})
    monkeypatch.setattr(study_critique, "own_chains", lambda given, split, tasks, seed, count, wrong: study_critique.chains_of(
        given, "planted", split, tasks, seed, count, wrong))  # the random model never states an answer
    mistakes = tmp_path / "mistakes.jsonl"
    mistakes.write_text(json.dumps({"input": "1 + 1 =", "steps": ["1 + 1 = 3."], "target": "2", "answer": "3", "mistake_index": 0}) + "\n")

    def start(*more):
        study_critique.study(arguments(["--seeds", "0", "--prepare", str(tmp_path / "prepare"), "--sft", str(tmp_path / "sft"), "--runs",
                                        str(tmp_path / "runs"), "--mistakes", str(mistakes), *SIZES, *more]))
        return started
    return start


@pytest.mark.slow
def test_the_study_on_a_random_model(study, tmp_path, capsys):
    started = study("--arms", "planted", "results")
    shown = capsys.readouterr().out
    assert "budget: 2 critics trained on 50 dialogues, 4 sets of reviews, 2 of answers" in shown
    assert [name for name, _ in started] == ["evaluation", "sft", "evaluation", "sft", "evaluation"]
    critics = [config for name, config in started if name == "sft"]
    assert {c.parents["pretrain"] for c in critics} == {str(tmp_path / "sft")} and {c.num_rows for c in critics} == {50}
    assert {key for key in vars(critics[0]) if vars(critics[0])[key] != vars(critics[1])[key]} == {"run_dir", "sources"}
    rows = [row for _, row in read_rows(Path(critics[0].sources[0]["data"]))]
    assert len(rows) == 40 and 15 <= Counter(row["completion"] == "The answer is no mistake." or row["completion"].endswith("no mistake.")
                                             for row in rows)[False] <= 38
    lines = [json.loads(line) for line in (tmp_path / "runs/study_critique.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["arm"]) for line in lines] == [
        ("reviews", SURPRISE), ("reviews", PLAIN), ("answers", PLAIN), ("reviews", "planted"), ("answers", "planted"),
        ("reviews", "results")]
    asked_for = {f"{sort}_{task}" for sort in ARMS for task in TASKS}
    assert set(lines[1]["figures"]) == {f"{name}.{words}" for name in (*asked_for, "bigbench") for words in ("direct", "zero_shot_cot")}
    assert all(f["n"] == 4 for name, f in lines[1]["figures"].items() if not name.startswith("bigbench"))
    for line, own in ((lines[2], ["surprise"]), (lines[4], ["worked", "bare"])):
        redone = [*own, "verifier"]
        assert set(line["figures"]) == {f"{task}.{name}" for task in TASKS for name in (
            "zero_shot_cot", "self_consistency", "self_refine", *redone, *(f"sampled_{name}" for name in redone))}
    assert "| bigbench | none | direct | 1 |" in shown and "| word_problems, critic planted | accuracy |" in shown

    before = {path: path.stat().st_mtime_ns for path in map(Path, lines[4]["files"])}
    Path(lines[4]["files"][0]).unlink()
    study("--arms", "planted", "results")  # the same command goes on: what is there stays, and the figures are the same
    assert [json.loads(line) for line in (tmp_path / "runs/study_critique.jsonl").read_text().splitlines()] == lines
    assert [path.stat().st_mtime_ns == time for path, time in before.items()] == [False] + [True] * (len(before) - 1)


def test_training_and_held_out_problems_share_none_and_none_comes_twice():
    train, test = ({row["id"] for row in fresh(split, TASKS, 0, 6000)} for split in ("train", "test"))
    assert len(train) == len(test) == 6000 and not train & test  # among so many, some short ones are drawn again
    assert not {row["id"] for row in fresh("test", TASKS[:1], 0, 300)} & {row["id"] for row in fresh("train", TASKS[:1], 1, 300)}


def test_own_chains_are_as_often_wrong_as_is_asked_for(monkeypatch):
    def solve(made, backend, batch_size):
        texts = ["Start 1. The answer is 99.", "and so on", " ".join(complete(rows[0]["solutions"][0], rows[0]["answer"]))]
        samples = [Result(text=texts[i % 3], prompt_tokens=1, generated_tokens=1, finish="stop") for i in range(len(made))]
        return [Solution(answer=study_critique.steps_of(s.text)[-1][14:-1] if "answer" in s.text else None, samples=(s,), answers=(None,))
                for s in samples]

    rows = fresh("train", TASKS, 0, 1)
    monkeypatch.setattr(study_critique, "fresh", lambda split, tasks, seed, count: rows * count)
    monkeypatch.setattr(study_critique, "solve", solve)
    monkeypatch.setattr(study_critique, "loaded", lambda model, seed: None)
    for wrong in (0.5, 0.75):
        chains = study_critique.own_chains(SimpleNamespace(sft=""), "train", TASKS, 0, 8, wrong)
        assert Counter(first_wrong(*each) is None for each in chains) == {False: 8 * wrong, True: 8 - 8 * wrong}


def test_surprise_by_hand():
    class Backend:
        tokenizer = staticmethod(lambda text, add_special_tokens: {"input_ids": text.split()})

        def score(self, context, continuation):
            assert context[-1]["content"] == f"How many? {CUES['worked']}" and continuation == " Start 4. Add 1."
            return [-0.1, -3.0, -0.2, -0.5]

    assert least_likely(Backend(), "How many?", ["Start 4.", "Add 1."]) == [-3.0, -0.5]
    assert below([-3.0, -0.5], -1.0) == 0 and below([-3.0, -0.5], -4.0) is None and below([-0.1, -2.0], -1.0) == 1


def review_of(gold, answer, finish="stop"):
    return {"gold": gold, "answer": answer, "correct": gold == answer, "samples": [{"finish": finish}], "cost": {"generated_tokens": 4}}


def test_figures_of_reviews_by_hand():
    figures = found([review_of("2", "2"), review_of("2", "1"), review_of("1", "no mistake"), review_of("0", None, "too_long"),
                     review_of("no mistake", "no mistake"), review_of("no mistake", "3"), review_of("no mistake", "no mistake"),
                     review_of("no mistake", "why")])
    assert figures == {"n": 8, "exact": 3 / 8, "wilson95": pytest.approx((0.1368, 0.6943), abs=1e-4), "too_long": 1, "no mistake": 4 / 8,
                       "frequent": 2 / 8, "located": 1 / 4, "precision": 2 / 3, "recall": 2 / 4, "tokens": 4}
    assert found([review_of("no mistake", "no mistake")])["located"] is None


def answered(name, first, last, prompt=10):
    sample = {"answer": "1", "finished": True, "finish": "stop", "faults": [], "gold_score": 0.0}
    return {"id": name, "task": "t", "difficulty": 3, "gold": "1", "answer": "1", "correct": last, "tie": False,
            "cost": {"requests": 1, "prompt_tokens": prompt, "generated_tokens": 5},
            "samples": [{**sample, "correct": right} for right in (first, last)][:1 + (prompt > 10)]}


def test_what_critique_buys_by_hand():
    outcomes = [(True, True)] * 5 + [(False, True)] * 2 + [(True, False)] + [(False, False)] * 2
    vote = [{**answered(str(i), first, first), "samples": answered("", first, first, 11)["samples"]}
            for i, (first, _) in enumerate(outcomes)]
    rows = bought({"self_consistency": [{**row, "cost": {**row["cost"], "prompt_tokens": 30}} for row in vote],
                   "worked": [answered(str(i), *both, prompt=20) for i, both in enumerate(outcomes)]})
    [worked] = [row for row in rows if row[0] == "worked"]
    assert worked[1].startswith("0.700 [") and worked[2:5] == ["20 + 5", "0.200", "0.100"] and worked[5].startswith("+10.0 [")
    assert worked[6].startswith("+10.0 [") and worked[7] == "1.4"  # a chain costs 17.5 of its 35 tokens, the critique 25


def test_reviews_are_averaged_over_seeds():
    def line(seed, exact):
        return {"kind": "reviews", "arm": "planted", "seed": seed, "figures": {"own_word_problems.direct": {
            **found([review_of("1", "1")]), "exact": exact, "precision": None}}}

    shown = report([line(0, 0.4), line(1, 0.6)])
    assert ("| own_word_problems | planted | direct | 2 | 0.500 [-0.771, 1.771] | 1.000 | - | 1.000 | 0.000 | 1.000 | 4.000 | 0.000 |"
            in shown)
