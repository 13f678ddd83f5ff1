"""Plain matplotlib figures: of one stage in `<run>/figures/`, of a whole recipe in its report.

An .svg follows its viewer: text and axes take the light or dark colour scheme, its colours read on both, and the background is
the page's. It is the same bytes for the same numbers. A .png is for light backgrounds.
"""
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Contrast of 3 or more (WCAG 2.1, 1.4.11) both on white and on the page's dark #16181c.
COLORS = ("#2f81d0", "#cf7a22", "#1f9e77", "#b565c4", "#d5544f", "#8f8f2f", "#5a7dab", "#8a8a8a")
INK = "#345678"  # stands for the viewer's text colour until the file is written
SCHEME = "svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#dfe3e8}}"
SIZE = (4.5, 3.1)  # inches: shown at that size or a little larger, so that text stays legible on a phone


class Series(NamedTuple):
    """Points to draw. `low` and `high` are ends of intervals, of a "band" the edges of a shaded strip around its line; a "ring" marks
    points of others and has the colour of text. `color` is a place in the palette (default: the next one), beyond whose end dashes and
    marks change; a series without a label is not in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    look: Literal["line", "dashed", "points", "squares", "diamonds", "star", "ring", "band"] = "line"
    color: int | None = None


MARKERS = {"points": ("o", 16), "squares": ("s", 20), "diamonds": ("D", 18), "star": ("*", 90)}
# Each time round the palette: dashes of lines, marks of points. A plot has room for as many series in its legend.
ROUNDS: tuple[tuple[str | tuple[int, tuple[float, ...]], str], ...] = (
    ("-", "o"), ((0, (5, 1.5, 1, 1.5)), "s"), ((0, (1, 1.2)), "^"), ((0, (8, 2)), "D"))
Bar = tuple[float, float | None, float | None]  # value and the ends of its interval, None where there is no interval


def lines(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str, title: str = "",
          log_x: bool = False, log_y: bool = False, marks: Mapping[str, float] | None = None) -> Path:
    """One line a series `{label: (xs, ys)}`; `marks` draws named horizontal levels. Returns `path`."""
    return plot(path, [Series(label, xs, ys) for label, (xs, ys) in series.items()], x=x, y=y, title=title, log_x=log_x,
                log_y=log_y, marks=marks)


def plot(path: Path, series: Sequence[Series], *, x: str, y: str, title: str = "", log_x: bool = False, log_y: bool = False,
         marks: Mapping[str, float] | None = None, events: Mapping[str, float] | None = None,
         y_range: tuple[float, float] | None = None, diagonal: bool = False) -> Path:
    """Lines and points, with intervals where there are any; points that are not finite are left out. Returns `path`.

    `marks` draws named horizontal levels, `events` named places on the x axis, `diagonal` the line on which y equals x.
    """
    with _axes(path) as axes:
        for place, s in enumerate(series):
            turn, hue = divmod(place if s.color is None else s.color, len(COLORS))
            color, (dash, dot) = COLORS[hue], ROUNDS[turn % len(ROUNDS)]
            kept = [i for i, pair in enumerate(zip(s.x, s.y, strict=True)) if all(map(math.isfinite, pair))]
            xs, ys = [s.x[i] for i in kept], [s.y[i] for i in kept]
            if s.look == "band":
                assert s.low is not None and s.high is not None, "a band has edges"
                axes.fill_between(xs, [s.low[i] for i in kept], [s.high[i] for i in kept], color=color, alpha=0.18, linewidth=0)
            elif s.low is not None and s.high is not None:
                reach = [[max(0.0, s.y[i] - s.low[i]) for i in kept], [max(0.0, s.high[i] - s.y[i]) for i in kept]]
                axes.errorbar(xs, ys, yerr=reach, fmt="none", ecolor=color, elinewidth=1, capsize=2, zorder=2)
            if s.look == "ring":
                axes.scatter(xs, ys, facecolors="none", edgecolors=_ink(path), s=60, linewidths=0.8, label=s.label, zorder=4)
            elif s.look in ("line", "dashed", "band"):
                axes.plot(xs, ys, color=color, linewidth=1 if s.look == "dashed" else 1.5, linestyle="--" if s.look == "dashed" else dash,
                          marker=dot if s.look != "dashed" and len(xs) < 30 else None, markersize=3, label=s.label)
            else:
                marker, size = MARKERS[s.look]
                marker = dot if s.look == "points" else marker
                axes.scatter(xs, ys, color=color, marker=marker, s=size, label=s.label, zorder=3)
        for label, level in (marks or {}).items():
            axes.axhline(level, linestyle=":", linewidth=1, color="#8a8a8a")
            axes.annotate(label, (0.01, level), xycoords=("axes fraction", "data"), fontsize=7.5, va="bottom")
        for label, where in (events or {}).items():
            axes.axvline(where, linestyle="-.", linewidth=1, color="#8a8a8a", zorder=1)
            axes.annotate(label, (where, 0.02), xycoords=("data", "axes fraction"), fontsize=7.5, rotation=90, ha="right", va="bottom")
        if diagonal:
            ends = [*axes.get_xlim(), *axes.get_ylim()]
            axes.plot([min(ends), max(ends)], [min(ends), max(ends)], linestyle=":", linewidth=1, color="#8a8a8a", zorder=1)
        axes.set(xlabel=x, ylabel=y, title=title)
        for axis, wanted, set_scale in ((axes.xaxis, log_x, axes.set_xscale), (axes.yaxis, log_y, axes.set_yscale)):
            if wanted:
                set_scale("log")
            _plain_ticks(axis, log=wanted)
        if y_range:
            axes.set_ylim(*y_range)
        axes.grid(alpha=0.22)
        if not log_x:
            axes.xaxis.get_major_locator().set_params(nbins=6, integer=all(float(value).is_integer() for s in series for value in s.x))
        _legend(axes, [s.label for s in series if s.label])
    return path


def bars(path: Path, rows: Mapping[str, Mapping[str, Bar | None]], *, x: str, title: str = "",
         x_range: tuple[float, float] | None = None, marks: Mapping[str, float] | None = None) -> Path:
    """Horizontal bars with intervals, `{row: {group: bar}}`: a row has a bar for each group it names; None reads "not measured".

    `marks` draws named vertical levels. Returns `path`.
    """
    groups = list(dict.fromkeys(group for row in rows.values() for group in row))
    places, top = {}, 0.0
    for row, named in rows.items():
        for group in (g for g in groups if g in named):
            places[row, group] = top
            top += 1
        top += 0.6 if len(groups) > 1 else 0.25
    with _axes(path, (SIZE[0], 0.95 + 0.17 * max(top, 4))) as axes:
        left = x_range[0] if x_range else 0.0
        for place, group in enumerate(groups):
            turn, hue = divmod(place, len(COLORS))
            color, hatch = COLORS[hue], ("", "///", "...", "xxx")[turn % len(ROUNDS)]
            found = [(y, rows[row][group]) for (row, g), y in places.items() if g == group]
            shown = [(y, bar) for y, bar in found if bar is not None]
            axes.barh([y for y, _ in shown], [b[0] for _, b in shown], height=0.84, color=color, label=group,
                      hatch=hatch, edgecolor=_ink(path) if hatch else None)
            for y, (value, low, high) in shown:
                if low is not None and high is not None:
                    axes.errorbar([value], [y], xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt="none",
                                  ecolor=_ink(path), elinewidth=1, capsize=2)
            for y in (y for y, bar in found if bar is None):
                axes.annotate(" not measured", (left, y), fontsize=6.5, va="center", color="#8a8a8a")
        for label, level in (marks or {}).items():
            axes.axvline(level, linestyle=":", linewidth=1.2, color="#8a8a8a")
            axes.annotate(f"{label} ", (level, top), fontsize=7.5, va="bottom", ha="right")
        middle = {row: [y for (r, _), y in places.items() if r == row] for row in rows}
        axes.set_yticks([sum(ys) / len(ys) for ys in middle.values() if ys], [row for row, ys in middle.items() if ys])
        axes.set_ylim(top + (0.4 if marks else -0.2), -0.7)
        if x_range:
            axes.set_xlim(*x_range)
        axes.set(xlabel=x, title=title)
        axes.grid(alpha=0.22, axis="x")
        _legend(axes, groups)
    return path


def heat(path: Path, rows: Mapping[str, Sequence[float]], *, columns: Sequence[str], y: str, legend: str) -> Path:
    """A table of shades, `{row: values}`, with its numbers where there are few enough to read. Returns `path`."""
    with _axes(path, (SIZE[0], 1.0 + 0.16 * max(len(rows), 6))) as axes:
        image = axes.imshow(list(rows.values()), aspect="auto", cmap="viridis", vmin=0)
        if len(rows) <= 40:
            for i, values in enumerate(rows.values()):
                for j, value in enumerate(values):
                    axes.annotate(f"{value:.1f}", (j, i), ha="center", va="center", fontsize=5.5,
                                  color="white" if value < image.norm.vmax / 2 else "black")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=6)
        axes.set_ylabel(y)
        axes.figure.colorbar(image, ax=axes, label=legend)
    return path


@contextmanager
def _axes(path: Path, size: tuple[float, float] = SIZE) -> Iterator[Any]:
    """Axes to draw on, written to `path` afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink = _ink(path)
    with matplotlib.rc_context({
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink, "font.size": 9,
            "axes.titlesize": 9.5, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
            "svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            head, rest = path.read_text(encoding="utf-8").replace(INK, "currentColor").split("<svg", 1)
            attributes, rest = rest.split(">", 1)
            path.write_text(f"{head}<svg{attributes}><style>{SCHEME}</style>{rest}", encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)
        plt.close(figure)


def _ink(path: Path) -> str:
    return INK if path.suffix == ".svg" else "black"


def _legend(axes, labels: Sequence[str]) -> None:
    """Above the axes, where it hides nothing; one label needs none."""
    if len(labels) > 1:
        columns = next((n for n in (5, 4, 3) if n * (max(map(len, labels)) + 5) <= 62), 2)
        axes.figure.legend(fontsize=8, frameon=False, ncols=min(columns, len(labels)), loc="outside upper left", borderpad=0.1,
                      handlelength=1.5, columnspacing=1.2)


def _plain_ticks(axis, *, log: bool) -> None:
    """Numbers as people read them (200k, 2M); on an axis of logs at 1, 2 and 5, or at 1 and 3 where those would run into one another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if log and low > 0 and high / low < 1e4:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1, 3)))
        axis.set_minor_formatter(NullFormatter())
    if (log and low > 0 and high / low < 1e4) or (not log and high >= 1e4):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """`963968` as `964k`, `2e6` as `2M`, `1.69e13` as `1.69e+13`; numbers below a thousand with three digits."""
    size = abs(value)
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 0.9995 * unit <= size < 1000 * unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
