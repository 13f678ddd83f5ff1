"""The embedded curriculum: text from which a model under a million parameters learns to reason in minutes.

Everything is generated from a seed. Four task families stand beside short narrative text; each problem is written either
with worked steps or with the bare answer, and an explicit phrase in the question (`CUES`) says which is wanted. Difficulty is
the number of steps. A problem belongs to one of `SPLITS` by a hash of what must be computed (names and objects left out),
so problems of different splits are disjoint by construction, however many are drawn.

Sources: chained steps as written here follow Wei et al. 2022 (chain of thought; last-letter concatenation, section 5);
several orders of solving one problem give self-consistency something to vote on (Wang et al. 2023, section 2).
"""
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORKED, DIRECT = "worked", "direct"
CUES = {WORKED: "Think step by step.", DIRECT: "Answer directly."}
# Shares of the problem space, percent. A small share is learned by heart: which numbers go together in it (LOG.md).
SPLITS = {"train": 44, "preferences": 16, "ppo": 20, "validation": 6, "test": 14}

NAMES = "Tom Ann Bob Mia Sam Eve Max Zoe Leo Ida Ben Amy Dan Joy Kim Ray".split()
OBJECTS = "apples pens cards coins books shells stamps eggs".split()
VARIABLES = "a b c d e f g h j k m n p q r s".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
PLACES = "garden kitchen school market forest river".split()
FOODS = "bread soup cake rice fish plums".split()
COLORS = "red blue green black white gold".split()
PETS = "cat dog bird fox frog mouse".split()
MOODS = "happy sad tired proud calm brave".split()
MAX_NUMBER = 20
TRAINED = (1, 2, 3, 4, 5)  # steps of the problems in the pretraining documents
WORD_CHANGE, CHAIN_CHANGE = 9, 5  # largest step of a total, in word problems and in chained variables
# Shares of the main documents; the rest are problems, of which some stand in documents of two to four.
COPYING_SHARE, STORY_SHARE, SEVERAL_SHARE, WORKED_SHARE = 0.1, 0.1, 0.15, 0.65


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem with every worked solution that the curriculum writes for it.

    `key` is what must be computed, without names or objects; it alone decides the split. `solutions` holds one tuple of
    steps for each accepted order of working; all of them end in `answer`.
    """

    task: str
    difficulty: int
    question: str
    answer: str
    solutions: tuple[tuple[str, ...], ...]
    key: str

    @property
    def split(self) -> str:
        point = int.from_bytes(hashlib.sha256(f"{self.task}:{self.key}".encode()).digest()[:8], "big") % 100
        for name, share in SPLITS.items():
            if point < share:
                return name
            point -= share
        raise AssertionError("shares of SPLITS do not add up to 100")

    @property
    def id(self) -> str:
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]

    def as_row(self) -> dict:
        """Plain record for jsonl and for the verifiers in `reward/`."""
        return {"id": self.id, "task": self.task, "difficulty": self.difficulty, "question": self.question,
                "answer": self.answer, "answer_type": "string" if self.task == "last_letters" else "number",
                "solutions": [list(steps) for steps in self.solutions]}


def word_problem(rng: random.Random, steps: int) -> Problem:
    """A running total over weekdays, solved forward, backward, or gains first."""
    while True:
        start = rng.randint(1, 9)
        changes = [rng.choice([1, -1]) * rng.randint(1, WORD_CHANGE) for _ in range(steps)]
        totals = [start + sum(changes[:i]) for i in range(steps + 1)]
        if all(0 <= t <= MAX_NUMBER for t in totals):
            break
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    sentences = [f"{name} has {start} {thing}."]
    for day, change in zip(DAYS, changes, strict=False):
        verb = rng.choice(["buys", "finds"]) if change > 0 else rng.choice(["loses", "sells"])
        sentences.append(f"On {day} {name} {verb} {abs(change)}.")
    sentences.append(f"How many {thing} does {name} have?")

    solutions: list[tuple[str, ...]] = []
    forward = list(range(steps))
    for order in (forward, forward[::-1], sorted(forward, key=lambda i: changes[i] < 0)):
        total, lines = start, [f"Start {start}."]
        for i in order:
            after = total + changes[i]
            if not 0 <= after <= MAX_NUMBER:
                break
            lines.append(f"{DAYS[i]} {total} {'+' if changes[i] > 0 else '-'} {abs(changes[i])} = {after}.")
            total = after
        if len(lines) == steps + 1 and tuple(lines) not in solutions:
            solutions.append(tuple(lines))
    return Problem(task="word_problems", difficulty=steps, question=" ".join(sentences), answer=str(totals[-1]),
                   solutions=tuple(solutions), key=f"{start} {changes}")


def chained_variables(rng: random.Random, steps: int) -> Problem:
    """Assignments in order with an irrelevant one among them; each step repeats one, puts the value in and computes."""
    while True:
        start = rng.randint(1, 9)
        changes = [rng.choice([1, -1]) * rng.randint(1, CHAIN_CHANGE) for _ in range(steps)]
        values = [start + sum(changes[:i]) for i in range(steps + 1)]
        if all(0 <= v <= MAX_NUMBER for v in values):
            break
    names = rng.sample(VARIABLES, steps + 2)
    given, computed = [f"{names[0]} = {start}."], [f"{names[0]} = {start}."]
    for i, change in enumerate(changes, start=1):
        operation = f"{'+' if change > 0 else '-'} {abs(change)}"
        given.append(f"{names[i]} = {names[i - 1]} {operation}.")
        computed.append(f"{names[i]} = {names[i - 1]} {operation} = {values[i - 1]} {operation} = {values[i]}.")
    given.insert(rng.randint(0, len(given)), f"{names[-1]} = {rng.randint(1, 9)}.")
    return Problem(task="chained_variables", difficulty=steps, question=f"{' '.join(given)} What is {names[steps]}?",
                   answer=str(values[-1]), solutions=(tuple(computed),), key=f"{start} {changes}")


def last_letters(rng: random.Random, steps: int) -> Problem:
    """Join the last letters of names, last name first (Wei et al. 2022, section 5, reversed)."""
    names = [rng.choice(NAMES) for _ in range(steps)]
    return Problem(task="last_letters", difficulty=steps, question=f"Join the last letters of {' '.join(names)} in reverse order.",
                   answer=" ".join(n[-1] for n in names[::-1]), solutions=(tuple(f"{n} ends in {n[-1]}." for n in names[::-1]),),
                   key=" ".join(names))


def modular_sum(rng: random.Random, steps: int) -> Problem:
    """The last digit of a sum, folded from the left with the running last digit written out."""
    terms = [rng.randint(0, 9) for _ in range(steps + 1)]
    total, lines = terms[0], [f"Start {terms[0]}."]
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term} so {(total + term) % 10}.")
        total = (total + term) % 10
    return Problem(task="modular_sums", difficulty=steps, question=f"What is the last digit of {' + '.join(map(str, terms))}?",
                   answer=str(total), solutions=(tuple(lines),), key=str(terms))


TASKS: dict[str, Callable[[random.Random, int], Problem]] = {
    "word_problems": word_problem, "chained_variables": chained_variables,
    "last_letters": last_letters, "modular_sums": modular_sum}
TASK_WEIGHTS = {"word_problems": 0.45, "chained_variables": 0.35, "last_letters": 0.1, "modular_sums": 0.1}


def problems(seed: int, *, split: str, tasks: dict[str, float] | None = None, difficulties: tuple[int, ...] = TRAINED,
             ) -> Iterator[Problem]:
    """Endless problems of one split, in an order fixed by the seed.

    Raises ValueError for an unknown split or task, naming those there are.
    """
    weights = TASK_WEIGHTS if tasks is None else tasks
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if unknown := set(weights) - set(TASKS):
        raise ValueError(f"unknown task {sorted(unknown)[0]!r}: choose from {', '.join(TASKS)}")
    rng = random.Random(f"{seed}:{split}")
    while True:
        task = rng.choices(list(weights), list(weights.values()))[0]
        problem = TASKS[task](rng, rng.choice(difficulties))
        if problem.split == split:
            yield problem


def response(problem: Problem, style: str, solution: int = 0) -> str:
    """The reference answer, in the words that every prompt of this style asks for."""
    steps = " ".join(problem.solutions[solution]) + " " if style == WORKED else ""
    return f"{steps}The answer is {problem.answer}."


def user_turn(question: str, style: str) -> str:
    return f"{question} {CUES[style]}"


def example(problem: Problem, style: str, rng: random.Random) -> str:
    """One question with its answer, as the pretraining documents and the few-shot prompts write it."""
    answer = response(problem, style, rng.randrange(len(problem.solutions)))
    return f"Question: {user_turn(problem.question, style)}\nAnswer: {answer}"


def story(rng: random.Random) -> str:
    first, second = rng.sample(NAMES, 2)
    place, thing, color = rng.choice(PLACES), rng.choice(OBJECTS)[:-1], rng.choice(COLORS)
    food, pet = rng.choice(FOODS), rng.choice(PETS)
    sentences = [
        f"{first} went to the {place}.",
        rng.choice([f"{first} met {second} in the {place}.", f"In the {place}, {first} saw a {color} {pet}."]),
        f"{first} found a {color} {thing}.",
        rng.choice([f"{second} liked the {color} {thing}.", f"{second} and {first} ate some {food}.",
                    f"The {pet} was near the {place}."]),
        f"{first} gave the {thing} to {second}.",
        f"{second} was {rng.choice(MOODS)}.",
        f"They went home from the {place}."]
    kept = sorted(rng.sample(range(len(sentences)), rng.randint(3, len(sentences))))
    return " ".join(sentences[i] for i in kept)


def copying(rng: random.Random) -> str:
    """Lists to repeat and facts to look up: what a small model must be able to do before it can follow steps."""
    if rng.random() < 0.5:
        numbers = [str(i) for i in range(MAX_NUMBER + 1)]
        pool = rng.choice([NAMES, VARIABLES, OBJECTS, numbers, DAYS + COLORS + FOODS])
        items = [rng.choice(pool) for _ in range(rng.randint(3, 8))]
        line = " ".join(items)
        return f"List: {line}. Backward: {' '.join(items[::-1])}." if rng.random() < 0.3 else f"List: {line}. Again: {line}."
    people = rng.sample(NAMES, rng.randint(2, 5))
    facts = [(name, rng.randint(0, MAX_NUMBER), rng.choice(OBJECTS)) for name in people]
    name, number, thing = rng.choice(facts)
    text = " ".join(f"{n} has {k} {o}." for n, k, o in facts)
    return f"Question: {text} How many {thing} does {name} have? {CUES[DIRECT]}\nAnswer: The answer is {number}."


def documents(seed: int, *, phase: str = "main", split: str = "train", worked_share: float = WORKED_SHARE) -> Iterator[dict]:
    """Endless pretraining documents `{"text", "kind"}`.

    `phase="easy"` holds copying, lookups and problems of one or two steps, for the beginning of training: without it the
    jump to following steps comes later or not at all (LOG.md). One document in eight holds several worked or direct
    examples, so that few-shot prompts are in distribution.
    """
    if phase not in ("easy", "main"):
        raise ValueError(f"unknown phase {phase!r}: choose easy or main")
    easy = phase == "easy"
    rng = random.Random(f"{seed}:{phase}:{split}")
    source = problems(seed + (1 << 20 if easy else 0), split=split, difficulties=(1, 2) if easy else TRAINED)
    while True:
        draw = rng.random()
        if draw < (0.5 if easy else COPYING_SHARE):
            yield {"text": copying(rng), "kind": "copying"}
        elif draw < (0.55 if easy else COPYING_SHARE + STORY_SHARE):
            yield {"text": story(rng), "kind": "story"}
        else:
            count = rng.randint(2, 4) if rng.random() < SEVERAL_SHARE else 1
            style = WORKED if rng.random() < worked_share else DIRECT
            chosen = [next(source) for _ in range(count)]
            yield {"text": "\n\n".join(example(p, style, rng) for p in chosen), "kind": style if count == 1 else f"{style}-few-shot"}
