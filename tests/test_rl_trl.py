"""What stages/rl/_trl.py takes from inside TRL is what the installed TRL has; a release that changes it fails here and not in a run."""
import ast
import inspect
from pathlib import Path

import torch

from stages.rl import _trl, generation
from tests.rl_tiny import policy
from tests.rl_vllm import FakeVLLM

ROOT = Path(__file__).parent.parent
SOURCE = inspect.getsource(_trl.VLLMGeneration)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_is_inside_trl_is_imported_in_one_place():
    """The trainers and configs that TRL offers its users may be imported anywhere, as may the PPO of a TRL in an interpreter of its own."""
    for path in (ROOT / "stages" / "rl").glob("*.py"):
        inside = {node.module for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                  if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl.")}
        assert not inside or path.name == "_trl.py" or inside == {"trl.experimental.ppo"}, (path.name, inside)


def test_vllm_generation_takes_what_it_is_given():
    taken = parameters(_trl.VLLMGeneration.__init__)
    assert taken[:4] == ["self", "model", "accelerator", "processing_class"]
    given = {keyword.arg for node in ast.walk(ast.parse(inspect.getsource(generation.make_engine)))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "VLLMGeneration" for keyword in node.keywords}
    assert len(given) > 6 and given <= set(taken)
    assert set(parameters(FakeVLLM.__init__)) == {*given, *taken[:4]}, "the fake is as strict"


def test_it_samples_from_the_softmax_alone():
    """Neither top-k nor a penalty by default, and one log-probability a token, after the temperature."""
    defaults = {name: p.default for name, p in inspect.signature(_trl.VLLMGeneration.__init__).parameters.items()}
    assert {name: defaults[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty", "logprobs")} == {
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}
    assert 'logprobs_mode="processed_logprobs"' in SOURCE and "generation_kwargs.update(self.generation_kwargs)" in SOURCE


def test_generate_and_sync_weights_are_called_as_they_are():
    assert parameters(_trl.VLLMGeneration.generate)[:4] == ["self", "prompts", "images", "num_generations"]
    assert parameters(_trl.VLLMGeneration.sync_weights) == ["self"]
    returned = [node.value for node in ast.walk(ast.parse(inspect.cleandoc(inspect.getsource(_trl.VLLMGeneration.generate))))
                if isinstance(node, ast.Return)]
    assert [[name.id for name in each.elts] for each in returned] == [["prompt_ids", "completion_ids", "logprobs", "logprob_token_ids"]]


def test_colocate_starts_from_the_files_of_the_policy_and_a_server_says_what_it_reports():
    assert "model=model.name_or_path" in SOURCE and "self.vllm_client = VLLMClient(" in SOURCE
    client = inspect.getmodule(_trl.VLLMGeneration).VLLMClient
    assert parameters(client.get_server_info) == ["self"]


def test_weights_are_sent_under_the_names_of_the_policy():
    """Of a plain model each parameter as it is now; without vLLM, so without its constructor."""
    engine, model = object.__new__(_trl.VLLMGeneration), policy()

    class Accelerator:
        class state:
            deepspeed_plugin = None

    engine.model, engine.accelerator = model, Accelerator()
    engine._dist = inspect.getmodule(_trl.VLLMGeneration).DistributedBackend(engine.accelerator)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    sent, own = list(engine._iter_named_params()), dict(model.named_parameters())
    assert [name for name, _ in sent] == list(own) and all(torch.equal(tensor, own[name]) for name, tensor in sent)
