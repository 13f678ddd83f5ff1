"""The story of a recipe's runs on one self-contained page, with every number traceable to a manifest.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.report --config recipes/tiny/report.yaml
    python -m stages.report --recipe tiny --against other     # two runs beside one another, in runs/tiny/against/other
"""
from dataclasses import dataclass, replace
from pathlib import Path

from stages.evals.pairs import aligned
from stages.evals.scoring import clusters_of
from stages.evals.statistics import compare
from stages.laws.fit import expected
from stages.run import (
    cited,
    figures,
    names,
    page,
    story,
    story_alignment,
    story_compare,
    story_frontier,
    story_hacking,
    story_pipeline,
    story_samples,
)
from stages.run.config import StageConfig, option, runs_of
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, Run, hash_path, say

CODE = (cited, figures, names, page, story, story_alignment, story_compare, story_frontier, story_hacking, story_pipeline, story_samples)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(StageConfig):
    STAGE = "report"
    PARENTS = ("prepare", "scaling", "pretrain", "sft", "preferences", "reward_model", "rejection_sampling", "ppo", "evaluation")
    OPTIONAL = ("rejection_sampling",)  # no part of the main road: shown if there, not missed if not

    against: str | None = option(None, "a recipe, or a folder of runs, to show these runs beside", added=True)


def main(config: ReportConfig) -> Manifest:
    present = finished(config.parents)
    if config.against is not None:
        return compare_runs(config, present, config.against)
    missing = {name: why_missing(name, Path(path), config.recipe) for name, path in config.parents.items()
               if name not in (*present, *config.OPTIONAL)}
    if "pretrain" not in present:
        raise ValueError(f"no finished run in {config.parents['pretrain']}: run `make pretrain RECIPE={config.recipe}` first")
    run = Run(replace(config, parents=present), inputs=hashes(present))
    if run.finished:
        return run.manifest

    stages = {name: cited.Stage(run.parents[name]) for name in present}
    told = story.tell(stages, missing, run.directory / "figures", recipe=config.recipe, law=expected)
    for why in missing.values():
        say(f"left out: {why}")
    return write(run, told, len(stages), missing=sorted(missing))


def finished(parents: dict[str, str]) -> dict[str, str]:
    return {name: path for name, path in parents.items() if (Path(path) / MANIFEST).is_file()}


def hashes(runs: dict[str, str], side: str = "") -> dict[str, str | None]:
    """Of all that the page is made from: manifests, code and style."""
    made: dict[str, str | None] = {f"{side}{name} manifest": hash_path(Path(path) / MANIFEST) for name, path in runs.items()}
    made |= {Path(str(module.__file__)).name: hash_path(Path(str(module.__file__))) for module in CODE}
    return made | {page.STYLE.name: hash_path(page.STYLE)}


def write(run: Run, told: page.Page, stages: int, **notes: object) -> Manifest:
    (run.directory / "figures").mkdir(exist_ok=True)
    (run.directory / "index.html").write_text(page.to_html(told, run.directory), encoding="utf-8")
    (run.directory / "report.md").write_text(page.to_markdown(told), encoding="utf-8")
    for warning in told.warnings:
        say(f"note: {page.plain(warning)}")
    drawn = sum(len(section.figures) for section in told.sections)
    manifest = run.finish(metrics={}, products={"report": "index.html", "markdown": "report.md", "figures": "figures"},
                          counts={"stages": stages, "figures": drawn, "numbers": len(page.numbers(told))},
                          notes={**notes, "warnings": [page.plain(warning) for warning in told.warnings]})
    say(f"report: {stages} stages, {drawn} figures in {manifest.product('report')} and {manifest.product('markdown')}")
    return manifest


def compare_runs(config: ReportConfig, present: dict[str, str], against: str) -> Manifest:
    """The page of two runs. Raises ValueError where `against` names no runs, or these themselves."""
    other = Path(against) if Path(against).is_dir() else Path(runs_of()) / against
    theirs = finished({name: str(other / name) for name in config.PARENTS})
    if not theirs:
        there = sorted({path.parent.parent.name for path in Path(runs_of()).glob(f"*/*/{MANIFEST}")} - {config.recipe})
        raise ValueError(f"against {against!r}: no finished stage in {other}: give a recipe that has been run "
                         f"({', '.join(there) or 'none'}), or a folder that holds runs, one a stage")
    if {Path(path).resolve() for path in theirs.values()} & {Path(path).resolve() for path in present.values()}:
        raise ValueError(f"against {against!r}: these are the same runs; give another recipe or folder")
    name = other.name if other.parent == Path(runs_of()) else "-".join(other.resolve().parts[-2:])
    run = Run(replace(config, parents=present, run_dir=str(Path(config.run_dir).parent / "against" / name)),
              inputs=hashes(present) | hashes(theirs, f"{name}, "))
    if run.finished:
        return run.manifest
    first, second = (story_compare.Side(label, {stage: cited.Stage(Manifest(path)) for stage, path in runs.items()})
                     for label, runs in ((config.recipe, present), (name, theirs)))
    told = story_compare.tell(first, second, run.directory / "figures", paired=paired)
    return write(run, told, len(present), against=str(other))


def paired(first: story_compare.Records, second: story_compare.Records) -> dict:
    """Both on the same problems, in the order of the first. Raises ValueError unless they are the same."""
    a, b = aligned([first, second], "evaluations of two runs")
    right = [[float(r["correct"]) for r in side] for side in (a, b)]
    return compare(right[0], right[1], clusters_of(a))


def why_missing(name: str, path: Path, recipe: str) -> str:
    begun = path.with_name(path.name + ".partial").exists()
    return (f"{name} has {'begun but not finished' if begun else 'not been run'} ({path}); `make {name} RECIPE={recipe}` "
            f"{'continues' if begun else 'makes'} it")


if __name__ == "__main__":
    launch(main, ReportConfig, distributed=False)
