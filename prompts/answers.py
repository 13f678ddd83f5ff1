r"""Answers: found in a text, brought to one form, compared. The one place for every answer type.

`extract` reads what a text offers as its final answer and abstains (None) where there is none: it never guesses from the last
number in sight; `extract_lenient` does, for those who want to know what strictness costs. `normalize` brings every way of writing an
answer to one spelling, so that "18", "18." and "18.0" are one candidate in a vote. `equal` compares two answers.

Each takes a type of `ANSWER_TYPES`; what does not fit it is no answer. Without a type numbers, letters, yes/no and words are told apart
by their looks. All of them take time linear in the text, whatever a model's loop fills it with.
"""
import ast
import re
import unicodedata
from fractions import Fraction

ANSWER_TYPES = ("number", "choice", "yes_no", "string", "list", "expression")

# The last of these that is followed by something wins. `A:` at a line's start and `####` are GSM8K's (Cobbe et al. 2021).
_MARKER = re.compile(
    r"####|\\boxed\s*(?=\{)|^[^\S\n]*A:|\banswer(?: to [^.\n]{1,80}?)?\s*"
    r"(?:\s(?:is|was|would be|should be|must be|equals)\b|[:=]|\s-\s)", re.IGNORECASE | re.MULTILINE)
_END = re.compile(r"(?<=\S)[.?](?=\s|$|<\|)|\n|<\|")  # a sentence's end (not the point in 18.0), a line's, or a special token
_REACH = 1000  # characters after a marker; an answer is not an essay
_LONGEST = 60  # digits; more is a model's loop, not a number
_LONGEST_SUM = 200  # characters of arithmetic that is worked out
# groups: sign; whole part, numerator and denominator of a fraction; or a decimal. Not part of a word, a date, a time or `2x`.
_NUMBER = re.compile(r"(?<![\w.])([-+]?)(?:(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)|((?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2}(?!\d))?))"
                     r"(?!\s?[xyzn]\b)(?![/:.]?\d)")
_CHOICE = re.compile(r"\(([a-z])\)|(?:option |choice )?\(?([a-z])\)?(?:[):.](?=\s|$|\S{2,})|$)")
# For the type alone: a capital that opens the answer, as in "B because ...". Not the words I and A: "A dog" names no option.
_CAPITAL = re.compile(r"[\s*(]*(?:[Oo]ption |[Cc]hoice )?([A-Z])(?![\w'’])(?!(?<=[AI])\s+\w)")
_MATHS = re.compile(r"[\d+^*=√<>|\\()\[\]{}]")
_WORDS = re.compile(r"(?<![\\a-z])[a-z]{2,}\s+[a-z]{2,}")  # two words side by side: prose, not an expression
# What `extract_lenient` looks for. Possessive, so that no failure is tried again from the middle of a number.
_ANY_NUMBER = re.compile(r"(?<![\w.])(?:[-+\N{MINUS SIGN}][$€£¥]?|[$€£¥][-+\N{MINUS SIGN}]?)?+"
                         r"(?:\d++(?:,\d{3}(?!\d))*+(?:/\d++|\.\d++)?+|\.\d++)(?:\s?%)?")
_ANY_CHOICE = re.compile(r"(?<!\w)\([A-Za-z]\)|(?<![\w'’])(?:[B-HJ-Z](?![\w'’])|[AI](?=[).:,;*\n]|\s*$))")
_ANY_YES_NO = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_ANY_LIST = re.compile(r"\[[^\[\]]*+\]")


def extract(text: str, type: str | None = None, *, which: str = "last") -> str | None:
    """The final answer that a text gives, as written, or None when it gives none of this type.

    Looks for "the answer is ...", "Answer: ...", GSM8K's "#### ..." and a LaTeX box, the last one first (`which="first"`: the first
    one first). A text that is nothing but an answer is its own: a number, a capital letter, yes/no, and where the type says so one word,
    a list in brackets or arithmetic. Raises ValueError for an unknown type or `which`.
    """
    if which not in ("last", "first"):
        raise ValueError(f"got which={which!r}: expected last or first")
    _check(type)
    markers = list(_MARKER.finditer(text))
    for i in range(len(markers)) if which == "first" else reversed(range(len(markers))):
        end = markers[i].end()
        # No further than the next marker: an answer that runs into one is none, and a text full of markers is read once.
        limit = min(end + _REACH, markers[i + 1].start() if i + 1 < len(markers) else len(text))
        cut = limit < min(end + _REACH, len(text))
        found = _braced(text[end:limit]) if markers[i].group().startswith("\\") else _first_sentence(text[end:limit], cut)
        if found and normalize(found, type) and not _MARKER.search(found):
            return found
    whole = text.strip()
    if len(whole) <= (_REACH if type == "list" else _LONGEST) and not _MARKER.search(whole) and _is_bare(whole, type):
        return whole
    return None


