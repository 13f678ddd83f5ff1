"""A ladder of small pretraining runs, the law through them, and what it predicts for the main model before that is trained.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.scaling --config recipes/tiny/scaling.yaml

Without training, on any csv or jsonl of runs (docs/scaling-laws.md; each command has --help):

    python -m stages.scaling fit runs.csv --n-column N --d-column D --loss-column loss --where column=value --out fit.json
    python -m stages.scaling predict fit.json --params 7e9 --tokens 2e12
    python -m stages.scaling plan fit.json --loss 1.97 --inference-tokens 2e12
    python -m stages.scaling holdout runs.csv --train-below-flops 1e21
    python -m stages.scaling isoflop runs.csv --c-column C
    python -m stages.scaling emergence task.csv --flops-column flops --accuracy-column accuracy --smooth-column brier
"""
import itertools
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from stages.laws.commands import command
from stages.laws.fit import FORMS, PARAMETERS, Form, cross_check, expected, fit_law, formula, predict
from stages.laws.holdout import holdout, rolling
from stages.laws.isoflop import grid_curves
from stages.run import figures
from stages.run.config import StageConfig, option
from stages.run.console import clock, table
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, Run, hash_data, is_main, metric, say, write_json
from stages.run.story_scaling import compute_drawings, law_drawings

REACH = 4.0  # how many times the dearest fitted run's FLOPs count as far, and what the main model should cost at least
COUNTS = {"matmul": "matmul_parameters", "non_embedding": "non_embedding_parameters", "total": "parameters"}


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(StageConfig):
    STAGE = "scaling"
    PARENTS = ("prepare",)

    pretrain_config: str = option(
        "", "the main model's file, whose settings the ladder shares (default recipes/<recipe>/pretrain.yaml)",
        recorded_only=True)  # its content is fingerprinted instead
    sizes: list[dict[str, int]] = option(
        [{"hidden_size": 32, "num_heads": 1}, {"hidden_size": 48, "num_heads": 2}, {"hidden_size": 64, "num_heads": 2},
         {"hidden_size": 96, "num_heads": 3}],
        "sizes of the ladder, three at least; each changes some of hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size")
    tokens: list[int] = option(
        [100_000, 200_000, 400_000, 800_000], "training tokens, three budgets at least; by the main model's schedule each run has a whole "
        "one (linear), or a size's budgets branch off one run (wsd)")
    evaluations: int = option(2, "held-out evaluations over each run, for its curve; the law takes the last measurement")
    parameters: Literal["matmul", "non_embedding", "total"] = option("matmul", "the convention by which N counts parameters")
    loss: str = option("heldout_loss", "metric of the runs that the law is fitted to")
    floor: Literal["fitted", "text"] = option(
        "fitted", "E of the law: fitted, or text: the entropy a token that prepare computed for text it generated")
    form: Form = option("sum", "E + A / N^alpha + B / D^beta, or E + C / (N^a D^b), which needs a known floor")
    holdout_fraction: float = option(0.25, "share of the runs, the dearest, that a second fit has to predict (0: no such check)")
    bootstrap_draws: int = option(300, "draws of the residual bootstrap")


