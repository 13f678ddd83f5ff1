"""Benchmark: questions a second of self-consistency, all chains drawn and with adaptive stopping, beside lm-eval's hf backend.

    python -m stages.evals.bench_eval --rounds 3

Every variant asks the same saved model the same problems with the same prompts (compared as token ids), `--num-samples` chains each at
temperature 1, without top-k or top-p, with the same stop texts and token limit. Each runs in a process of its own, in rounds, so that
what slows the machine slows all of them; a round is a seed. lm-eval runs in its own environment (`make bench-eval` makes it) as
`repeats: N`, at several batch sizes, and on each clock it is compared at its best one.

What is timed is generation. Here that is the scheduler's whole work, prompts, extraction of the answers and votes included; of lm-eval it
is `HFLM.generate_until` alone, without its making of tasks and its filters. Loading the model, and a first forward, come before the clock.
The answers of both are judged by the same code. Then `--memory` numbers of questions are asked of a tiny model, each number in a process
of its own, for the highest resident memory.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prompts.answers import extract
from prompts.intervals import mean_interval
from prompts.records import Result, Strategy
from prompts.strategies import conclude, self_consistency
from prompts.templates import DIRECT, WORKED, Row, Style
from prompts.voting import stopper
from reward.folders import trusted
from reward.verifiers import right
from stages.evals.studies import markdown, measured
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import Manifest, say

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
MODELS = {"base": ("pretrain", False), "sft": ("sft", True), "ppo": ("ppo", True)}  # run, chat
VARIANTS = {"all": "this project's: all chains, one reading of a prompt for them",
            "adaptive": "this project's: as many chains as the stopping rule wants",
            "lm-eval": "lm-eval's hf backend, which reads a prompt once for each of its repeats"}
PEER = Path(__file__).resolve().parents[2] / ".venv-lm-eval" / "bin" / "python"
CLOCKS = {"wall_s": "questions/s", "processor_s": "questions/processor-s"}
LISTS = ("chains", "votes")  # what a run has for each question: kept for comparisons, not printed


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_eval", description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="who asks", metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", default=f"{RUNS}/tiny", help="folder with the finished runs prepare and that of the model")
    parser.add_argument("--model", default="sft", choices=list(MODELS))
    parser.add_argument("--task", default="word_problems", help="as evaluation's `tasks` name one")
    parser.add_argument("--difficulties", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--stop", default="beta:0.95", help="rule of the variant `adaptive`")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=256, help="rows decoded together, here")
    parser.add_argument("--peer-batch-sizes", nargs="+", type=int, default=[64, 128, 256], help="the same in lm-eval, each tried")
    parser.add_argument("--memory", nargs="*", type=int, default=[1000, 10000], help="questions asked of a tiny model; none leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.num_samples < 2:
        raise ValueError(f"num_samples {given.num_samples}: a vote needs at least 2 chains")
    for name in ("rounds", "questions", "max_tokens", "batch_size", "threads"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name} is at least 1, got {getattr(given, name)}")
    if min([*given.peer_batch_sizes, *given.memory], default=1) < 1:
        raise ValueError("peer_batch_sizes and memory are lists of numbers of at least 1")
    stopper(given.stop)
    return given


def style_of(given: argparse.Namespace, cues: Any) -> Style:
    return Style(chat=MODELS[given.model][1], cues=cues, max_tokens={WORKED: given.max_tokens, DIRECT: given.max_tokens})


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and its wall and processor time; the latter is of all threads of the process."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}


def judged(rows: Sequence[Row], texts: Sequence[Sequence[str]], answers: Sequence[str | None]) -> dict[str, Any]:
    """For each question the share of its chains that are right and whether its vote is, and over all chains what they look like."""
    found = [[extract(text, row.get("answer_type")) for text in of] for row, of in zip(rows, texts, strict=True)]
    every = [answer for of in found for answer in of]
    return {"chains": [statistics.fmean(right(row, answer) for answer in of) for row, of in zip(rows, found, strict=True)],
            "votes": [right(row, answer) for row, answer in zip(rows, answers, strict=True)],
            "unparsed": every.count(None) / len(every), "samples_mean": len(every) / len(rows),
            "characters_mean": statistics.fmean(len(text) for of in texts for text in of)}


def digest(ids: Sequence[Sequence[int]]) -> str:
    """Of all prompts as token ids: equal when both sides ask the same."""
    return hashlib.sha256(json.dumps([list(each) for each in ids]).encode()).hexdigest()[:16]


def one(variant: str, seed: int, batch_size: int, given: argparse.Namespace) -> dict[str, Any]:
    """Ask all questions with one variant in this process: time of generation, highest memory, how the answers are."""
    import torch
    import transformers

    from stages.evals.tasks import load_task

    task = load_task(given.task, problems=Manifest(f"{given.runs}/prepare").product("problems"), difficulties=given.difficulties,
                     num_problems=given.questions, seed=0)
    style, model = style_of(given, task.cues), Manifest(f"{given.runs}/{MODELS[given.model][0]}").product("model")
    ask = peer if variant == "lm-eval" else ours
    found = ask(variant, model, task.rows, style, seed, batch_size, given)
    return {"variant": variant, "batch_size": batch_size, "seed": seed, "questions": len(task.rows), **found,
            "peak_bytes": peak_bytes(), "torch": torch.__version__, "transformers": transformers.__version__}


def ours(variant: str, model: Path, rows: Sequence[Row], style: Style, seed: int, batch_size: int, given: argparse.Namespace) -> dict:
    """This project's scheduler over its local backend."""
    from stages.evals.backends import LocalModel
    from stages.evals.scheduler import solve

    backend = LocalModel(model, seed=seed, batch_size=batch_size)
    strategies = [asked(row, style, given.stop if variant == "adaptive" else "none", given) for row in rows]
    prompts = [backend.encode(next(asked(row, style, "none", given))[0].prompt) for row in rows]  # type: ignore[union-attr]
    warm(backend.model, prompts[0])
    solutions, times = timed(lambda: solve(strategies, backend, batch_size=4 * batch_size))
    if backend.too_long:
        raise ValueError(f"{backend.too_long} chains have no room for {given.max_tokens} tokens in the context: lower --max-tokens")
    texts = [[sample.text for sample in solution.samples] for solution in solutions]
    return {**times, "prompts": digest(prompts), **judged(rows, texts, [solution.answer for solution in solutions])}