def extract_lenient(text: str, type: str, *, which: str = "last") -> str | None:
    """What `extract` finds or else the last thing of the type in the text, whatever the text says of it; None when there is none.

    The last number; the last letter in brackets or capital that stands alone; the last yes, no, true or false; the last list in
    brackets, else the last line if it has a comma; for an expression the last line that is one; for a string the last line.
    Raises ValueError for an unknown type.
    """
    found = extract(text, type, which=which)
    if found is not None:
        return found
    if pattern := {"number": _ANY_NUMBER, "choice": _ANY_CHOICE, "yes_no": _ANY_YES_NO, "list": _ANY_LIST}.get(type):
        candidates = pattern.findall(text)
    else:
        candidates = []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if type == "expression":
        candidates = lines
    elif type == "string" or (type == "list" and lines and "," in lines[-1]):
        candidates = [*lines[-1:], *candidates]
    return next((c for c in reversed(candidates) if len(c) <= _REACH and normalize(c, type)), None)


def normalize(text: str, type: str | None = None) -> str:
    """One spelling for every way of writing an answer; the empty string for no answer of this type (always for "[invalid]").

    Without a type: numbers become an integer, a finite decimal or a reduced fraction, without currency, separators, units or per cent
    sign: "$1,080.00" is "1080", "6/8" is "0.75", "25%" is "25". "(B) 65" is "b"; single letters in a row are joined: "g y m" is "gym".
    number, choice: only these. yes_no: also true and false, as "yes" and "no". string: words as they are, without case and marks at
    the ends. list: items in their order, each in its form, "3, 4.0 and B" is "[3, 4, b]"; without commas white space divides.
    expression: arithmetic becomes its exact value, "(4 + 8) * 2" is "24"; of an equation the last side counts; what is not arithmetic
    is compared as written, without white space. Raises ValueError for an unknown type.
    """
    _check(type)
    folded = _fold(text)
    clean = _clean(folded)
    if clean in ("", "[invalid]"):
        return ""
    if type == "expression":
        return _expression(folded, clean)
    if type == "list":
        return _list(clean)
    if type in (None, "choice"):
        if match := _CHOICE.match(clean):
            return match[1] or match[2]
        if type and (match := _CAPITAL.match(text)):
            return match[1].casefold()
    if type in (None, "yes_no") and (match := re.match(r"(yes|no)\b(?=,|;|\.|$)", clean)):
        return match[1]
    if type == "yes_no" and (match := re.match(r"(true|false)\b(?=,|;|\.|$)", clean)):
        return "yes" if match[1] == "true" else "no"
    if type in (None, "number") and (number := _number(clean)) is not None:
        return number
    if type not in (None, "string"):
        return ""
    if re.fullmatch(r"[a-z](?:[\s,-]+[a-z])+", clean):
        return re.sub(r"[^a-z]", "", clean)
    return clean


def equal(a: str, b: str, type: str | None = None) -> bool:
    """Whether two answers are the same. No answer equals nothing, itself included.

    A percentage equals both its figure and its value ("25%" is 25 and 0.25): benchmarks write either.
    Raises ValueError for an unknown type.
    """
    first, second = normalize(a, type), normalize(b, type)
    if not first or not second:
        return False
    if first == second:
        return True
    if type in (None, "number", "expression") and _percent(a) != _percent(b):
        try:
            values = [Fraction(n) / (100 if _percent(raw) else 1) for n, raw in ((first, a), (second, b))]
        except ValueError:
            return False
        return values[0] == values[1]
    return False


def _check(type: str | None) -> None:
    if type is not None and type not in ANSWER_TYPES:
        raise ValueError(f"unknown answer type {type!r}: expected one of {', '.join(ANSWER_TYPES)}")


def _fold(text: str) -> str:
    """One code point for one meaning: compatibility forms, case, minus signs and fraction bars.

    Raised figures stay powers and 2½ two and a half, where the plain compatibility form would write 5² as 52 and 2½ as 21/2. Essays are
    no answers and keep their forms: to order a run of combining marks takes time quadratic in its length, and one letter can become 18.
    """
    if text.isascii() or len(text) > 10 * _REACH:
        return text.casefold()
    text = re.sub(r"(?<=[\d)])(?=[²³¹⁰⁴-⁹])", "^", re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text))
    return unicodedata.normalize("NFKC", text).casefold().replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/")


def _clean(text: str) -> str:
    """A folded text without markup, currency and marks at its ends."""
    text = text.replace("####", " ")
    text = re.sub(r"\\d?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;!()\[\] ]|\\(?=[$%])|[*`$€£¥\"]", "", text)
    return " ".join(text.split()).rstrip(" .,;:!?'").lstrip(" ,;:!?'")


