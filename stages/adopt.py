"""A model trained elsewhere in the place of a stage: its folder becomes a finished run, from which the later stages go on.

    python -m stages.adopt --recipe mine --stage sft --model ../my-model
"""
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer

from reward.folders import trusted
from stages.models.clients import CLASSIFIER, COPIED, load
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, Run, hash_path, say

FILES = (*COPIED, "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(StageConfig):
    STAGE = "adopt"
    PARENTS = ("prepare",)

    stage: Literal["pretrain", "sft", "reward_model", "ppo"] = option("sft", "whose place the model takes")
    model: str = option("", "the model's folder: config, tokenizer and safetensors", recorded_only=True)


def main(config: AdoptConfig) -> Manifest:
    """Raises ValueError for a folder that later stages could not go on from, and rather than replace a run that was trained here."""
    folder = Path(config.model)
    if not config.model or not (folder / "config.json").is_file():
        raise ValueError(f"--model {config.model or '(missing)'}: name the folder of a model, with config.json and safetensors")
    final = Path(config.run_dir)
    final = final.with_name(config.stage) if final.name == "adopt" else final
    if final.exists() and not ((final / MANIFEST).is_file() and Manifest(final).data.get("notes", {}).get("adopted")):
        raise ValueError(f"{final} holds a run that was not adopted, which this would replace: name another place by --run-dir, and set "
                         f"parents.{config.stage} to it in the stages that follow")
    kind: Any = type("Adopted", (AdoptConfig,), {"STAGE": config.stage})
    run = Run(kind(**vars(config) | {"run_dir": str(final)}), inputs={"model": hash_path(folder)})
    if run.finished:
        return run.manifest
    check(folder, config.stage, run.parents["prepare"])
    product = run.directory / "model"
    product.mkdir(exist_ok=True)
    for pattern in FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, product / file.name)
    model, _ = load(product, config.stage == "reward_model")
    say(f"adopt: {folder} stands as {config.stage} in {final}; nothing of it was measured here")
    return run.finish(metrics={}, products={"model": "model"}, counts={"parameters": sum(p.numel() for p in model.parameters())},
                      notes={"adopted": True})


def check(folder: Path, stage: str, prepare: Manifest) -> None:
    """Raises ValueError naming what a later stage would stumble over."""
    config, tokenizer = AutoConfig.from_pretrained(trusted(folder)), AutoTokenizer.from_pretrained(trusted(folder))
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} has no model.safetensors: save the whole model there, adapters merged in")
    (architecture,) = config.architectures or ("none",)
    if architecture.endswith(CLASSIFIER) != (stage == "reward_model"):
        raise ValueError(f"{folder} is a {architecture}: stage {stage} needs "
                         f"{'a sequence classifier with one output' if stage == 'reward_model' else 'a language model'}")
    if stage == "reward_model" and config.num_labels != 1:
        raise ValueError(f"{folder} has {config.num_labels} outputs: a reward model has one")
    if stage != "pretrain" and tokenizer.chat_template is None:
        raise ValueError(f"{folder} has no chat template, by which stage {stage} is asked: set tokenizer.chat_template and save it anew")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{folder} has no padding token: set tokenizer.pad_token (not the end token) and save it anew")
    if stage != "reward_model" and config.eos_token_id is None:
        raise ValueError(f"{folder} does not say which token ends a response: set eos_token_id in its config.json")
    own = AutoTokenizer.from_pretrained(trusted(prepare.product("tokenizer"))).get_vocab()
    if own != tokenizer.get_vocab():
        raise ValueError(f"the vocabulary of {folder} is not that of {prepare.path}, whose tokens the later stages measure on: run "
                         f"`make prepare` with tokenizer: {folder} in a recipe of its own first")


if __name__ == "__main__":
    launch(main, AdoptConfig, distributed=False)
