"""Benchmark: samples a second, where the time goes and peak memory of PPO, beside TRL's last PPO and its GRPO.

    python -m stages.evals.bench_ppo --rounds 3

An iteration samples a batch of responses and learns from it in epochs x minibatches optimizer steps. Every variant does the same work:
the same random decoder, reward model, questions of the curriculum, response length (the end token is switched off), batch, epochs,
minibatches, fp32, temperature 1, a price on the KL to a frozen reference. Each runs in a process of its own; rounds go over all of
them, so that what slows the machine slows all. Ratios are within rounds; the first iteration of a run is not timed.

TRL's PPO is that of its last release to have one, in an environment of its own (`make bench-ppo` makes it), with
`gradient_accumulation_steps` 1: with more of them its minibatches take no optimizer step of their own. GRPO has no critic and
`--generations` responses to each question, whose scores it compares: less work, shown for orientation.
"""
import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.evals.bench_pretrain import launcher
from stages.evals.studies import in_rounds, markdown, measured
from stages.models.sizes import of_size
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import say

VARIANTS = {"critic": "this project's PPOTrainer with a critic of its own",
            "trunk": "the same, the values from a head on the policy's trunk",
            "lora": "the same, policy and critic as adapters of rank 16 on one frozen base, which is the reference, too",
            "vllm": "the first, with rollouts by vLLM in the same process (left out unless named: it needs a GPU)",
            "trl-ppo": "trl.experimental.ppo.PPOTrainer of TRL 1.12",
            "trl-grpo": "GRPOTrainer of the TRL installed here: no critic"}
BASELINE = "trl-ppo"
PHASES = ("rollout", "score", "forward", "update", "rest")  # as stages.rl.timed has them
PEER = Path(__file__).resolve().parents[2] / ".venv-trl112" / "bin" / "python"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.bench_ppo", description=__doc__.splitlines()[0])
    usual = [name for name in VARIANTS if name != "vllm"]
    parser.add_argument("--variants", nargs="+", default=usual, choices=list(VARIANTS), help="who trains", metavar="VARIANT")
    parser.add_argument("--sizes", nargs="+", default=["128x4", "256x6"], help="of the decoders and classifiers: width x layers, or "
                        "a recipe's name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="that are timed, in each run")
    parser.add_argument("--batch-size", type=int, default=64, help="responses an iteration")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--response-tokens", type=int, default=40)
    parser.add_argument("--generations", type=int, default=8, help="responses to a question, of GRPO")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast of all trainers")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, in bf16, or not at all")
    given = parser.parse_args(argv)
    for name in ("minibatches", "generations"):
        if given.batch_size % getattr(given, name):
            raise ValueError(f"batch_size {given.batch_size} is not a multiple of {name} {getattr(given, name)}: choose one that is")
    for size in given.sizes:
        of_size(size)
    if given.gpu and (peers := [name for name in given.variants if name.startswith("trl-")]):
        raise ValueError(f"{peers[0]} is not set up for a GPU here: leave it out of --variants")
    given.bf16 |= given.gpu
    return given


def work(given: argparse.Namespace) -> dict[str, int]:
    """What every variant does, as the keyword arguments of stages.rl.timed.Work."""
    return {name: value for name, value in vars(given).items() if name not in ("variants", "sizes", "rounds", "gpu")}


def summary(runs: Sequence[dict[str, Any]], size: str) -> str:
    """A table of one size: medians over rounds, and the ratio within rounds with its lowest and highest."""
    found = {name: [run for run in runs if run["variant"] == name and run["size"] == size] for name in VARIANTS}
    rows = []
    for name, of in found.items():
        each = [run["samples_per_s"] / other["samples_per_s"] for run, other in zip(of, found[BASELINE], strict=False)]
        if of:
            rows.append([name, f"{statistics.median(run['samples_per_s'] for run in of):.1f}",
                         f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" if each else "-",
                         *(f"{statistics.median(run['seconds_an_iteration'][phase] for run in of):.2f}" for phase in PHASES),
                         f"{max(run['peak_bytes'] for run in of) / 2**30:.2f}", VARIANTS[name]])
    return markdown([f"size {size}", "samples/s", f"times {BASELINE}", *(f"{phase}, s" for phase in PHASES), "peak GiB",
                     "what it is"], rows)


def bench(given: argparse.Namespace) -> None:
    if BASELINE in given.variants and not PEER.exists():
        raise ValueError(f"{PEER} is not there: run `make bench-ppo`, which makes it, or leave {BASELINE} out of --variants")
    if given.gpu:
        launcher("gpu")
    samples = (given.iterations + 1) * given.batch_size
    costs = [of["hidden_size"] ** 1.5 * of["num_layers"] for of in map(of_size, given.sizes)]
    speed = 2e8 if given.gpu else 580_000
    seconds = given.rounds * len(given.variants) * sum(15 + samples * (1 + given.epochs) * cost / speed for cost in costs)
    say(f"budget: {given.rounds} rounds of {len(given.variants)} variants at {len(given.sizes)} sizes, about {clock(seconds)}")
    in_rounds(given, given.sizes, lambda name, size: measured(
        f"{name} at size {size}", "stages.rl.timed", name, size, json.dumps(work(given)),
        python=str(PEER) if name == BASELINE else sys.executable, OMP_NUM_THREADS=str(given.threads)), summary)


if __name__ == "__main__":
    run_program(lambda argv: bench(arguments(argv)))
