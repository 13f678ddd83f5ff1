"""What a recipe would cost before it costs anything: parameters, tokens, FLOPs, memory a device, hours.

    python -m stages.plan --recipe 1b --engine fsdp2 --devices 8 --memory-gib 80 --peak-tflops 989 --mfu 0.4

Models are built on the meta device: no weights, no downloads, no GPU. Memory is by the formulas of stages/models/memory.py;
hours are FLOPs / (devices x peak x MFU). The defaults of peak and memory are an H100's (bf16, dense).
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.models.counts import FLOPS, build_meta, count_parameters, planned_decoder, train_flops_per_token
from stages.models.ladder import ladder_configs, shared_tokens
from stages.models.memory import activation_bytes, cache_bytes, logits_bytes, matrices_of_layers, state_bytes, widths
from stages.models.pretraining import PretrainConfig
from stages.run.config import StageConfig, build_config, no_recipe, option, read_yaml
from stages.run.console import clock, table
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, say

GIB = 1 << 30
RESERVED_GIB = 2.0  # CUDA context, NCCL buffers, cuBLAS workspace, fragmentation
DEFAULTS: dict[str, dict[str, Any]] = {  # of stages this one may not import; a test holds them equal
    "sft": {"method": "lora", "lora_rank": 16, "max_length": 512, "batch_size": 16, "micro_batch_size": None},
    "preferences": {"responses_per_prompt": 8, "source": None},
    "reward_model": {"batch_size": 8, "micro_batch_size": None, "optimizer": "muon", "gradient_checkpointing": False,
                     "share_prompts": True, "method": "full", "lora_rank": 16},
    "ppo": {"micro_batch_size": 48, "rollout_batch": 192, "method": "full", "value_trunk": "separate", "lora_rank": 16}}
SHARDED = ("zero3", "fsdp2")  # engines under which no device has the whole weights
PARTS = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "cache")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(StageConfig):
    STAGE = "plan"

    engine: Literal["ddp", "zero2", "zero3", "fsdp2"] = option("ddp", "how the model is spread over devices")
    devices: int = option(1, "devices, over all machines")
    memory_gib: float = option(80.0, "memory of a device")
    peak_tflops: float = option(989.0, "dense bf16 peak of a device, in TFLOP/s")
    mfu: float = option(0.4, "share of the peak that the model's own FLOPs reach, without recomputation")
    micro_batch_rows: int | None = option(None, "rows a forward pass and device, instead of the recipe's")
    gradient_checkpointing: bool | None = option(None, "recompute activations, instead of what the recipe says")


def main(config: PlanConfig) -> dict[str, Any]:
    """Print the plan and return its figures. Raises ValueError for a recipe that cannot run as asked."""
    folder = Path("recipes") / config.recipe
    if not (folder / "pretrain.yaml").is_file():
        raise no_recipe(config.recipe, "pretrain")
    raw = {path.stem: read_yaml(path) for path in sorted(folder.glob("*.yaml"))}
    pretrain = build_config(PretrainConfig, raw["pretrain"], recipe=config.recipe, where=str(folder / "pretrain.yaml"))
    prepare = raw.get("prepare", {})
    row_length, (vocabulary, prepared) = prepare.get("row_length", 512), vocabulary_of(config, prepare)
    decoder = planned_decoder(pretrain, vocabulary=vocabulary, row_length=row_length)
    model = build_meta(decoder)
    counts = count_parameters(model)
    say(f"{config.recipe}: {pretrain.architecture}, {pretrain.num_layers} layers, {pretrain.hidden_size} wide, "
        f"vocabulary {decoder.vocab_size:,}"
        + ("" if prepared else f" (assumed, as prepare has not run: `make prepare RECIPE={config.recipe}` tells)"))
    say("parameters: " + ", ".join(f"{name} {value:,}" for name, value in counts.items() if value))

    per_token = train_flops_per_token(decoder, row_length, counts)
    batch, rows = batch_plan(pretrain, config, row_length)
    flops = pretrain.tokens * per_token
    hours = flops / (config.devices * config.peak_tflops * 1e12 * config.mfu) / 3600
    say(f"tokens: {pretrain.tokens:,} ({pretrain.tokens / counts['non_embedding']:.1f} a non-embedding parameter), in "
        f"{pretrain.tokens // pretrain.batch_tokens:,} steps of {pretrain.batch_tokens:,} = {config.devices} devices x "
        f"{batch['rows']} rows x {batch['accumulation']} passes x {row_length}")
    say(f"FLOPs: {flops:.3g}, {per_token:.3g} a token ({FLOPS})")
    given = {name: getattr(config, name) for name in ("peak_tflops", "mfu", "memory_gib")}
    if assumed := [f"--{name.replace('_', '-')} {value:g}" for name, value in given.items() if value == getattr(PlanConfig, name)]:
        say(f"assumed, not measured here: {', '.join(assumed)} (an H100 in bf16); give your device's")
    say(f"time: {f'{hours:,.1f} hours' if hours >= 1 else clock(3600 * hours)} on {config.devices} devices at {config.mfu:.0%} of "
        f"{config.peak_tflops:g} TFLOP/s ({hours * config.devices:,.1f} device hours)")

    needs = {"pretrain": need(model, config, tokens=rows * row_length, muon=pretrain.optimizer == "muon",
                              checkpointing=bool(first(config.gradient_checkpointing, pretrain.gradient_checkpointing)))}
    needs |= later_stages(model, config, raw)
    shown = [[stage, *(f"{part.get(key, 0) / GIB:.1f}" for key in PARTS), f"{total(part):.1f}", "yes" if fits(part, config) else "NO"]
             for stage, part in needs.items()]
    say(f"memory a device, GiB, {config.engine} ({RESERVED_GIB:g} GiB reserved of {config.memory_gib:g}):")
    say(table(["stage", *PARTS, "total", "fits"], shown))
    if "scaling" in raw:
        ladder = ladder_flops(pretrain, raw["scaling"], vocabulary, row_length)
        say(f"the ladder before it: {ladder:.3g} FLOPs, {ladder / flops:.1%} of the main run")
    for warning in warnings(config, pretrain, raw, needs):
        say(f"warning: {warning}")
    return {"counts": counts, "flops": flops, "hours": hours, "batch": batch, "memory": needs,
            "fits": {stage: fits(part, config) for stage, part in needs.items()}}


def vocabulary_of(config: PlanConfig, prepare: dict[str, Any]) -> tuple[int, bool]:
    """Tokens of the recipe's tokenizer, and whether that is known: as prepared where that has run, else the largest it may become."""
    prepared = Path(config.run_dir).parent / "prepare"
    known = (prepared / MANIFEST).is_file()
    return Manifest(prepared).counts["vocabulary"] if known else prepare.get("vocab_size", 1024), known


