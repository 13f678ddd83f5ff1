"""The plan's memory formulas on numbers worked by hand, and the plan of a recipe against the model that is really built."""
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.counts import build_meta, count_parameters
from stages.models.memory import activation_bytes, cache_bytes, logits_bytes, matrices_of_layers, state_bytes, widths
from stages.plan import PlanConfig, adapter_parameters, main, need
from stages.run.config import build_config

GPT = {"h": 8, "q": 8, "k": 8, "f": 32, "L": 3, "V": 50, "gated": 0, "normed": 0}


def test_activations_are_korthikantis_less_dropout_masks_and_what_transformers_adds():
    # 34 h a token and layer, of which 2 h are the two dropout masks that these decoders do not have
    assert activation_bytes(GPT, 10, checkpointing=False, autocast=False) == 10 * 3 * (32 + 8) * 8
    assert activation_bytes(GPT, 10, checkpointing=True, autocast=False) == 10 * (3 * 2 * 8 + (32 + 8) * 8)
    assert activation_bytes(GPT, 10, checkpointing=True, autocast=True) == 10 * (3 * 4 * 8 + (32 + 18) * 8)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_what_autograd_keeps(kv_heads, autocast):
    """Of a layer of Qwen3 in bf16: bytes of the tensors that are saved, less parameters and their casts."""
    def kept(layers):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "qwen3", vocab_size=64, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads,
            head_dim=32, intermediate_size=384), attn_implementation="sdpa", dtype=torch.float32 if autocast else torch.bfloat16)
        own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
        ids = torch.randint(64, (4, 128))

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, labels=ids, use_cache=False)
        assert out.loss.requires_grad
        casts = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2) if autocast else 0
        return sum(size for pointer, size in storages.items() if pointer not in own) - casts, widths(model)

    (many, w), (few, _) = kept(4), kept(2)
    assert activation_bytes({**w, "L": 2}, 4 * 128, checkpointing=False, autocast=autocast) == pytest.approx(many - few, rel=0.02)


def test_logits_and_cache():
    assert logits_bytes(GPT, 10) == 12 * 50 * 10
    assert cache_bytes(GPT, 10) == 10 * 3 * 2 * 8 * 2  # keys and values, bf16


@pytest.mark.parametrize(("engine", "devices", "expected"), [
    ("ddp", 1, {"weights": 400, "gradients": 400, "optimizer": 800, "copies": 200}),
    ("ddp", 4, {"weights": 400, "gradients": 400, "optimizer": 800, "copies": 600}),
    ("zero2", 4, {"weights": 200, "gradients": 50, "optimizer": 300, "copies": 400}),
    ("zero3", 4, {"weights": 50, "gradients": 50, "optimizer": 300, "copies": 200}),
    ("fsdp2", 4, {"weights": 100, "gradients": 100, "optimizer": 200, "copies": 2 * (20 + 2 * 10) + 4 * 10})])
def test_state_of_a_hundred_parameters(engine, devices, expected):
    assert state_bytes(engine, devices=devices, trainable=100, layer=10, outer=20) == expected


def test_adapters_leave_the_base_without_gradients():
    state = state_bytes("ddp", devices=1, trainable=10, frozen=100, frozen_width=4)
    assert state == {"weights": 440, "gradients": 40, "optimizer": 80, "copies": 20}
    assert state_bytes("ddp", devices=1, trainable=100, muon_parameters=60)["optimizer"] == 60 * 4 + 40 * 8
    with pytest.raises(ValueError, match="unknown engine 'fsdp'"):
        state_bytes("fsdp", devices=1, trainable=1)