def main(config: ScalingConfig) -> Manifest:
    from stages.models.counts import CONVENTIONS, FLOPS, count_parameters, planned_decoder, train_flops_per_token
    from stages.models.ladder import ladder_configs, main_config, nested, schedule_of, shared_tokens  # torch takes seconds to import,
    from stages.models.pretraining import identity, pretrain  # which the subcommands do without
    from stages.models.training import barrier

    if config.form == "product" and config.floor == "fitted":
        raise ValueError("form: product needs a known floor: set floor to text, or form to sum")
    base = main_config(config.recipe, config.pretrain_config)
    ladder = ladder_configs(base, config.sizes, config.tokens, seed=config.seed, parents=config.parents, evaluations=config.evaluations,
                            logs=min(10, base.logs), report_to=config.report_to)
    run = Run(config, inputs={"pretrain": hash_data(base.fingerprinted())})
    if run.finished:
        return run.manifest
    prepared = run.parents["prepare"]
    floor = known_floor(config, prepared)
    vocabulary, row_length = prepared.counts["vocabulary"], prepared.data["notes"]["row_length"]

    def cost(c) -> tuple[int, int, dict[str, int]]:
        decoder = planned_decoder(c, vocabulary=vocabulary, row_length=row_length)
        tokens, counts = c.tokens // c.batch_tokens * c.batch_tokens, count_parameters(decoder)
        return tokens * train_flops_per_token(decoder, row_length, counts), tokens, counts

    costs = {name: cost(c) for name, c in ladder.items()}
    own = {name: costs[name][0] * (1 - shared_tokens(c) / costs[name][1]) for name, c in ladder.items()}  # FLOPs spent in no other run
    order = sorted(ladder, key=lambda name: (costs[ladder[name].branch_from or name][0], bool(ladder[name].branch_from), costs[name][0]))
    total = sum(own.values())
    points, done, trained, spent = [], 0.0, 0.0, 0.0
    for number, name in enumerate(order, start=1):
        rate = f", ETA of the ladder {clock((total - done) / (trained / spent))}" if trained else ", ETA of the ladder after this run"
        say(f"ladder {number}/{len(order)}: {name}, {done / total:.0%} of {total:.2g} FLOPs done{rate}")
        settings = nested(ladder[name], name, run)
        barrier()
        began, known = time.time(), (run.directory / name / MANIFEST).is_file()
        manifest = pretrain(settings)
        barrier()
        done += own[name]
        if not known:
            trained, spent = trained + own[name], spent + time.time() - began
        if not ladder[name].keep_at:
            points.append(point(name, manifest, config))

    N, D, loss = (np.array([p[key] for p in points], dtype=float) for key in ("N", "D", "loss"))
    path_flops = np.array([costs[p["run"]][0] for p in points], dtype=float)
    sizes = N if base.schedule != "linear" else None  # branches off one run share its noise
    fit = fit_law(N, D, loss, floor=floor, form=config.form, runs=sizes, num_draws=config.bootstrap_draws, seed=config.seed, conventions={
        "N": f"{config.parameters}: {CONVENTIONS[config.parameters]}", "D": "tokens trained on, padding included",
        "loss": f"{config.loss}, nats a token", "flops": FLOPS, "flops_per_unit": float(np.median(path_flops / (N * D))),
        "schedule": schedule_of(base)})
    fit["projection"] = cross_check(fit, N, D, loss, floor=floor)
    fit["coverage"] = rolling(N, D, loss, flops=path_flops, floor=floor, form=config.form, seed=config.seed)
    flops, tokens, counts = cost(base)
    size = counts[config.parameters]
    value, interval = predict(fit, size, tokens)
    prediction = {"value": value, "interval": list(interval), "form": config.form, "loss": config.loss, "N": size, "D": tokens,
                  "flops": flops, "main_model": identity(base), "prepare": prepared.fingerprint,
                  "beyond": {"N": size / N.max(), "D": tokens / D.max(), "flops": flops / path_flops.max()}, "warnings": fit["warnings"],
                  "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    checked = check(config, N, D, loss, floor, path_flops)
    if is_main():
        write_json(run.directory / "fit.json", fit)
        write_json(run.directory / "prediction.json", prediction)
        (run.directory / "points.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points), encoding="utf-8")
        curves = grid_curves(path_flops, N, loss)
        write_json(run.directory / "curves.json", curves)
        by_law = partial(fitted_loss, fit)
        for drawing in [*law_drawings(points, prediction, by_law, None, config.parameters),
                        *compute_drawings(run.directory, points, prediction, by_law, curves)]:
            figures.plot(run.directory / "figures" / f"{drawing.name}.png", drawing.series, **drawing.options)
    say(table(["run", "N", "D", config.loss, "fit"], [
        [p["run"], f"{p['N']:,}", f"{p['D']:,}", f"{p['loss']:.4f}", f"{fitted_loss(fit, p):.4f}"]
        for p in points]))
    say(f"L = {formula(fit)}; predicted for the main model (N = {size:,}, D = {tokens:,}, {flops / path_flops.max():.2g} times the "
        f"FLOPs of the dearest run), before it is trained: {value:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]")
    for text in fit["warnings"]:
        say(f"warning: do not trust this prediction: {text}")
    if base.schedule != "linear":
        say(f"the ladder took {total:.3g} FLOPs; with every budget trained from its beginning it would have taken {path_flops.sum():.3g} "
            f"({total / path_flops.sum() - 1:+.0%})")
    barrier()
    return run.finish(
        metrics={"predicted_loss": metric(value, n=len(points), ci95=interval), **checked,
                 **{name: metric(fit[name], n=len(points), ci95=fit["intervals"].get(name)) for name in PARAMETERS},
                 **{name: metric(fit["product"][name], n=len(points), ci95=ends)
                    for name, ends in fit.get("product", {}).get("intervals", {}).items()}},
        counts={"runs": len(points), "tokens": sum(costs[name][1] - shared_tokens(c) for name, c in ladder.items()),
                "flops": total, "flops_unshared": path_flops.sum()},
        products={"fit": "fit.json", "prediction": "prediction.json", "points": "points.jsonl", "curves": "curves.json"})


def fitted_loss(fit: dict[str, Any], p: dict[str, Any]) -> float:
    return float(expected(fit, p["N"], p["D"]))


def known_floor(config: ScalingConfig, prepared: Manifest) -> float | None:
    """E where it is not to be fitted. Raises ValueError where the entropy of the text, or of the part that is asked for, is not known."""
    if config.floor == "fitted":
        return None
    if config.loss != "heldout_loss" or "text_entropy" not in prepared.metrics:
        raise ValueError("floor: text needs heldout_loss on the embedded curriculum alone, whose entropy prepare computes; "
                         "set floor to fitted")
    return prepared.metrics["text_entropy"]["value"]


def point(name: str, manifest: Manifest, config: ScalingConfig) -> dict[str, Any]:
    if config.loss not in manifest.metrics:
        raise ValueError(f"{name} has no metric {config.loss!r}: set loss to one of {', '.join(manifest.metrics)}")
    losses = {key: value["value"] for key, value in manifest.metrics.items() if key.startswith("heldout")}
    return {"run": name, "N": manifest.counts[COUNTS[config.parameters]], "D": manifest.counts["tokens"],
            "loss": manifest.metrics[config.loss]["value"], "flops": manifest.counts["flops"], **losses}


def check(config: ScalingConfig, N, D, loss, floor, flops) -> dict[str, dict]:
    """How well a fit on the cheaper runs predicts the dearer ones, and those at `REACH` times the compute, as metrics; none when too few
    would be left to fit."""
    if config.holdout_fraction <= 0:
        return {}
    found: dict[str, dict] = {}
    for form, (which, how) in itertools.product(FORMS if floor else FORMS[:1], {
            "": {"fraction": config.holdout_fraction}, "_4x": {"below": flops.max() / REACH * 1.0001, "reach": REACH}}.items()):
        try:
            report = holdout(N, D, loss, flops=flops, floor=floor, form=form, seed=config.seed,
                             num_draws=config.bootstrap_draws if form == "sum" else 0, **how)
        except ValueError as error:
            say(f"no hold-out check of the law{f' at {REACH:g} times the compute' if which else ''}: {error}")
            continue
        count, end = report["num_heldout"], which if form == config.form else f"{which}/{form}"
        say(f"check of the {form}: fitted on the {report['num_fitted']} cheaper runs, the law is off by {report['error_mean']:.2%} on the "
            f"{count} dearer ones{f' at {REACH:g} times their compute or more' if which else ''}, of which {report['coverage']:.0%} lie "
            "inside their 95 % intervals")
        found |= {f"holdout_error{end}": metric(report["error_mean"], n=count),
                  f"holdout_coverage{end}": metric(report["coverage"], n=count)}
    return found


if __name__ == "__main__":
    if not sys.argv[1:] or not sys.argv[1].startswith("-"):
        sys.exit(command(sys.argv[1:], __doc__))
    launch(main, ScalingConfig)