def asked(row: Row, style: Style, stop: str, given: argparse.Namespace) -> Strategy:
    return self_consistency(row, style, n=given.num_samples, temperature=1.0, stop=stop)


def peer(variant: str, model: Path, rows: Sequence[Row], style: Style, seed: int, batch_size: int, given: argparse.Namespace) -> dict:
    """lm-eval's hf backend on a task of the same prompts as text; its answers are voted on and judged here."""
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=batch_size)
    wanted = [next(asked(row, style, "none", given))[0].prompt for row in rows]  # type: ignore[union-attr]
    texts = [prompt if isinstance(prompt, str) else
             lm.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True) for prompt in wanted]
    prompts = [lm.tok_encode(text) for text in texts]
    warm(lm.model, prompts[0])
    times: dict[str, float] = {}
    generate = lm.generate_until

    def generate_timed(*arguments: Any, **settings: Any) -> list[str]:
        result, spent = timed(lambda: generate(*arguments, **settings))
        times.update(spent)
        return result

    lm.generate_until = generate_timed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "documents.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "-"}) + "\n" for text in texts))
        (folder / "bench.yaml").write_text(yaml.safe_dump({
            "task": "bench", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
            "repeats": given.num_samples, "metric_list": [{"metric": "exact_match"}],
            # A chat answer ends with the model's own end token, which lm-eval adds to the stops by itself.
            "generation_kwargs": {"until": list(style.stop) or [lm.tokenizer.eos_token], "do_sample": True, "temperature": 1.0,
                                  "top_k": 0, "top_p": 1.0, "max_gen_toks": given.max_tokens}}))
        found = lm_eval.simple_evaluate(model=lm, tasks=["bench"], task_manager=TaskManager(include_path=name, include_defaults=False),
                                        bootstrap_iters=0, torch_random_seed=seed)
    samples = sorted(found["samples"]["bench"], key=lambda sample: sample["doc_id"])
    drawn = [sample["resps"][0] for sample in samples]
    if [sample["arguments"][0][0] for sample in samples] != texts or {len(of) for of in drawn} != {given.num_samples}:
        raise ValueError(f"lm-eval did other work: {len(drawn)} questions of {sorted({len(of) for of in drawn})} chains, or other prompts")
    answers = [voted(row, of) for row, of in zip(rows, drawn, strict=True)]
    return {**times, "prompts": digest(prompts), **judged(rows, drawn, answers), "lm_eval": lm_eval.__version__}


