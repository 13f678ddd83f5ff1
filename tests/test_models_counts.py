"""Parameters and FLOPs against a count by hand, the really built model, and torch's own FLOP counter."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.counts import attention_flops, count_parameters, planned_decoder, train_flops_per_token

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "tie_word_embeddings": False}


def small(architecture: str, **changes):
    return AutoConfig.for_model(architecture, **(SMALL | changes))


def test_dense_counts_by_hand():
    # A layer: q 32x32, k and v 32x16, o 32x32 = 3072; gate, up, down 3 x 32 x 48 = 4608; two norms of 32, q and k norms of 8.
    counts = count_parameters(small("qwen3"))
    assert counts["attention"] == 2 * 3072
    assert counts["mlp"] == 2 * 4608
    assert counts["norm"] == 2 * (64 + 16) + 32
    assert counts["embedding"] == counts["head"] == 96 * 32
    assert counts["total"] == 2 * (3072 + 4608 + 80) + 32 + 2 * 3072
    assert counts["non_embedding"] == 2 * (3072 + 4608 + 80) + 32
    assert counts["matmul"] == 2 * (3072 + 4608) + 3072
    assert counts["active"] == counts["total"]


def test_tied_head_is_counted_once_and_still_multiplies():
    untied, tied = count_parameters(small("qwen3")), count_parameters(small("qwen3", tie_word_embeddings=True))
    assert tied["total"] == untied["total"] - 96 * 32
    assert tied["head"] == 0
    assert tied["matmul"] == untied["matmul"]
    assert tied["non_embedding"] == untied["non_embedding"]


def test_moe_counts_by_hand():
    # 8 experts of 3 x 32 x 16 = 1536 a layer, a router of 32 x 8; two experts a token.
    counts = count_parameters(small("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16))
    assert counts["experts"] == 2 * 8 * 1536
    assert counts["router"] == 2 * 32 * 8
    assert counts["mlp"] == 0
    assert counts["total"] - counts["active"] == 2 * 6 * 1536
    assert counts["matmul"] == 2 * (3072 + 256 + 2 * 1536) + 3072


@pytest.mark.parametrize(("architecture", "changes"), [
    ("qwen3", {}), ("llama", {}), ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})])
def test_equal_to_the_built_model(architecture, changes):
    config = AutoConfig.for_model("gpt2", vocab_size=96, **changes) if architecture == "gpt2" else small(architecture, **changes)
    model = AutoModelForCausalLM.from_config(config)
    counts = count_parameters(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts == count_parameters(model)
    assert sum(counts[kind] for kind in ("embedding", "head", "attention", "mlp", "experts", "router", "norm")) == counts["total"]


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_flops_equal_torchs_count(architecture):
    config = small(architecture) if architecture != "gpt2" else AutoConfig.for_model(
        "gpt2", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 96, (3, 24))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == pytest.approx(ids.numel() * train_flops_per_token(config, 24) / 3, rel=1e-12)


def test_attention_flops_by_hand_and_sliding_window():
    config = small("qwen3")
    assert attention_flops(config, 64) == 12 * 2 * 4 * 8 * 64
    sliding = small("qwen3", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert sliding.layer_types == ["full_attention", "sliding_attention"]
    assert attention_flops(sliding, 64) == 12 * 4 * 8 * (64 + 16)


def test_planned_decoder_is_the_one_that_pretraining_builds():
    from stages.models.pretraining import PretrainConfig
    from stages.models.sizes import build_decoder

    config = PretrainConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2)
    planned = planned_decoder(config, vocabulary=90, row_length=64)
    assert planned.vocab_size == 96
    assert count_parameters(planned)["total"] == sum(p.numel() for p in build_decoder(planned, seed=0).parameters())