def _percent(text: str) -> bool:
    return "%" in text or "percent" in text.casefold() or "per cent" in text.casefold()


def _first_sentence(rest: str, cut: bool) -> str:
    """`rest` up to a sentence's end; nothing if it has none because the next marker `cut` it off."""
    rest = re.sub(r"^[\s:*]*?\n?[^\S\n]*", "", rest, count=1) if rest[:1] in " :*\n\t" else rest
    end = _END.search(rest)
    return rest[:end.start() if end else len(rest)].strip(" \t:*") if end or not cut else ""


def _braced(rest: str) -> str:
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return ""


def _is_bare(text: str, type: str | None) -> bool:
    """Whether a whole text is nothing but an answer of its type; without one a number without words, a capital letter, or yes/no."""
    patterns = {"choice": r"\(?[A-Z]\)?\.?", "yes_no": r"(?i:yes|no|true|false)[.!]?", "string": r"\w\S*", "list": r"[\[(].*[\])]\.?",
                "expression": r"[-+*/^().=\d\s×·÷\N{MINUS SIGN}]+"}
    if type in patterns:
        return bool(re.fullmatch(patterns[type], text)) and bool(normalize(text, type))
    if type is None and re.fullmatch(r"\(?[A-Z]\)?\.?|(?i:yes|no)[.!]?", text):
        return True
    return bool(re.fullmatch(r"[-+\N{MINUS SIGN}$€£¥\d.,/%*\s]+", text)) and _number(normalize(text)) is not None


def _list(text: str) -> str:
    text = re.sub(r",?\s+and\s+", ", ", text).translate(str.maketrans("(){};", "[][],"))
    if text.startswith("[") and _bracketed(text) == len(text):
        text = text[1:-1]
    if "," not in text:
        text = ",".join(text.split())
    parts = [part if part in "[]," else normalize(part.strip(" '")) for part in re.split(r"([\[\],])", text)]
    return f"[{''.join(parts)}]".replace(",", ", ") if any(part not in "[]," for part in parts) else ""


def _bracketed(text: str) -> int:
    """The length of the list that opens a text, 0 when it never closes."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return i + 1
    return 0


def _expression(folded: str, clean: str) -> str:
    """`clean` has lost its asterisks, so arithmetic is read from the folded text."""
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", folded.replace("####", " "))
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[,;! ]|\\(?=[$%])|[`$€£¥\"]", "", text)
    text = re.sub(r"\\div(?![a-z])|÷", "/", re.sub(r"\\(?:cdot|times)(?![a-z])|[×·∙⋅]", "*", text))
    if "=" in text and not re.search(r"[<>!≤≥]", text):
        text = text.rpartition("=")[2]
    text = " ".join(text.split()).rstrip(" .,;:?'*").lstrip(" ,;:?'*")
    value = _value(text)
    if value is not None:
        return _spell(value)
    if "*" not in text and (number := _number(clean)) is not None:
        return number
    return "" if _WORDS.search(text) else "".join(text.split())


def _value(text: str) -> Fraction | None:
    """The exact value of arithmetic on plain numbers; None for anything else and for what would grow out of bounds."""
    if len(text) > _LONGEST_SUM:
        return None
    while (simpler := re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)) != text and len(simpler) <= _LONGEST_SUM:
        text = simpler
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.translate(str.maketrans("{}[]", "()()")).replace("^", "**"))
    text = re.sub(r"(?<=\d) x (?=\d)", "*", text)
    text = re.sub(r"(?<=[\d)])\s*(?=\()", "*", re.sub(r"(?<![\d.])0+(?=\d)", "", text))  # 2(3 + 4); Python refuses 07
    if not re.fullmatch(r"[-+*/(). \d]+", text) or not text.isascii():
        return None
    try:
        return _worked_out(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None


def _worked_out(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            value = Fraction(source[node.col_offset:node.end_col_offset])  # the digits themselves: 0.1 is a tenth
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _worked_out(operand, source) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _worked_out(left, source), _worked_out(right, source)
            match operator:
                case ast.Add():
                    value = a + b
                case ast.Sub():
                    value = a - b
                case ast.Mult():
                    value = a * b
                case ast.Div():
                    value = a / b
                case ast.Pow() if b.denominator == 1 and abs(b) <= 64:
                    value = a ** int(b)
                case _:
                    raise ValueError("not arithmetic, or a power too high")
        case _:
            raise ValueError("not arithmetic")
    if value.numerator.bit_length() + value.denominator.bit_length() > 512:
        raise OverflowError("too large to be an answer")
    return value


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
