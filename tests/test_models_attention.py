"""Attention document by document equals attention under the block-diagonal mask, gradients included."""
import copy
import random
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from stages.data.packing import PackedCollator, pack
from stages.models import attention
from stages.models.attention import DOCUMENTS, GROUPS, SAME, FastAttention, Turned, attend, documents, paired, speed_up
from tests.rl_tiny import policy


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
    assert where.index.tolist() == [5, 0, 1, 2, 3, 4, 3] and where.padding.tolist() == [6]
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


def counted(monkeypatch):
    """Shapes of the heads that the fast form turns: queries and keys of each layer."""
    shapes, turned = [], Turned.apply
    monkeypatch.setattr(Turned, "apply", lambda x, *rest: shapes.append(x.shape) or turned(x, *rest))
    return shapes


def results(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def test_a_turn_by_hand():
    """A head of four at position 1, of frequencies pi / 2 and 0: the first pair (1, 3) turns to (-3, 1), the second stays."""
    where = documents(torch.tensor([[0, 1]]))
    angles = torch.tensor([[0.0, 0.0], [torch.pi / 2, 0.0]])
    heads = paired(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).T, 4).T.expand(2, -1)[:, None]
    assert heads[0, 0].tolist() == [1, 3, 2, 4]
    turned = Turned.apply(heads, None, torch.polar(torch.ones(2, 1, 2), angles[:, None]), 0.0, where)
    torch.testing.assert_close(turned[:, 0], torch.tensor([[1.0, 3.0, 2.0, 4.0], [-3.0, 1.0, 2.0, 4.0]]))


