"""What of a model is fine-tuned: all of it, or adapters through peft (LoRA and its kin, also on a base in 4 bits), saved and merged.

An untied head rests but for the rows of the chat tokens, which pretraining never saw.
"""
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from reward.folders import trusted
from stages.data.tokenizer import ASSISTANT, END, EOS, SYSTEM, USER
from stages.models.attention import speed_up
from stages.models.training import TrainingConfig
from stages.run.config import option
from stages.run.manifest import say

METHODS = ("full", "lora", "qlora")
# of peft's methods those that change layers: vectors before a row cannot be merged, and rows of embeddings alone are no method for text
PEFT_METHODS = sorted(kind.name.lower() for kind, settings in PEFT_TYPE_TO_CONFIG_MAPPING.items()
                      if "target_modules" in settings.__dataclass_fields__ and kind != PeftType.TRAINABLE_TOKENS)
BASE_FILE = "base.json"  # beside an adapter: the hash of the model that it belongs to


@dataclass(frozen=True, kw_only=True)
class MethodConfig(TrainingConfig):
    """What trains."""

    method: str = option("lora", "lora: adapters on all linear layers; full: all weights; qlora: lora on a base in 4 bits "
                         "(bitsandbytes); or another method of peft by its name, such as ia3 or vera")
    lora_rank: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "scale of the adapters")
    peft: dict[str, Any] = option({}, "more of the method's settings under peft's own names, such as {use_dora: true}")


def check_undivided(config: MethodConfig) -> None:
    """Raises ValueError for adapters where the launch config divides the weights: peft cannot save parts, or asks for whole ones."""
    divided = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if config.method != "full" and divided:
        raise ValueError(f"method {config.method} trains adapters, which peft does not make or save where FSDP or ZeRO-3 divides the "
                         "weights: launch with ddp.yaml or zero2.yaml, or set method: full")


def load_base(path: Path, config: MethodConfig) -> PreTrainedModel:
    """The model to tune. Raises ValueError for a method that is not known, or that this machine cannot run."""
    check_undivided(config)
    if config.method not in METHODS and config.method not in PEFT_METHODS:
        raise ValueError(f"unknown method {config.method!r}: choose full, lora, qlora, or one of peft's: {', '.join(PEFT_METHODS)}")
    if config.method != "qlora":
        whole: Any = AutoModelForCausalLM.from_pretrained(trusted(path), dtype="auto")
        speed_up(whole)
        return whole.to(PartialState().device)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("method qlora needs bitsandbytes (pip install bitsandbytes) and, to be of use, a GPU: set method: lora here")
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.bfloat16)  # Dettmers et al. 2023, section 3
    return AutoModelForCausalLM.from_pretrained(trusted(path), quantization_config=four_bits, dtype=torch.bfloat16)


@torch.no_grad()
def give_meaning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Start the chat tokens, which pretraining never saw, where the words stand that did their work in "Question: ... Answer: ...".

    From random rows the adapters first have to undo the noise, and what the base could do is lost on the way (LOG.md).
    Averaging over the words' tokens follows Hewitt 2021 (Initializing new word embeddings).
    """
    ends = [model.get_input_embeddings().weight] + ([] if model.config.tie_word_embeddings else [model.get_output_embeddings().weight])
    for token, word in {SYSTEM: "Question", USER: "Question", ASSISTANT: ":", END: EOS}.items():
        if token not in tokenizer.get_vocab():
            continue
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        for weight in ends:
            weight[tokenizer.convert_tokens_to_ids(token)] = weight[ids].mean(0)


def adapter_config(config: MethodConfig, new_tokens: Sequence[int], tied: bool) -> PeftConfig:
    """The adapters: on all linear layers, with rows of new tokens trained at both ends where the method allows it.

    An untied head is saved whole: TRL multiplies by `lm_head.weight` itself, so rows trained through peft's wrapper would be passed
    over; `hold_other_rows` keeps all but the new tokens' where they are. Raises ValueError for a setting that the method does not have.
    """
    lora = config.method in ("lora", "qlora")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["LORA" if lora else config.method.upper()]]
    known = kind.__dataclass_fields__
    if unknown := sorted(set(config.peft) - set(known)):
        raise ValueError(f"peft: {config.method} has no setting {unknown[0]!r}: it has {', '.join(sorted(known))}")
    given: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if lora:
        given |= {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    if new_tokens:
        given |= {"trainable_token_indices": {"embed_tokens": list(new_tokens)}} if "trainable_token_indices" in known else {
            "modules_to_save": ["embed_tokens"]}
        if not tied:
            given["modules_to_save"] = [*given.get("modules_to_save", []), "lm_head"]
    return kind(**{key: value for key, value in (given | config.peft).items() if key in known})


def load_adapter(model: PreTrainedModel, folder: str | Path, base_hash: str) -> PeftModel:
    """An adapter to go on training, put on the base it belongs to.

    Raises ValueError for a folder without one, and for one that was trained on another base.
    """
    mark = Path(folder) / BASE_FILE
    if Path(folder).is_dir() and not mark.is_file():
        say(f"the adapter in {folder} does not say which base it was trained on; that it is this one is taken on trust")
    trained_on = json.loads(mark.read_text(encoding="utf-8"))["sha256"] if mark.is_file() else base_hash
    if trained_on != base_hash:
        raise ValueError(f"the adapter in {folder} was trained on another base ({trained_on[:19]}) than the one given "
                         f"({base_hash[:19]}): set parents.pretrain to the run that it belongs to")
    try:
        return PeftModel.from_pretrained(model, trusted(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:  # peft: no adapter_config.json; torch: sizes that differ
        raise ValueError(f"the adapter in {folder} does not fit the base: {' '.join(str(error).split())[:200]}") from None


def save_adapter(model: PeftModel, folder: Path, base_hash: str) -> None:
    model.save_pretrained(str(folder))
    (folder / BASE_FILE).write_text(json.dumps({"sha256": base_hash}) + "\n", encoding="utf-8")


def merged(model: Any, config: MethodConfig, base_path: Path, adapter_path: Path, prepare) -> PreTrainedModel:
    """The tuned model without adapters. Of a base in 4 bits, a whole one takes their place: merged into 4 bits they would be rounded.

    `prepare` is done to that base before the adapters are put on it.
    """
    if not isinstance(model, PeftModel):
        return model
    if config.method != "qlora":
        return model.merge_and_unload()
    base: Any = AutoModelForCausalLM.from_pretrained(trusted(base_path), dtype="auto")
    base = base.to(PartialState().device)
    prepare(base)
    return PeftModel.from_pretrained(base, trusted(adapter_path)).merge_and_unload()


def head_rows(config: MethodConfig, peft_config: PeftConfig | None) -> list[int]:
    """Rows of an untied head that train beside adapters, those of the new tokens; none if it is not there or trains whole by `peft`."""
    if peft_config is None or "modules_to_save" in config.peft or "lm_head" not in (getattr(peft_config, "modules_to_save", None) or []):
        return []
    return list((getattr(peft_config, "trainable_token_indices", None) or {}).get("embed_tokens", []))


def hold_other_rows(weight: nn.Parameter, rows: Sequence[int]) -> None:
    """Let only these rows of a head move, which has to train whole for its loss: others get no gradient, and nothing decays them."""
    moves = torch.zeros(weight.size(0), 1)
    moves[list(rows)] = 1
    weight.register_hook(lambda grad: grad * moves.to(grad))
