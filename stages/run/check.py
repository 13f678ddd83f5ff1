"""Names of a whole command line before its first stage begins: recipe, keys of the recipes' files, settings in ARGS.

    python -m stages.run.check tiny "prepare scaling" "pretrain sft" --learning-rate 1e-3

Stages check names and values themselves, each once it is reached, which may be after hours. Here settings are read from the stages'
source, without torch.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.run.config import no_recipe, parse_flags, read_yaml, runs_of, unknown
from stages.run.entry import run_program
from stages.run.status import ORDER, declared


def check(recipe: str, before: Sequence[str], named: Sequence[str], arguments: list[str]) -> None:
    """`named` get the flags, `before` run because these need them. Raises ValueError as the stages would, and for a flag that is known to
    some of the named alone."""
    flags = {} if {"-h", "--help"} & set(arguments) else parse_flags(arguments)
    config = flags.pop("config", None)
    for stage in dict.fromkeys([*before, *named]):
        own = stage in named
        file = Path(str(config)) if config and own else Path("recipes") / recipe / f"{stage}.yaml"
        if stage in ORDER or file.is_file():
            check_keys(stage, read_yaml(file), str(file))
        elif "parents" not in flags and not any((Path(home) / recipe).is_dir() for home in ("recipes", runs_of())):
            raise no_recipe(recipe)
        if own:
            for key in flags.keys() - declared(stage).settings.keys():
                if others := [other for other in named if key in declared(other).settings]:
                    raise ValueError(f"ARGS goes to all of {', '.join(named)}, and {stage} has no setting {key!r}: give it in a command "
                                     f"that names {', '.join(others)} alone")
            check_keys(stage, flags, f"ARGS of {stage}")


def check_keys(stage: str, values: Mapping[str, Any], where: str) -> None:
    known = declared(stage)
    for key in values:
        if key not in known.settings:
            if others := [other for other in ORDER if key in declared(other).settings]:
                raise ValueError(f"{where}: unknown key {key!r}, a setting of {', '.join(others)}")
            raise unknown(str(key), list(known.settings), where)
    parents = values.get("parents")
    for name in parents if isinstance(parents, Mapping) else ():
        if name not in known.parents:
            raise unknown(str(name), list(known.parents), f"{where}: parents")


if __name__ == "__main__":
    run_program(lambda given: check(given[0], given[1].split(), given[2].split(), given[3:]))
