"""The entropy of the embedded curriculum: the loss below which no model can go, known because the text is generated.

Every document is one draw among choices that can be read off its text, so its information is the sum of the logs of those
choices (Shannon 1948, section 6). A law of loss fitted with this floor needs not guess it from runs far above it. Nats, always.
"""
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from stages.data import curriculum
from stages.data.curriculum import CHAIN_CHANGE, MAX_NUMBER, NAMES, OBJECTS, VARIABLES, WORD_CHANGE


def information(shares: Iterable[float]) -> float:
    """Entropy of a choice with these probabilities."""
    return -sum(share * math.log(share) for share in shares if share)


def paths(steps: int, largest: int) -> int:
    """Ways to start at 1 to 9 and change the total `steps` times by 1 to `largest`, up or down, without leaving 0 to MAX_NUMBER."""
    ways = Counter(range(1, 10))
    for _ in range(steps):
        moved: Counter[int] = Counter()
        for total, count in ways.items():
            for change in (*range(-largest, 0), *range(1, largest + 1)):
                if 0 <= total + change <= MAX_NUMBER:
                    moved[total + change] += count
        ways = moved
    return ways.total()


def problem_nats(task: str, steps: int) -> float:
    """Log of the number of questions of a task and difficulty, all of which are equally likely, whatever their split."""
    if task == "word_problems":
        return math.log(paths(steps, WORD_CHANGE) * len(NAMES) * len(OBJECTS) * 2**steps)
    if task == "chained_variables":
        return math.log(paths(steps, CHAIN_CHANGE) * math.perm(len(VARIABLES), steps + 2) * (steps + 2) * 9)
    return {"last_letters": steps * math.log(len(NAMES)), "modular_sums": (steps + 1) * math.log(10)}[task]


def copying_nats() -> float:
    """Mean information of `curriculum.copying`."""
    pools = [len(NAMES), len(VARIABLES), len(OBJECTS), MAX_NUMBER + 1, len(curriculum.DAYS + curriculum.COLORS + curriculum.FOODS)]
    items = math.log(len(pools)) + math.log(6) + 5.5 * sum(map(math.log, pools)) / len(pools) + information((0.3, 0.7))
    facts = [math.log(math.perm(len(NAMES), people)) + people * math.log((MAX_NUMBER + 1) * len(OBJECTS)) + math.log(people)
             for people in (2, 3, 4, 5)]
    return math.log(2) + items / 2 + (math.log(4) + sum(facts) / 4) / 2


def story_nats(text: str) -> float:
    """Information of one story: which sentences were kept, and what can be seen in them of the choices behind all seven."""
    words = text.replace(",", "").replace(".", "").split()
    pools = [curriculum.PLACES, curriculum.COLORS, curriculum.FOODS, curriculum.PETS, curriculum.MOODS, [o[:-1] for o in OBJECTS]]
    seen = sum(math.log(len(pool)) for pool in pools if set(pool) & set(words))
    seen += math.log(math.perm(len(NAMES), len(set(NAMES) & set(words))))
    seen += math.log(2) * bool({"met", "saw"} & set(words)) + math.log(3) * bool({"liked", "ate", "near"} & set(words))
    return seen + math.log(5) + math.log(math.comb(7, text.count(".")))


def document_nats(seed: int, *, split: str = "train", draws: int = 4000) -> float:
    """Mean information of the curriculum's main documents; means over solutions and stories are taken over `draws`."""
    drawn = list(itertools.islice(curriculum.problems(seed, split=split), draws))
    worked = sum(math.log(len(p.solutions)) for p in drawn) / draws
    questions = sum(share * problem_nats(task, steps) for task, share in curriculum.TASK_WEIGHTS.items() for steps in curriculum.TRAINED)
    problem = (information(curriculum.TASK_WEIGHTS.values()) + math.log(len(curriculum.TRAINED)) + questions / len(curriculum.TRAINED)
               + math.log(curriculum.SPLITS[split] / 100) + curriculum.WORKED_SHARE * worked)
    rng = random.Random(seed)
    story = sum(story_nats(curriculum.story(rng)) for _ in range(draws)) / draws
    several, copies, stories = curriculum.SEVERAL_SHARE, curriculum.COPYING_SHARE, curriculum.STORY_SHARE
    problems = (information((curriculum.WORKED_SHARE, 1 - curriculum.WORKED_SHARE)) + information((1 - several, *[several / 3] * 3))
                + (1 + 2 * several) * problem)  # two to four, three on average
    rest = 1 - copies - stories
    return information((copies, stories, rest)) + copies * copying_nats() + stories * story + rest * problems


def token_nats(documents: Sequence[Sequence[int]], nats: float) -> float:
    """`nats` a document as nats a predicted token. `documents` are token ids with the end-of-text token.

    The first token of a document is never predicted, so what it tells (its entropy over these documents) is left out.
    """
    first = Counter(ids[0] for ids in documents)
    known = information(count / len(documents) for count in first.values())
    return (nats - known) * len(documents) / sum(len(ids) - 1 for ids in documents)
