"""Critique that keeps the steps before the first wrong one, on fake models whose answers make the right behaviour visible."""
import pytest

from prompts import strategies
from prompts.critique import critique_redo, first_wrong_question, named_step, steps_of
from prompts.templates import DIRECT, WORKED, render
from tests.test_prompts_search import CHAT, PLAIN, ROW, ask

DRAFT, MENDED = "Take 2. Add 3 to get 6. The answer is 6.", "Add 3 to get 5. The answer is 5."
REDO = {"rounds": 2, "temperature": 0.7}


def model(*reviews, again=MENDED, draft=DRAFT):
    said = iter(reviews)
    return lambda r: next(said) if r.stage.startswith("review") else again if r.stage.startswith("redo") else draft


def test_the_steps_before_the_wrong_one_stand_and_the_rest_is_sampled():
    solution, asked = ask(critique_redo(ROW, CHAT, **REDO), model("0 yes. 1 no. The answer is 1.", "The answer is no mistake."))
    draft, review, redo, again = asked
    assert [r.stage for r in asked] == ["worked", "review/0", "redo/0", "review/1"]
    assert review.prompt == render(first_wrong_question("How many?", ["Take 2.", "Add 3 to get 6.", "The answer is 6."]), CHAT, WORKED)
    assert redo.prompt == (*draft.prompt, {"role": "assistant", "content": "Take 2."})
    assert (redo.temperature, review.temperature) == (0.7, 0)
    assert "Step 1: Add 3 to get 5.\nStep 2: The answer is 5." in again.prompt[0]["content"]
    assert solution.answer == "5" and solution.answers == ("6", "5") and solution.samples[1].text == f"Take 2. {MENDED}"
    assert solution.cost.requests == 4 and solution.cost.generated_tokens == sum(map(len, map(str.split, (
        DRAFT, "0 yes. 1 no. The answer is 1.", MENDED, "The answer is no mistake."))))


def test_it_ends_at_no_mistake_at_its_rounds_and_where_there_is_no_room():
    kept, asked = ask(critique_redo(ROW, PLAIN, **REDO), model("The answer is no mistake."))
    assert kept.answer == "6" and len(asked) == 2
    _, asked = ask(critique_redo(ROW, PLAIN, **REDO), model("The answer is 0.", "The answer is 0."))
    assert len(asked) == 5 and asked[2].prompt == asked[4].prompt == asked[0].prompt  # nothing is left of it: drawn anew
    assert asked[2].key != asked[4].key  # by other noise
    full, asked = ask(critique_redo(ROW, PLAIN, **REDO), model("The answer is 1.", again=("", "too_long")))
    assert full.answer == "6" and len(asked) == 3
    unread, asked = ask(critique_redo(ROW, PLAIN, **REDO), model(("", "too_long")))
    assert unread.answer == "6" and len(asked) == 2
    mute, _ = ask(critique_redo(ROW, PLAIN, **{**REDO, "rounds": 1}), model("The answer is 1.", again="I do not know"))
    assert mute.answer == "6"  # what states nothing does not take the answer away


def test_bare_reviews_sampled_drafts_and_a_verifier_in_the_reviews_place():
    _, asked = ask(critique_redo(ROW, CHAT, kind=DIRECT, **REDO), model("The answer is no mistake."))
    assert asked[1].max_tokens == CHAT.max_tokens[DIRECT] and asked[1].prompt[0]["content"].endswith(CHAT.cues[DIRECT])
    _, asked = ask(critique_redo(ROW, CHAT, sampled=True, **REDO), model("The answer is no mistake."))
    _, voted = ask(strategies.self_consistency(ROW, CHAT, n=2, temperature=0.7), lambda r: DRAFT)
    assert asked[0] == voted[0]  # the very chain that votes
    seen = []
    told, asked = ask(critique_redo(ROW, CHAT, find=lambda steps: seen.append(steps) or (1 if len(seen) == 1 else None), **REDO), model())
    assert told.answer == "5" and [r.stage for r in asked] == ["worked", "redo/0"] and told.cost.requests == 2
    assert seen == [steps_of(DRAFT), steps_of(f"Take 2. {MENDED}")]


@pytest.mark.parametrize(("review", "step"), [("The answer is 2.", 2), ("The answer is no mistake.", None), ("The answer is 3.", None),
                                              ("The answer is -1.", None), ("1 no. The answer is 0", 0), ("Nothing.", None), ("", None)])
def test_a_review_names_a_step_that_there_is(review, step):
    assert named_step(review, 3) == step


def test_steps_end_with_the_answer():
    assert steps_of("Pay 3.5 + 1.  So\n be it. The answer is 4.5. And more.") == ["Pay 3.5 + 1.", "So be it.", "The answer is 4.5."]
    assert steps_of("No answer. At all.") == ["No answer.", "At all."] and steps_of("") == []


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"temperature": 0.0}])
def test_settings_under_which_nothing_could_change_are_refused(wrong):
    with pytest.raises(ValueError, match="critique needs rounds >= 1 and temperature > 0"):
        ask(critique_redo(ROW, PLAIN, **{**REDO, **wrong}), model())
