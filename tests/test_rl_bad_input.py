"""What PPO does with input that cannot work or teaches nothing: one line that says what and where, and no checkpoint lost."""
import math
import re
from pathlib import Path

import pytest
import torch

from stages.models.training import fit
from stages.rl.questions import asked
from stages.rl.rewards import Response, build_reward
from stages.run.checkpoint import newest_complete
from tests.rl_tiny import END, VOCAB, early_letters, prompts, tokenizer, trainer

GOOD = Response({"id": "a"}, [5, 6], [3, END], "b", True)
CALLS: list[int] = []


def raises_at_q(problems, texts, finished):
    return [1.0 if "q" not in text else {}["q"] for text in texts]


def raises_in_company(problems, texts, finished):
    assert len(texts) < 2
    return [1.0] * len(texts)


def nan_at_q(problems, texts, finished):
    return [math.nan if "q" in text else 1.0 for text in texts]


def none_at_q(problems, texts, finished):
    return [None if "q" in text else 1.0 for text in texts]


def infinite_at_q(problems, texts, finished):
    return torch.tensor([math.inf if "q" in text else 1.0 for text in texts])


def too_many(problems, texts, finished):
    return [1.0] * (len(texts) + 1)


def nothing(problems, texts, finished):
    return None


def fails_in_the_third_rollout(problems, texts, finished):
    CALLS.append(len(texts))
    return [None] * len(texts) if len(CALLS) == 3 else early_letters(problems, texts, finished)


@pytest.mark.parametrize(("function", "message"), [
    ("raises_at_q", r"raised KeyError: 'q' at response 2 of 3 \(problem 'b', text 'x q'\): mend the function"),
    ("raises_in_company", r"raised AssertionError: .*for 3 responses, for none of them alone"),
    ("nan_at_q", r"returned nan for response 2 of 3 \(problem 'b', text 'x q'\): a score is a finite number"),
    ("none_at_q", r"returned None for response 2 of 3 \(problem 'b'.*returns 0 for a response that it does not judge"),
    ("infinite_at_q", r"returned inf for response 2 of 3"), ("too_many", r"returned 4 scores for 3 responses: return one each"),
    ("nothing", r"returned None for 3 responses: return one each")])
def test_a_reward_function_that_fails_is_named_with_the_response(function, message):
    responses = [GOOD, GOOD, GOOD._replace(problem={"id": "b"}, text="x q")]
    name = f"tests.test_rl_bad_input:{function}"
    with pytest.raises(ValueError, match=message) as caught:
        build_reward({name: 1.0}, model_path=None, vocab_size=VOCAB)(responses)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def checkpoint(directory: Path) -> str:
    folder = newest_complete(directory / "checkpoints", world_size=1)
    return folder.name if folder else ""


def test_a_reward_that_fails_late_loses_no_checkpoint(tmp_path):
    """The third rollout fails; the run goes on after the second iteration once the function is mended."""
    CALLS.clear()
    reward = build_reward({"tests.test_rl_bad_input:fails_in_the_third_rollout": 1.0}, model_path=None, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="fails_in_the_third_rollout' returned None for response 0 of 16"):
        fit(trainer(tmp_path, iterations=3, reward=reward))
    assert checkpoint(tmp_path) == "checkpoint-8"
    again = trainer(tmp_path, iterations=3, reward=reward)
    fit(again)
    assert again._initial_global_step == 8 and again.state.global_step == 12


def test_kl_that_explodes_saves_and_stops(tmp_path):
    """A ceiling far below what this learning rate does: the checkpoint is that of the iteration before, though none was due."""
    def make(limit):
        return trainer(tmp_path, iterations=4, kl_limit=limit, learning_rate=3e-2, save_iterations=4)

    with pytest.raises(ValueError, match=r"KL to the reference is \d.* nats a response after step 4, above kl_limit 0.01: raise kl_coef"):
        fit(make(0.01))
    assert checkpoint(tmp_path) == "checkpoint-4"
    with pytest.raises(ValueError, match="above kl_limit"):  # the same limit stops at the same place
        fit(make(0.01))
    higher = make(1e9)
    fit(higher)
    assert higher._initial_global_step == 4 and higher.state.global_step == 16
    whole = trainer(tmp_path / "whole", iterations=4, learning_rate=3e-2, save_iterations=4)
    fit(whole)
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_kl_that_is_no_number_stops_too(tmp_path):
    t = trainer(tmp_path, kl_limit=1e9)
    with torch.no_grad():
        t.reference.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the KL to the reference is nan"):
        fit(t)


def test_zero_reward_variance_is_said_once_and_logged(tmp_path, capsys):
    t = trainer(tmp_path, iterations=2, reward=lambda responses: [0.25] * len(responses), missing_eos_penalty=None)
    fit(t)
    said = re.findall(r"warning: all 16 responses of a rollout have the score 0\.25", capsys.readouterr().out)
    assert len(said) == 1 and t.experience.metrics["reward/zero_variance"] == 1.0
    t = trainer(tmp_path / "other", iterations=1)
    fit(t)
    assert t.experience.metrics["reward/zero_variance"] == 0.0 and "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("penalty", "left"), [(-1.0, "gets missing_eos_penalty -1 for a score"), (None, "keeps its score")])
def test_all_responses_truncated_is_said_once_and_logged(tmp_path, capsys, penalty, left):
    t = trainer(tmp_path, iterations=2, missing_eos_penalty=penalty, eos_ids=(VOCAB + 1,))  # an end that is never drawn
    fit(t)
    printed = capsys.readouterr().out
    assert printed.count("none of 16 responses ended by itself, the longest has 8 tokens") == 1 and left in printed
    assert t.experience.metrics["response/eos_rate"] == 0.0
    assert t.experience.metrics["reward/zero_variance"] == (penalty is not None)


def test_empty_prompts_are_refused(tmp_path):
    t = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"prompt 'p3' has no tokens \(1 of 11 have none\)"):
        type(t)(t.model, t.args, t.settings, prompts=[*prompts(), ({"id": "p3"}, [])], reward=t.reward, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"problem 'b' has an empty question \(1 of 2 have one\)"):
        asked([{"id": "a", "question": "1 + 1?"}, {"id": "b", "question": " \n"}], "Answer:", tokenizer())


def test_a_conversation_that_the_template_refuses_is_named():
    speaker = tokenizer()
    speaker.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    prompt = [{"role": "system", "content": "x"}, {"role": "user", "content": "?"}]
    with pytest.raises(ValueError, match=r"problem 'a': the chat template of .* of the turns system, user: no system here; write it"):
        asked([{"id": "a", "question": "?", "prompt": prompt}], "", speaker)


@pytest.mark.parametrize(("changes", "message"), [
    ({"ptx_coef": 0.5}, "ptx_coef is 0.5 but there are no rows"), ({"ptx_coef": -1.0}, r"set it to 0 \(off\) or above"),
    ({"length_penalty": -0.1}, "length_penalty is -0.1"), ({"score_clip": 0.0}, "clip above 0"),
    ({"score_clip": 2.0, "par_samples": 1}, "leave it out with PAR")])
def test_settings_of_the_reward_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)
