"""Study: dense decoders against mixtures of experts, at equal active and at equal total parameters, over token budgets and seeds.

    python -m stages.evals.study_moe --seeds 0 1 2

All arms have the same width, attention, data and order of it, optimizer and learning rates; each budget is a run with a schedule of its
own. Two mixtures with other attention stand beside them (`--arms all`). What a token costs in processor time is measured first, the arms
in turn, since wall time on a shared machine says little. Every run is a folder of stages.pretrain, not run again once finished, and one
JSON line in `--out`, so the same command continues where it was.
"""
import argparse
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer

from prompts.intervals import mean_interval
from reward.folders import trusted
from stages.data.packing import PackedCollator
from stages.evals.scoring import write_records
from stages.evals.studies import markdown, mean, places, stage
from stages.models.attention import DOCUMENTS
from stages.models.counts import count_parameters, train_flops_per_token
from stages.models.optimizer import build_optimizer
from stages.models.pretraining import PretrainConfig
from stages.models.routing import Routers
from stages.models.sizes import build_decoder, decoder_of
from stages.models.training import keep_memory
from stages.run import figures
from stages.run.config import build_config, read_yaml
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.figures import Series
from stages.run.manifest import Manifest, say

DENSE = "dense"
MOE: dict[str, Any] = {"architecture": "qwen3_moe", "num_experts": 8}  # a dense Qwen3's attention and norms: the MLPs alone differ
MAIN = (DENSE, "MoE 8/2", "dense, wide")
EXPERTS_BY, WAYS = "experts_implementation", ("eager", "grouped_mm", "batched_mm")  # how transformers can compute experts
ASSUMED_TOKENS_PER_S = 8000  # for the budget until costs are measured
ROUNDS, STEPS = 7, 2  # of the cost; the first round warms up


def arms(width: int) -> dict[str, dict[str, Any]]:
    """Settings of each arm at this width. The wide dense one has as many MLP parameters as the eight experts together."""
    mlp = -(-8 * width // 3 // 32) * 32
    return {DENSE: {"intermediate_size": mlp}, "MoE 8/2": MOE | {"intermediate_size": mlp}, "dense, wide": {"intermediate_size": 4 * mlp},
            "OLMoE 8/2": MOE | {"architecture": "olmoe", "intermediate_size": mlp},
            "MoE 8/1 and shared": MOE | {"architecture": "qwen2_moe", "experts_per_token": 1, "intermediate_size": mlp},
            "MoE 8/2, no balancing": MOE | {"intermediate_size": mlp, "balance_coef": 0.0}}


def arguments(argv: list[str]) -> argparse.Namespace:
    names = list(arms(64))
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_moe", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(MAIN), choices=[*names, "all"], metavar="ARM",
                        help=f"of: {'; '.join(names)}; or all")
    parser.add_argument("--tokens", nargs="+", type=int, default=[225_000, 450_000, 900_000], help="budgets")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens a step")
    parser.add_argument("--cost", action="store_true", help="measure the cost alone, that of other ways to compute experts, too")
    places(parser, "study_moe")
    given = parser.parse_args(argv)
    given.arms = [name for name in names if name in given.arms or "all" in given.arms or name == DENSE]
    given.tokens = sorted(set(given.tokens))
    return given


