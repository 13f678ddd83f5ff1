"""Pretrain the main model on the packed tokens, and compare it with what the ladder predicted.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.pretrain --config recipes/tiny/pretrain.yaml
"""
import json
from pathlib import Path

from stages.models.pretraining import PretrainConfig, pretrain
from stages.run.entry import launch
from stages.run.manifest import Manifest, say


def main(config: PretrainConfig) -> Manifest:
    forecast = read_forecast(config)
    manifest = pretrain(config, forecast=forecast)
    measured = manifest.metrics["heldout_loss"]["value"]
    if forecast:
        error = forecast["value"] / measured - 1
        say(f"held-out loss {measured:.4f}, predicted {forecast['value']:.4f} before training ({error:+.1%})")
    return manifest


def read_forecast(config: PretrainConfig) -> dict | None:
    """The ladder's prediction for this size and budget, when the recipe has one; it does not change the run."""
    file = Path(config.run_dir).parent / "scaling" / "prediction.json"
    if not file.is_file():
        return None
    prediction = json.loads(file.read_text(encoding="utf-8"))
    return prediction if prediction.get("tokens") == config.tokens and prediction.get("hidden_size") == config.hidden_size else None


if __name__ == "__main__":
    launch(main, PretrainConfig)
