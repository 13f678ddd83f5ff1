"""Study: does a model learn to find the first wrong step of a chain, and is its critique worth its tokens?

    python -m stages.evals.study_critique --seeds 0 1 2 --mistakes "data/bigbench-mistake/*.jsonl"

Critics are SFT models taught further, on reviews of chains (worked and bare) and on the ordinary dialogues, so that one set of weights
answers and reviews. Arms differ in the chains reviewed: errors of all kinds planted by program, wrong results alone, or the SFT model's
own samples, judged by the program. Each critic reviews held-out chains of each sort, and so does a critic without training: the SFT
model's own surprise, which finds the first step with a token less likely than a threshold. The SFT model by its surprise and the critic
of the first arm then redo their own answers to test problems, beside self-refine, a vote of as many tokens, and a verifier in the
critic's place. Every run is a folder in `--runs` and a JSON line in `--out`; the same command continues where it was.
"""
import argparse
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prompts import strategies
from prompts.critique import critique_redo, self_refine, steps_of
from prompts.intervals import wilson
from prompts.records import Strategy
from prompts.templates import Style, render
from stages.data.corpora import read_rows
from stages.data.curriculum import CUES, DIRECT, WORKED, problems
from stages.data.planted import KINDS, TASKS, chain, dialogue, first_wrong, record
from stages.data.problems import load_problems
from stages.evals import scoring
from stages.evals.backends import LocalModel
from stages.evals.frontier import frontier
from stages.evals.scheduler import solve
from stages.evals.statistics import compare
from stages.evals.studies import markdown, mean, places, stage
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import Manifest, say

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
PLAIN, SURPRISE, OWN = "none", "surprise", "own"  # no critic training, twice; the SFT model's own chains
ARMS: dict[str, tuple[str, ...]] = {"planted": KINDS, "results": ("result",), OWN: ()}
DIFFICULTIES, EASIER = (3, 4, 5), (1, 2, 3, 4, 5)  # of what is held out; short chains to train on, from which comparing is learned sooner
STREAM = 8_000_000  # seeds of the problems, away from those of prepare
WORKED_SHARE, WRONG_SHARE = 0.8, 0.65  # of the reviews that are trained on
THRESHOLDS = [-k / 4 for k in range(1, 25)]  # nats
WORDS = {DIRECT: "direct", WORKED: "zero_shot_cot"}  # strategies of stages.evaluation that ask for either review
REVIEW_TOKENS = {WORKED: 160, DIRECT: 16}  # a worked review is longer than what it reviews
SAMPLES_FOR_OWN = 4  # chains drawn for each one wanted, as four in five are right
ASSUMED_TRAINING_S, ASSUMED_REVIEW_S, ASSUMED_ANSWERS_S = 300, 100, 120  # on two CPU cores, for the budget alone

Chains = list[tuple[dict[str, Any], list[str]]]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_critique", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of problems, planting, training and sampling")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS),
                        help="chains that critics are trained on (without any: no critic)")
    parser.add_argument("--critiques", type=int, default=6000, help="reviews that a critic is trained on")
    parser.add_argument("--replay", type=int, default=1500, help="ordinary dialogues mixed in")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over both")
    parser.add_argument("--chains", type=int, default=400, help="held-out chains of each sort and family, half of them without mistake")
    parser.add_argument("--problems", type=int, default=400, help="test problems of each family for the answers")
    parser.add_argument("--num-samples", type=int, default=16, help="chains of the vote that critique is held against")
    parser.add_argument("--rounds", type=int, default=2, help="reviews of an answer, at most")
    parser.add_argument("--mistakes", help="files of BIG-Bench Mistake, reviewed by every model too")
    parser.add_argument("--sft", default=f"{RUNS}/tiny/sft", help="finished sft run that critics start from")
    places(parser, "study_critique")
    return parser.parse_args(argv)


def fresh(split: str, tasks: Sequence[str], seed: int, count: int) -> list[dict[str, Any]]:
    """`count` problems of a split, none twice; splits share none."""
    stream = problems(STREAM + seed, split=split, tasks=dict.fromkeys(tasks, 1.0),
                      difficulties=EASIER if split == "train" else DIFFICULTIES)
    found: dict[str, dict[str, Any]] = {}
    for problem in stream:
        found.setdefault(problem.id, problem.as_row())
        if len(found) == count:
            break
    return list(found.values())


def loaded(model: str, seed: int) -> LocalModel:
    return LocalModel(Manifest(model).product("model"), seed=seed, batch_size=256, device="cuda" if torch.cuda.is_available() else "cpu")


def style_of(tokens: int = REVIEW_TOKENS[WORKED]) -> Style:
    return Style(chat=True, cues=CUES, max_tokens=REVIEW_TOKENS | {WORKED: tokens})


