r"""Answers: found in a text, brought to one form, compared. The one place for every answer type.

`extract` reads what a text offers as its final answer and abstains (None) where there is none: it never guesses from the last
number in sight. `normalize` brings integers, decimals, fractions, thousands separators, percentages, choice letters, yes/no and
words to one spelling each, so that "18", "18." and "18.0" are one candidate in a vote. `equal` compares two answers.
"""
import re
import unicodedata
from fractions import Fraction

# The last of these that is followed by something wins. `A:` at a line's start and `####` are GSM8K's (Cobbe et al. 2021).
_MARKER = re.compile(
    r"####|\\boxed\s*(?=\{)|^\s*A:|\banswer(?: to [^.\n]{1,80}?)?\s*"
    r"(?:\s(?:is|was|would be|should be|must be|equals)\b|[:=]|\s-\s)", re.IGNORECASE | re.MULTILINE)
_END = re.compile(r"(?<=\S)[.?](?=\s|$|<\|)|\n|<\|")  # a sentence's end (not the point in 18.0), a line's, or a special token
_REACH = 1000  # characters after a marker; an answer is not an essay
_LONGEST = 60  # digits; more is a model's loop, not a number
# groups: sign; whole part, numerator and denominator of a fraction; or a decimal. Not part of a word, a date, a time or `2x`.
_NUMBER = re.compile(r"(?<![\w.])([-+]?)(?:(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)|((?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2}(?!\d))?))"
                     r"(?!\s?[xyzn]\b)(?![/:.]?\d)")
_CHOICE = re.compile(r"\(([a-z])\)|(?:option |choice )?\(?([a-z])\)?(?:[):.](?=\s|$|\S{2,})|$)")
_MATHS = re.compile(r"[\d+*^=√<>|\\()\[\]{}]")


def extract(text: str) -> str | None:
    """The final answer that a text gives, as written, or None when it gives none.

    Looks for "the answer is ...", "Answer: ...", GSM8K's "#### ..." and a LaTeX box, the last one first; a text that is nothing
    but a number, a choice letter or yes/no is its own answer.
    """
    for match in reversed(list(_MARKER.finditer(text))):
        rest = text[match.end():match.end() + _REACH]
        found = _braced(rest) if match.group().startswith("\\") else _first_sentence(rest)
        if normalize(found) and not _MARKER.search(found):
            return found
    whole = text.strip()
    if len(whole) <= _LONGEST and not _MARKER.search(whole) and _is_bare(whole):
        return whole
    return None


def normalize(text: str) -> str:
    """One spelling for every way of writing an answer; the empty string for no answer at all (also for "[invalid]").

    Numbers become an integer, a finite decimal or a reduced fraction, without currency, separators, units or per cent sign:
    "$1,080.00" is "1080", "6/8" is "0.75", "25%" is "25". "(B) 65" is "b"; single letters in a row are joined: "g y m" is "gym".
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("####", " ")
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/")
    text = re.sub(r"\\d?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!()\[\] ]|\\(?=[$%])|[*`$€£¥\"]", "", text)
    text = " ".join(text.split()).rstrip(" .,;:!?'").lstrip(" ,;:!?'")
    if text in ("", "[invalid]"):
        return ""
    if match := _CHOICE.match(text):
        return match[1] or match[2]
    if match := re.match(r"(yes|no)\b(?=,|;|\.|$)", text):
        return match[1]
    number = _number(text)
    if number is not None:
        return number
    if re.fullmatch(r"[a-z](?:[\s,-]+[a-z])+", text):
        return re.sub(r"[^a-z]", "", text)
    return text


def equal(a: str, b: str) -> bool:
    """Whether two answers are the same. No answer equals nothing, itself included.

    A percentage equals both its figure and its value ("25%" is 25 and 0.25): benchmarks write either.
    """
    first, second = normalize(a), normalize(b)
    if not first or not second:
        return False
    if first == second:
        return True
    if _percent(a) != _percent(b):
        try:
            values = [Fraction(n) / (100 if _percent(raw) else 1) for n, raw in ((first, a), (second, b))]
        except ValueError:
            return False
        return values[0] == values[1]
    return False


def _percent(text: str) -> bool:
    return "%" in text or "percent" in text.casefold() or "per cent" in text.casefold()


def _first_sentence(rest: str) -> str:
    rest = re.sub(r"^[\s:*]*?\n?[^\S\n]*", "", rest, count=1) if rest[:1] in " :*\n\t" else rest
    end = _END.search(rest)
    return rest[:end.start() if end else len(rest)].strip(" \t:*")


def _braced(rest: str) -> str:
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return ""


def _is_bare(text: str) -> bool:
    """Whether a whole text is a number without words, a capital letter in or out of brackets, or yes/no."""
    if re.fullmatch(r"\(?[A-Z]\)?\.?|(?i:yes|no)[.!]?", text):
        return True
    return bool(re.fullmatch(r"[-+\N{MINUS SIGN}$€£¥\d.,/%*\s]+", text)) and _number(normalize(text)) is not None


def _number(text: str) -> str | None:
    """The canonical spelling of the one number that a text holds beside units and words; None when it is not that simple."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.rpartition("=")[2].strip())
    if sum(character.isdigit() for character in text) > _LONGEST:
        return None
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or _MATHS.search((text[:found[0].start()] + text[found[0].end():]).strip(" ()[]")):
        return None
    sign, whole, numerator, denominator, decimal = found[0].groups()
    if decimal is None and int(denominator) == 0:
        return None
    value = Fraction(decimal) if decimal else int(whole or 0) + Fraction(int(numerator), int(denominator))
    return _spell(-value if sign == "-" else value)


def _spell(value: Fraction) -> str:
    places, rest = 0, value.denominator
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        places = max(places, power)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10 ** places // value.denominator).rjust(places + 1, "0")
    whole, decimals = digits[:len(digits) - places], digits[len(digits) - places:]
    return ("-" if value < 0 else "") + whole + (f".{decimals}" if decimals else "")
