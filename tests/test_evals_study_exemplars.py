"""The study of exemplars: what it starts and asks, on a random model, and its tables by hand. No stage runs here."""
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from prompts.intervals import share_interval
from prompts.records import Result
from prompts.templates import DIRECT, WORKED, Style, render
from stages.data import curriculum
from stages.evals import studies, study_exemplars
from stages.evals.backends import LocalModel
from stages.evals.study_exemplars import MAX_TOKENS, ROAD, arguments, report, room
from stages.evals.tasks import load_task
from stages.evaluation import EvaluationConfig
from stages.ppo import PpoConfig
from stages.preferences import PreferencesConfig
from stages.pretrain import PretrainConfig
from stages.reward_model import RewardModelConfig
from stages.run.config import load_config
from stages.sft import SftConfig

CONFIGS = {"pretrain": PretrainConfig, "sft": SftConfig, "preferences": PreferencesConfig, "reward_model": RewardModelConfig,
           "ppo": PpoConfig, "evaluation": EvaluationConfig}


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    for file, split in (("test", "test"), ("sft", "train")):
        made = itertools.islice(curriculum.problems(1, split=split, difficulties=(1, 2)), 120)
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(p.as_row()) + "\n" for p in made))
    return folder


@pytest.fixture
def task(problems):
    return load_task("word_problems", problems=problems, difficulties=[1, 2], num_problems=6, seed=0)


def manifest(folder: Path, width: int = 0, **products: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in products.items():
        shutil.copytree(path, folder / name, dirs_exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": str(folder), "config": {"hidden_size": width}, "products": {
        name: {"path": name} for name in products}}))


def test_sizes_go_one_road_and_answer_once(monkeypatch, tmp_path, problems, model_folder, capsys):
    calls, told = {}, []

    def make(command, check):
        flags = dict(zip(command[5::2], command[6::2], strict=True))
        calls[Path(flags["--run_dir"]).name] = command[2].split(".")[1], flags
        manifest(Path(flags["--run_dir"]), model=model_folder)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(studies.subprocess, "run", make)
    monkeypatch.setattr(study_exemplars.commands, "frontier", told.append)
    monkeypatch.setattr(study_exemplars, "MAX_TOKENS", {WORKED: 12, DIRECT: 6})
    monkeypatch.setattr(study_exemplars, "measure", lambda backend, style, task, kind, shots, draw, what: {"right": "01" + str(draw)})
    manifest(tmp_path / "tiny" / "prepare", problems=problems)
    for name in ("pretrain", "sft"):
        manifest(tmp_path / "tiny" / name, width=96, model=model_folder)
    given = arguments(["--main", str(tmp_path / "tiny"), "--runs", str(tmp_path), "--widths", "32", "64", "--ppo", "32", "--tasks",
                       "word_problems", "--difficulties", "1", "2", "--problems", "3", "--num-samples", "2"])
    study_exemplars.study(given)

    assert list(calls) == [f"{name}-{width}-0" for width, stages in (
        (32, [*ROAD, "evaluation"]), (64, ["pretrain", "sft", "evaluation"]), (96, ["evaluation"])) for name in stages]
    for kind, config_class in CONFIGS.items():
        configs = [vars(load_config(config_class, ["--config", f"recipes/tiny/{kind}.yaml", *itertools.chain(*flags.items())]))
                   for stage, flags in calls.values() if stage == kind]
        differ = {key for config in configs for key in config if config[key] != configs[0][key]}
        assert differ <= {"run_dir", "parents", "hidden_size", "num_heads", "models"}, kind  # sizes differ in size alone
    assert calls["reward_model-32-0"][1]["--parents.preferences"] == str(tmp_path / "preferences-32-0")
    assert [json.loads(calls[f"evaluation-{width}-0"][1]["--models"]).keys() for width in (32, 64, 96)] == [
        {"base", "sft", "ppo"}, {"base", "sft"}, {"base", "sft"}]
    assert told == [[*(str(tmp_path / f"evaluation-{width}-0") for width in (32, 64, 96)), "--out", str(tmp_path / "frontier")]]

    lines = [json.loads(line) for line in (tmp_path / "study_exemplars.jsonl").read_text().splitlines()]
    assert {(line["width"], line["model"]) for line in lines} == {(32, "base"), (32, "sft"), (32, "ppo"), (64, "base"), (64, "sft"),
                                                                 (96, "base"), (96, "sft")}
    one = [(line["kind"], line["shots"], line["draw"]) for line in lines if (line["width"], line["model"]) == (64, "sft")]
    assert len(one) == len(set(one)) and (WORKED, 0, 1) not in one  # nothing to draw
    assert {(DIRECT, shots, draw) for shots in (1, 2) for draw in (0, 1)} | {(WORKED, 0, 0), (DIRECT, 0, 0), (WORKED, 1, 0)} < set(one)
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 3  # base, sft, ppo
    shown = capsys.readouterr().out
    assert "budget: 2 sizes to train" in shown and "| ppo 32, worked | 0.333 [" in shown and "| 33.3 |" in shown  # draws: 010 and 011

    monkeypatch.setattr(study_exemplars, "measure", lambda *_: pytest.fail("measured again"))
    study_exemplars.study(given)
    assert len((tmp_path / "study_exemplars.jsonl").read_text().splitlines()) == len(lines)


