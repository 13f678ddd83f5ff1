"""Templates, strategies and votes, driven by hand instead of a model."""
import random
import re

import pytest

from prompts import strategies
from prompts.records import Result
from prompts.templates import DIRECT, WORKED, Style, exemplars, render
from prompts.voting import majority, settled
from stages.data.curriculum import CUES, Problem, example

ROW = {"id": "q", "task": "t", "difficulty": 1, "question": "Tom has 2. Tom buys 3. How many?", "answer": "5",
       "solutions": [["Start 2.", "Monday 2 + 3 = 5."]]}
OTHER = {**ROW, "id": "r", "question": "Ann has 1. How many?", "answer": "1", "solutions": [["Start 1."]]}
PLAIN = Style(chat=False, cues=CUES, max_tokens={WORKED: 96, DIRECT: 16})
CHAT = Style(chat=True, cues=CUES, max_tokens={WORKED: 96, DIRECT: 16})


def drive(strategy, texts):
    """Answer a strategy's requests with texts in order; all requests made, and the solution."""
    made, texts = [], iter(texts)
    requests = next(strategy)
    while True:
        made += requests
        try:
            requests = strategy.send([Result(text=next(texts), prompt_tokens=7, generated_tokens=10, finish="stop") for _ in requests])
        except StopIteration as finished:
            return made, finished.value


def test_plain_prompt_is_what_pretraining_documents_hold():
    problem = Problem(task="t", difficulty=1, question=ROW["question"], answer="5", key="", solutions=(tuple(ROW["solutions"][0]),))
    document = example(problem, WORKED, random.Random(0)) + "\n\n" + example(problem, WORKED, random.Random(0))
    prompt = render(ROW["question"], PLAIN, WORKED, [ROW])
    assert document == prompt + " Start 2. Monday 2 + 3 = 5. The answer is 5."


def test_chat_prompt_has_examples_as_earlier_turns():
    prompt = render(ROW["question"], CHAT, DIRECT, [OTHER])
    assert [turn["role"] for turn in prompt] == ["user", "assistant", "user"]
    assert prompt[0]["content"] == "Ann has 1. How many? Answer directly." and prompt[1]["content"] == "The answer is 1."
    system = render(ROW["question"], Style(chat=True, cues=CUES, max_tokens={}, system="Be brief."), DIRECT)
    assert system[0] == {"role": "system", "content": "Be brief."} and len(system) == 2


def test_worked_example_without_solution_is_refused():
    with pytest.raises(ValueError, match="problem r has no worked solution"):
        render("?", PLAIN, WORKED, [{**OTHER, "solutions": []}])


@pytest.mark.parametrize("make, cue, shots", [
    (lambda: strategies.direct(ROW, PLAIN), DIRECT, 0), (lambda: strategies.few_shot(ROW, PLAIN, [OTHER]), DIRECT, 1),
    (lambda: strategies.zero_shot_cot(ROW, PLAIN), WORKED, 0), (lambda: strategies.few_shot_cot(ROW, PLAIN, [OTHER]), WORKED, 1)])
def test_greedy_strategies(make, cue, shots):
    [request], solution = drive(make(), ["2 + 3 = 5. The answer is 5."])
    assert request.prompt.count(CUES[cue]) == shots + 1 and request.prompt.count("Question:") == shots + 1
    assert (request.temperature, request.max_tokens, request.key) == (0.0, PLAIN.max_tokens[cue], f"t/q/{cue}")
    assert (solution.answer, solution.tokens, solution.unparsed) == ("5", 10, 0)


def test_self_consistency_votes_over_parsed_chains():
    texts = ["The answer is 4.", "The answer is 5.", "I do not know.", "The answer is 5.0.", "The answer is 6."]
    requests, solution = drive(strategies.self_consistency(ROW, CHAT, n=5, temperature=0.7), texts)
    assert [r.sample for r in requests] == [0, 1, 2, 3, 4] and {r.temperature for r in requests} == {0.7}
    assert solution.answer == "5" and solution.unparsed == 1 and not solution.tie and solution.tokens == 50


def test_self_consistency_stops_when_settled():
    # 2 of 6 agree: not settled. 4 of 6 agree with 2 to come: settled, so the last round is not drawn.
    requests, solution = drive(strategies.self_consistency(ROW, CHAT, n=6, temperature=1.0, round_size=2), ["The answer is 5."] * 4)
    assert len(requests) == 4 and solution.answer == "5"
    with pytest.raises(ValueError, match="temperature > 0"):
        next(strategies.self_consistency(ROW, CHAT, n=6, temperature=0.0))


def test_votes():
    vote = majority(["18", "[invalid]", None, "18.", "$18.0", "7", "7"])
    assert (vote.answer, vote.counts, vote.abstained, vote.tie) == ("18", {"18": 3, "7": 2}, 2, False)
    tie = majority(["7", "18", "18", "7"])
    assert tie.answer == "7" and tie.tie
    nothing = majority(["[invalid]", None, ""])
    assert nothing.answer is None and nothing.abstained == 3 and not nothing.tie


def test_settled_only_when_no_vote_can_change():
    assert settled({"a": 4, "b": 1}, 2)
    assert not settled({"a": 3, "b": 1}, 2)  # b could draw level, and b may have been seen first
    assert settled({"a": 1}, 0) and not settled({}, 1) and not settled({"a": 2}, 2)


def test_exemplar_files_are_consistent():
    for name in ("arithmetic", "multiple_choice"):
        rows = exemplars(name)
        assert len({row["id"] for row in rows}) == len(rows) >= 4
        for row in rows:
            assert row["answer"] in row["solutions"][0][-1] and row["question"].strip() == row["question"]
            for step in row["solutions"][0]:  # every equation written out holds
                for left, right in [part.split("=") for part in [step] if part.count("=") == 1]:
                    sides = ["".join(c for c in side if c in "0123456789+-*/. ").strip(" .") for side in (left, right)]
                    assert abs(eval(_expression(sides[0])) - eval(_expression(sides[1]))) < 1e-9, step


def _expression(text):
    """The arithmetic at the end (left side) or the beginning (right side) of what is left of a sentence."""
    return max(re.findall(r"\d[\d.]*(?: ?[-+*/] ?\d[\d.]*)*", text), key=len).rstrip(".")
