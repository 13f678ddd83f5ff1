"""The curriculum's entropy against the text that its generator really writes."""
import itertools
import math
import random
from collections import Counter

import pytest

from stages.data import curriculum, entropy


def by_collisions(draws):
    """Log of the number of equally likely outcomes, from how often two draws are equal."""
    pairs = sum(count * (count - 1) / 2 for count in Counter(draws).values())
    return math.log(len(draws) * (len(draws) - 1) / 2 / pairs)


@pytest.mark.parametrize(("task", "steps", "count"), [
    ("word_problems", 1, 20_000), ("chained_variables", 1, 40_000), ("last_letters", 2, 4000), ("modular_sums", 2, 4000)])
def test_questions_are_as_many_as_counted(task, steps, count):
    rng = random.Random(0)
    drawn = [curriculum.TASKS[task](rng, steps).question for _ in range(count)]
    assert by_collisions(drawn) == pytest.approx(entropy.problem_nats(task, steps), abs=0.15)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_paths_are_those_of_the_generator(steps):
    changes = [c for c in range(-5, 6) if c]
    expected = sum(all(0 <= start + sum(path[:i + 1]) <= curriculum.MAX_NUMBER for i in range(steps))
                   for start in range(1, 10) for path in itertools.product(changes, repeat=steps))
    assert entropy.paths(steps, 5) == expected


def test_stories_are_as_likely_as_their_information_says():
    """Two stories are equal with probability E[p(text)], which is E[exp(-nats)] if the information is right."""
    rng = random.Random(1)
    texts = [curriculum.story(rng) for _ in range(100_000)]
    expected = sum(math.exp(-entropy.story_nats(text)) for text in texts) / len(texts)
    assert by_collisions(texts) == pytest.approx(-math.log(expected), abs=0.2)


class Counting(random.Random):
    """Adds up the information of its draws."""

    nats = 0.0

    def _randbelow(self, n):
        self.nats += math.log(n)
        return int(super().random() * n)


def test_copies_take_the_choices_that_their_generator_draws():
    rng, coins = Counting(2), 0.0
    texts = [curriculum.copying(rng) for _ in range(20_000)]
    for text in texts:  # draws of random() against a share, which `Counting` does not see
        coins += math.log(2) + (0.0 if text.startswith("Question") else -math.log(0.3 if "Backward" in text else 0.7))
    assert entropy.copying_nats() == pytest.approx((rng.nats + coins) / len(texts), rel=0.005)


def test_documents_hold_what_their_parts_hold():
    whole = entropy.document_nats(0, draws=500)
    assert whole == pytest.approx(entropy.document_nats(1, draws=500), abs=0.1)
    assert entropy.document_nats(0, split="test", draws=500) < whole  # a smaller share of the problems


def test_nats_a_token_leave_the_first_token_out():
    documents = [[1, 2, 0], [1, 3, 3, 0], [4, 0], [4, 2, 2, 2, 2, 0]]  # two of the four begin with 1: log 2 nats
    assert entropy.token_nats(documents, 5.0) == pytest.approx((5.0 - math.log(2)) * 4 / (2 + 3 + 1 + 5))
