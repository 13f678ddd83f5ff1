"""Shared fixtures: the smoke recipe, run once a session through the real command line."""
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stages.run.entry import fix_arithmetic

fix_arithmetic()  # as every stage does: without it some processors do not give the same sums twice

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Recipe:
    """A recipe's runs in a temporary folder, each stage run once and on demand."""

    def __init__(self, name: str, runs: Path):
        self.name, self.runs = name, runs

    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        return inherited | {"PLUMBLINE_RUNS": str(self.runs), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}

    def command(self, stage: str, *flags: str, accelerate: str = "cpu") -> list[str]:
        return [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", f"recipes/accelerate/{accelerate}.yaml",
                "-m", f"stages.{stage}", "--config", f"recipes/{self.name}/{stage}.yaml", *flags]

    def run(self, stage: str, *flags: str, accelerate: str = "cpu", check: bool = True) -> subprocess.CompletedProcess:
        """Run the stage and return what it printed; `check` fails the test with its output when it did not finish."""
        done = subprocess.run(self.command(stage, *flags, accelerate=accelerate), cwd=ROOT, env=self.environment(),
                              capture_output=True, text=True, timeout=900)
        if check and done.returncode:
            pytest.fail(f"stages.{stage} {' '.join(flags)} exited {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return done

    def killed(self, moment: str, stage: str, *flags: str) -> None:
        """Run the stage in one process and kill it at a moment (tests/killer.py); fails when it was not killed."""
        done = subprocess.run([sys.executable, "tests/killer.py", moment, f"stages.{stage}", "--config",
                               f"recipes/{self.name}/{stage}.yaml", *flags], cwd=ROOT, env=self.environment(), capture_output=True,
                              text=True, timeout=900)
        assert done.returncode == -9, f"not killed at {moment}: exit {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"

    def path(self, stage: str) -> Path:
        """The stage's run folder; the stage and the stages before it are run if they have not been."""
        folder = self.runs / self.name / stage
        if not (folder / "manifest.json").is_file():
            for parent in PARENTS[stage]:
                self.path(parent)
            self.run(stage)
        return folder


PARENTS = {"prepare": (), "scaling": ("prepare",), "pretrain": ("prepare",), "sft": ("pretrain",), "preferences": ("sft",),
           "reward_model": ("preferences",), "ppo": ("reward_model",), "rejection_sampling": ("reward_model",),
           "evaluation": ("ppo",), "report": ("scaling", "evaluation")}


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Recipe:
    return Recipe("smoke", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random two-layer model with the project's tokenizer, saved as stages save theirs. Its answers mean nothing."""
    import torch

    from stages.data import curriculum
    from stages.data.tokenizer import train_tokenizer
    from stages.models.sizes import build_decoder, decoder_config
    from stages.models.training import save_model

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


@pytest.fixture
def stage(model_folder, tmp_path):
    """A config of the stage over parents that all hold the random model."""
    from transformers import AutoTokenizer

    from reward.model import from_language_model
    from stages import evaluation
    from stages.data import curriculum

    problems = tmp_path / "prepare" / "problems"
    problems.mkdir(parents=True)
    for split, drawn_from in (("sft", "train"), ("test", "test")):
        made = {p.id: p.as_row() for p in itertools.islice(curriculum.problems(0, split=drawn_from, difficulties=(1, 2)), 200)}
        (problems / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made.values()))
    reward = from_language_model(model_folder, pad_id=0, seed=0, random_head=True)
    for name in ("pretrain", "sft", "ppo"):
        shutil.copytree(model_folder, tmp_path / name / "model")
    reward.save_pretrained(tmp_path / "reward_model" / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "reward_model" / "model")
    own = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(9)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for parent, product in [("prepare", "problems"), ("pretrain", "model"), ("sft", "model"), ("ppo", "model"), ("reward_model", "model")]:
        (tmp_path / parent / "manifest.json").write_text(json.dumps(
            {"stage": parent, "fingerprint": f"sha256:{parent}", "products": {product: {"path": product}},
             "config": {"sources": ["curriculum"]}}))
    settings = {"models": {"base": ["direct", "few_shot_cot"], "sft": ["zero_shot_cot", "self_consistency"], "ppo": ["zero_shot_cot"]},
                "tasks": ["word_problems", f"own=gsm8k:{tmp_path / 'own.jsonl'}"], "difficulties": [1, 2], "num_problems": 7, "shots": 1,
                "num_samples": 3, "max_tokens_worked": 12, "max_tokens_direct": 6, "batch_size": 16, "seed": 5,
                "parents": {name: str(tmp_path / name) for name in evaluation.EvaluationConfig.PARENTS}}
    return lambda name="evaluation", **more: evaluation.EvaluationConfig(run_dir=str(tmp_path / name), **settings | more)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A recipe with made-up runs of all stages, and its report. Not to be changed."""
    from stages.report import ReportConfig
    from tests.report_runs import make_runs, report

    home = make_runs(tmp_path_factory.mktemp("whole") / "tiny", ReportConfig.PARENTS)
    report(home)
    return home


@pytest.fixture
def shown(monkeypatch):
    """What a report would draw, by the name of the file: series and options of `plot`. Drawing takes a second in all."""
    from stages.run import figures
    from tests.report_runs import small_figure

    found: dict = {}
    monkeypatch.setattr(figures, "bars", small_figure)
    monkeypatch.setattr(figures, "plot", lambda path, lines, **options: (found.update({path.stem: (lines, options)}), small_figure(path)))
    return found


@pytest.fixture
def told(whole, tmp_path, shown):
    """The report of `whole` as records."""
    from tests.report_runs import tell

    return tell(whole, tmp_path)


CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def chromium():
    """A headless browser. `make test-browser` installs what pip can."""
    missing = ["playwright"] * (find_spec("playwright") is None) + ["a Chromium (or CHROMIUM=path)"] * (CHROMIUM is None)
    if missing:
        pytest.skip(f"missing: {', '.join(missing)} (make test-browser installs what pip can)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
