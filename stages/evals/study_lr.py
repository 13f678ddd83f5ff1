"""Study: is the learning rate that a rule transfers across widths near the best one of each width?

    python -m stages.evals.study_lr --widths 64 128 --seeds 0

The rule: Muon's rate holds up to a recipe's `matrix_lr_width` and falls as 1 / width beyond it. Its base rate, `matrix_lr`, is varied by
factors of two with the rule in force, so that at each width the middle column is the rule's rate and its neighbours are what the rule might
have missed. Every run is a folder of stages.pretrain, not run again once finished, and one JSON line in `--out`.
"""
import argparse
from collections.abc import Sequence
from typing import Any

from stages.evals.scoring import write_records
from stages.evals.studies import markdown, places, stage
from stages.models.pretraining import PretrainConfig
from stages.run import figures
from stages.run.config import build_config, read_yaml
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.figures import Series
from stages.run.manifest import say

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
ASSUMED_TOKENS_PER_S = 8000


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_lr", description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128], help="multiples of 32, the width of a head")
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS), help="of the recipe's rate; 1 is always among them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--recipe", default="tiny", help="whose pretrain.yaml has the rule, and all other settings")
    parser.add_argument("--tokens", type=int, default=300_000)
    places(parser, "study_lr")
    given = parser.parse_args(argv)
    if wrong := [width for width in given.widths if width <= 0 or width % 32]:
        raise ValueError(f"--widths {wrong[0]}: heads are 32 wide, so give a multiple of 32")
    given.factors = sorted({1.0, *given.factors})
    return given


def study(given: argparse.Namespace) -> None:
    recipe = read_yaml(f"recipes/{given.recipe}/pretrain.yaml")
    config = build_config(PretrainConfig, recipe)
    base, limit = config.matrix_lr, config.matrix_lr_width or max(given.widths)
    total = given.tokens * len(given.widths) * len(given.factors) * len(given.seeds)
    say(f"budget: {len(given.widths) * len(given.factors) * len(given.seeds)} runs, {total:,} tokens, about "
        f"{clock(total / ASSUMED_TOKENS_PER_S)}")
    lines: list[dict[str, Any]] = []
    for seed in given.seeds:
        for width in given.widths:
            for factor in given.factors:
                folder = given.runs / f"{given.recipe}-d{width}-lr{base * factor:g}-{given.tokens}-s{seed}"
                run = stage("pretrain", folder, **recipe | {
                    "seed": seed, "tokens": given.tokens, "hidden_size": width, "num_heads": width // 32, "matrix_lr": base * factor,
                    "evaluations": 1, "checkpoints": 1, "logs": 10, "parents.prepare": given.prepare})
                lines.append({"width": width, "factor": factor, "seed": seed, "tokens": run.counts["tokens"], "run": str(folder),
                              "rate": base * factor * min(1.0, limit / width), "loss": run.metrics["heldout_loss"]["value"]})
                write_records(given.out or given.runs / "study_lr.jsonl", lines)
    say("\n" + report(lines))
    series = []
    for place, width in enumerate(given.widths):
        for seed in given.seeds:
            own = [line for line in lines if (line["width"], line["seed"]) == (width, seed)]
            series.append(Series(f"width {width}" if seed == given.seeds[0] else "", [line["rate"] for line in own],
                                 [line["loss"] for line in own], color=place))
    figures.plot(given.runs / "study_lr.svg", series, x="Muon's peak rate", y="held-out loss (nats a token)", log_x=True)


def report(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: the loss at each rate, seed by seed, the best one, and by how much the rule's rate (factor 1) is above it."""
    factors, rows = sorted({line["factor"] for line in lines}), []
    for width, seed in sorted({(line["width"], line["seed"]) for line in lines}):
        own = {line["factor"]: line for line in lines if (line["width"], line["seed"]) == (width, seed)}
        best = min(own.values(), key=lambda line: line["loss"])
        rows.append([str(width), str(seed), f"{own[1.0]['rate']:.3g}", *(f"{own[f]['loss']:.4f}" if f in own else "-" for f in factors),
                     f"{best['rate']:.3g}", f"{own[1.0]['loss'] / best['loss'] - 1:.1%}"])
    header = ["width", "seed", "the rule's rate", *(f"times {factor:g}" for factor in factors), "best rate", "rule above best"]
    return markdown(header, rows)


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
