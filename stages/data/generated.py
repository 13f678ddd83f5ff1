"""Two symbolic tasks of Wei et al. 2022 (section 5) on names: last letters joined, and coin flips; made here from a seed, no file needed.

Written `name_letters:2` or `coin_flip:4`: the number is that of names, the difficulty. Settings follow a question mark: `size` (500, as
in the paper) and `seed` (0). Problems of the train and the test split never meet: a hash of the question decides.
"""
import hashlib
import random
from collections.abc import Callable, Iterator
from urllib.parse import parse_qsl

FIRST = ("Alba Anders Bianca Boris Carla Cyril Dagmar Dario Edda Emil Farah Felix Gisela Gregor Hanna Hugo Ilse Ivan Jana Jonas "
         "Kira Klaus Lotte Lukas Marta Milan Nadia Nils Olga Oskar Paula Piet Quinn Ralf Renate Rosa Selma Stefan Tamar Timon Ulla "
         "Ugo Vera Viktor Wanda Wim Xenia Yannick Yvonne Zelda").split()
LAST = ("Abel Arnold Becker Berg Castro Conti Dahl Duarte Engel Evans Fischer Fox Garcia Grant Haas Hill Ito Ivers Jansen Jung "
        "Keller Kovacs Lang Lopez Marsh Moreau Novak Nagy Olsen Ortiz Pavlov Pohl Quast Reed Rossi Sato Stone Tanaka Thorn Ulrich "
        "Urban Vance Vogel Weber Wolf Xu Yamada Young Zeman Zhou").split()


def _name_letters(rng: random.Random, num_names: int) -> dict:
    names = [rng.choice(LAST if i % 2 else FIRST) for i in range(num_names)]
    letters = [name[-1] for name in names]
    steps = [f"The last letter of \"{name}\" is \"{letter}\"." for name, letter in zip(names, letters, strict=True)]
    joined = "".join(letters)
    return {"question": f"Take the last letters of the words in \"{' '.join(names)}\" and concatenate them.", "answer": joined,
            "answer_type": "string", "solutions": [[*steps, f"Joined they are \"{joined}\"."]]}


def _coin_flip(rng: random.Random, num_names: int) -> dict:
    names = rng.sample(FIRST, num_names)
    flips = [rng.random() < .5 for _ in names]
    told = " ".join(f"{name} {'flips' if flip else 'does not flip'} the coin." for name, flip in zip(names, flips, strict=True))
    flipped = [name for name, flip in zip(names, flips, strict=True) if flip]
    count = len(flipped)
    who = f"The coin was flipped by {' and '.join(flipped)}." if flipped else "Nobody flipped the coin."
    parity = f"That is {count} flip{'s' * (count != 1)}, an {'odd' if count % 2 else 'even'} number."
    side = "The coin started heads up, so it is " + ("tails up." if count % 2 else "still heads up.")
    return {"question": f"A coin is heads up. {told} Is the coin still heads up?", "answer": "no" if count % 2 else "yes",
            "answer_type": "yes_no", "solutions": [[who, parity, side]]}


MADE: dict[str, tuple[Callable[[random.Random, int], dict], range]] = {"name_letters": (_name_letters, range(1, 33)),
                                                                        "coin_flip": (_coin_flip, range(1, 33))}


def settings(source: str) -> tuple[str, dict[str, str]]:
    """What comes before the question mark of `4?size=200&seed=1`, and the settings after it. Raises ValueError for one without a value."""
    name, _, query = source.partition("?")
    try:
        return name, dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError:
        raise ValueError(f"{source!r}: write settings as {name}?size=200&seed=1") from None


def make(task: str, source: str, split: str) -> Iterator[tuple[str, dict]]:
    """Distinct problems of one split with where each comes from. Raises ValueError for what cannot be made."""
    write, allowed = MADE[task]
    number, given = settings(source)
    where = f"{task}:{source}"
    if not number.isdecimal() or int(number) not in allowed:
        raise ValueError(f"{where}: give the number of names, {allowed.start} to {allowed.stop - 1}, as in {task}:4")
    if unknown := given.keys() - {"size", "seed"}:
        raise ValueError(f"{where}: unknown setting {min(unknown)!r}: choose from size, seed")
    if wrong := [key for key, value in given.items() if not value.isdecimal()]:
        raise ValueError(f"{where}: {wrong[0]} is {given[wrong[0]]!r}: give a whole number")
    size, side = int(given.get("size", 500)), int(split != "test")
    rng = random.Random(f"{task}:{number}:{given.get('seed', 0)}:{split}")
    seen: set[str] = set()
    for _ in range(50 * size):
        row = write(rng, int(number))
        if row["question"] in seen or hashlib.sha256(row["question"].encode()).digest()[0] % 2 != side:
            continue
        seen.add(row["question"])
        yield where, {**row, "difficulty": int(number)}
        if len(seen) == size:
            return
    raise ValueError(f"{where}: {size} different problems were not found ({len(seen)} were): set size lower, or take more names")
