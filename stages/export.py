"""A finished stage's model as a folder for other programs: weights, tokenizer, chat template, generation config and a model card.

    python -m stages.export --recipe tiny --stage ppo
    python -m stages.export --recipe tiny --datasets true

docs/export.md says which clients read it and what is checked. An export stands in `<run_dir>/<stage>` and is never replaced.
"""
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reward.folders import read_object, trusted
from reward.model import ENSEMBLE
from stages.models.clients import CLASSIFIER, COPIED, difference, load, older_config, older_tokenizer, vllm_faults
from stages.rl.trl_datasets import write_datasets
from stages.run.card import card, evaluation_of, lineage
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, hash_data, hash_path, provenance, say, write_json

TOLERANCE = 1e-5  # of logits, between our own load of the product and the load of the export
FORMAT = 1  # part of an export's fingerprint: another number where the same product would be written differently


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StageConfig):
    STAGE = "export"
    PARENTS = ("prepare", "pretrain", "sft", "reward_model", "ppo", "rejection_sampling", "preferences", "evaluation")

    stage: Literal["pretrain", "sft", "reward_model", "ppo", "rejection_sampling"] = option("ppo", "whose model; pretrain is the base")
    name: str = option("", "the model's name on its card (default <recipe>-<stage>)")
    datasets: bool = option(False, "what sft, preferences and ppo learn from, in TRL's dataset formats, instead of a model")


def main(config: ExportConfig) -> Manifest | None:
    if config.datasets:
        datasets(config)
        return None
    source = Manifest(config.parents[config.stage])
    product, recorded = source.product("model"), source.data["products"]["model"].get("sha256")
    out = Path(config.run_dir) / config.stage
    identity = {"format": FORMAT, "source": source.fingerprint, "model": recorded, "name": config.name}
    fingerprint = hash_data(identity)
    if out.exists():
        if (out / MANIFEST).is_file() and Manifest(out).fingerprint == fingerprint:
            say(f"export: {out} is there already, of this very model")
            return Manifest(out)
        raise ValueError(f"{out} holds something else, perhaps an export of another run: delete it, or give another folder by --run-dir")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checks = write_model(product, partial)
    runs, evaluated = lineage(source), evaluation_of(source, Path(config.parents["evaluation"]))
    (partial / "README.md").write_text(card(source, runs, name=config.name or f"{config.recipe}-{config.stage}", evaluated=evaluated,
                                            ensemble=(product / ENSEMBLE).is_file(), checks=checks), encoding="utf-8")
    files = {str(file.relative_to(partial)): {"sha256": hash_path(file), "bytes": file.stat().st_size}
             for file in sorted(partial.rglob("*")) if file.is_file()}
    made = provenance(0.0, 1)
    write_json(partial / MANIFEST, {
        "stage": "export", "recipe": config.recipe, "status": "finished", "fingerprint": fingerprint, "exported": config.stage,
        "parents": {config.stage: source.fingerprint}, "products": {"model": {"path": "."}}, "files": files,
        "checks": checks, "config": {"stage": config.stage, "name": config.name}, "counts": source.counts, "metrics": source.metrics,
        "lineage": [{key: run.get(key) for key in ("stage", "recipe", "fingerprint", "commit", "seed", "products", "unknown") if key in run}
                    for run in runs],
        "provenance": {key: made[key] for key in ("commit", "dirty", "versions", "python")}})
    for path in [partial, *partial.rglob("*")]:  # safetensors writes 0600, which a server under another user cannot read
        path.chmod(0o755 if path.is_dir() else 0o644)
    partial.rename(out)
    say(f"export: {config.stage} of {source.path} is in {out}: " + "; ".join(f"{key}: {value}" for key, value in checks.items()))
    return Manifest(out)


def datasets(config: ExportConfig) -> None:
    folder = Path(config.run_dir) / "datasets"
    if folder.exists():
        raise ValueError(f"{folder} is there already: delete it, or give another folder by --run-dir")
    runs = {name: Manifest(path) for name, path in config.parents.items() if (Path(path) / MANIFEST).is_file()}
    for name, rows in write_datasets(runs, folder).items():
        say(f"export: {folder / name}: {rows:,} rows")


def write_model(product: Path, folder: Path) -> dict[str, Any]:
    """Weights as they are, and configs in the words of older clients. Returns what was checked, with figures.

    Raises ValueError when the export's logits or token ids are not the product's.
    """
    trusted(product)
    for pattern in COPIED:
        for file in product.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    config = older_config(read_object(product / "config.json") | {"use_cache": True})
    classifier = config["architectures"][0].endswith(CLASSIFIER)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer_config.json", older_tokenizer(read_object(product / "tokenizer_config.json")))
    if not classifier:
        write_json(folder / "generation_config.json", generation(product, config))
    (ours, tokenizer), (theirs, reader) = load(product, classifier), load(folder, classifier)
    if (largest := difference(ours, theirs)) > TOLERANCE:
        raise ValueError(f"the export's logits differ from the product's by {largest:.2g}, more than {TOLERANCE}: the architecture "
                         f"{config['architectures'][0]} has settings that older configs cannot say")
    check_tokens(tokenizer, reader)
    faults = vllm_faults(config, len(reader))
    return {"largest difference of logits": f"{largest:.2g}", "token ids": "equal",
            "vLLM's checks of a config": "; ".join(faults) or "pass"}


def generation(product: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: where a response ends, the padding, and sampling at temperature 1, as the stages measure it."""
    file = product / "generation_config.json"
    own = read_object(file) if file.is_file() else {}
    ends = own.get("eos_token_id", config.get("eos_token_id"))
    if ends is None:
        raise ValueError(f"{product} does not say which token ends a response: set eos_token_id in its config.json")
    return {"eos_token_id": ends, "pad_token_id": own.get("pad_token_id", config.get("pad_token_id")), "do_sample": True,
            "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}


def check_tokens(ours: Any, theirs: Any) -> None:
    """Raises ValueError where the two tokenizers read a text or a chat differently."""
    texts = ["Tom has 12 apples.\n\nHe eats 3.5 of them; naïve — 日本語 🙂", " leading and trailing ", "x" * 50]
    if ours.chat_template:
        chat = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5."}]
        texts.append(ours.apply_chat_template(chat, tokenize=False))
        if theirs.chat_template != ours.chat_template:
            raise ValueError("the export's chat template is not the product's")
    for text in texts:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise ValueError(f"the export's tokenizer reads {text[:30]!r} differently from the product's: its class "
                             f"{type(ours).__name__} has settings that older configs cannot say")


if __name__ == "__main__":
    launch(main, ExportConfig, distributed=False)
