"""Exported models in other programs: transformers 4.57 (equal logits and ids) and ctranslate2 (equal greedy tokens).

They live in an environment of their own, `make test-clients`: elsewhere this is skipped.
"""
import json
import os
import subprocess

import pytest
import torch

from stages import export
from stages.models.clients import load
from stages.models.sampling import sample
from stages.models.sizes import build_decoder, decoder_config
from stages.models.training import save_model
from stages.run.manifest import Manifest
from tests.conftest import ROOT

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
pytestmark = [pytest.mark.clients, pytest.mark.skipif(not (ROOT / ".venv-clients" / ".installed").is_file(),
                                                      reason="no .venv-clients here: make test-clients makes it")]
TEXT = "Tom has 12 apples, naïve — 日本語\n\nand 3.5 more"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]
NEW = 24


def asked_of_clients(folder, ids, *, classifier=False, ctranslate2=True):
    done = subprocess.run([str(PYTHON), str(ROOT / "tests" / "clients_load.py"), str(folder)], capture_output=True, text=True, timeout=900,
                          env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}, input=json.dumps(
        {"ids": ids, "text": TEXT, "messages": MESSAGES, "max_new_tokens": NEW, "classifier": classifier, "ctranslate2": ctranslate2}))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(product, out, *, classifier=False, ctranslate2=True):
    """The export `out` in the other programs against the product in the pipeline's own hands."""
    model, tokenizer = load(product, classifier)
    ids = torch.randint(6, len(tokenizer), (3, 20), generator=torch.Generator().manual_seed(1))
    theirs = asked_of_clients(out, ids.tolist(), classifier=classifier, ctranslate2=ctranslate2)
    assert theirs["version"].startswith("4.57") and theirs["class"] == type(model).__name__
    assert theirs["text"] == tokenizer(TEXT)["input_ids"]
    assert theirs["chat"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        ours = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.tensor(theirs["logits"]).sub(ours).abs().max() <= 1e-5
    if not classifier:
        ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        drawn = sample(model, ids.tolist(), keys=[(i, 0) for i in range(3)], seed=0, temperature=0, max_new_tokens=NEW, eos_ids=[ends],
                       pad_id=tokenizer.pad_token_id)
        assert theirs["generated"] == drawn
        if ctranslate2:
            assert theirs["ctranslate2"] == drawn


def exported(stage, product, tmp_path):
    """An export of a model folder as if it were a stage's product."""
    from stages.run.manifest import hash_path
    home = tmp_path / "runs" / stage
    home.mkdir(parents=True)
    product.rename(home / "model")
    (home / "manifest.json").write_text(json.dumps({
        "stage": stage, "recipe": "r", "fingerprint": "f", "config": {}, "counts": {}, "metrics": {}, "seed": 0,
        "products": {"model": {"path": "model", "sha256": hash_path(home / "model")}}}))
    config = export.ExportConfig(recipe="r", stage=stage, run_dir=str(tmp_path / "out"), parents={
        name: str(tmp_path / "runs" / name) for name in export.ExportConfig.PARENTS})
    return home / "model", export.main(config).path


@pytest.mark.parametrize("architecture, ctranslate2", [("qwen3", True), ("llama", True), ("olmoe", False), ("qwen3_moe", False)])
def test_random_models_of_every_shape_we_build(architecture, ctranslate2, model_folder, tmp_path):
    """ctranslate2 has no mixtures of experts."""
    tokenizer = load(model_folder, False)[1]
    experts = {"num_experts": 4, "experts_per_token": 2} if not ctranslate2 else {}
    model = build_decoder(decoder_config(tokenizer, architecture=architecture, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                                         context_length=128, rope_theta=500.0, tie_embeddings=architecture == "llama", **experts), seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(model, tokenizer, tmp_path / "made")
    check(*exported("pretrain", tmp_path / "made", tmp_path), ctranslate2=ctranslate2)


def test_a_reward_model(model_folder, tmp_path):
    from transformers import AutoTokenizer

    from reward.model import from_language_model
    from_language_model(model_folder, pad_id=0, seed=0, random_head=True).save_pretrained(tmp_path / "made")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "made")
    check(*exported("reward_model", tmp_path / "made", tmp_path), classifier=True, ctranslate2=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo", "reward_model"])
def test_products_of_the_smoke_recipe(stage, smoke, tmp_path):
    product = Manifest(smoke.path(stage)).product("model")
    parents = {name: str(smoke.runs / "smoke" / name) for name in export.ExportConfig.PARENTS}
    out = export.main(export.ExportConfig(recipe="smoke", stage=stage, run_dir=str(tmp_path / "out"), parents=parents)).path
    check(product, out, classifier=stage == "reward_model", ctranslate2=stage != "reward_model")