def study(given: argparse.Namespace) -> None:
    chosen = {name: arm for name, arm in arms(given.hidden_size).items() if name in given.arms}
    common = {"hidden_size": given.hidden_size, "num_heads": max(1, given.hidden_size // 32), "evaluations": 1, "logs": 10,
              "batch_tokens": given.batch_tokens}
    if given.cost:
        ways = {f"MoE 8/2, {way}": MOE | {"intermediate_size": chosen[DENSE]["intermediate_size"], EXPERTS_BY: way} for way in WAYS}
        say("\n" + costs_table(cost({name: common | arm for name, arm in (chosen | ways).items()}, given.prepare)))
        return
    total = len(chosen) * len(given.seeds) * sum(given.tokens)
    say(f"budget: {len(chosen) * len(given.seeds) * len(given.tokens)} runs, {total:,} tokens, about {clock(total / ASSUMED_TOKENS_PER_S)}")
    costs = cost({name: common | arm for name, arm in chosen.items()}, given.prepare)
    say(costs_table(costs))
    lines: list[dict[str, Any]] = []
    for tokens in given.tokens:
        for seed in given.seeds:
            for name, arm in chosen.items():
                folder = given.runs / f"{name.replace(' ', '-').replace('/', 'of').replace(',', '')}-{given.hidden_size}-{tokens}-{seed}"
                run = stage("pretrain", folder, seed=seed, tokens=tokens, **common, **arm, **{"parents.prepare": given.prepare})
                lines.append({"arm": name, "seed": seed, "tokens": run.counts["tokens"], "flops": run.counts["flops"], "run": str(folder),
                              "settings": arm, "cost": costs[name], "wall_s": run.data["provenance"]["wall_s"],
                              "figures": {key: value["value"] for key, value in run.metrics.items()}})
                write_records(given.out or given.runs / "study_moe.jsonl", lines)
    say("\n" + report(lines))
    draw(given.runs, lines)


def cost(settings: Mapping[str, Mapping[str, Any]], prepare: str) -> dict[str, dict[str, float]]:
    """Processor seconds a token of whole training steps on the same rows, one thread, the arms in turn: median over rounds, and the median
    ratio to the dense arm's within rounds with its extremes; and each arm's counts."""
    tokens = Manifest(prepare).product("tokens")
    tokenizer = AutoTokenizer.from_pretrained(trusted(Manifest(prepare).product("tokenizer")))
    rows = datasets.load_from_disk(str(tokens / "train"))
    row_length, threads = len(rows[0]["input_ids"]), torch.get_num_threads()
    torch.set_num_threads(1)
    keep_memory()
    made: dict[str, Any] = {}
    counts: dict[str, dict[str, float]] = {}
    for name, arm in settings.items():
        arm = dict(arm)
        way = arm.pop(EXPERTS_BY, None)
        config = build_config(PretrainConfig, read_yaml("recipes/tiny/pretrain.yaml") | arm, recipe="tiny")
        decoder = decoder_of(config, tokenizer, row_length)
        model = build_decoder(decoder, seed=0, attn_implementation=DOCUMENTS)
        if way:
            model.set_experts_implementation(way)
        counted = count_parameters(decoder)
        counts[name] = {"total": counted["total"], "active": counted["active"], "matmul": counted["matmul"],
                        "flops": train_flops_per_token(decoder, row_length, counted)}
        made[name] = (model, build_optimizer(model, matrix_lr=config.matrix_lr, lr=config.learning_rate),
                      Routers(model, balance_coef=config.balance_coef, z_coef=config.router_z_coef) if config.num_experts else None)
    collator = PackedCollator(eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    rows_a_step = max(1, config.batch_tokens // row_length)
    spent: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(ROUNDS):
        batches = [collator([rows[((turn * STEPS + s) * rows_a_step + i) % len(rows)] for i in range(rows_a_step)]) for s in range(STEPS)]
        for name, (model, optimizer, routers) in made.items():
            began = time.process_time()
            for batch in batches:
                train_step(model, optimizer, routers, batch)
            spent[name].append((time.process_time() - began) / (STEPS * rows_a_step * row_length))
    torch.set_num_threads(threads)
    ratios = {name: [a / b for a, b in zip(own[1:], spent[DENSE][1:], strict=True)] for name, own in spent.items()}
    return {name: counts[name] | {"processor_s": median(own[1:]), "ratio": median(ratios[name]), "ratio_low": min(ratios[name]),
                                  "ratio_high": max(ratios[name])} for name, own in spent.items()}


def costs_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    header = ["arm", "matmul parameters visited", "parameters", "FLOPs a token, times dense", "processor us a token", "times dense"]
    return markdown(header, [
        [name, f"{c['matmul']:,}", f"{c['total']:,}", f"{c['flops'] / costs[DENSE]['flops']:.2f}", f"{c['processor_s'] * 1e6:.0f}",
         f"{c['ratio']:.2f} ({c['ratio_low']:.2f} to {c['ratio_high']:.2f})"] for name, c in costs.items()])


def train_step(model: Any, optimizer: Any, routers: Routers | None, batch: dict[str, torch.Tensor]) -> None:
    if routers:
        routers.begin_step(model, [batch], torch.device("cpu"))
        with routers.recording() as seen:
            loss = model(**batch, use_cache=False).loss
        loss = loss + routers.loss(seen, batch["input_ids"])
    else:
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def at(points: Sequence[tuple[float, float]], where: float) -> float:
    """Loss at a cost between those of two runs, linear in the logarithm of the cost; NaN beyond them."""
    for (x0, y0), (x1, y1) in pairwise(sorted(points)):
        if x0 * (1 - 1e-9) <= where <= x1 * (1 + 1e-9):
            return y0 + (y1 - y0) * math.log(where / x0) / math.log(x1 / x0)
    return math.nan


COSTS = {"tokens": "equal tokens", "flops": "equal FLOPs", "processor_s": "equal processor time"}


def axis(line: Mapping[str, Any], name: str) -> float:
    return line["tokens"] * line["cost"]["processor_s"] if name == "processor_s" else line[name]


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what each arm is and costs, its loss at the largest budget, and what it has over the dense arm, seed by seed, at the
    largest cost that both reach, by each kind of cost."""
    largest = max(line["tokens"] for line in lines)
    loss = {(line["arm"], line["seed"], line["tokens"]): line["figures"]["heldout_loss"] for line in lines}
    names, seeds = list(dict.fromkeys(line["arm"] for line in lines)), sorted({line["seed"] for line in lines})
    rows = []
    for name in names:
        own = [line for line in lines if line["arm"] == name]
        c, final = own[0]["cost"], [line for line in own if line["tokens"] == largest]
        row = [name, f"{c['active']:,}", f"{c['total']:,}", f"{c['flops'] / cost_of(lines, DENSE)['flops']:.2f}", f"{c['ratio']:.2f}",
               mean([loss[name, line["seed"], largest] for line in final])]
        for kind in COSTS:
            gains = []
            for seed in seeds:
                mine, dense = ([(axis(line, kind), line["figures"]["heldout_loss"]) for line in lines
                                if line["arm"] == arm and line["seed"] == seed] for arm in (name, DENSE))
                if mine and dense:
                    where = min(max(x for x, _ in mine), max(x for x, _ in dense))
                    gains.append(at(mine, where) - at(dense, where))
            known = [gain for gain in gains if math.isfinite(gain)]
            row.append("" if name == DENSE else mean(known) if known else "-")
        checked = [line["figures"]["router_max_vio"] for line in final if "router_max_vio" in line["figures"]]
        row += [mean(checked, 2), f"{sum(line['figures']['router_dead'] for line in final):.0f}"] if checked else ["", ""]
        rows.append(row)
    return markdown(["arm", "parameters a token visits", "parameters", "FLOPs, times dense", "processor time, times dense",
                     f"held-out loss at {largest:,} tokens", *(f"less dense at {text}" for text in COSTS.values()), "MaxVio", "dead"], rows)


def cost_of(lines: Sequence[Mapping[str, Any]], arm: str) -> Mapping[str, float]:
    return next(line["cost"] for line in lines if line["arm"] == arm)


def draw(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Loss against tokens, FLOPs and processor time: mean over seeds with its interval, a line an arm."""
    for kind in COSTS:
        series = []
        for name in dict.fromkeys(line["arm"] for line in lines):
            budgets: dict[float, list[float]] = {}
            for line in lines:
                if line["arm"] == name:
                    budgets.setdefault(axis(line, kind), []).append(line["figures"]["heldout_loss"])
            spans = [mean_interval(values) if len(values) > 1 else (values[0],) * 3 for values in budgets.values()]
            centre, low, high = (list(column) for column in zip(*spans, strict=True))
            series.append(Series(name, list(budgets), centre, low, high))
        figures.plot(folder / f"moe-{kind}.svg", series, x={"tokens": "training tokens", "flops": "training FLOPs"}.get(
            kind, "processor seconds of training"), y="held-out loss (nats a token)", log_x=True)
    say(f"figures: {folder}/moe-*.svg")


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