def own_chains(given: argparse.Namespace, split: str, tasks: Sequence[str], seed: int, count: int, wrong: float) -> Chains:
    """Chains of the SFT model at temperature 1, one a problem, a share `wrong` of them wrong; those that state no answer are left out."""
    rows = fresh(split, tasks, seed, SAMPLES_FOR_OWN * count)
    solved = solve([strategies.self_consistency(row, style_of(), n=1, temperature=1.0) for row in rows], loaded(given.sft, seed),
                   batch_size=1024)
    found: tuple[Chains, Chains] = [], []
    for row, solution in zip(rows, solved, strict=True):
        steps = steps_of(solution.samples[0].text)
        if solution.answer is not None and steps[-1] == f"The answer is {solution.answer}.":
            found[first_wrong(row, steps) is None].append((row, steps))
    used = min(count, int(len(found[0]) / wrong), int(len(found[1]) / (1 - wrong)))
    say(f"{OWN} chains, {split}: {len(found[0])} wrong and {len(found[1])} right of {len(rows)}; {used} are used")
    chosen = [*found[0][:round(used * wrong)], *found[1][:used - round(used * wrong)]]
    return random.Random(seed).sample(chosen, used)


def chains_of(given: argparse.Namespace, sort: str, split: str, tasks: Sequence[str], seed: int, count: int, wrong: float = 0.5) -> Chains:
    if sort == OWN:
        return own_chains(given, split, tasks, seed, count, wrong)
    rng = random.Random(f"{sort}:{split}:{seed}")
    return [(row, chain(row, rng, ARMS[sort], wrong)) for row in fresh(split, tasks, seed, count)]


def critic(given: argparse.Namespace, arm: str, seed: int) -> str:
    """The run of a critic, trained here unless it is there."""
    reviews = given.runs / f"reviews-{arm}-{seed}.jsonl"
    if not reviews.is_file():
        rng = random.Random(f"style:{seed}")
        scoring.write_records(reviews, [dialogue(row, steps, WORKED if rng.random() < WORKED_SHARE else DIRECT)
                                        for row, steps in chains_of(given, arm, "train", TASKS, seed, given.critiques, WRONG_SHARE)])
    folder = given.runs / f"critic-{arm}-{seed}"
    stage("sft", folder, seed=seed, method="full", learning_rate=2e-3, batch_size=4, epochs=given.epochs,
          num_rows=given.critiques + given.replay,
          sources=[{"data": str(reviews), "name": "reviews", "weight": given.critiques}, {"data": "curriculum", "weight": given.replay}],
          validation_rows=60, repeats="ignore", patience=0, keep="last", replay_share=0.0, probe_prompts=0, instruction_prompts=0,
          forgetting_rows=0, **{"parents.prepare": given.prepare, "parents.pretrain": given.sft})
    return str(folder)


def held_out(given: argparse.Namespace, seed: int) -> dict[str, Path]:
    """Files of chains by sort and family, half of them without mistake, in BIG-Bench Mistake's format."""
    made = {f"{sort}_{task}": given.runs / "chains" / f"{sort}_{task}-{seed}.jsonl" for sort, task in itertools.product(ARMS, TASKS)}
    for (sort, task), path in zip(itertools.product(ARMS, TASKS), made.values(), strict=True):
        if not path.is_file():
            scoring.write_records(path, [record(*each) for each in chains_of(given, sort, "test", [task], seed, given.chains)])
    return made


def reviews(given: argparse.Namespace, arm: str, seed: int, model: str, chains: Mapping[str, Path]) -> dict[str, Any]:
    """Figures of one model's reviews, by chains and kind of review, asked and answered by stages.evaluation."""
    tasks = [f"{name}=mistake:{path}" for name, path in chains.items()]
    folder = given.runs / f"reviewed-{arm}-{seed}"
    stage("evaluation", folder, seed=seed, models={"sft": list(WORDS.values())}, num_problems=0, cues=CUES,
          tasks=tasks + ([f"bigbench=mistake:{given.mistakes}"] if given.mistakes else []),
          max_tokens_worked=REVIEW_TOKENS[WORKED], max_tokens_direct=REVIEW_TOKENS[DIRECT],
          **{"parents.prepare": given.prepare, "parents.sft": model})
    return {path.stem: found([row for _, row in read_rows(path)]) for path in sorted((folder / "results" / "sft").glob("*.jsonl"))}


def least_likely(backend: LocalModel, question: str, steps: Sequence[str]) -> list[float]:
    """Log-probability of each step's least likely token, in a chain as the model's own answer."""
    logprobs = iter(backend.score(render(question, style_of(), WORKED), "".join(f" {step}" for step in steps)))
    return [min(itertools.islice(logprobs, len(backend.tokenizer(f" {step}", add_special_tokens=False)["input_ids"]))) for step in steps]


