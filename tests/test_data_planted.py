"""Planted errors: one of them, of its kind, in its place, with consistent steps after it; reviews by hand."""
import itertools
import random
import re

import pytest

from prompts.answers import extract
from reward.verifiers import gold_score, right
from stages.data.benchmarks import BENCHMARKS
from stages.data.curriculum import DIRECT, MAX_NUMBER, WORKED, problems
from stages.data.planted import KINDS, TASKS, chain, complete, dialogue, first_wrong, planted, record, review

WORD = {"id": "w", "task": "word_problems", "question": "Bob has 4 pens. On Monday Bob buys 3. On Tuesday Bob sells 5. "
        "On Friday Bob finds 6. How many pens does Bob have?", "answer": "8", "answer_type": "number",
        "solutions": [["Start 4.", "Monday 4 + 3 = 7.", "Tuesday 7 - 5 = 2.", "Friday 2 + 6 = 8."],
                      ["Start 4.", "Monday 4 + 3 = 7.", "Friday 7 + 6 = 13.", "Tuesday 13 - 5 = 8."]]}
RIGHT = complete(WORD["solutions"][0], "8")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_error_of_its_kind_and_consistent_steps_after_it(task, kind):
    places, rng = set(), random.Random(0)
    for problem in itertools.islice(problems(0, split="train", tasks={task: 1.0}, difficulties=(3, 4, 5)), 150):
        row = problem.as_row()
        try:
            steps = planted(row, rng, (kind,))
        except ValueError as error:  # leaving out a step can make another accepted order, or leave the range
            assert kind == "skip" and "no error of skip fits" in str(error)
            continue
        place = first_wrong(row, steps)
        places.add(place)
        lines = [[int(n) for n in re.findall(r"\d+", step)] for step in steps]
        assert all(0 <= n <= MAX_NUMBER for line in lines for n in line) and " -" not in re.sub(r" - \d", "", " ".join(steps))
        sums = [line[-3] + (line[-2] if "+ " in step else -line[-2]) == line[-1] for line, step in zip(lines, steps, strict=True)
                if re.search(r" = \d+ [+-] | [+-] \d+ = ", step)]
        if kind == "result":
            assert sums.index(False) == place - 1 and sums.count(False) == 1
        else:
            assert all(sums)
        assert [line[-3] for line in lines[1:-1]] == [line[-1] for line in lines[:-2]]  # each goes on from what the one before says
        assert lines[-1] == [lines[-2][-1]] and not right(row, extract(steps[-1]))
        assert len(steps) == problem.difficulty + 2 - (kind == "skip")
        judged = gold_score(row, " ".join(steps), finished=True)  # the verifier's own count of right steps agrees
        assert judged.steps_right == pytest.approx(place / (problem.difficulty + 1)) and not judged.correct
    assert len(places) >= 3 and (0 in places) == (kind == "copy")


def test_half_of_the_chains_have_no_error_and_kinds_are_mixed():
    rows = [p.as_row() for p in itertools.islice(problems(1, split="train", tasks={TASKS[0]: 1.0}, difficulties=(4,)), 300)]
    rng = random.Random(1)
    chains = [(row, chain(row, rng)) for row in rows]
    wrong = [(row, steps) for row, steps in chains if first_wrong(row, steps) is not None]
    assert 120 < len(wrong) < 180 and {len(steps) for _, steps in wrong} == {5, 6}  # a skipped step among them
    assert all(right(row, extract(steps[-1])) for row, steps in chains if first_wrong(row, steps) is None)
    assert [chain(row, random.Random(2)) for row in rows[:9]] == [chain(row, random.Random(2)) for row in rows[:9]]


def test_first_wrong_step_by_hand():
    other = complete(WORD["solutions"][1], "8")
    assert first_wrong(WORD, RIGHT) is None and first_wrong(WORD, other) is None and first_wrong(WORD, RIGHT[:2]) is None
    assert first_wrong(WORD, [*RIGHT[:-1], "The answer is 9."]) == 4
    assert first_wrong(WORD, [*other[:3], *RIGHT[3:]]) == 3  # the order that agrees longest is what it is held against
    assert first_wrong(WORD, [*RIGHT[:3], RIGHT[-1]]) == 3  # the answer stated a step too soon
    assert first_wrong(WORD, [*RIGHT, "The answer is 8."]) == 5


def test_reviews_by_hand_and_what_a_critic_is_trained_on():
    wrong = [*RIGHT[:2], "Tuesday 7 - 5 = 3.", "Friday 3 + 6 = 9.", "The answer is 9."]
    assert review(WORD, wrong, WORKED) == ("0 Start 4. 4 yes. 1 Monday 4 + 3 = 7. 7 yes. 2 Tuesday 7 - 5 = 2. 3 no. "
                                           "3 Friday 2 + 6 = 8. 9 no. 4 8. 9 no. The answer is 2.")
    assert review(WORD, wrong, DIRECT) == "The answer is 2." and review(WORD, RIGHT, DIRECT) == "The answer is no mistake."
    assert review(WORD, RIGHT, WORKED).endswith("3 Friday 2 + 6 = 8. 8 yes. 4 8. 8 yes. The answer is no mistake.")
    read = BENCHMARKS["mistake"].read(record(WORD, wrong))
    assert read["mistake_index"] == 2 and read["steps"] == wrong and read["target"] == "8"
    for steps in (wrong, RIGHT):
        row = BENCHMARKS["mistake"].read(record(WORD, steps))
        for style in (WORKED, DIRECT):
            made = dialogue(WORD, steps, style)
            assert made["prompt"].startswith(row["question"]) and right(row, extract(made["completion"], row["answer_type"]))


def test_what_cannot_be_planted_or_recorded():
    with pytest.raises(ValueError, match=r"ends with 'Friday 2 \+ 6 = 8.', not with an answer sentence"):
        record(WORD, RIGHT[:-1])
    letters = next(problems(0, split="train", tasks={"last_letters": 1.0}, difficulties=(3,))).as_row()
    with pytest.raises(ValueError, match="errors are planted in word_problems and chained_variables, got last_letters"):
        planted(letters, random.Random(0))
    short = {**WORD, "answer": "7", "solutions": [["Start 4.", "Monday 4 + 3 = 7."]]}
    with pytest.raises(ValueError, match="no error of skip fits into 2 steps"):
        planted(short, random.Random(0), ("skip",))
