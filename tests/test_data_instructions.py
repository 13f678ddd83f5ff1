"""Instructions: what the prompt asks is what the answer is, splits never meet, and only the exact answer follows."""
import itertools
import re

import pytest

from stages.data import curriculum
from stages.data.instructions import KINDS, OPERATIONS, SPLITS, follows, instructions, split_of
from stages.data.tokenizer import train_tokenizer

BY_HAND = {  # first wording: items, n, the prompt, the answer
    "Write {n} times: {items}": ("bread fish", 3, "Write 3 times: bread fish", "bread fish bread fish bread fish"),
    "Write the first {n} words of: {items}": ("red cat bread fish", 3, "Write the first 3 words of: red cat bread fish", "red cat bread"),
    "Write the last {n} words of: {items}": ("red cat bread fish", 2, "Write the last 2 words of: red cat bread fish", "bread fish"),
    "Write in capital letters: {items}": ("fox pens", 2, "Write in capital letters: fox pens", "FOX PENS"),
    "Write in small letters: {items}": ("Tom Monday", 5, "Write in small letters: Tom Monday", "tom monday"),
    "Write each word with a capital first letter: {items}": (
        "sad frog", 4, "Write each word with a capital first letter: sad frog", "Sad Frog"),
    "Sort these words by the alphabet: {items}": (
        "soup cat river", 2, "Sort these words by the alphabet: soup cat river", "cat river soup"),
    "Write these numbers from small to large: {items}": ("7 3 12", 2, "Write these numbers from small to large: 7 3 12", "3 7 12"),
    "Write these words backward: {items}": ("red cat bread", 2, "Write these words backward: red cat bread", "bread cat red")}


def rows(split, count=400, seed=0, **more):
    return list(itertools.islice(instructions(seed, split=split, **more), count))


def asked(prompt):
    """What a reader of the prompt alone would answer."""
    given = prompt.partition(": ")[2] or re.sub(r"^Write | (in (capital|small) letters|\d times)\.$", "", prompt)
    items, number = given.split(), int((re.search(r"\b(\d) ?(?:times|words|of)", prompt) or [0, 0])[1])
    answers = {"a capital": [i.title() for i in items], "capital letters": [i.upper() for i in items], "small letters":
               [i.lower() for i in items], "alphabet": sorted(items), "numbers": sorted(items, key=lambda i: (len(i), i)),
               "backward": items[::-1], "from last": items[::-1], "times": items * number, "first": items[:number], "last": items[-number:]}
    return " ".join(next(answer for sign, answer in answers.items() if sign in prompt))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.wordings[0])
def test_answers_worked_by_hand(operation):
    items, n, prompt, answer = BY_HAND[operation.wordings[0]]
    assert operation.wordings[0].format(n=n, items=items) == prompt
    assert " ".join(operation.answer(items.split(), n)) == answer
    assert asked(prompt) == answer


def test_every_prompt_asks_for_its_answer_and_copying_is_no_answer():
    drawn = rows("sft", 2000)
    for row in drawn:
        assert row["answer"] == asked(row["prompt"]), row
        assert row["answer"] != row["prompt"].partition(": ")[2]
    assert {row["kind"] for row in drawn} == set(KINDS) and all(len(o.wordings) >= 2 for o in OPERATIONS)
    seen = {wording for o in OPERATIONS for wording in o.wordings for row in drawn
            if re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(wording)), row["prompt"])}
    assert seen == {wording for o in OPERATIONS for wording in o.wordings}
    assert {row["kind"] for row in rows("sft", 50, kinds=("case",))} == {"case"}


def test_splits_share_no_instruction_in_any_wording():
    drawn = {split: rows(split, 1500) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {row["prompt"] for row in drawn[one]} & {row["prompt"] for row in drawn[other]}
        assert not {row["id"] for row in drawn[one]} & {row["id"] for row in drawn[other]}
    reworded = {r["prompt"].replace("Write these words from last to first:", "Write these words backward:") for r in drawn["test"]}
    reworded = {prompt for prompt in reworded if prompt.startswith("Write these words backward:")}
    assert len(reworded) > 20 and {split_of(prompt) for prompt in reworded} == {"test"}
    share = sum(split_of(f"Write 2 times: {i}") == "validation" for i in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.015)


def test_the_seed_fixes_the_rows():
    assert rows("test", 50) == rows("test", 50) != rows("test", 50, seed=1)


def test_only_the_exact_answer_follows():
    row = {"answer": "bread bread bread"}
    assert follows(row, "bread bread bread") and follows(row, " bread bread bread\n")
    for text in ("bread bread", "bread bread bread bread", "Bread bread bread", "bread bread bread.", "bread  bread bread", "",
                 "The answer is bread bread bread"):
        assert not follows(row, text), text


def test_answers_are_short_in_the_curriculums_tokenizer():
    documents = (d["text"] for d in itertools.islice(curriculum.documents(0), 1500))
    tokenizer = train_tokenizer(documents, vocab_size=1024)
    longest = max(len(tokenizer(" " + row["answer"])["input_ids"]) for row in rows("sft", 1000))
    assert longest < 32  # what an exam gives an instruction, with room for the end of turn


@pytest.mark.parametrize("arguments, message", [
    ({"split": "train"}, "unknown split 'train': choose from sft, validation, test"),
    ({"split": "sft", "kinds": ("count", "length")}, "choose at least one, from count, case, order"),
    ({"split": "sft", "kinds": ()}, "choose at least one")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        next(instructions(0, **arguments))