def voted(row: Row, texts: Sequence[str]) -> str | None:
    """The vote over texts that were drawn elsewhere, as `self_consistency` holds it."""
    samples = [Result(text=text, prompt_tokens=0, generated_tokens=0, finish="stop") for text in texts]
    return conclude(samples, row.get("answer_type")).answer


def warm(model: Any, ids: Sequence[int]) -> None:
    """A first forward, which sets up what later ones find."""
    import torch

    with torch.inference_mode():
        model(input_ids=torch.tensor([list(ids)]))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(questions: int, batch_size: int, given: argparse.Namespace) -> dict[str, Any]:
    """So many made questions asked of a random decoder of width 32, four tokens a chain; a result is dropped as it comes, and problems are
    made as they are asked, so that what is held is what scheduler and backend hold."""
    from transformers import AutoTokenizer

    from stages.data import curriculum
    from stages.evals.backends import LocalModel
    from stages.evals.scheduler import run
    from stages.models.sizes import build_decoder, decoder_config

    tokenizer = AutoTokenizer.from_pretrained(trusted(Manifest(f"{given.runs}/{MODELS[given.model][0]}").product("model")))
    model = build_decoder(decoder_config(tokenizer, hidden_size=32, num_layers=1), seed=0)
    backend = LocalModel.of(model, tokenizer, stop_ids=[tokenizer.eos_token_id], seed=0, batch_size=batch_size)
    style = Style(chat=MODELS[given.model][1], cues=curriculum.CUES, max_tokens={WORKED: 4, DIRECT: 4})
    made = itertools.islice(curriculum.problems(0, split="test"), questions)
    rows = ({**problem.as_row(), "id": str(number)} for number, problem in enumerate(made))
    warm(model, backend.encode("Question:"))
    before, ended = peak_bytes(), 0
    for _ in run((asked(row, style, "none", given) for row in rows), backend, batch_size=4 * batch_size):
        ended += 1
    return {"variant": "memory", "batch_size": batch_size, "questions": ended, "before_bytes": before, "peak_bytes": peak_bytes()}


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """Medians over rounds; ratios to lm-eval at the batch size that is best on that clock, within rounds, with lowest and highest; and how
    right votes and single chains are, with the paired difference from lm-eval's over questions (95 %, Student's t)."""
    found = {key: [run for run in runs if (run["variant"], run["batch_size"]) == key]
             for key in dict.fromkeys((run["variant"], run["batch_size"]) for run in runs)}
    best = {which: max((of for (name, _), of in found.items() if name == "lm-eval"), default=[], key=lambda of: speed(of, which))
            for which in CLOCKS}
    rows = []
    for (name, batch_size), of in found.items():
        cells = [f"{name}, batch {batch_size}"]
        for which in CLOCKS:
            each = [other[which] / run[which] for run, other in zip(of, best[which], strict=False)]
            cells += [f"{speed(of, which):.1f}", f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" if each else "-"]
        reference = best["processor_s"] if name != "lm-eval" else []
        cells += [rightness(of, reference, "votes"), rightness(of, reference, "chains") if name != "adaptive" else "-",
                  *(f"{statistics.fmean(run[key] for run in of):.{digits}f}"
                    for key, digits in (("samples_mean", 1), ("characters_mean", 1), ("unparsed", 3))),
                  f"{max(run['peak_bytes'] for run in of) / 2**30:.2f}"]
        rows.append(cells)
    speeds = [head for unit in CLOCKS.values() for head in (unit, "times lm-eval's best")]
    return markdown(["variant", *speeds, "votes right, minus lm-eval's", "chains right, minus lm-eval's", "chains a question",
                     "characters a chain", "unparsed", "peak GiB"], rows)


def speed(runs: Sequence[dict[str, Any]], which: str) -> float:
    return statistics.median(run["questions"] / run[which] for run in runs)


def rightness(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], what: str) -> str:
    """The share that is right, over rounds, and the mean difference from the others' with its interval over questions."""
    own, theirs = ([statistics.fmean(values) for values in zip(*(run[what] for run in of), strict=True)] for of in (runs, others))
    share = f"{statistics.fmean(own):.3f}"
    if len(own) < 2 or not theirs:
        return share
    difference, low, high = mean_interval([a - b for a, b in zip(own, theirs, strict=True)])
    return f"{share}, {difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def child(python: str, what: Sequence[Any], argv: Sequence[str], given: argparse.Namespace, folder: str) -> dict[str, Any]:
    words = [str(each) for each in what]
    return measured(" ".join(words), "stages.evals.bench_eval", *argv, "--one", *words, python=python, OMP_NUM_THREADS=str(given.threads),
                    HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=folder, TOKENIZERS_PARALLELISM="false")