def test_the_gradients_of_a_turn_are_those_of_the_formula():
    where = documents(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    turn = torch.polar(torch.ones(6, 1, 2, dtype=torch.float64), torch.rand(6, 1, 2, dtype=torch.float64))
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    real = torch.ones(len(where.index), 1, 1, dtype=torch.float64).index_fill(0, where.padding, 0)  # nothing comes back from padding
    assert torch.autograd.gradcheck(lambda x, weight: Turned.apply(x, weight, turn, 1e-6, where) * real, (x, weight))
    assert torch.autograd.gradcheck(lambda x: Turned.apply(x, None, turn, 1e-6, where) * real, (x,))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", SAME)
def test_models_compute_what_they_did(name, kv_heads, monkeypatch):
    torch.manual_seed(0)
    plain = policy(architecture={"LlamaAttention": "llama", "Qwen3Attention": "qwen3", "Qwen3MoeAttention": "qwen3_moe"}[name],
                   num_key_value_heads=kv_heads, num_attention_heads=4, hidden_size=32, head_dim=8)
    for key, p in plain.named_parameters():
        if key.endswith("norm.weight"):
            torch.nn.init.uniform_(p)
    plain.set_attn_implementation(DOCUMENTS)
    fast = copy.deepcopy(plain)
    speed_up(fast)
    speed_up(fast)
    batch = packed_batch([3, 5, 11, 30, 63, 1, 8, 9], 64)
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 20, batch["labels"].where(batch["labels"] < 0, batch["labels"] % 20)
    expected, calls = results(plain, batch), counted(monkeypatch)
    found = results(fast, batch)
    layers = [m for m in fast.modules() if type(m).__name__ == name]
    assert len(calls) == 2 * len(layers) > 0 and all(type(m).mro().count(FastAttention) == 1 for m in layers)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_what_is_no_attention_within_documents_or_no_plain_projection_is_left_to_transformers(monkeypatch):
    model = policy()
    speed_up(model)
    calls, batch = counted(monkeypatch), packed_batch([3, 5, 11], 32)
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 20, batch["labels"].where(batch["labels"] < 0, batch["labels"] % 20)
    loss = results(model, batch)["loss"]  # sdpa under a mask
    model.set_attn_implementation(DOCUMENTS)
    assert not calls
    torch.testing.assert_close(results(model, batch)["loss"], loss)
    assert len(calls) == 2 * model.config.num_hidden_layers
    calls.clear()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert abs(results(adapted, batch)["loss"] - loss) > 1e-3, "what adapters add is passed over"
    assert not calls


@pytest.mark.parametrize("fast", [False, True])
def test_under_autocast_what_lies_between_projections_stays_in_float32(fast, monkeypatch):
    """On a CPU the backward pass of attention in bf16 takes four times as long as in float32."""
    model = policy()
    model.set_attn_implementation(DOCUMENTS)
    if fast:
        speed_up(model)
    batch = packed_batch([3, 5, 11, 30], 64)
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 20, batch["labels"].where(batch["labels"] < 0, batch["labels"] % 20)
    whole, types, inside = results(model, batch), set(), attention.scaled_dot_product_attention

    def watched(*tensors, **more):
        out = inside(*tensors, **more)
        types.update(tensor.dtype for tensor in (*tensors, out))
        return out

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: types.add((out.dtype,)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(model, batch)
    assert types == {torch.float32, (torch.bfloat16,)}
    assert rounded["loss"] != whole["loss"] and rounded["loss"] == pytest.approx(float(whole["loss"]), abs=0.02)
    for name, expected in whole.items():
        assert torch.cosine_similarity(rounded[name].flatten(), expected.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_model_of_bf16_weights_reads_documents_without_autocast(architecture):
    model = policy(architecture=architecture)
    model.set_attn_implementation(DOCUMENTS)
    batch = packed_batch([3, 5, 11, 30], 64)
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 20, batch["labels"].where(batch["labels"] < 0, batch["labels"] % 20)
    whole = model(**batch, use_cache=False)
    for fast in (False, True):
        rounded = copy.deepcopy(model).bfloat16()
        if fast:
            speed_up(rounded)
        found = rounded(**batch, use_cache=False)
        assert found.logits.dtype == torch.bfloat16 and found.loss.item() == pytest.approx(float(whole.loss.detach()), abs=0.05)


def test_one_kernel_reads_documents_where_they_lie(monkeypatch):
    """The kernel needs a GPU (tests/test_gpu.py compares it there); here each document by itself stands in for it."""
    seen = []

    def kernel(query, key, value, starts, ends, longest, _, *, scale, window_size):
        assert window_size == (-1, 0) and starts is ends and starts.dtype == torch.int32 and query.shape == key.shape == value.shape
        seen.append((query.dtype, len(starts) - 1, longest))
        documents = ([x[a:b].transpose(0, 1) for x in (query, key, value)] for a, b in pairwise(starts.tolist()))
        return torch.cat([attention.scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(0, 1)
                          for heads in documents])

    model = policy(num_key_value_heads=2, num_attention_heads=4, hidden_size=32, head_dim=8)
    model.set_attn_implementation(DOCUMENTS)
    batch = packed_batch([3, 5, 11, 30, 8, 64], 64)
    batch["input_ids"], batch["labels"] = batch["input_ids"] % 20, batch["labels"].where(batch["labels"] < 0, batch["labels"] % 20)
    expected = results(model, batch)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    assert results(model, batch)["loss"] == expected["loss"] and not seen
    monkeypatch.setattr(attention, "of_kernel", lambda *_: torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(model, batch)
    assert seen == [(torch.bfloat16, seen[0][1], 64)] * model.config.num_hidden_layers and seen[0][1] > 6
    assert rounded["loss"] == pytest.approx(float(expected["loss"]), abs=0.02)
    for name, value in expected.items():
        assert torch.cosine_similarity(rounded[name].flatten(), value.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize(("device", "dtype", "autocast", "size", "found"), [
    ("cuda", torch.bfloat16, False, 64, torch.bfloat16), ("cuda", torch.float32, False, 64, None),
    ("cuda", torch.float32, True, 64, torch.bfloat16), ("cuda", torch.bfloat16, False, 36, None),
    ("cuda", torch.bfloat16, False, 512, None), ("cpu", torch.bfloat16, False, 64, None), ("cpu", torch.float32, True, 64, None)])
def test_the_kernel_is_for_half_precision_on_a_gpu(device, dtype, autocast, size, found, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert attention.of_kernel(device, dtype, size) == found
