"""Time and memory of each finished stage of a recipe: `python -m stages.run.timetable runs/tiny`."""
import sys
from pathlib import Path

from stages.run.console import clock, table
from stages.run.manifest import MANIFEST, Manifest

ORDER = ("prepare", "scaling", "pretrain", "sft", "preferences", "reward_model", "ppo", "rejection_sampling", "evaluation",
         "report")


def timetable(folder: Path) -> str:
    """One row a stage, in the order of the Makefile, and the sum of the times."""
    runs = [Manifest(folder / stage) for stage in ORDER if (folder / stage / MANIFEST).is_file()]
    if not runs:
        raise ValueError(f"no finished stage in {folder}: run make pretrain first")
    rows = []
    for run in runs:
        made = run.data["provenance"]
        again = f" (the last of {made['attempts']} attempts)" if made.get("attempts", 1) > 1 else ""
        rows.append([run.path.name, clock(made["wall_s"]) + again, f"{made['peak_rss_bytes'] / 2**30:.2f} GiB"])
    total = sum(run.data["provenance"]["wall_s"] for run in runs)
    return table(["stage", "time", "peak memory"], [*rows, ["sum", clock(total), ""]])


if __name__ == "__main__":
    try:
        print(timetable(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")))
    except ValueError as error:
        sys.exit(f"error: {error}")
