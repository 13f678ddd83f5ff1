"""The story of a recipe's runs on one self-contained page, with every number traceable to a manifest.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.report --config recipes/tiny/report.yaml
"""
from dataclasses import dataclass, replace
from pathlib import Path

from stages.laws.fit import expected
from stages.run import cited, figures, page, story, story_alignment, story_frontier, story_hacking, story_pipeline, story_samples
from stages.run.config import StageConfig
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, Run, hash_path, say

CODE = (cited, figures, page, story, story_alignment, story_frontier, story_hacking, story_pipeline, story_samples)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(StageConfig):
    STAGE = "report"
    PARENTS = ("prepare", "scaling", "pretrain", "sft", "preferences", "reward_model", "rejection_sampling", "ppo", "evaluation")
    OPTIONAL = ("rejection_sampling",)  # no part of the main road: shown if there, not missed if not


def main(config: ReportConfig) -> Manifest:
    present = {name: path for name, path in config.parents.items() if (Path(path) / MANIFEST).is_file()}
    missing = {name: why_missing(name, Path(path), config.recipe) for name, path in config.parents.items()
               if name not in (*present, *config.OPTIONAL)}
    if "pretrain" not in present:
        raise ValueError(f"no finished run in {config.parents['pretrain']}: run `make pretrain RECIPE={config.recipe}` first")
    manifests = {f"{name} manifest": hash_path(Path(path) / MANIFEST) for name, path in present.items()}
    written = {Path(str(module.__file__)).name: hash_path(Path(str(module.__file__))) for module in CODE}
    run = Run(replace(config, parents=present), inputs=manifests | written | {page.STYLE.name: hash_path(page.STYLE)})
    if run.finished:
        return run.manifest

    stages = {name: cited.Stage(run.parents[name]) for name in present}
    told = story.tell(stages, missing, run.directory / "figures", recipe=config.recipe, law=expected)
    (run.directory / "index.html").write_text(page.to_html(told, run.directory), encoding="utf-8")
    (run.directory / "report.md").write_text(page.to_markdown(told), encoding="utf-8")
    for why in missing.values():
        say(f"left out: {why}")
    for warning in told.warnings:
        say(f"note: {page.plain(warning)}")
    drawn = sum(len(section.figures) for section in told.sections)
    manifest = run.finish(metrics={}, products={"report": "index.html", "markdown": "report.md", "figures": "figures"},
                          counts={"stages": len(stages), "figures": drawn, "numbers": len(page.numbers(told))},
                          notes={"missing": sorted(missing), "warnings": [page.plain(warning) for warning in told.warnings]})
    say(f"report: {len(stages)} stages, {drawn} figures in {manifest.product('report')} and {manifest.product('markdown')}")
    return manifest


def why_missing(name: str, path: Path, recipe: str) -> str:
    begun = path.with_name(path.name + ".partial").exists()
    return (f"{name} has {'begun but not finished' if begun else 'not been run'} ({path}); `make {name} RECIPE={recipe}` "
            f"{'continues' if begun else 'makes'} it")


if __name__ == "__main__":
    launch(main, ReportConfig, distributed=False)
