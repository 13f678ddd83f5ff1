"""One frozen dataclass a stage, filled from a recipe's YAML and from `--key value`, strictly.

An unknown key, a wrong type, a bad choice or a key written twice fails with one line that names the nearest valid key or the
type wanted. Flags accept `-` and `_` alike. Defaults that follow from the recipe's name (`run_dir`, `parents`) are filled in
here; `PLUMBLINE_RUNS` in the environment moves them from `runs/` to another disk.
"""
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml

C = TypeVar("C", bound="StageConfig")


def option(default: Any = dataclasses.MISSING, help: str = "", *, recorded_only: bool = False, added: bool = False) -> Any:
    """A config field. `recorded_only` keeps it out of the fingerprint: paths, logging, anything that cannot change the numbers. `added`
    is for what came after runs were made, and by default does what was done before: it counts once it is set, so they stay finished."""
    metadata = {"help": help, "recorded_only": recorded_only, "added": added}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage has. Subclasses name their stage and their parents and add what recipes vary."""

    STAGE: ClassVar[str] = ""
    PARENTS: ClassVar[tuple[str, ...]] = ()

    recipe: str = option("", "name of the recipe; the folder of the config file", recorded_only=True)
    run_dir: str = option("", "where the run lives (default runs/<recipe>/<stage>)", recorded_only=True)
    parents: dict[str, str] = option({}, "run folders read, by stage (default runs/<recipe>/<parent>)", recorded_only=True)
    seed: int = option(0, "seed of everything random in the stage")
    report_to: str = option("none", "experiment trackers of transformers: none, tensorboard, wandb, trackio", recorded_only=True)

    def fingerprinted(self) -> dict[str, Any]:
        """The fields that can change the numbers."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            unset = value == (field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
            if not (field.metadata.get("recorded_only") or (field.metadata.get("added") and unset)):
                found[field.name] = value
        return found


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key written twice, which YAML would settle silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"{node.start_mark.name}, line {key_node.start_mark.line + 1}: key {key!r} is written twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping. Raises ValueError naming file and line when it is not one."""
    try:
        with Path(path).open(encoding="utf-8") as f:
            loader = _StrictLoader(f)
            loader.name = str(path)
            data = loader.get_single_data()
    except FileNotFoundError:
        folder = Path(path).parent
        if folder.parent.name == "recipes":
            raise no_recipe(folder.name, Path(path).stem, folder.parent) from None
        raise ValueError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be a mapping of config keys, not a {type(data).__name__}")
    return data


def describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return " | ".join(map(str, get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(describe(a) for a in get_args(hint))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(describe(a) for a in get_args(hint))}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type, or ValueError. Only lossless changes: int to float, "1e-3" (a string to YAML) to float."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return coerce(value, arg, key)
            except ValueError:
                continue
    elif origin is Literal:
        if value is False and "off" in args:  # how YAML reads a bare off
            return "off"
        if value in args:
            return value
    elif origin in (list, tuple):
        if isinstance(value, list | tuple):
            return origin(coerce(v, args[0], f"{key}[{i}]") for i, v in enumerate(value))
    elif origin is dict or hint is dict:
        if isinstance(value, Mapping):
            return {k: coerce(v, args[1] if args else Any, f"{key}.{k}") for k, v in value.items()}
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer() and abs(value) >= 1e3:  # 1.6e6 tokens
            return int(value)
        if isinstance(value, str) and "e" in value.lower():
            try:
                return coerce(float(value), int, key)
            except ValueError:
                pass
    elif (hint is type(None) and value is None) or (isinstance(hint, type) and type(value) is hint):
        return value
    kind = "bool, as YAML reads yes, no, on and off" if isinstance(value, bool) else type(value).__name__
    raise ValueError(f"{key}: got {value!r} ({kind}), expected {describe(hint)}")


def unknown(key: str, known: list[str], where: str, what: str = "key") -> ValueError:
    """The error for a key that is not among those known: it names the nearest, or all."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f", did you mean {near[0]!r}?" if near else f": choose from {', '.join(known)}"
    return ValueError(f"{where}: unknown {what} {key!r}{remedy}")


def no_recipe(recipe: str, stage: str = "", folder: Path = Path("recipes")) -> ValueError:
    """The error for a recipe that is not there, or has no settings of `stage`. Where no stage is meant, names of runs are valid, too."""
    if stage and (folder / recipe).is_dir():
        there = sorted(path.parent.name for path in folder.glob(f"*/{stage}.yaml"))
        return ValueError(f"recipe {recipe!r} has no {stage}.yaml; recipes with one: {', '.join(there) or 'none'}")
    known = {path.parent.name for path in folder.glob("*/*.yaml")} - {"accelerate"}
    known |= set() if stage else {path.parent.parent.name for path in Path(runs_of()).glob("*/*/manifest.json")}
    return unknown(recipe, sorted(known), str(folder), "recipe")


def fill(cls: type, values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The given fields of a dataclass in their types. Raises ValueError naming the nearest key, the type wanted or what is missing."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    filled: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown(str(key), list(fields), where)
        filled[key] = coerce(value, hints[key], f"{where}: {key}")
    missing = [n for n, f in fields.items() if n not in filled
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is required")
    return filled


def build_config(cls: type[C], values: Mapping[str, Any], *, recipe: str = "", where: str = "config") -> C:
    """A config from plain values. Raises ValueError naming the nearest valid key or the type wanted."""
    filled = fill(cls, values, where=where)
    recipe = filled.setdefault("recipe", recipe) or recipe or "custom"
    filled["recipe"] = recipe
    filled["run_dir"] = filled.get("run_dir") or f"{runs_of()}/{recipe}/{cls.STAGE}"
    given = filled.get("parents", {})
    for name in given:
        if name not in cls.PARENTS:
            raise unknown(name, list(cls.PARENTS), f"{where}: parents")
    filled["parents"] = parent_folders(cls.PARENTS, given, runs_of(), recipe)
    return cls(**filled)


def runs_of() -> str:
    """The folder of all runs."""
    return os.environ.get("PLUMBLINE_RUNS") or "runs"


def parent_folders(names: tuple[str, ...], given: Mapping[str, str], runs: str, recipe: str) -> dict[str, str]:
    """The run folder of each parent: what is given, moved to where the runs are, else the recipe's own."""
    moved = {name: path if path.startswith(f"{runs}/") or not path.startswith("runs/") else f"{runs}/{path.removeprefix('runs/')}"
             for name, path in given.items()}
    return {name: moved.get(name, f"{runs}/{recipe}/{name}") for name in names}


def parse_flags(argv: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--nested.key value` to plain values; values are read as YAML scalars or flow collections."""
    values: dict[str, Any] = {}
    position = 0
    while position < len(argv):
        flag = argv[position]
        if not flag.startswith("--"):
            raise ValueError(f"expected a flag such as --seed, got {flag!r}")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            position += 1
            if position == len(argv):
                raise ValueError(f"{flag} needs a value, for example: {flag} 1")
            text = argv[position]
        position += 1
        target, *rest = name.replace("-", "_").split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if target in ("recipe", "run_dir"):  # names, which may look like numbers
            value = text
        if rest:
            values.setdefault(target, {})[".".join(rest)] = value
        else:
            values[target] = value
    return values


def load_config(cls: type[C], argv: list[str]) -> C:
    """Config of a stage from its command line: `--config recipes/tiny/sft.yaml --learning-rate 1e-3`.

    Flags win over the file; `--parents.sft DIR` sets one entry of a mapping; `--recipe smoke` alone reads recipes/smoke/<stage>.yaml where
    there is one. Raises ValueError for anything not understood.
    """
    flags = parse_flags(argv)
    path = flags.pop("config", None)
    if not path and "recipe" in flags and (usual := Path("recipes") / str(flags["recipe"]) / f"{cls.STAGE}.yaml").is_file():
        path = str(usual)
    values = read_yaml(path) if path else {}
    for key, value in flags.items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if nested else value
    recipe = Path(path).resolve().parent.name if path else "custom"
    file = str(path or cls.STAGE)
    return build_config(cls, values, recipe=recipe, where=f"{file} and flags" if path and flags else file)


def help_text(cls: type[StageConfig]) -> str:
    """One line a field: flag, type, default, meaning."""
    hints = typing.get_type_hints(cls)
    lines = [f"python -m stages.{cls.STAGE} --config recipes/<recipe>/{cls.STAGE}.yaml [--key value ...]", ""]
    for f in dataclasses.fields(cls):
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"default {default!r}"
        lines.append(f"  --{f.name.replace('_', '-')}  ({describe(hints[f.name])}, {shown})  {f.metadata.get('help', '')}")
    return "\n".join(lines)
