"""Attention document by document equals attention under the block-diagonal mask, gradients included."""
import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from stages.data.packing import PackedCollator, pack
from stages.models.attention import DOCUMENTS, GROUPS, attend, documents


def packed_batch(lengths, row_length=512):
    rng = random.Random(0)
    rows = pack([[rng.randint(3, 60) for _ in range(length)] for length in lengths], row_length, eos_id=1, pad_id=0)
    return PackedCollator(eos_id=1, pad_id=0)([{"input_ids": row} for row in rows])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_loss_and_gradients_equal_those_under_a_mask(kv_heads):
    batch = packed_batch([*GROUPS[1:], 3, 5, 11, 30, 63, 100, 300, 511, 1])
    assert len(batch["input_ids"]) > 2 and (batch["labels"] == -100).sum() > 20  # several rows, with padding
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                                         num_key_value_heads=kv_heads, intermediate_size=32, initializer_range=0.3))
    found = {}
    for name in ("sdpa", DOCUMENTS):
        model.set_attn_implementation(name)
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found[name] = {"loss": loss.detach(), **{key: p.grad.clone() for key, p in model.named_parameters()}}
    for key, expected in found["sdpa"].items():
        torch.testing.assert_close(found[DOCUMENTS][key], expected, rtol=1e-4, atol=1e-6, msg=key)


def test_a_document_sees_no_other():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                                         num_key_value_heads=2, intermediate_size=32, initializer_range=0.3)).eval()
    model.set_attn_implementation(DOCUMENTS)
    batch = packed_batch([20, 20, 20], 64)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 5] += 1
    first, second = (model(**b, use_cache=False).logits[0] for b in (batch, changed))
    assert torch.equal(first[21:], second[21:]) and torch.equal(first[:5], second[:5]) and not torch.allclose(first[5:21], second[5:21])


def test_places_by_hand():
    where = documents(torch.tensor([[0, 1, 2, 0, 1, 0]]))  # documents of 3, 2 and 1 tokens; single tokens are a group of their own
    assert where.shapes == [(1, 1), (2, 3)]
    assert where.index.tolist() == [5, 0, 1, 2, 3, 4, 3] and where.real.flatten().tolist() == [1, 1, 1, 1, 1, 1, 0]
    assert where.back.tolist() == [1, 2, 3, 4, 5, 0]


def test_what_is_not_packed_is_refused():
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
                                         num_key_value_heads=1, intermediate_size=8))
    model.set_attn_implementation(DOCUMENTS)
    with pytest.raises(ValueError, match="documents attention takes packed rows"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, pad_token_id=0)


def test_a_mask_is_refused():
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
                                         num_key_value_heads=1, intermediate_size=8))
    model.set_attn_implementation(DOCUMENTS)
    with pytest.raises(ValueError, match="documents attention takes packed rows"):
        model(input_ids=torch.tensor([[0, 1, 2]]), attention_mask=torch.tensor([[0, 1, 1]]), use_cache=False)


@pytest.mark.parametrize("more", [{"softcap": 30.0}, {"s_aux": torch.zeros(1)}, {"sliding_window": 3}])
def test_what_it_does_not_compute_is_refused(more):
    heads = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="no sliding windows, capped scores or sinks"):
        attend(torch.nn.Identity(), heads, heads, heads, None, position_ids=torch.arange(4)[None], **more)