def below(values: Sequence[float], threshold: float) -> int | None:
    return next((i for i, value in enumerate(values) if value < threshold), None)


def surprise(given: argparse.Namespace, seed: int, chains: Mapping[str, Path]) -> dict[str, Any]:
    """The threshold that is right most often on the SFT model's own chains of the training split, and figures of what it finds."""
    backend = loaded(given.sft, seed)

    def judged(records: Sequence[Mapping[str, Any]]) -> list[tuple[int | None, list[float]]]:
        return [(row["mistake_index"], least_likely(backend, row["input"], row["steps"])) for row in records]

    known = judged([record(*each) for each in chains_of(given, OWN, "train", TASKS, seed, given.chains)])
    threshold = max(THRESHOLDS, key=lambda level: sum(below(values, level) == wrong for wrong, values in known))
    figures = {}
    for name, path in chains.items():
        said = [["no mistake" if i is None else str(i) for i in (wrong, below(values, threshold))]
                for wrong, values in judged([row for _, row in read_rows(path)])]
        figures[f"{name}.{SURPRISE}"] = found([{"gold": gold, "answer": answer, "correct": gold == answer, "samples": [],
                                                "cost": {"generated_tokens": 0}} for gold, answer in said])
    return {"threshold": threshold, "figures": figures}


def found(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well reviews find the first wrong step: `exact` (index or no mistake) with Wilson's interval, `located` (exact among the chains
    with a mistake), `precision` and `recall` of saying that there is one, and what knowing nothing gets: always `no mistake`, or always
    the most `frequent` index. A review that names no step says that there is none; one that had no room in the context is wrong, and
    counted in `too_long`."""
    wrong = [r for r in records if r["gold"] != "no mistake"]
    said = [r for r in records if (r["answer"] or "").isdecimal()]
    hits = sum(r["gold"] != "no mistake" for r in said)
    exact = sum(r["correct"] for r in records)
    return {"n": len(records), "exact": exact / len(records), "wilson95": wilson(exact, len(records)),
            "too_long": sum(end == "too_long" for r in records for end in scoring.finishes(r)),
            "no mistake": 1 - len(wrong) / len(records),
            "frequent": max(Counter(r["gold"] for r in wrong).values(), default=0) / len(records),
            "located": sum(r["correct"] for r in wrong) / len(wrong) if wrong else None,
            "precision": hits / len(said) if said else None, "recall": hits / len(wrong) if wrong else None,
            "tokens": sum(r["cost"]["generated_tokens"] for r in records) / len(records)}


def asked(given: argparse.Namespace, backend: LocalModel, threshold: float | None) -> dict[str, Callable[[dict], Strategy]]:
    """The strategies of the plain model, whose surprise has a threshold, or of a critic. Each that redoes begins with a greedy answer
    and with a sampled one."""
    style, draws = style_of(), {"temperature": 1.0}
    redo = partial(critique_redo, style=style, rounds=given.rounds, **draws)

    def verified(row: dict, **more: Any) -> Strategy:
        return redo(row, find=partial(first_wrong, row), **more)

    def surprised(row: dict, **more: Any) -> Strategy:
        def find(steps: Sequence[str]) -> int | None:  # what states no answer is drawn again from its beginning
            stated = bool(steps) and steps[-1].startswith("The answer is")
            return below(least_likely(backend, row["question"], steps), threshold or 0.0) if stated else 0

        return redo(row, find=find, **more)

    own: dict[str, Callable[..., Strategy]] = {SURPRISE: surprised} if threshold else {"worked": redo, "bare": partial(redo, kind=DIRECT)}
    redone = own | {"verifier": verified}
    return {"zero_shot_cot": partial(strategies.zero_shot_cot, style=style),
            "self_consistency": partial(strategies.self_consistency, style=style, n=given.num_samples, **draws),
            "self_refine": partial(self_refine, style=style_of(96), rounds=given.rounds),
            **redone, **{f"sampled_{name}": partial(make, sampled=True) for name, make in redone.items()}}


def answers(given: argparse.Namespace, arm: str, seed: int, model: str, threshold: float | None) -> dict[str, Any]:
    """Figures of one model's answers, and the files of their records, one a family and strategy; what is there is not asked again."""
    backend, files, figures = loaded(model, seed), [], {}
    for task, (strategy, make) in itertools.product(TASKS, asked(given, backend, threshold).items()):
        path = given.runs / f"answers-{arm}-{seed}" / f"{task}.{strategy}.jsonl"
        if not path.is_file():
            rows = fresh("test", [task], seed + 500, given.problems)
            solved = solve([make(row) for row in rows], backend, batch_size=1024)
            scoring.write_records(path, [{**scoring.record(row, solution), "id": f"{seed}/{row['id']}"}
                                         for row, solution in zip(rows, solved, strict=True)])
        files.append(str(path))
        figures[path.stem] = scoring.summary([row for _, row in read_rows(path)])
    return {"files": files, "figures": figures}


