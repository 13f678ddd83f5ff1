"""Every training stage on every engine with two CPU processes: losses of one, models that load, exact resumes. Makes docs/engines.md.

    python -m tests.engines --runs DIR [--engines ddp fsdp2 zero2 zero3] [--cases ...]        (make engines)

The smoke recipe, AdamW, fp32, gloo. Each cell of the matrix is one JSON line in `--out`; cells that are there are not run again.
Processes are forked as in tests/lab.py, and reach the engines as in tests/rl_engines.py: what no product may do. DeepSpeed's cells
need deepspeed.
"""
import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.run.checkpoint import read_metrics
from stages.run.manifest import Manifest
from tests.conftest import PARENTS, ROOT
from tests.lab import PRELOADED, Ended, Lab, Running, Wrong, differs
from tests.rl_engines import ENGINES as LAUNCHED

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
ADAMW = ["--optimizer", "adamw"]
SHORT = ["--tokens", "10240", "--checkpoints", "3", "--evaluations", "2", "--learning-rate", "3e-3", *ADAMW]
RANKED = [*ADAMW, "--share-prompts", "false", "--fresh-problems", "8", "--evaluations", "2"]
PPO = ["--iterations", "2", "--eval-problems", "4", "--best-of", "0", "--probe-prompts", "0", "--max-grad-norm", "1e3"]
TUNED = ["--num-rows", "48", "--probe-prompts", "0", "--instruction-prompts", "0", "--evaluations", "3"]
CASES: dict[str, tuple[str, list[str]]] = {
    "pretrain, dense": ("pretrain", SHORT),
    "pretrain, experts": ("pretrain", [*SHORT, "--architecture", "olmoe", "--num-experts", "4"]),
    "sft, LoRA": ("sft", TUNED), "sft, full": ("sft", [*TUNED, "--method", "full"]),
    "reward_model, full": ("reward_model", RANKED), "reward_model, LoRA": ("reward_model", [*RANKED, "--method", "lora"]),
    "ppo, full": ("ppo", PPO), "ppo, LoRA": ("ppo", [*PPO, "--method", "lora"]),
    "pretrain with Muon": ("pretrain", [*SHORT[:-2], "--optimizer", "muon"])}
REL, ABS = 1e-3, 1e-4  # of a loss against one process's


def prepared(engine: str) -> Callable[[], None]:
    """What makes a process of this engine out of one that has only its rank."""
    def prepare() -> None:
        from stages.models import finetuning, pretraining, ranking, training
        from tests.rl_engines import join

        os.environ.update(LAUNCHED.get(engine, {}))
        common, more = training.training_arguments, join(engine)

        def arguments(run: Any, **given: Any) -> dict[str, Any]:
            return {**common(run, **given), **more}

        for module in (training, pretraining, finetuning, ranking):
            module.training_arguments = arguments  # type: ignore[attr-defined]

    return prepare


class Bench:
    """A laboratory whose trials are runs of a case on an engine."""

    def __init__(self, lab: Lab):
        self.lab = lab

    def start(self, case: str, engine: str, folder: str, processes: int = 2) -> Running:
        stage, flags = CASES[case]
        return self.lab.start(stage, [*flags, "--run-dir", str(self.lab.trial / folder)], processes=processes,
                              prepared=prepared(engine) if processes > 1 else lambda: None)

    def one(self, case: str) -> Path:
        """The case in one process, run once."""
        kept = self.lab.runs / "one" / case.replace(", ", "-")
        if not kept.exists():
            finished(self.start(case, "one", "one", processes=1).end())
            kept.parent.mkdir(exist_ok=True)
            shutil.move(self.lab.trial / "one", kept)
        return kept

    def killed(self, case: str, engine: str, folder: str) -> None:
        """Kill a run of the case after its first checkpoint."""
        running = self.start(case, engine, folder)
        if not running.until(lambda: bool(list(self.lab.trial.glob(f"{folder}.partial/checkpoints/*/complete.json")))):
            raise Wrong(f"no checkpoint: {running.log.read_text()[-600:]}")
        running.signal(signal.SIGKILL, *running.alive())
        running.end()


def finished(ended: Ended) -> None:
    if any(ended.codes):
        raise Wrong(f"exit {ended.codes}: {' '.join(ended.errors) or ended.text[-1500:]}")


def farthest(one: Path, two: Path) -> float:
    """The largest relative difference of a logged loss. Raises Wrong where one is beyond tolerance or steps differ."""
    worst, compared = 0.0, 0
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    if [row["step"] for row in first] != [row["step"] for row in second]:
        raise Wrong("the steps logged are others")
    for a, b in zip(first, second, strict=True):
        for key in (key for key in a if "loss" in key):
            if abs(b[key] - a[key]) > REL * abs(a[key]) + ABS:
                raise Wrong(f"{key} at step {a['step']} is {b[key]:.6g}, of one process {a[key]:.6g}")
            worst, compared = max(worst, abs(b[key] - a[key]) / max(abs(a[key]), ABS / REL)), compared + 1
    if compared < 3:
        raise Wrong(f"{compared} losses are too few to compare")
    return worst


