"""Adapters: what of a model they train, that they merge, come back and refuse another base; methods and settings that cannot be."""
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model

from stages.models import finetuning
from stages.models.adapters import adapter_config, load_adapter, load_base, merged, save_adapter
from stages.models.finetuning import DialogueCollator
from stages.models.forgetting import Watch
from tests.sft_tiny import NEW, base_of, config_of, dialogues, shake, tiny_tokenizer, tune


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def trainable(model, *parts):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("method", "peft", "kinds"), [
    ("lora", {}, {"lora_A", "lora_B"}), ("lora", {"use_dora": True}, {"lora_A", "lora_B", "lora_magnitude_vector"}),
    ("ia3", {}, {"ia3_l"}), ("vera", {"r": 8}, {"vera_lambda_b", "vera_lambda_d"}), ("loha", {"r": 2}, {"hada_w1_a"})])
def test_what_an_adapter_trains(tokenizer, method, peft, kinds, tied):
    model = base_of(tokenizer, tied=tied)
    new = tokenizer.convert_tokens_to_ids(list(NEW))
    ids = torch.arange(6, 40)[None]
    before = model(ids).logits
    made = adapter_config(config_of(method=method, peft=peft), new, tied)
    adapted = get_peft_model(model, made)
    torch.testing.assert_close(adapted(ids).logits, before)  # it starts as the base
    for kind in kinds:
        names = trainable(adapted, f".{kind}.")
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            assert sum(f".{matrix}." in name for name in names) == 2, (kind, matrix)  # in both layers
        assert not any("lm_head" in name for name in names)
    ends = {name.split(".default")[0].removeprefix("base_model.model.") for name in trainable(adapted, "embed_tokens", "lm_head")}
    wanted = {"model.embed_tokens.token_adapter.trainable_tokens_delta" if method == "lora" else "model.embed_tokens.modules_to_save"}
    assert ends == wanted | (set() if tied else {"lm_head.modules_to_save"})
    if method == "lora":
        assert (made.r, made.lora_alpha) == (4, 8)
        assert adapted.get_parameter("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default").size(0) == len(new)
    without = get_peft_model(base_of(tokenizer), adapter_config(config_of(method=method, peft=peft), [], tied))
    assert not trainable(without, "embed", "lm_head")


@pytest.mark.parametrize("whole", [False, True])
def test_of_an_untied_head_only_the_rows_of_new_tokens_move(monkeypatch, tmp_path, tokenizer, whole):
    config = config_of(method="lora", learning_rate=1e-2, **({"peft": {"modules_to_save": ["lm_head"]}} if whole else {}))
    trainer = tune(monkeypatch, tmp_path, tokenizer, config, evaluations=1)
    moved = (trainer.model.get_output_embeddings().weight - base_of(tokenizer).lm_head.weight).abs().amax(1) > 0
    learned = {token for row in dialogues(32) for token in row["labels"] if token != -100} & set(range(len(moved)))
    if whole:  # as the recipe says it
        assert moved.sum() > len(NEW) and moved[sorted(learned)].all()
    else:
        assert set(moved.nonzero().flatten().tolist()) == set(tokenizer.convert_tokens_to_ids(list(NEW)))


def test_settings_of_the_recipe_win(tokenizer):
    made = adapter_config(config_of(method="lora", peft={"target_modules": ["q_proj"], "r": 2}), [], False)
    assert (made.target_modules, made.r, made.lora_alpha) == ({"q_proj"}, 2, 8)


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize(("method", "peft", "message"), [
    ("lora", {"use_doora": True}, "lora has no setting 'use_doora'"), ("ia3", {"r": 4}, "ia3 has no setting 'r'")])
def test_a_setting_that_the_method_lacks(method, peft, message):
    with pytest.raises(ValueError, match=message) as error:
        adapter_config(config_of(method=method, peft=peft), [], False)
    assert one_line(error)


@pytest.mark.parametrize(("method", "message"), [
    ("lorra", "unknown method 'lorra': choose full, lora, qlora, or one of peft's"),
    ("prompt_tuning", "unknown method 'prompt_tuning'"),  # its vectors stand before a row: they cannot be merged, nor rows be flat
    ("trainable_tokens", "unknown method 'trainable_tokens'"),
    ("qlora", "needs bitsandbytes")])