def test_exemplars_are_shown_with_and_without_steps_and_are_not_asked(task):
    asked = []

    class Backend:
        batch_size = 4

        def generate(self, requests):
            asked.append([request.prompt for request in requests])
            return [Result(text="The answer is 3.", prompt_tokens=2, generated_tokens=4, finish="stop") for _ in requests]

    style = Style(chat=False, cues=task.cues, max_tokens=MAX_TOKENS)
    lines = [study_exemplars.measure(Backend(), style, task, kind, shots, draw, "")
             for kind, shots, draw in ((WORKED, 2, 0), (WORKED, 2, 1), (DIRECT, 2, 0), (WORKED, 0, 0))]
    for prompts, cue, shots in zip(asked, ["worked", "worked", "direct", "worked"], (2, 2, 2, 0), strict=True):
        assert all(prompt.count("The answer is") == shots and prompt.count(task.cues[cue]) == shots + 1 for prompt in prompts)
        assert all(prompt.count("Start") == (shots if cue == "worked" else 0) for prompt in prompts)
    assert all(a != b for a, b in zip(asked[0], asked[1], strict=True))  # another draw
    assert [row["question"] for row in task.rows] == [p.split("Question: ")[-1].split(f" {task.cues['worked']}")[0] for p in asked[3]]
    assert not {row["question"] for row in task.rows} & {row["question"] for row in task.pool}
    assert lines[0]["right"] == "".join(str(int(row["answer"] == "3")) for row in task.rows) and lines[0]["tokens_mean"] == 4


@pytest.mark.parametrize(("chat", "kind"), [(False, WORKED), (True, DIRECT)])
def test_what_the_context_holds(model_folder, task, chat, kind):
    backend = LocalModel(model_folder, seed=0, batch_size=8)
    style = Style(chat=chat, cues=task.cues, max_tokens={WORKED: 24, DIRECT: 8})

    def longest(shots):
        return max(len(backend.encode(render(row["question"], style, kind, task.examples(row, shots, draw))))
                   for row in task.rows for draw in range(2)) + style.max_tokens[kind]

    most = room(backend, task, style, kind, 2)
    assert most > 0 and longest(most) <= backend.context < longest(most + 1)


def test_tables_by_hand():
    def line(shots, draw, right, task="a"):
        return {"width": 64, "model": "sft", "task": task, "kind": WORKED, "shots": shots, "draw": draw, "n": 4, "right": right}

    shown = report([line(0, 0, "1000"), line(1, 0, "1100"), line(1, 1, "1000"), line(3, 0, "1111"), line(3, 1, "1110"),
                    line(0, 0, "0000", "b"), line(1, 0, "0000", "b")])
    cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*share_interval(shares)) for shares in ([1, 0, 0, 0], [1, .5, 0, 0], [1, 1, 1, .5])]
    assert f"| sft 64, worked | {cells[0]} | {cells[1]} | - | - | {cells[2]} (3) |" in shown
    # eight problems: half a point on one of them, then 2.5; two draws of one exemplar get 2 and 1 of 4 right
    last = shown.splitlines()[-1]
    assert last.startswith("| sft 64, worked | +6.2 [") and " | +31.2 [" in last and last.endswith("| 25.0 |")