def plan(given: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """(round, variant, batch size) in an order of each round's own, so that none always comes after the same one."""
    each = [(name, size) for name in given.variants for size in (given.peer_batch_sizes if name == "lm-eval" else [given.batch_size])]
    for number in range(given.rounds):
        yield from ((number, name, size) for name, size in random.Random(number).sample(each, len(each)))


def bench(given: argparse.Namespace, argv: Sequence[str]) -> None:
    if given.one:
        variant, number, batch_size = given.one[0], int(given.one[1]), int(given.one[2])
        found = memory(number, batch_size, given) if variant == "memory" else one(variant, number, batch_size, given)
        return say(json.dumps(found))
    if "lm-eval" in given.variants and not PEER.exists():
        raise ValueError(f"{PEER} is not there: run `make bench-eval`, which makes it, or leave lm-eval out of --variants")
    steps = list(plan(given))
    chains = given.questions * given.num_samples * given.max_tokens / 96
    seconds = sum(20 + chains * {"all": 1 / 250, "adaptive": 1 / 500, "lm-eval": 1 / 60}[name] for _, name, _ in steps)
    seconds += sum(15 + n * given.num_samples / 4000 for n in given.memory)
    say(f"budget: {len(steps)} runs in {given.rounds} rounds, {given.questions} questions of {given.num_samples} chains each, and "
        f"{sum(given.memory):,} questions for memory: about {clock(seconds)} of one free core at width 128")
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name, size in steps:
            runs.append({"round": number + 1, **child(str(PEER) if name == "lm-eval" else sys.executable, (name, number, size), argv,
                                                      given, folder)})
            if runs[-1]["prompts"] != runs[0]["prompts"]:
                raise ValueError(f"{name} read other prompts than {runs[0]['variant']}: the two do not do the same work")
            say(json.dumps({key: value for key, value in runs[-1].items() if key not in LISTS}))
        say("\n" + summary(runs) + "\n")
        for questions in given.memory:
            say(json.dumps(child(sys.executable, ("memory", questions, given.batch_size), argv, given, folder)))


if __name__ == "__main__":
    run_program(lambda argv: bench(arguments(argv), argv))