def loads(stage: str, one: Path, two: Path) -> float:
    """The largest difference of a weight of the saved models, as plain transformers loads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if stage == "reward_model" else AutoModelForCausalLM
    ours, theirs = (kind.from_pretrained(Manifest(folder).product("model")).state_dict() for folder in (one, two))
    if ours.keys() != theirs.keys():
        raise Wrong("the saved model has other weights")
    with torch.no_grad():
        return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def cell(bench: Bench, case: str, engine: str) -> dict[str, Any]:
    """All that is asked of a case on an engine, or the line with which it is refused."""
    stage, trial = CASES[case][0], bench.lab.trial
    one = bench.one(case)
    ended = bench.start(case, engine, "two").end()
    if any(ended.codes) and len(ended.errors) == 1:
        return {"refused": ended.errors[0].removeprefix("error: ")}
    finished(ended)
    if (counts := [Manifest(folder).data["counts"] for folder in (one, trial / "two")])[0] != counts[1]:
        raise Wrong(f"counts are others than of one process: {counts}")
    found: dict[str, Any] = {"loss": farthest(one, trial / "two"), "weights": loads(stage, one, trial / "two")}
    bench.killed(case, engine, "again")
    shutil.copytree(trial / "again.partial", trial / "fewer.partial")
    finished(bench.start(case, engine, "again").end())
    if wrong := differs(trial / "two", trial / "again"):
        raise Wrong(f"resumed to other figures: {wrong}")
    found["resume"] = "exact"
    ended = bench.start(case, engine, "fewer", processes=1).end()
    if any(ended.codes):
        if len(ended.errors) != 1:
            raise Wrong(f"on one process: {ended.text[-800:]}")
        found["elastic"] = "refused: " + ended.errors[0].removeprefix("error: ")
    else:
        found["elastic"] = farthest(one, trial / "fewer")
    return found


def page(lines: dict[tuple[str, str], dict[str, Any]], versions: str) -> str:
    """docs/engines.md's matrix."""
    def shown(line: dict[str, Any] | None) -> str:
        if line is None:
            return "not run"
        if "refused" in line or "wrong" in line:
            return "refused" if "refused" in line else "**fails**"
        elastic = line["elastic"]
        return f"{line['loss']:.0e}, {line['weights']:.0e}; {line['resume']}; " + (
            "refused" if isinstance(elastic, str) else f"{elastic:.0e}")

    rows = ["| | " + " | ".join(ENGINES) + " |", "| --- " * (len(ENGINES) + 1) + "|"]
    rows += [f"| {case} | " + " | ".join(shown(lines.get((case, engine))) for engine in ENGINES) + " |" for case in CASES]
    said = sorted({f"- {case}, {engine}: {line.get('refused') or line.get('wrong')}" for (case, engine), line in lines.items()
                   if "refused" in line or "wrong" in line})
    return "\n".join([*rows, "", *said, "", f"With {versions}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder to work in")
    parser.add_argument("--out", type=Path, help="one JSON line a cell (default: engines.jsonl in --runs)")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--page", type=Path, help="file whose part between the marks of the matrix is replaced")
    args = parser.parse_args()
    lab, out = Lab(args.runs), args.out or args.runs / "engines.jsonl"
    given = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    known = {(line["case"], line["engine"]): line for line in given}
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    for module in PRELOADED:
        importlib.import_module(module)
    for case in args.cases:
        for engine in args.engines:
            if (case, engine) in known or (engine.startswith("zero") and not deepspeed):
                continue
            for parent in PARENTS[CASES[case][0]]:
                lab.base(parent)
            lab.clear()
            began, line = time.monotonic(), {"case": case, "engine": engine}
            try:
                line |= cell(Bench(lab), case, engine)
            except (Wrong, ValueError, OSError) as error:
                line["wrong"] = f"{type(error).__name__}: {error}"
            line["wall_s"] = round(time.monotonic() - began, 1)
            known[case, engine] = line
            print(json.dumps(line), flush=True)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate", *(
        ["deepspeed"] if deepspeed else [])))
    text = page(known, versions)
    print(text)
    if args.page:
        before, _, rest = args.page.read_text().partition("<!-- matrix -->\n")
        args.page.write_text(f"{before}<!-- matrix -->\n{text}<!-- /matrix -->\n{rest.partition('<!-- /matrix -->' + chr(10))[2]}")
    return int(any("wrong" in line for line in known.values()))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
