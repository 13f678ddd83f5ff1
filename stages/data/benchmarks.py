"""Records of published benchmarks as problem rows: one small reader a format, and the table of them.

A reader takes one record and returns question, answer and what else the row needs; it may say "answer_type" where that differs from row to
row. A row that equality cannot judge carries what `reward.verifiers.right` judges it by: "verifier" or "tolerance".
"""
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from prompts.answers import normalize
from prompts.critique import first_wrong_question


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one benchmark's records are read, the type of its answers, and where it is on the hub.

    `examples` names the project's own examples for it (prompts/exemplars_<examples>.jsonl); None where there are none. `test` is the split
    that is labelled: not every benchmark publishes the answers of its test split.
    """

    read: Callable[[dict], dict]
    answer_type: str | None = None
    hub_config: str | None = None
    test: str = "test"
    examples: str | None = None


def _gsm8k(record: dict) -> dict:
    """Cobbe et al. 2021: worked lines with <<calculator marks>>, then `#### answer`."""
    steps, marker, answer = record["answer"].rpartition("####")
    if not marker:
        raise ValueError("the answer has no '####' line")
    lines = [re.sub(r"<<.*?>>", "", line).strip() for line in steps.splitlines()]
    return {"question": record["question"], "answer": answer.strip(),
            "solutions": [[line if line.endswith(".") else line + "." for line in lines if line]]}


def _svamp(record: dict) -> dict:
    """Patel et al. 2021: body and question apart, the answer a number."""
    return {"question": f"{record['Body'].strip()} {record['Question'].strip()}", "answer": str(record["Answer"])}


def _asdiv(record: dict) -> dict:
    """Miao et al. 2020, as the hub has it: body and question apart, the unit in brackets after the answer."""
    return {"question": f"{record['body'].strip()} {record['question'].strip()}", **_number(record["answer"].partition("(")[0].strip())}


def _math(record: dict) -> dict:
    """MultiArith, AddSub, SingleEq, SingleOp, ASDiv and GSM-Hard as Gao et al. 2023 (PAL) publish them: input and target."""
    return {"question": record["input"].strip(), **_number(record["target"])}


def _number(value: float | str) -> dict:
    """A whole answer must be met exactly. Others are floats with noise (3244047.0999999996), which PAL compares to within .001; here
    also to within a thousandth of the value, so that 0.001 does not pass for 0.0017."""
    exact = Fraction(str(value))
    if exact.denominator == 1:
        return {"answer": str(exact.numerator)}
    return {"answer": str(value), "tolerance": min(1e-3, 1e-3 * abs(float(exact)))}


def _lettered(question: str, options: list[str], right: int) -> dict:
    choices = " ".join(f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    return {"question": f"{question.strip()} Choices: {choices}", "answer": chr(ord("A") + right), "num_choices": len(options)}


def _aqua(record: dict) -> dict:
    """Ling et al. 2017: five options written `A)...`, the answer a letter."""
    options = [re.sub(r"^(?:[A-E]\))+\s*", "", option) for option in record["options"]]
    return _lettered(record["question"], options, _letter(record["correct"]))


def _commonsense_qa(record: dict) -> dict:
    """Talmor et al. 2019 as the hub has it: labels and texts of five choices, the key a letter (empty in the test split)."""
    return _lettered(record["question"], list(record["choices"]["text"]), _letter(record["answerKey"]))


def _letter(text: str) -> int:
    if not isinstance(text, str) or not re.fullmatch(r"[A-Z]", text):
        raise ValueError(f"the answer is {text!r:.20}, not a choice's letter")
    return ord(text) - ord("A")


def _strategy_qa(record: dict) -> dict:
    """Geva et al. 2021: a question of yes or no, the answer true or false; the published decomposition is not a worked answer."""
    if not isinstance(record["answer"], bool):
        raise ValueError(f"the answer is {record['answer']!r:.20}, not true or false")
    return {"question": record["question"], "answer": "yes" if record["answer"] else "no"}


def _date_understanding(record: dict) -> dict:
    """BIG-bench: options with scores; the option scored 1 is the answer, as Gao et al. 2023 ask it, without the options."""
    return {"question": record["input"].strip(), "answer": _best(record["target_scores"])}


def _penguins(record: dict) -> dict:
    """BIG-bench: as above, each question after the file's table (`task_prefix`)."""
    question = f"{record.get('task_prefix', '').strip()}\n{record['input'].strip()}".strip()
    answer = _best(record["target_scores"])
    return {"question": question, "answer": answer, "answer_type": "number" if answer.isdigit() else "string"}


def _best(scores: dict) -> str:
    right = [option for option, score in scores.items() if score == 1]
    if len(right) != 1:
        raise ValueError(f"{len(right)} of the options {', '.join(scores)} score 1: one must")
    return str(right[0])


def _bbh(record: dict) -> dict:
    """Suzgun et al. 2023: input with its options, target `(A)`, a word, a number or a list; its type is read off the target."""
    question, target = record["input"].strip(), str(record["target"]).strip()
    if re.search(r"^\(A\) ", question, re.MULTILINE) and (match := re.fullmatch(r"\(?([A-Z])\)?", target)):
        letters = re.findall(r"^\(([A-Z])\) ", question, re.MULTILINE)
        return {"question": question, "answer": match[1], "answer_type": "choice", "num_choices": len(letters)}
    kind = ("yes_no" if target.casefold() in ("yes", "no") else "number" if re.fullmatch(r"-?\d+", target)
            else "list" if "List:" in question else "string")
    return {"question": question, "answer": target, "answer_type": kind}