def first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def total(part: dict[str, int]) -> float:
    return sum(part.values()) / GIB + RESERVED_GIB


def fits(part: dict[str, int], config: PlanConfig) -> bool:
    return total(part) <= config.memory_gib


def batch_plan(pretrain: PretrainConfig, config: PlanConfig, row_length: int) -> tuple[dict[str, int], int]:
    """Rows of a forward pass and passes of a step on each device. Raises ValueError when the batch does not divide."""
    if pretrain.batch_tokens % (row_length * config.devices):
        whole = max(1, round(pretrain.batch_tokens / row_length / config.devices))
        raise ValueError(f"batch_tokens {pretrain.batch_tokens} is not a multiple of {config.devices} devices x {row_length} tokens a row: "
                         f"set batch_tokens to {whole * row_length * config.devices} or devices to a divisor of "
                         f"{pretrain.batch_tokens // row_length}")
    local = pretrain.batch_tokens // row_length // config.devices
    rows = min(first(config.micro_batch_rows, pretrain.micro_batch_rows, local), local)
    if local % rows:
        raise ValueError(f"{local} rows a device do not divide into micro batches of {rows}: "
                         f"set micro_batch_rows to {math.gcd(local, rows)} or another divisor")
    return {"global_rows": pretrain.batch_tokens // row_length, "rows": rows, "accumulation": local // rows}, rows


def need(model: PreTrainedModel, config: PlanConfig, *, tokens: int, trainable: int | None = None, frozen: int = 0, muon: bool = False,
         checkpointing: bool = False, cache_tokens: int = 0, copies: int = 1) -> dict[str, int]:
    """Bytes on one device for one stage; `copies` models keep activations at once (a policy and its critic)."""
    counts, w = count_parameters(model), widths(model)
    layers = counts["total"] - counts["embedding"] - counts["head"]
    state = state_bytes(config.engine, devices=config.devices, trainable=counts["total"] if trainable is None else trainable,
                        frozen=frozen, layer=layers // w["L"], outer=counts["embedding"] + counts["head"], frozen_width=4,
                        muon_parameters=matrices_of_layers(model) if muon else 0)
    return state | {"activations": copies * activation_bytes(w, tokens, checkpointing=checkpointing,
                                                               autocast=config.engine in ("ddp", "fsdp2")),
                    "logits": logits_bytes(w, tokens), "cache": cache_bytes(w, cache_tokens)}


def adapter_parameters(model: PreTrainedModel, rank: int) -> int:
    """Parameters of LoRA on all linear layers but the head: rank x (in + out) each (Hu et al. 2021)."""
    head = model.get_output_embeddings()
    return sum(rank * sum(module.weight.shape) for module in model.modules()
               if isinstance(module, nn.Linear | Conv1D) and module is not head)


def later_stages(model: PreTrainedModel, config: PlanConfig, raw: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Rough needs of the stages after pretraining, from the recipe's own files."""
    P = count_parameters(model)["total"]
    sft, preferences, reward, ppo = (DEFAULTS[stage] | raw.get(stage, {}) for stage in ("sft", "preferences", "reward_model", "ppo"))

    def rows(stage: dict[str, Any]) -> int:
        local = max(1, stage["batch_size"] // config.devices)
        return min(stage["micro_batch_size"] or local, local)

    needs = {}
    if "sft" in raw:
        adapted = sft["method"] == "lora"
        needs["sft"] = need(model, config, tokens=rows(sft) * sft["max_length"], frozen=P if adapted else 0,
                            trainable=adapter_parameters(model, sft["lora_rank"]) if adapted else P)
    if "reward_model" in raw:  # a score in place of the logits; a prompt comes with all its responses, each of sft's length at most
        responses = 2 if preferences["source"] else preferences["responses_per_prompt"]  # the usual preference data are pairs
        tokens, adapted = rows(reward) * responses * sft["max_length"], reward["method"] == "lora"
        needs["reward_model"] = need(model, config, tokens=tokens, muon=reward["optimizer"] == "muon", frozen=P if adapted else 0,
                                     trainable=adapter_parameters(model, reward["lora_rank"]) if adapted else P,
                                     checkpointing=reward["gradient_checkpointing"]) | {"logits": 0}
    if "ppo" in raw:
        trainable, frozen = ppo_models(model, config, reward, ppo)
        needs["ppo"] = need(model, config, tokens=ppo["micro_batch_size"] * sft["max_length"], trainable=trainable, frozen=frozen,
                            copies=1 if ppo["value_trunk"] == "shared" else 2,
                            cache_tokens=min(256, -(-ppo["rollout_batch"] // config.devices)) * sft["max_length"])
        if config.engine in SHARDED:  # whole beside them: the reward model in fp32, the reference and the copy that samples in bf16
            needs["ppo"]["weights"] += (4 + 2 + 2) * P
    return needs


def ppo_models(model: PreTrainedModel, config: PlanConfig, reward: dict[str, Any], ppo: dict[str, Any]) -> tuple[int, int]:
    """Parameters that PPO trains, and those that stand frozen on each device.

    In full: policy and critic train, reference and reward model are frozen. With adapters the frozen base is the reference, too, and
    also bears a reward model that was trained as an adapter.
    """
    P, adapter, adapted = count_parameters(model)["total"], adapter_parameters(model, ppo["lora_rank"]), ppo["method"] == "lora"
    critic = {"separate": P, "shared": 0, "adapter": adapter}[ppo["value_trunk"]]
    scorer = adapter_parameters(model, reward["lora_rank"]) if adapted and reward["method"] == "lora" else P
    frozen = 0 if config.engine in SHARDED else P + scorer
    return (adapter if adapted else P) + critic, frozen


def ladder_flops(pretrain: PretrainConfig, scaling: dict, vocabulary: int, row_length: int) -> float:
    """FLOPs of all runs of the recipe's ladder; what runs share is counted once."""
    return sum((run.tokens - shared_tokens(run)) * train_flops_per_token(planned_decoder(run, vocabulary=vocabulary, row_length=row_length),
                                                                         row_length)
               for run in ladder_configs(pretrain, scaling["sizes"], [int(float(tokens)) for tokens in scaling["tokens"]]).values())


def warnings(config: PlanConfig, pretrain: PretrainConfig, raw: dict[str, dict], needs: dict[str, dict[str, int]]) -> list[str]:
    found = []
    if pretrain.optimizer == "muon" and config.engine != "ddp":
        found.append(f"optimizer muon needs whole matrices, which {config.engine} divides: set optimizer: adamw in pretrain.yaml")
    if "reward_model" in raw and config.engine in SHARDED and (DEFAULTS["reward_model"] | raw["reward_model"])["share_prompts"]:
        found.append(f"share_prompts does not work with {config.engine}: set share_prompts: false in reward_model.yaml")
    found += [f"method lora of {stage} does not work with {config.engine}, which divides the base: set method: full in {stage}.yaml"
              for stage in ("reward_model", "ppo") if stage in raw and config.engine in SHARDED
              and (DEFAULTS[stage] | raw[stage])["method"] == "lora"]
    found += [f"{stage} does not fit: try a smaller micro batch, another engine, more devices" + (
        ", or gradient_checkpointing" if stage == "pretrain" else "") for stage, part in needs.items() if not fits(part, config)]
    return found


if __name__ == "__main__":
    launch(main, PlanConfig, distributed=False)