def study(given: argparse.Namespace) -> None:
    for folder in (given.prepare, given.sft):
        Manifest(folder)  # said now, not after the chains are drawn
    if given.mistakes:
        load_problems(f"mistake:{given.mistakes}", hub_split="test")
    runs, reviewers = len(given.arms) * len(given.seeds), (len(given.arms) + 2) * len(given.seeds)
    answerers = len(given.seeds) * (1 + bool(given.arms))
    say(f"budget: {runs} critics trained on {given.critiques + given.replay} dialogues, {reviewers} sets of reviews, {answerers} of "
        f"answers, about {clock(runs * ASSUMED_TRAINING_S + reviewers * ASSUMED_REVIEW_S + answerers * ASSUMED_ANSWERS_S)}")
    out, lines = given.out or given.runs / "study_critique.jsonl", []
    known = {line["seed"]: line for _, line in read_rows(out) if line["arm"] == SURPRISE} if out.is_file() else {}

    def add(**line: Any) -> None:
        lines.append(line)
        scoring.write_records(out, [*lines, *(line for seed, line in known.items() if seed not in {line["seed"] for line in lines})])
        say(f"{len(lines)} of {reviewers + answerers} runs")

    for seed in given.seeds:
        chains = held_out(given, seed)
        surprised = known.get(seed) or {"kind": "reviews", "arm": SURPRISE, "seed": seed, **surprise(given, seed, chains)}
        add(**surprised)
        for arm in (PLAIN, *given.arms):
            model = given.sft if arm == PLAIN else critic(given, arm, seed)
            add(kind="reviews", arm=arm, seed=seed, figures=reviews(given, arm, seed, model, chains))
            if arm in (PLAIN, *given.arms[:1]):
                add(kind="answers", arm=arm, seed=seed,
                    **answers(given, arm, seed, model, surprised["threshold"] if arm == PLAIN else None))
    say("\n" + report(lines))


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables: reviews, mean over seeds with Student's t; answers, all seeds together, paired by problem."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        for name, figures in line["figures"].items() if line["kind"] == "reviews" else ():
            chains, _, words = name.rpartition(".")
            found.setdefault((chains, line["arm"], words), []).append(figures)
    shown = ("exact", "located", "precision", "recall", "no mistake", "frequent", "tokens", "too_long")
    kinds = {strategy: kind for kind, strategy in WORDS.items()}
    rows = [[chains, arm, kinds.get(words, "-"), str(sum(seed["n"] for seed in seeds)),
             *(mean([seed[key] for seed in seeds if seed[key] is not None]) if any(seed[key] is not None for seed in seeds) else "-"
               for key in shown)] for (chains, arm, words), seeds in sorted(found.items())]
    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for arm, path in ((line["arm"], Path(path)) for line in lines if line["kind"] == "answers" for path in line["files"]):
        task, strategy = path.stem.split(".")
        cells.setdefault((task, arm), {}).setdefault(strategy, []).extend(row for _, row in read_rows(path))
    return "\n\n".join([markdown(["chains", "critic", "review", "n", *shown], rows), *(
        markdown([f"{task}, critic {arm}", "accuracy", "tokens a question", "mended", "broken", "less its first answer",
                  "less a vote of as many tokens", "chains in that vote", "too long"], bought(made))
        for (task, arm), made in cells.items())])


def bought(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """A row a strategy: accuracy, tokens (prompt and generated), share of first answers mended and broken, and paired differences."""
    matched = {row["strategy"]: row for row in frontier(cells)["matched"]}
    rows = []
    for strategy, records in cells.items():
        right, n = [float(r["correct"]) for r in records], len(records)
        first = [float(r["samples"][0]["correct"]) for r in records]
        figures = scoring.summary(records)
        mended, broken = (sum(a - b == change for a, b in zip(right, first, strict=True)) / n for change in (1, -1))
        vote = matched.get(strategy)
        rows.append([strategy, interval(figures["accuracy"], figures["wilson95"]),
                     f"{figures['prompt_tokens_mean']:.0f} + {figures['tokens_mean']:.0f}", f"{mended:.3f}", f"{broken:.3f}",
                     difference(compare(right, first)), difference(vote) if vote else "-", f"{vote['k']:.1f}" if vote else "-",
                     str(figures["too_long"])])
    return rows


def interval(value: float, ends: Sequence[float]) -> str:
    return f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def difference(compared: Mapping[str, Any]) -> str:
    return f"{100 * compared['difference']:+.1f} [{100 * compared['ci95'][0]:.1f}, {100 * compared['ci95'][1]:.1f}]"


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
