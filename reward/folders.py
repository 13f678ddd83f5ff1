"""What may be read of a folder that somebody else made: data by names inside it, weights in safetensors, and no code. No torch.

A pickle runs what it likes when it is read, and `auto_map` names Python files that transformers would import after asking on the
terminal, where a piped answer could say yes. So both are refused before any loader sees the folder.
"""
import json
from pathlib import Path, PurePath
from typing import TypeVar

P = TypeVar("P", bound=str | Path)
PICKLES = {"pytorch_model*": "model*.safetensors", "adapter_model*.bin": "adapter_model*.safetensors"}  # read where the second is missing


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises ValueError where that is another place: by an absolute name, by `..` or through a link."""
    found = folder / name
    if not found.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} names {name!r}, which lies outside of it: a run holds its own files, so copy them there")
    return found


def trusted(path: P) -> P:
    """The path itself, of a model's or tokenizer's folder from which nothing is read but data; a hub id passes unseen.

    Raises ValueError where weights are there as pickles alone, where an index names shards elsewhere or of another kind, and where a
    config wants code of its own.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    for file in sorted(folder.glob("*config.json")):
        settings = read_object(file)
        if "auto_map" in settings:
            raise ValueError(f"{file} wants Python code of its own run (auto_map {str(settings['auto_map'])[:80]}), which is never done: "
                             "delete that entry if transformers knows the architecture without it, or convert the model to one it knows")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_object(index).get("weight_map", {})
        if bad := sorted(name for name in set(shards.values()) if PurePath(name).name != name or not name.endswith(".safetensors")):
            raise ValueError(f"{index} names the shard {bad[0]!r}: expected .safetensors files of the same folder")
    for pickles, weights in PICKLES.items():
        if (found := sorted(folder.glob(pickles))) and not any(folder.glob(weights)):
            raise ValueError(f"{found[0]} is a pickle, which can run code when it is read: give the weights as safetensors "
                             "(where it may run: load the model in transformers and save_pretrained writes them)")
    return path


def read_object(file: Path) -> dict:
    """A JSON object. Raises ValueError naming the file when it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ones
        raise ValueError(f"{file} is not JSON ({error}): it is damaged, or no model's") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object: it is damaged, or no model's")
    return found
