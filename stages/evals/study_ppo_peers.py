"""Study: how long does PPO take to the same gold score, here, with TRL's last PPO, and with its GRPO?

    python -m stages.evals.study_ppo_peers

All begin from one SFT model, are rewarded by one learned reward model (every trainer can take it; its normalisation is put inside its
head where a trainer does not know of it), and learn from the same questions: 64 responses an iteration, at most as long, at temperature 1,
4 epochs of 4 minibatches, fp32, AdamW, a constant learning rate, no penalty for a missing end (ours replaces the score, TRL's is
subtracted from it). What has the same name has the same value: `kl_coef` (GRPO: `beta`, there k3 in the loss), `vf_coef`, clipping
ranges, gamma, lambda. `vf_coef` is ours, since AdamW hides a scale of the loss from TRL's separate critic. The rest is each trainer's
default: ours gives the critic a rate of its own (3e-4, as `make ppo` does) and clips gradients, TRL's PPO neither; GRPO has no critic,
8 responses to each of 8 questions, and clips.

Fixed before any run: the threshold is the start's gold score and .7 of the way from there to the highest there is (1.5: the answer and
every step right), which is .8 of what the tiny recipe's own run gains (1.258 to 1.465). After each iteration the same code draws one
response to each of 300 held-out problems, with the same noise, and judges them; the clock does not run meanwhile. The threshold is
reached at the first of two evaluations in succession that are at it or above. A run that never does is kept, with its highest score: its
time is longer than what it had, so a ratio to it is a bound. Clocks begin with the training, after models are loaded and measured.

The first seed tries each learning rate; the best needs the fewest iterations (equal: the least processor time; never reached: the
highest score). Other seeds, which change the order of questions and the samples, run at each trainer's best. At the first seed that rate
was selected, and its time flatters. Trainers take turns, so that what slows the machine slows all; one thread, wall and processor time.
A run is a folder, not run again once finished, and one JSON line in `--out`.
"""
import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.evals.scoring import write_records
from stages.evals.studies import markdown, measured, places
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import Manifest, hash_path, say, write_json

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
VARIANTS = {"critic": "this project's PPOTrainer with a critic of its own",
            "trunk": "the same, the values from a head on the policy's trunk",
            "trl-ppo": "trl.experimental.ppo.PPOTrainer of TRL 1.12",
            "trl-grpo": "GRPOTrainer of the TRL installed here: no critic"}
BASELINE = "trl-ppo"
SHARE = 0.7
ASSUMED_ITERATION_S = {"critic": 5.7, "trunk": 4.0, "trl-ppo": 8.3, "trl-grpo": 4.2}  # one CPU core, evaluation included: for the budget
PEER = Path(__file__).resolve().parents[2] / ".venv-trl112" / "bin" / "python"
Line = Mapping[str, Any]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_ppo_peers", description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="who trains", metavar="VARIANT")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-5, 3e-5, 1e-4, 3e-4], help="tried at the first seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first one selects the learning rates")
    parser.add_argument("--iterations", type=int, default=30, help="the most that a run has")
    parser.add_argument("--batch-size", type=int, default=64, help="responses an iteration")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--generations", type=int, default=8, help="responses to a question, of GRPO")
    parser.add_argument("--eval-problems", type=int, default=300, help="held-out problems judged after each iteration")
    parser.add_argument("--sft", default=f"{RUNS}/tiny/sft", help="finished sft run: where all begin, of width 128 in the tiny recipe")
    parser.add_argument("--reward-model", default=f"{RUNS}/tiny/reward_model", help="finished reward_model run")
    places(parser, "study_ppo_peers")
    given = parser.parse_args(argv)
    for name in ("minibatches", "generations"):
        if given.batch_size % getattr(given, name):
            raise ValueError(f"batch_size {given.batch_size} is not a multiple of {name} {getattr(given, name)}: choose one that is")
    return given


def study(given: argparse.Namespace) -> None:
    if BASELINE in given.variants and not PEER.exists():
        raise ValueError(f"{PEER} is not there: run `make study-ppo-peers`, which makes it, or leave {BASELINE} out of --variants")
    sources = {"sft": Manifest(given.sft).product("model"), "reward_model": Manifest(given.reward_model).product("model"),
               "problems": Manifest(given.prepare).product("problems")}
    names = ("iterations", "batch_size", "epochs", "minibatches", "max_new_tokens", "generations", "eval_problems")
    terms = {name: getattr(given, name) for name in names} | {"share": SHARE} | {name: str(path) for name, path in sources.items()}
    inputs = {name: hash_path(path) for name, path in sources.items()}
    of_each = len(given.learning_rates) + len(given.seeds) - 1
    most = sum(of_each * given.iterations * ASSUMED_ITERATION_S[name] for name in given.variants)
    say(f"budget: {len(given.variants)} trainers, {of_each} runs each of at most {given.iterations} iterations, at most {clock(most)} on "
        "one core; runs end at the threshold")
    lines: list[dict[str, Any]] = []

    def race(variant: str, rate: float, seed: int) -> None:
        lines.append(finished(given.runs / f"{variant}-{rate:g}-{seed}", variant, terms | {"learning_rate": rate, "seed": seed}, inputs))
        write_records(given.out or given.runs / "study_ppo_peers.jsonl", lines)
        line = lines[-1]
        say(f"{len(lines)} of {of_each * len(given.variants)}: {variant} at {rate:g}, seed {seed}: {outcome(line)}")

    for rate in given.learning_rates:
        for variant in given.variants:
            race(variant, rate, given.seeds[0])
    rates = {variant: best([line for line in lines if line["variant"] == variant])["learning_rate"] for variant in given.variants}
    for seed in given.seeds[1:]:
        for variant in given.variants:
            race(variant, rates[variant], seed)
    say("\n" + report(lines))


