"""Answers: every type to one spelling, abstention where there is none, voting without the known mistakes."""
import pytest

from prompts.answers import equal, extract, normalize


@pytest.mark.parametrize("written, form", [
    ("18", "18"), ("18.", "18"), ("18.0", "18"), ("00018", "18"), ("$18.00", "18"), ("18 dollars per day", "18"), ("**18**", "18"),
    ("1,080", "1080"), ("109,200,000", "109200000"), ("$1,080.50", "1080.5"), ("12,34", "12,34"),
    ("-5", "-5"), ("\N{MINUS SIGN}5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("+30", "30"), ("-0", "0"),
    ("6/8", "0.75"), (".75", "0.75"), ("1 1/2", "1.5"), ("½", "0.5"), ("1/3", "1/3"), ("2/6", "1/3"), (r"\frac{3}{4}", "0.75"),
    ("25%", "25"), ("12.5 percent", "12.5"), ("1e3", "1000"), ("126km", "126"), ("x = 5", "5"), ("9 + 9 = 18", "18"),
    ("(B)", "b"), ("B) 65", "b"), ("b.", "b"), ("A)A)59", "a"), ("Option C", "c"),
    ("Yes.", "yes"), ("No, because 3 is odd", "no"), ("g y m", "gym"), ("g, y, m", "gym"), ("Monday.", "monday"),
    ("#### 72", "72"), (r"$\boxed{18}$", "18"),
    # not one plain number, so no number at all
    ("3/0", "3/0"), ("5-7", "5-7"), ("5:30", "5:30"), ("05/01/2021", "05/01/2021"), ("2x", "2x"), ("1.2.3", "1.2.3"),
    ("10 and 12", "10 and 12"), ("[invalid]", ""), (" . ", ""), ("", "")])
def test_normal_forms(written, form):
    assert normalize(written) == form


@pytest.mark.parametrize("text, answer", [
    ("Start 3. Monday 3 + 4 = 7. The answer is 7.", "7"), ("The answer is 18.0.", "18.0"), ("the final answer is: **18**. Done.", "18"),
    ("48/2 = <<48/2=24>>24\n#### 72", "72"), ("So she has 26.\nA: 26", "26"), ("Correct answer - A", "A"),
    (r"so $\boxed{\frac{3}{4}}$.", r"\frac{3}{4}"),
    ("The answer is 3. Wait. The answer is 4.", "4"), ("The answer is 5.\n\nQuestion: 1 + 1?\nAnswer:", "5"),
    ("The answer is 7<|end|><|user|> The", "7"), ("Final answer:\n18", "18"), ("The answer to the question is g y m.", "g y m"),
    ("18", "18"), (" $1,080.00 ", "$1,080.00"), ("(B).", "(B)."), ("yes", "yes"),
    # abstentions: no marker and more than an answer, or a marker without one
    ("She has 9 * 2 = 18 dollars left", None), ("42, maybe", None), ("The answer is", None), ("The answer is .", None), ("", None),
    ("The answer is [invalid].", None), ("To answer this, add 3 and 4.", None), ("a dog", None)])
def test_extraction(text, answer):
    assert extract(text) == answer


def test_what_is_extracted_compares():
    assert equal(extract("The answer is $1,080.00 in all.") or "", "1080")
    assert not equal("", "") and not equal("[invalid]", "[invalid]")  # no answer equals nothing
    assert equal("25%", "25") and equal("25%", "0.25") and not equal("25", "0.25") and not equal("yes%", "0.25")
    assert equal("1/3", "2/6") and not equal("1/3", "0.333")
    assert equal("A", "(a) 65") and not equal("A", "B")


def test_loops_and_huge_exponents_are_quick_and_no_numbers():
    digits = "9" * 100_000
    assert normalize(digits) == digits
    assert not equal(extract(f"The answer is {digits}") or "", "9")
    assert normalize("1e999999999") == "1e999999999"
    assert extract("The answer is " * 20_000) is None
