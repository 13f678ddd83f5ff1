"""Pretrain the main model on the packed tokens, and compare it with what the ladder predicted.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.pretrain --config recipes/tiny/pretrain.yaml
"""
import json
from pathlib import Path

from stages.models.pretraining import PretrainConfig, identity, pretrain
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest, say


def main(config: PretrainConfig) -> Manifest:
    forecast = read_forecast(config)
    manifest = pretrain(config, forecast=forecast)
    measured = manifest.metrics["heldout_loss"]["value"]
    if forecast:
        error = forecast["value"] / measured - 1
        say(f"held-out loss {measured:.4f}, predicted {forecast['value']:.4f} before training ({error:+.1%})")
        for text in forecast.get("warnings", ()):
            say(f"warning: that prediction was not to be trusted: {text}")
    return manifest


def read_forecast(config: PretrainConfig) -> dict | None:
    """The ladder's prediction, when there is one for these settings (any seed) and these tokens; it does not change the run."""
    folder = Path(config.run_dir).parent / "scaling"
    if not (folder / MANIFEST).is_file():
        return None
    prediction = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
    made_for = (prediction.get("main_model"), prediction.get("prepare"))
    if made_for != (identity(config), Manifest(config.parents["prepare"]).fingerprint):
        say(f"the prediction in {folder} is for another model or other tokens: no comparison")
        return None
    return prediction


if __name__ == "__main__":
    launch(main, PretrainConfig)