def finished(folder: Path, variant: str, terms: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """The run's result, from its folder if it is there and had the same terms and inputs, else run now.

    Raises ValueError when it stops; the same command begins that run anew.
    """
    file = folder / "result.json"
    asked_for = {"terms": dict(terms), "inputs": dict(inputs)}
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if {name: kept[name] for name in asked_for} == asked_for:
            return kept
        say(f"{folder} was made with other settings or models: it is run anew")
    python = str(PEER) if variant == BASELINE else sys.executable
    found = measured(str(folder), "stages.rl.raced", variant, json.dumps(terms), python=python, OMP_NUM_THREADS="1")
    result = {**found, "learning_rate": terms["learning_rate"], "seed": terms["seed"], **asked_for}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    return result


def best(lines: Sequence[Line]) -> Line:
    """Of one trainer's runs at one seed, that with the best learning rate."""
    return min(lines, key=lambda line: (0, line["reached"], line["cpu_seconds"]) if line["reached"] else (1, -line["highest"], 0.0))


def outcome(line: Line) -> str:
    if line["reached"]:
        return f"{line['seconds']:.0f} s ({line['cpu_seconds']:.0f} s), iteration {line['reached']}"
    return f"not in {len(line['history'])} iterations, {line['ended']}; highest {line['highest']:.3f}"


def spent(line: Line, measure: str) -> tuple[float, bool]:
    """Seconds to the threshold, and whether it was reached; where it was not, those that the run had: it takes longer."""
    if line["reached"]:
        return line[measure], True
    return (line["history"][-1][measure] if line["history"] else 0.0), False


def ratio(line: Line, other: Line, measure: str) -> tuple[str, float] | None:
    """Time of `line` over that of `other`, behind `<` or `>` where it is a bound, since one did not reach the threshold. None: neither did,
    or the one that did not has not run at all."""
    (own, own_reached), (peer, peer_reached) = spent(line, measure), spent(other, measure)
    if not (own_reached or peer_reached) or not own or not peer:
        return None
    return "" if own_reached and peer_reached else "<" if own_reached else ">", own / peer


def summarised(ratios: Sequence[tuple[str, float] | None]) -> str:
    """Geometric mean with its lowest and highest; behind `<` or `>` where bounds are among them, all on one side, else `-`."""
    known = [each for each in ratios if each is not None]
    signs = {sign for sign, _ in known if sign}
    if len(known) < len(ratios) or len(signs) > 1:
        return "-"
    values = [value for _, value in known]
    mean = math.exp(math.fsum(map(math.log, values)) / len(values))
    return f"{''.join(signs)}{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def report(lines: Sequence[Line]) -> str:
    """Markdown: each rate at the first seed, each seed at the best rate, ratios to TRL's PPO where it ran."""
    first, rates = lines[0]["seed"], list(dict.fromkeys(line["learning_rate"] for line in lines))
    seeds, variants = list(dict.fromkeys(line["seed"] for line in lines)), list(dict.fromkeys(line["variant"] for line in lines))
    found = {(line["variant"], line["learning_rate"], line["seed"]): line for line in lines}
    chosen = {name: best([line for line in lines if line["variant"] == name and line["seed"] == first])["learning_rate"]
              for name in variants}
    edges = (min(rates), max(rates))
    tables = [markdown([f"seed {first}, wall (processor) time", *(f"rate {rate:g}" for rate in rates)],
                       [[name, *(outcome(found[name, rate, first]) for rate in rates)] for name in variants])]
    heads = [f"seed {seed}{' (selected)' if seed == first else ''}" for seed in seeds]
    tables.append(markdown(["at its best rate", "rate", *heads, "what it is"], [
        [name, f"{chosen[name]:g}{' (an end of those tried)' if len(rates) > 1 and chosen[name] in edges else ''}",
         *(outcome(found[name, chosen[name], seed]) for seed in seeds), VARIANTS[name]] for name in variants]))
    if BASELINE in variants:
        rows = []
        for name in variants:
            for measure, label in (("seconds", "wall"), ("cpu_seconds", "processor")):
                each = [ratio(found[name, chosen[name], seed], found[BASELINE, chosen[BASELINE], seed], measure) for seed in seeds]
                if name != BASELINE:
                    rows.append([f"{name}, {label}", *("-" if r is None else f"{r[0]}{r[1]:.2f}" for r in each), summarised(each)])
        tables.append(markdown([f"time over that of {BASELINE}", *heads, "geometric mean (range)"], rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_program(lambda argv: study(arguments(argv)))
