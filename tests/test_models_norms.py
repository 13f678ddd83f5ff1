"""RMSNorm with its gradient written out: the same numbers as transformers' own, in every class it stands in for."""
import copy

import pytest
import torch
from torch import nn

from stages.models.norms import SAME, FastNorm, RmsNorm, speed_up_norms
from tests.rl_tiny import policy

ARCHITECTURES = {"Dots1RMSNorm": "dots1", "LlamaRMSNorm": "llama", "MistralRMSNorm": "mistral", "MixtralRMSNorm": "mixtral",
                 "OlmoeRMSNorm": "olmoe", "Qwen2MoeRMSNorm": "qwen2_moe", "Qwen2RMSNorm": "qwen2", "Qwen3MoeRMSNorm": "qwen3_moe",
                 "Qwen3RMSNorm": "qwen3"}
SMALL = {"dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
         "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}}


def norms(model):
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def test_by_hand():
    """Root mean square of (3, 4, 0, 0) is 2.5."""
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    torch.testing.assert_close(RmsNorm.apply(x, torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.0), torch.tensor([[1.2, 3.2, 0.0, 0.0]]))


def test_the_gradient_is_that_of_the_formula():
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: RmsNorm.apply(x, weight, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda x, weight: RmsNorm.apply(x.transpose(0, 1), weight, 1e-6).transpose(0, 1), (x, weight))


@pytest.mark.parametrize("name", SAME)
def test_models_compute_what_they_did(name):
    plain = policy(architecture=ARCHITECTURES[name], **SMALL.get(ARCHITECTURES[name], {}))
    assert norms(plain) and {type(module).__name__ for module in norms(plain)} == {name}
    for module in norms(plain):
        nn.init.uniform_(module.weight)
    fast = copy.deepcopy(plain)
    speed_up_norms(fast)
    speed_up_norms(fast)
    assert all(isinstance(module, FastNorm) and type(module).mro().count(FastNorm) == 1 for module in norms(fast))
    ids = torch.arange(3, 9)[None]
    results = []
    for model in (plain, fast):
        logits = model(input_ids=ids).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, results[0][0], atol=2e-5, rtol=1e-4)


def test_copies_and_saved_models_are_as_before(tmp_path):
    model = policy()
    names = list(model.state_dict())
    speed_up_norms(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert list(copy.deepcopy(model).state_dict()) == list(loaded.state_dict()) == names
    assert not any(isinstance(module, FastNorm) for module in norms(loaded))


def test_other_types_than_float32_are_left_to_transformers(monkeypatch):
    model = policy().to(torch.bfloat16)
    plain = copy.deepcopy(model)
    speed_up_norms(model)
    monkeypatch.setattr("stages.models.norms.scale_of", None)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with pytest.raises(TypeError):  # and float32 is not
        model.float()(input_ids=ids)
