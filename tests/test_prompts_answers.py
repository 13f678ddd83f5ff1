"""Answers: every type to one spelling, abstention where there is none, and time linear in whatever the text is."""
import time

import pytest

from prompts.answers import ANSWER_TYPES, equal, extract, extract_lenient, normalize


@pytest.mark.parametrize("written, form", [
    ("18", "18"), ("18.", "18"), ("18.0", "18"), ("00018", "18"), ("$18.00", "18"), ("18 dollars per day", "18"), ("**18**", "18"),
    ("1,080", "1080"), ("109,200,000", "109200000"), ("$1,080.50", "1080.5"), ("12,34", "12,34"),
    ("-5", "-5"), ("\N{MINUS SIGN}5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("+30", "30"), ("-0", "0"),
    ("6/8", "0.75"), (".75", "0.75"), ("1 1/2", "1.5"), ("½", "0.5"), ("2½", "2.5"), ("5²", "5^2"), ("1/3", "1/3"), ("2/6", "1/3"),
    (r"\frac{3}{4}", "0.75"),
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


@pytest.mark.parametrize("type, written, form", [
    ("number", "(B) 65", "65"), ("number", "18.0 eggs", "18"), ("number", "B", ""), ("number", "yes", ""), ("number", "10 and 12", ""),
    ("number", "seven", ""), ("number", "9" * 61, ""), ("number", "[invalid]", ""),
    ("choice", "(b) 65", "b"), ("choice", "B because 3 is odd", "b"), ("choice", "Option C", "c"), ("choice", "A, since", "a"),
    ("choice", "A dog", ""), ("choice", "18", ""), ("choice", "Both", ""), ("choice", "[invalid]", ""),
    ("yes_no", "No, because", "no"), ("yes_no", "True", "yes"), ("yes_no", "FALSE.", "no"), ("yes_no", "no one", ""),
    ("yes_no", "18", ""),
    ("string", "18.0", "18.0"), ("string", "(B) 65", "(b) 65"), ("string", "New  York.", "new york"), ("string", "g, y, m", "gym"),
    ("string", "[invalid]", ""), ("string", "invalid", "invalid"),
    ("list", "3, 4.0 and B", "[3, 4, b]"), ("list", "[3, 4, b]", "[3, 4, b]"), ("list", "(3; 4; 'b')", "[3, 4, b]"),
    ("list", "oven pan", "[oven, pan]"), ("list", "oven, pan", "[oven, pan]"), ("list", "[[1, 2], [3]]", "[[1, 2], [3]]"),
    ("list", "[1], [2]", "[[1], [2]]"), ("list", "[]", ""), ("list", "[invalid]", ""),
    ("expression", "(4 + 8) * 2", "24"), ("expression", "**(4 + 8) × 2**", "24"), ("expression", "10 - 4 = 6", "6"),
    ("expression", "2(3+4)", "14"),
    ("expression", "0.1 + 0.2", "0.3"), ("expression", "1/3 + 1/3", "2/3"), ("expression", r"\frac{1}{\frac{1}{2}}", "2"),
    ("expression", "2^{-3}", "0.125"),
    ("expression", "5²", "25"), ("expression", "1,000 + 007", "1007"), ("expression", "y = 2x + 1", "2x+1"),
    ("expression", "18 dollars", "18"),
    ("expression", "I do not know", ""), ("expression", "[invalid]", ""),
    # refused as arithmetic, compared as written: no value, and none that would grow out of bounds
    ("expression", "1/0", "1/0"), ("expression", "9^9^9^9", "9^9^9^9"), ("expression", "9^64^9", "9^64^9"),
    ("expression", "(9^64)^64", "(9^64)^64"),
    ("expression", "2 ** .5", "2**.5"),
    ("expression", "__import__('os')", "__import__('os')")])
def test_normal_forms_of_a_type(type, written, form):
    assert normalize(written, type) == form
    assert normalize(form, type) == form  # a normal form is its own


@pytest.mark.parametrize("type, text, last, first, lenient", [
    ("number", "The answer is 3. The answer is B.", "3", "3", "3"), ("number", "The answer is 3. So the answer is 4.", "4", "3", "4"),
    ("number", "It costs $1,080.50 by 5-3", None, None, "3"), ("number", "all in all -$5", None, None, "-$5"),
    ("number", "none", None, None, None),
    ("number", "1.2.3", None, None, "1.2"), ("number", "12,3456 or ½", None, None, "3456"),
    ("choice", "(B) or C, I say", None, None, "C"), ("choice", "I take A", None, None, "A"), ("choice", "A dog says I", None, None, "I"),
    ("choice", "The answer is 4. The answer is (B) 5.", "(B) 5", "(B) 5", "(B) 5"), ("choice", "apple(s)", None, None, None),
    ("yes_no", "Yes, so true. Nobody", None, None, "true"), ("yes_no", "True.", "True.", "True.", "True."),
    ("string", "So it goes.\nMonday", None, None, "Monday"), ("string", "Monday", "Monday", "Monday", "Monday"),
    ("list", "sorted: [3, 4]\nthanks, all", None, None, "[3, 4]"), ("list", "so\n3, 4", None, None, "3, 4"),
    ("list", "nothing", None, None, None),
    ("list", "[3, 4]", "[3, 4]", "[3, 4]", "[3, 4]"), ("expression", "(4+8)*2", "(4+8)*2", "(4+8)*2", "(4+8)*2"),
    ("expression", "We try.\n(4+8)*2\nand it is right", None, None, "(4+8)*2")])
def test_extraction_of_a_type(type, text, last, first, lenient):
    assert (extract(text, type), extract(text, type, which="first"), extract_lenient(text, type)) == (last, first, lenient)


def test_first_and_last_of_several_answers():
    text = "The answer is 3. Wait, the answer is 4. Answer:"
    assert extract(text, which="first") == "3" and extract(text) == "4"
    assert extract("The answer is the answer is 5", which="first") == "5"  # what runs into the next marker is no answer


def test_a_type_decides_what_is_equal():
    assert equal("(4+8)*2", "24", "expression") and not equal("(4+8)*2", "24")
    assert equal("oven pan", "oven, pan", "list") and not equal("oven, pan", "pan, oven", "list")
    assert not equal("18.0", "18", "string") and equal("18.0", "18", "number") and equal("25%", "0.25", "number")
    assert not equal("B", "B", "number")  # neither is an answer
    for call in (lambda: normalize("1", "integer"), lambda: extract("1", "integer"), lambda: equal("1", "1", "integer"),
                 lambda: extract_lenient("1", "integer")):
        with pytest.raises(ValueError, match="unknown answer type 'integer': expected one of number, choice"):
            call()
    with pytest.raises(ValueError, match="which='middle'"):
        extract("1", which="middle")


HOSTILE = ["9", "The answer is ", "answer is . ", "answer to ", "answer ", "####", "\\boxed{", "{", "[", "(", "[[1],", " ", "\n",
           "  \n", "A: \n", "1,111,", "1,", "1 / ",
           "1 ", "- ", "*", "=", "\\frac{", "\\frac{1}{", "a b ", "a, ", "and ", "aa ", "(A", "A ", "B", "yes", "\u0316\u0301",
           "\ufdfa", "½", "²", ".", "%"]


@pytest.mark.parametrize("unit", HOSTILE, ids=repr)
def test_hostile_text_takes_linear_time(unit):
    """50 kB of anything, alone, after a marker and around digits: what is quadratic in it takes many seconds (processor time: the machine
    may be busy, and slow)."""
    run = (unit * 50_000)[:50_000]
    for text in (run, f"The answer is {run}", f"9{run}x"):
        calls = [lambda t=text: extract(t), lambda t=text: extract(t, which="first"), lambda t=text: normalize(t),
                 lambda t=text: normalize(t, "list"), lambda t=text: normalize(t, "expression")]
        for call in calls + [lambda t=text, type=type: extract_lenient(t, type) for type in ANSWER_TYPES]:
            started = time.process_time()
            call()
            assert time.process_time() - started < 1.5