def test_a_method_that_cannot_be(tokenizer, tmp_path, monkeypatch, method, message):
    base_of(tokenizer).save_pretrained(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ValueError, match=message) as error:
        load_base(tmp_path, config_of(method=method))
    assert one_line(error)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("method", "peft"), [("lora", {}), ("lora", {"use_dora": True}), ("ia3", {}), ("vera", {"r": 8}), ("full", {})])
def test_merged_gives_equal_logits_after_training(monkeypatch, tmp_path, tokenizer, method, peft, tied):
    config = config_of(method=method, peft=peft)
    rows = dialogues(24, low=0)  # new tokens too
    base, ids = base_of(tokenizer, tied=tied), torch.arange(0, 40)[None]
    trainer = tune(monkeypatch, tmp_path, tokenizer, config, tied=tied, train=rows)
    model = trainer.model.eval()
    with torch.no_grad():
        trained = model(ids).logits
        assert (trained - base(ids).logits).abs().max() > 0.01
        product = merged(model, config, tmp_path, tmp_path, None)
        torch.testing.assert_close(product(ids).logits, trained, rtol=1e-4, atol=1e-4)
        product.save_pretrained(tmp_path / "model")
        torch.testing.assert_close(load_base(tmp_path / "model", config)(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert not isinstance(product, PeftModel)


def test_an_adapter_comes_back(tokenizer, tmp_path):
    ids = torch.arange(0, 40)[None]
    model = get_peft_model(base_of(tokenizer), adapter_config(config_of(method="lora"), [2, 3], False))
    shake(model, 0.1)
    save_adapter(model, tmp_path / "adapter", "sha256:base")
    again = load_adapter(base_of(tokenizer), tmp_path / "adapter", "sha256:base")
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert trainable(again, "") == trainable(model, "")


def test_an_adapter_that_does_not_fit_is_one_clear_line(tokenizer, tmp_path):
    model = get_peft_model(base_of(tokenizer), adapter_config(config_of(method="lora"), [], False))
    save_adapter(model, tmp_path / "adapter", "sha256:base")
    with pytest.raises(ValueError, match=r"was trained on another base \(sha256:base\) than the one given \(sha256:other\): set parents"):
        load_adapter(base_of(tokenizer), tmp_path / "adapter", "sha256:other")
    with pytest.raises(ValueError, match=r"the adapter in .*/nothing does not fit the base: .*adapter_config\.json") as error:
        load_adapter(base_of(tokenizer), tmp_path / "nothing", "sha256:base")
    assert one_line(error)
    with pytest.raises(ValueError, match=r"does not fit the base: .*size mismatch") as error:
        load_adapter(base_of(tokenizer, width=64), tmp_path / "adapter", "sha256:base")
    assert one_line(error)


def test_an_adapter_goes_on_training(monkeypatch, tmp_path, tokenizer):
    first = get_peft_model(base_of(tokenizer), adapter_config(config_of(method="lora"), [], False))
    save_adapter(first, tmp_path / "adapter", "sha256:base")
    model = load_adapter(base_of(tokenizer), tmp_path / "adapter", "sha256:base")
    watch = Watch(tmp_path / "watch", validation=dialogues(9), sources=["x"] * 9, collator=DialogueCollator(0), neutral=None, tokens=1e9)
    trainer = finetuning.tune(model, tokenizer, config_of(method="lora", kl_coef=0.1), run=SimpleNamespace(directory=tmp_path),
                              train=dialogues(16), watch=watch, evaluations=1, peft_config=None)
    assert trainer.model is model and trainer.frozen is None
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(("name", "value"), [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")])
def test_adapters_where_the_launch_divides_the_weights_are_refused(name, value, monkeypatch, tmp_path):
    from stages.models.adapters import MethodConfig, check_undivided, load_base

    monkeypatch.setenv(name, value)
    check_undivided(MethodConfig(method="full"))
    with pytest.raises(ValueError, match=r"method lora trains adapters, .*: launch with ddp.yaml or zero2.yaml, or set method: full"):
        load_base(tmp_path, MethodConfig(method="lora"))
