"""Plain matplotlib figures, written where a reader of the run looks for them: `<run>/figures/`."""
from collections.abc import Mapping, Sequence
from pathlib import Path


def lines(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, title: str = "",
          log_x: bool = False, log_y: bool = False, marks: Mapping[str, float] | None = None) -> Path:
    """One line a series `{label: (xs, ys)}`; `marks` draws named horizontal levels. Returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for label, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o" if len(xs) < 30 else None, markersize=3, linewidth=1.3, label=label)
    for label, level in (marks or {}).items():
        axes.axhline(level, linestyle="--", linewidth=1, color="grey")
        axes.annotate(label, (0.01, level), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.set(xlabel=x, ylabel=y, title=title)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