def _mistake(record: dict) -> dict:
    """Tyen et al. 2024 (BIG-Bench Mistake): a chain of thought with the index of its first wrong step, counted from 0 as the file does.

    The row keeps "steps", "mistake_index" (None: no mistake), the traced question ("traced") and its right answer ("target").
    """
    steps, index = record["steps"], record["mistake_index"]
    if not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError("steps is not a list of texts")
    if index is not None and not (type(index) is int and 0 <= index < len(steps)):
        raise ValueError(f"mistake_index is {index!r}, but the steps are 0 to {len(steps) - 1} (null: no mistake)")
    return {"question": first_wrong_question(record["input"], steps), "answer": "no mistake" if index is None else str(index),
            "answer_type": "string", "steps": list(steps), "mistake_index": index, "traced": record["input"],
            "target": str(record["target"])}


def _game24(record: dict) -> dict:
    """Yao et al. 2023 (Tree of Thoughts): four numbers to make 24 of, from the column Puzzles of their table.

    The answer is one solution, found here, so that such rows can serve as examples; answers are judged by the program, not held against
    it. The rank is the order of difficulty: ranks 901 to 1000, on which the paper measures, are of difficulty 10.
    """
    numbers = [int(n) for n in str(record["Puzzles"]).split()]
    if len(numbers) != 4 or min(numbers) < 0:
        raise ValueError(f"the puzzle is {record['Puzzles']!r:.40}, not four whole numbers")
    found = make_24(tuple(numbers))
    if found is None:
        raise ValueError(f"no expression of {record['Puzzles']} equals 24")
    expression, steps = found
    rank = {"difficulty": (int(record["Rank"]) + 99) // 100, "id": f"game24-{int(record['Rank'])}"} if "Rank" in record else {}
    return {"question": f"Use the numbers {' '.join(map(str, numbers))}, each exactly once, with + - * / and brackets to make 24.",
            "answer": expression, "solutions": [steps], "numbers": numbers, "verifier": "game24", **rank}


def make_24(numbers: tuple[int, ...]) -> tuple[str, list[str]] | None:
    """An expression of all the numbers that equals 24 and the steps to it, or None; exact fractions, by exhaustion."""
    order = _order(tuple((n, 1) for n in numbers))
    if order is None:
        return None
    items, steps = [(Fraction(n), str(n)) for n in numbers], []
    for i, j, sign in order:
        (a, first), (b, second) = items[i], items[j]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        items = [item for k, item in enumerate(items) if k not in (i, j)] + [(value, f"({first} {sign} {second})")]
        steps.append(f"{a} {sign} {b} = {value} (left: {' '.join(str(n) for n, _ in items)}).")
    return items[0][1][1:-1], steps


def _order(values: tuple[tuple[int, int], ...]) -> list[tuple[int, int, str]] | None:
    """Which two of the fractions (numerator, denominator) to combine how, until 24 is left; what is made goes to the end."""
    if len(values) == 1:
        return [] if values[0][0] == 24 * values[0][1] else None
    for i, j in itertools.permutations(range(len(values)), 2):
        (a, b), (c, d) = values[i], values[j]
        rest = tuple(value for k, value in enumerate(values) if k not in (i, j))
        made = [("-", (a * d - c * b, b * d))] + ([("/", (a * d, b * c))] if c else [])
        if i < j:
            made += [("+", (a * d + c * b, b * d)), ("*", (a * c, b * d))]
        for sign, value in made:
            if (found := _order((*rest, value))) is not None:
                return [(i, j, sign), *found]
    return None


def fits(answer: str, kind: str | None, num_choices: int | None = None) -> bool:
    """Whether an answer is of its type: a number, a letter of the choices, yes or no, else any answer at all."""
    form = normalize(answer)
    if kind == "number":
        return bool(re.fullmatch(r"-?\d+(?:\.\d+)?(?:/\d+)?", form))
    if kind == "choice":
        return bool(re.fullmatch(r"[a-z]", form)) and (num_choices is None or ord(form) - ord("a") < num_choices)
    if kind == "yes_no":
        return form in ("yes", "no")
    return bool(form)


_MATH = Format(read=_math, answer_type="number", examples="arithmetic")
BENCHMARKS: dict[str, Format] = {
    "gsm8k": Format(read=_gsm8k, answer_type="number", hub_config="main", examples="arithmetic"),
    "svamp": Format(read=_svamp, answer_type="number", examples="arithmetic"),
    "aqua": Format(read=_aqua, answer_type="choice", hub_config="raw", examples="multiple_choice"),
    "multiarith": _MATH, "addsub": _MATH, "singleeq": _MATH, "singleop": _MATH, "asdiv": _MATH, "gsm_hard": _MATH,
    "asdiv_hub": Format(read=_asdiv, answer_type="number", test="validation", examples="arithmetic"),
    "date_understanding": Format(read=_date_understanding, answer_type="string", examples="dates"),
    "penguins": Format(read=_penguins, examples="tables"),
    "bbh": Format(read=_bbh),
    "strategy_qa": Format(read=_strategy_qa, answer_type="yes_no", examples="yes_no"),
    "commonsense_qa": Format(read=_commonsense_qa, answer_type="choice", test="validation", examples="common_sense"),
    "game24": Format(read=_game24, answer_type="expression", examples="game24"),
    "mistake": Format(read=_mistake)}
