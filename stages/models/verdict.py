"""What fine-tuning taught and what it cost: figures for the manifest, a table, a plot, and the checkpoint to keep."""
import math
from collections.abc import Sequence
from pathlib import Path

from stages.models.forgetting import Watch, above, backward_transfer
from stages.models.heldout import ratio, summarised
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.console import table
from stages.run.manifest import is_main, metric, say


def forgotten(before: list[list[float]], now: list[list[float]]) -> dict[str, dict]:
    """Loss on the base corpus before and after, their paired difference, and KL(base || model), as manifest metrics.

    `before` and `now` are what `Neutral` found of the same rows.
    """
    counts = [int(row[2]) for row in now]
    change, error = ratio([b[0] - a[0] for a, b in zip(before, now, strict=True)], counts)
    kl, kl_error = ratio([row[3] for row in now], [int(row[4]) for row in now])
    made = {"before/base_loss": summarised([row[:3] for row in before])["heldout_loss"],
            "after/base_loss": summarised([row[:3] for row in now])["heldout_loss"],
            "change/base_loss": metric(change, n=sum(counts), ci95=(change - 1.96 * error, change + 1.96 * error)),
            "after/kl_to_base": metric(kl, n=int(sum(row[4] for row in now)), ci95=(kl - 1.96 * kl_error, kl + 1.96 * kl_error))}
    say(f"base corpus: held-out loss {made['before/base_loss']['value']:.4f} before, {made['after/base_loss']['value']:.4f} after "
        f"({change:+.4f} [{change - 1.96 * error:+.4f}, {change + 1.96 * error:+.4f}]); KL from the base {kl:.4f} nats a token, "
        f"over {len(now)} rows")
    return made


def transferred(watch: Watch, names: Sequence[str], steps: Sequence[int]) -> dict[str, dict]:
    """Backward transfer in nats a token, and the loss of each source (rows) after each part of the sequence."""
    at = {point["step"]: point for point in watch.points}
    scores = [[-watch.loss_of(at[step], name) for name in names] for step in steps]
    value = backward_transfer(scores)
    errors = [above(watch.rows_of(at[steps[i]], name), watch.rows_of(at[steps[-1]], name))[1] for i, name in enumerate(names[:-1])]
    reach = 1.96 * math.sqrt(sum(error**2 for error in errors)) / len(errors)
    rows = {name: len(watch.rows_of(at[steps[-1]], name)) for name in names}
    say(table(["validation loss after", *names], [[learned, *(f"{-score:.4f}" for score in row)]
                                                  for learned, row in zip(names, scores, strict=True)]))
    say(f"backward transfer {value:+.4f} [{value - reach:+.4f}, {value + reach:+.4f}] nats a token: "
        "what later sources changed of earlier ones (below 0: forgotten)")
    return {"backward_transfer": metric(value, n=sum(rows[name] for name in names[:-1]), ci95=(value - reach, value + reach))} | {
        f"sequence/{learned}/{name}": metric(-score, n=rows[name]) for learned, row in zip(names, scores, strict=True)
        for name, score in zip(names, row, strict=True)}


def verdict(folder: Path, watch: Watch, *, kept: int, recommended: int, equal: Sequence[int],
            started: bool = False) -> None:
    """The looks as a table, which checkpoint is recommended and why, and learning against forgetting as a figure. `started`: the chat
    tokens had been given start values, which the first look sees."""
    logged = read_metrics(folder / "metrics.jsonl")
    looks = [(point["step"], watch.logs(point)) for point in watch.points]
    rows = []
    for step, logs in looks:
        training = next((row["train/loss"] for row in reversed(logged) if row["step"] <= step and "train/loss" in row), float("nan"))
        rows.append([f"{step}", *((f"{training:.4f}", f"{logs['eval_loss']:.4f}", f"{logs['eval_loss'] - training:+.4f}") if step else
                                  ("-", f"{logs['eval_loss']:.4f}", "-")),
                     *((f"{logs[f'forgetting/{key}']:.4f}" if watch.neutral else "-") for key in ("base_loss", "kl_to_base")),
                     "recommended" if step == recommended else "as good" if step in equal else ""])
    say(table(["step", "training", "validation", "gap", "base corpus", "KL", ""], rows))
    if watch.neutral:
        say(f"at each look validation is over {watch.count} dialogues, base corpus and KL are over {watch.neutral_count} rows"
            + ("; the KL at step 0 is that of the chat tokens' start values" if started and looks[0][0] == 0 else ""))
    reason = "no checkpoint learned more, beyond noise, and of these it forgot least" if watch.neutral else "no checkpoint learned more"
    say(f"verdict: step {recommended} ({reason}); {'it is' if kept == recommended else f'step {kept} is'} the product")
    if not is_main():
        return
    figures.lines(folder / "figures" / "loss.png", {
        label: ([r["step"] for r in logged if key in r], [r[key] for r in logged if key in r])
        for label, key in (("training", "train/loss"), ("validation", "eval/loss"), ("base corpus", "forgetting/base_loss"))},
        x="step", y="loss (nats a token)", log_y=True)
    if watch.neutral:
        points = [(step, logs["forgetting/base_loss"], logs["eval_loss"]) for step, logs in looks if step]
        figures.plot(folder / "figures" / "verdict.png", [
            figures.Series("", [x for _, x, _ in points], [y for _, _, y in points], color=7),
            *(figures.Series(f"step {step}", [x], [y], look="star" if step == recommended else "points", color=place)
              for place, (step, x, y) in enumerate(points))],
            x="forgetting: loss on the base corpus (nats a token)", y="learning: validation loss (nats a token)",
            title=f"recommended: step {recommended}")
