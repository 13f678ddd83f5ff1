import itertools
import random

from stages.data import curriculum, overlap

WORDS = [a + b for a in "badi foku nelo pira suve".split() for b in "ma to ki re".split()]


def text(rng, count):
    return [rng.choice(WORDS) for _ in range(count)]


def jaccard(a, b):
    one, other = ({tuple(said[i:i + 5]) for i in range(max(1, len(said) - 4))} for said in (a.split(), b.split()))
    return len(one & other) / len(one | other)


def test_grams_by_hand():
    assert overlap.words("It's 3 o'clock, ÜBER-late!") == ["it", "s", "3", "o", "clock", "über", "late"]
    grams = overlap.grams(["a", "b", "a", "b"], 2).tolist()
    assert grams[0] == grams[2] != grams[1] and len(grams) == 3
    assert overlap.grams(["a"], 5).tolist() == overlap.grams(["a"], 1).tolist() and not len(overlap.grams([], 5))


def test_near_duplicates_are_those_of_a_brute_search():
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        said = text(rng, rng.randint(30, 60))
        texts.append(" ".join(said))
        for changes in (1, 2, 4):
            for at in rng.sample(range(len(said)), changes):
                said[at] = "changed"
            texts.append(" ".join(said))
    rng.shuffle(texts)
    kept, expected = [], []
    for at, mine in enumerate(texts):
        alike = [other for other in kept if jaccard(mine, texts[other]) >= 0.8]
        expected += [(at, alike[0])] if alike else []
        kept += [] if alike else [at]
    found = overlap.near_duplicates(texts)
    assert found == expected == overlap.near_duplicates(texts) and 20 < len(found) < 150


def test_threshold_by_hand():
    base = [f"w{i}" for i in range(22)]  # 18 shingles
    near = [*base[:-1], "other"]  # 17 shared of 19
    far = [*base[:10], "other", *base[11:]]  # 13 shared of 23
    assert overlap.near_duplicates([" ".join(t) for t in (base, near, far)]) == [(1, 0)]


def test_case_and_punctuation_do_not_hide_a_repeat_but_signs_of_arithmetic_count():
    assert overlap.near_duplicates(["Tom has 3 apples.", "tom has 3 APPLES", "", "  ", "short", "Short!"]) == [(1, 0), (5, 4)]
    assert overlap.near_duplicates(["a = 3 + 4. What is a?", "a = 3 - 4. What is a?", "a = 3 + 4; what is a"]) == [(2, 0)]


def test_a_row_overlaps_when_it_holds_thirteen_words_in_a_row_of_the_question():
    said = [f"w{i}" for i in range(30)]
    question = " ".join(said)
    thirteen, twelve = " ".join(["x", *said[10:23], "y"]), " ".join(["x", *said[10:22], "y"])
    assert overlap.overlapping([thirteen, twelve, question.upper() + "!"], [question]) == [(0, 0), (2, 0)]


def test_a_short_question_counts_whole():
    texts = ["Well, what is the sum of 2 and 2? Four.", "What is the sum of 2?", ""]
    assert overlap.overlapping(texts, ["What is the sum of 2 and 2", "?!", "what is the sum of"]) == [(0, 0), (0, 2), (1, 2)]
    assert overlap.overlapping(texts, ["what is", "Four."]) == []  # stands in any text


def test_splits_of_the_curriculum_do_not_overlap():
    """Disjoint by construction; these questions are shorter than 13 words, so one overlaps only where it stands whole."""
    def asked(split):
        return [p.question for p in itertools.islice(curriculum.problems(0, split=split, tasks={"last_letters": 1.0}), 50)]
    assert not overlap.overlapping(asked("train"), asked("test"))
    both = asked("train")
    assert {row for row, _ in overlap.overlapping(both, both[:10])} >= set(range(10))


def row(name, question, answer, source="f"):
    return {"id": name, "source": source, "first": 1,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_screened_rows_are_listed_and_on_request_left_out():
    plain, held = row("1", "How many apples has Tom?", "Three, as he said."), row("2", "So: what is two and two? Say it.", "Four.")
    again, other = row("3", "how many apples has Tom", "Three, as he said"), row("4", "Name a bird that sings.", "A lark.")
    made = row("5", "How many apples has Tom?", "Three, as he said.", source="curriculum")
    text = {"id": "6", "source": "t", "text": "they asked: Name a fish that flies"}
    train, validation = [plain, held, again, other, made, text], [row("7", "name a fish that flies", "None.")]
    questions = ["What is two and two?"]
    expected = [{"where": "2", "source": "f", "reason": "holds the evaluation question 'What is two and two?'"},
                {"where": "3", "source": "f", "reason": "nearly repeats 1"},
                {"where": "6", "source": "t", "reason": "holds the evaluation question 'name a fish that flies'"}]
    assert overlap.screened(train, validation, questions, generated=["curriculum"], drop=False) == (train, expected)
    assert overlap.screened(train, validation, questions, generated=["curriculum"], drop=True) == ([plain, other, made], expected)
    assert overlap.screened([plain, other] * 2, [], [], generated=[], drop=True) == ([plain, other] * 2, [])  # a mixture's second pass
