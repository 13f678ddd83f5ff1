"""Numbers that know where they come from: a finished stage as the report cites it, and how its figures are written.

Every number is marked with the file and key that hold it (`stages.run.page.number`), or with what it was computed from. What no
manifest holds reads "not measured"; nothing is filled in.
"""
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.figures import Series
from stages.run.manifest import MANIFEST, Manifest
from stages.run.page import Figure, Section, number

MISSING = "not measured"
MEASURED = ["", "value", "95 % interval", "n"]  # header of a table of `Stage.row`
TITLES = {"prepare": "Data", "scaling": "Scaling law", "pretrain": "Pretraining", "sft": "Supervised fine-tuning",
          "preferences": "Preferences", "reward_model": "Reward model", "rejection_sampling": "Rejection sampling", "ppo": "PPO",
          "evaluation": "Evaluation"}
STRATEGIES = {"direct": "direct", "few_shot": "few-shot", "zero_shot_cot": "CoT", "few_shot_cot": "few-shot CoT",
              "sampled_cot": "one sampled CoT", "self_consistency": "self-consistency"}
MODELS = {"base": "base", "sft": "SFT", "ppo": "PPO", "base_chat": "base, chat form"}
Told = tuple[Section, list[list[str]]]  # a section, and its lines of the summary: effect, result, 95 % interval, n, beside it


class Form(NamedTuple):
    """How a number is written."""

    digits: int = 3
    scale: float = 1.0
    sign: str = ""
    unit: str = ""

    def bare(self, value: float) -> str:
        rounded = round(value * self.scale, self.digits) + 0.0  # + 0.0: never "-0.0"
        return f"{rounded:{self.sign if rounded else ''}.{self.digits}f}"

    def text(self, value: float) -> str:
        return self.bare(value) + self.unit

    def between(self, ends: Iterable[float]) -> str:
        return "[{}, {}]".format(*map(self.bare, ends))


LOSS, SCORE, CHANGE = Form(4), Form(3), Form(3, sign="+")
SHARE, GAIN, ERROR = Form(1, 100, unit=" %"), Form(1, 100, "+", " points"), Form(1, 100, "+", " %")


class Stage:
    """A finished stage. Methods that take a `key` give the marked text of a metric or count, or "not measured"."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.data, self.path = manifest, manifest.data, manifest.path
        self.config, self.counts, self.fingerprint = manifest.config, manifest.counts, manifest.fingerprint
        self.notes: dict[str, Any] = manifest.data.get("notes", {})
        self.provenance: dict[str, Any] = manifest.data["provenance"]

    @property
    def short(self) -> str:
        return short_hash(self.fingerprint)

    @property
    def commit(self) -> str:
        commit = self.provenance.get("commit")
        return (commit[:10] if commit else "not recorded") + (" with uncommitted changes" if self.provenance.get("dirty") else "")

    def cite(self, *files: str) -> str:
        """The small line under a figure: manifest (and other files of the run), fingerprint, commit, seed."""
        return (f"{', '.join([str(self.path / MANIFEST), *files])} · {self.data['stage']} {self.short} · commit {self.commit} · "
                f"seed {self.data['seed']}")

    def origin(self, *keys: str) -> str:
        return f"{self.path / MANIFEST}#{'/'.join(keys)}"

    def get(self, key: str) -> dict[str, Any] | None:
        return self.manifest.metrics.get(key)

    def ends(self, key: str) -> list[float] | None:
        """The 95 % interval of a metric, None where there is none."""
        return (self.get(key) or {}).get("ci95")

    def value(self, key: str, form: Form = SCORE) -> str:
        found = self.get(key)
        return number(form.text(found["value"]), self.origin("metrics", key, "value")) if found else MISSING

    def interval(self, key: str, form: Form = SCORE) -> str:
        ends = self.ends(key)
        if ends:
            return number(form.between(ends), self.origin("metrics", key, "ci95"))
        return "no interval" if self.get(key) else MISSING

    def n(self, key: str) -> str:
        n = (self.get(key) or {}).get("n")
        return number(f"{n:,}", self.origin("metrics", key, "n")) if n is not None else MISSING

    def short_form(self, key: str, form: Form = SCORE) -> str:
        """`0.457 [0.451, 0.464]`."""
        return self.value(key, form) + (f" {self.interval(key, form)}" if self.ends(key) else "")

    def full(self, key: str, form: Form = SCORE) -> str:
        """`0.457 [0.451, 0.464], n 192,055`."""
        return self.short_form(key, form) + (f", n {self.n(key)}" if "n" in (self.get(key) or {}) else "")

    def row(self, label: str, key: str, form: Form = SCORE) -> list[str]:
        return [label, self.value(key, form), self.interval(key, form), self.n(key)]

    def bar(self, key: str) -> figures.Bar | None:
        found = self.get(key)
        return (found["value"], *found.get("ci95", (None, None))) if found else None

    def count(self, key: str) -> str:
        found = self.counts.get(key)
        if found is None:
            return MISSING
        return number(f"{found:,}" if found < 1e9 else f"{found:.3g}", self.origin("counts", key))

    def note(self, value: Any, *keys: str) -> str:
        return number(f"{value:,}" if isinstance(value, int) else str(value), self.origin("notes", *keys))

    def series(self, label: str, key: str, x: str = "step", *, per: float = 1.0, **look: Any) -> list[Series]:
        """The curve of a key of metrics.jsonl, none if it was not logged; x is divided by `per`."""
        rows = [row for row in read_metrics(self.path / "metrics.jsonl") if key in row and x in row]
        return [Series(label, [row[x] / per for row in rows], [row[key] for row in rows], **look)] if rows else []


def short_hash(value: str) -> str:
    return value.removeprefix("sha256:")[:12]


Stages = Mapping[str, Stage]


def draw(how: Callable[..., Any], folder: Path, name: str, content: Any, caption: str, sources: list[str], **options: Any) -> Figure:
    """Draw `content` into `folder` by a function of stages.run.figures; its file is named relative to the report."""
    how(folder / f"{name}.svg", content, **options)
    return Figure(f"{folder.name}/{name}.svg", caption, sources)


def verdict(ends: Iterable[float] | None) -> str:
    if ends is None:
        return "undecided"  # as where all problems change alike
    low, high = ends
    return "above zero" if low > 0 else "below zero" if high < 0 else "not distinguishable from zero"


def annotator(stages: Stages) -> str:
    """Who ranked, in words; simulated annotators are called so."""
    s = stages.get("preferences")
    if s is None or "simulated" not in s.notes:
        return "an annotator whom no manifest names"
    names = ", ".join(name.removeprefix("simulated: ") for name in s.notes.get("annotators", [])) or "unnamed"
    if not s.notes["simulated"]:
        return "annotators of whom nobody says who they are" if names == "unknown" else f"people ({names})"
    return f"a simulated annotator ({names}), not by people"


def scorer(stages: Stages, s: Stage) -> str:
    """What gave the reward, in words."""
    sources = s.config.get("reward", {})
    reward = ", ".join(f"{weight:g} x {name}" for name, weight in sources.items()) or MISSING
    learned = any(name.partition("@")[0] == "model" for name in sources)
    return reward + (f" (the reward model, learned from rankings by {annotator(stages)})" if learned else "")