def test_letters_are_read_from_the_model():
    config = AutoConfig.for_model(
        "qwen3", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=64)
    assert widths(build_meta(config)) == {"h": 32, "q": 32, "k": 16, "f": 48, "L": 2, "V": 96, "gated": 1, "normed": 1}
    gpt2 = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert widths(build_meta(gpt2)) == {"h": 32, "q": 32, "k": 32, "f": 128, "L": 2, "V": 96, "gated": 0, "normed": 0}
    moe = AutoConfig.for_model(
        "qwen3_moe", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
    assert widths(build_meta(moe))["f"] == 2 * 16


def test_muon_and_adapters_count_what_they_really_train():
    from peft import LoraConfig, get_peft_model

    from stages.models.optimizer import build_optimizer

    config = AutoConfig.for_model(
        "qwen3", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    muon = next(group for group in build_optimizer(model, matrix_lr=0.1, lr=0.1).param_groups if group["muon"])
    assert matrices_of_layers(build_meta(config)) == sum(p.numel() for p in muon["params"])
    expected = adapter_parameters(model, 4)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert expected == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    folder = tmp_path / "recipes" / "r"
    folder.mkdir(parents=True)
    (folder / "prepare.yaml").write_text("vocab_size: 96\nrow_length: 64\n")
    (folder / "pretrain.yaml").write_text(
        "hidden_size: 32\nnum_layers: 2\nnum_heads: 4\ntokens: 1.0e+6\nbatch_tokens: 1024\nmicro_batch_rows: 4\n")
    (folder / "sft.yaml").write_text("max_length: 64\nlora_rank: 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLUMBLINE_RUNS", raising=False)
    return folder


def plan_of(**values):
    return main(build_config(PlanConfig, values, recipe="r"))


def test_plan_counts_the_built_model(recipe, capsys):
    figures = plan_of(engine="ddp", devices=2, peak_tflops=1.0, mfu=0.5)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        intermediate_size=96, max_position_embeddings=64, tie_word_embeddings=False)
    built = AutoModelForCausalLM.from_config(config)
    assert figures["counts"]["total"] == sum(p.numel() for p in built.parameters())
    flops = 1_000_000 * (6 * count_parameters(built)["matmul"] + 12 * 2 * 4 * 8 * 64)
    assert figures["flops"] == flops
    assert figures["hours"] == pytest.approx(flops / (2 * 1e12 * 0.5) / 3600)
    assert figures["batch"] == {"global_rows": 16, "rows": 4, "accumulation": 2}
    matrices = matrices_of_layers(built)
    assert figures["memory"]["pretrain"]["optimizer"] == 8 * figures["counts"]["total"] - 4 * matrices
    assert figures["fits"] == {"pretrain": True, "sft": True}
    printed = capsys.readouterr().out
    assert f"total {figures['counts']['total']:,}" in printed
    assert "976 steps of 1,024 = 2 devices x 4 rows x 2 passes x 64" in printed
    assert "vocabulary 96 (assumed, as prepare has not run: `make prepare RECIPE=r` tells)" in printed
    assert "assumed, not measured here: --memory-gib 80 (an H100 in bf16)" in printed
    plan_of(devices=2, peak_tflops=1.0, mfu=0.5, memory_gib=16.0)
    assert "not measured" not in capsys.readouterr().out


def test_adapters_train_and_the_base_stands_once(recipe):
    (recipe / "reward_model.yaml").write_text("method: lora\noptimizer: adamw\nlora_rank: 4\n")
    (recipe / "ppo.yaml").write_text("method: lora\nvalue_trunk: adapter\nlora_rank: 4\n")
    adapted = plan_of()
    total, adapter = adapted["counts"]["total"], adapted["memory"]["sft"]["optimizer"] // 8  # sft: an adapter of the same rank
    assert adapted["memory"]["reward_model"]["optimizer"] == 8 * adapter
    assert adapted["memory"]["reward_model"]["weights"] == 4 * (total + adapter)
    assert adapted["memory"]["ppo"]["optimizer"] == 8 * 2 * adapter  # the policy's and the critic's
    assert adapted["memory"]["ppo"]["weights"] == 4 * (total + 3 * adapter)  # and the reward model's, on the same base
    (recipe / "reward_model.yaml").write_text("")
    (recipe / "ppo.yaml").write_text("value_trunk: shared\n")
    full = plan_of()["memory"]
    assert full["ppo"]["optimizer"] == 8 * total and full["ppo"]["weights"] == 4 * 3 * total  # policy, reference, reward model
    (recipe / "ppo.yaml").write_text("")
    whole = plan_of()["memory"]
    assert whole["ppo"]["optimizer"] == 8 * 2 * total and whole["ppo"]["weights"] == 4 * 4 * total
    assert whole["ppo"]["activations"] == 2 * full["ppo"]["activations"]


def test_plan_warns_of_adapters_on_a_divided_base(recipe, capsys):
    (recipe / "ppo.yaml").write_text("method: lora\n")
    plan_of(devices=2)
    assert "method lora" not in capsys.readouterr().out
    plan_of(devices=2, engine="fsdp2")
    assert "method lora of ppo does not work with fsdp2" in capsys.readouterr().out


def test_plan_says_what_does_not_fit_or_divide(recipe, capsys):
    assert plan_of(devices=1, memory_gib=1.0)["fits"]["pretrain"] is False
    assert "does not fit" in capsys.readouterr().out
    plan_of(devices=2, engine="zero3")
    assert "optimizer muon needs whole matrices" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"batch_tokens 1024 is not a multiple of 3 devices x 64 .* set batch_tokens to 960"):
        plan_of(devices=3)
    with pytest.raises(ValueError, match="do not divide into micro batches of 5"):
        plan_of(devices=2, micro_batch_rows=5)
    with pytest.raises(ValueError, match="recipes: unknown recipe 'none': choose from r"):
        plan_of(recipe="none")


def test_sharding_divides_state_and_nothing_else(recipe):
    config = AutoConfig.for_model("qwen3", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                                  num_key_value_heads=4, intermediate_size=96, max_position_embeddings=64)
    model = build_meta(config)
    few, many = (need(model, build_config(PlanConfig, {"engine": "fsdp2", "devices": n}), tokens=128) for n in (2, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert few[part] == pytest.approx(4 * many[part], abs=8)
    assert few["activations"] == many["activations"]


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_step_frees_stays_for_the_next(kept):
    """Pages faulted in by a second round of the same allocations: few where the memory of the first was kept."""
    code = ("import resource, torch\nfrom stages.models.training import keep_memory\n" + ("keep_memory()\n" if kept else "") +
            "def faults():\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "    held = [torch.ones(4_000_000) for _ in range(4)]\n    del held\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\nfaults()\nprint(faults())")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert (int(done.stdout) < 8000) == kept, done.stdout  # of 15,625
