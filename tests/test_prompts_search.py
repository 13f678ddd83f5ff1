"""Strategies of several rounds on fake models whose answers make the right behaviour visible."""
import random
import re
from types import SimpleNamespace

import pytest

from prompts import allocation, strategies
from prompts.allocation import budgeted, doubt, gain
from prompts.critique import finds_no_fault, self_refine
from prompts.records import Cost, Request, Result, Score
from prompts.search import Puzzle, Search, tree_of_thought
from prompts.templates import BENCHMARK_CUES, DIRECT, WORKED, Style
from prompts.thoughts import game_of_24, worked_steps
from prompts.voting import stopper
from stages.evals.scheduler import run, solve

PLAIN = Style(chat=False, cues=BENCHMARK_CUES, max_tokens={WORKED: 50, DIRECT: 10})
CHAT = Style(chat=True, cues=BENCHMARK_CUES, max_tokens={WORKED: 50, DIRECT: 10})
ROW = {"id": "q", "task": "t", "difficulty": 1, "question": "How many?", "answer": "5", "solutions": []}


class Fake:
    """Answers a request with what `say` makes of it: a text, or (text, finish). Prompts cost 3 tokens and texts their words."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def generate(self, requests):
        self.asked += requests
        return [self.answer(self.say(request)) for request in requests]

    def answer(self, said):
        text, finish = said if isinstance(said, tuple) else (said, "stop")
        return Result(text=text, prompt_tokens=3, generated_tokens=len(text.split()), finish=finish)


def ask(strategy, say, judge=None):
    """(solution, requests that the backend got)."""
    fake = Fake(say)
    [solution] = solve([strategy], fake, batch_size=4, judge=judge)
    return solution, fake.asked


def scores(of):
    return lambda asked: [Result(text="", prompt_tokens=5, generated_tokens=0, finish="stop", score=of(s.response)) for s in asked]


def test_second_stage_only_where_the_steps_state_no_answer():
    solution, asked = ask(strategies.two_stage_cot(ROW, PLAIN), lambda r: "2 and 3 make five. So" if r.stage == "worked" else " 5.")
    assert [r.stage for r in asked] == ["worked", "extract"] and solution.answer == "5." and solution.answers == ("5.",)
    assert asked[1].prompt == f"{asked[0].prompt}2 and 3 make five. So Therefore, the answer is" and asked[1].max_tokens == 10
    assert solution.cost == Cost(requests=2, prompt_tokens=6, generated_tokens=7)  # the extraction is paid for too
    solution, asked = ask(strategies.two_stage_cot(ROW, PLAIN), lambda r: "The answer is 4.")
    assert len(asked) == 1 and solution.answer == "4"
    solution, asked = ask(strategies.two_stage_cot(ROW, CHAT), lambda r: "Hm" if r.stage == "worked" else "5")
    assert [turn["role"] for turn in asked[1].prompt] == ["user", "assistant", "user"] and solution.answer == "5"
    solution, asked = ask(strategies.two_stage_cot(ROW, PLAIN), lambda r: ("", "too_long"))
    assert len(asked) == 1 and solution.answer is None


def test_adaptive_consistency_stops_when_its_rule_says_so():
    agree = strategies.self_consistency(ROW, PLAIN, n=16, temperature=1.0, stop="beta:0.95")
    solution, asked = ask(agree, lambda r: "The answer is 5.")
    assert len(asked) == 4 and solution.answer == "5"  # 1 - 2^-(4+1) is the first above .95
    split = strategies.self_consistency(ROW, PLAIN, n=6, temperature=1.0, stop="beta:0.95")
    solution, asked = ask(split, lambda r: f"The answer is {r.sample % 2}.")
    assert len(asked) == 6 and solution.tie
    with pytest.raises(ValueError, match="unknown stopping rule"):
        ask(strategies.self_consistency(ROW, PLAIN, n=6, temperature=1.0, stop="gamma:1"), lambda r: "")


@pytest.mark.parametrize("stop", ["beta:0.95", "window:3", "binomial:0.05", "none"])
def test_rounds_draw_no_chain_that_one_at_a_time_would_not(stop):
    for seed in range(40):
        answers = random.Random(seed).choices(["1", "2", "3"], weights=[6, 3, 1], k=20)
        enough, used = stopper(stop), 1
        while used < 20 and not enough(answers[:used]):
            used += 1
        solution, asked = ask(strategies.self_consistency(ROW, PLAIN, n=20, temperature=1.0, stop=stop),
                              lambda r, answers=answers: f"The answer is {answers[r.sample]}.")
        assert len(asked) == used and solution.answer is not None
    rounds = []
    strategy = strategies.self_consistency(ROW, PLAIN, n=20, temperature=1.0, stop=stop)
    requests = next(strategy)
    rounds.append(len(requests))
    assert rounds == [{"beta:0.95": 4, "window:3": 3, "binomial:0.05": 6, "none": 20}[stop]]


def test_best_of_n_and_weighted_vote_follow_the_reward_model():
    said = ["The answer is 4.", "The answer is 4.", "The answer is 5!", "no idea"]
    judged = []

    def judge(asked):
        judged.extend(asked)
        return scores(lambda text: 3.0 if "5" in text else 0.0)(asked)
    for strategy in (strategies.best_of_n, strategies.weighted_vote):
        solution, asked = ask(strategy(ROW, PLAIN, n=4, temperature=1.0), lambda r: said[r.sample], judge)
        assert solution.answer.strip("!") == "5" and solution.unparsed == 1 and len(asked) == 4
        assert solution.cost == Cost(requests=7, prompt_tokens=4 * 3 + 3 * 5, generated_tokens=14)  # what has no answer is not scored
    assert all(isinstance(s, Score) and s.prompt[0]["role"] == "user" for s in judged)
    weak = scores(lambda text: 0.5 if "5" in text else 0.0)  # e^.5 < 2: two weak votes outweigh it
    assert ask(strategies.weighted_vote(ROW, PLAIN, n=4, temperature=1.0), lambda r: said[r.sample], weak)[0].answer == "4"
    assert ask(strategies.best_of_n(ROW, PLAIN, n=4, temperature=1.0), lambda r: said[r.sample], weak)[0].answer.strip("!") == "5"
    with pytest.raises(ValueError, match="no reward model"):
        ask(strategies.best_of_n(ROW, PLAIN, n=4, temperature=1.0), lambda r: said[r.sample])


# A tree whose best first step leads nowhere: values by state, and which states are whole.
TREE = {(): ["a", "b"], ("a",): ["aa", "ab"], ("b",): ["ba", "bb"]}
VALUES = {("a",): 9.0, ("b",): 5.0, ("a", "aa"): 1.0, ("a", "ab"): 2.0, ("b", "ba"): 8.0, ("b", "bb"): 3.0}


def toy(finished=lambda state: len(state) == 2):
    return Puzzle(extend=lambda state: f"extend {' '.join(state)}", read=lambda state, text: text.split(), finished=finished,
                  answer=lambda state: f"{state[-1]} is it", text=" ".join, max_tokens=9, stop=(),
                  value=lambda state: f"value {' '.join(state)}", rate=float,
                  choose=lambda states: "choose " + ", ".join(" ".join(state) for state in states))


def toy_model(request):
    kind, _, rest = request.prompt.partition(" ")
    state = tuple(rest.split())
    if kind == "extend":
        return " ".join(TREE.get(state, [])) if request.temperature == 0 else TREE.get(state, [""])[request.sample % 2]
    if kind == "value":
        return str(VALUES[state])
    options = [tuple(option.split()) for option in rest.split(", ")]
    return f"The best is {1 + max(range(len(options)), key=lambda i: VALUES[options[i]])}."


def search(**settings):
    return Search(**{"thoughts": "propose", "width": 2, "depth": 2, "threshold": 0.0} | settings)


def test_breadth_first_with_a_beam_finds_what_greedy_misses():
    greedy, _ = ask(tree_of_thought(ROW, PLAIN, toy(), search(beam=1)), toy_model)
    assert greedy.answer == "ab is it"
    wide, asked = ask(tree_of_thought(ROW, PLAIN, toy(), search(beam=2)), toy_model)
    assert wide.answer == "ba is it" and wide.samples[0].text == "b ba"
    assert wide.cost.requests == len(asked) == (1 + 2) + (2 + 4)  # a proposal and two values, then two and four


def test_thoughts_can_be_sampled_and_states_voted_on():
    voted, asked = ask(tree_of_thought(ROW, PLAIN, toy(), search(beam=2, judge="vote", thoughts="sample", judgements=1)), toy_model)
    assert voted.answer == "ba is it"
    assert [r.temperature for r in asked if r.prompt == "extend "] == [1.0, 1.0] and {r.sample for r in asked} == {0, 1}
    assert len([r for r in asked if r.prompt.startswith("choose")]) == 2


def test_depth_first_goes_back_and_prunes():
    backtracked, asked = ask(tree_of_thought(ROW, PLAIN, toy(), search(order="depth", threshold=4.0)), toy_model)
    assert backtracked.answer == "ba is it"  # both ends below `a` are under the threshold
    assert [r.prompt for r in asked if r.prompt.startswith("extend")] == ["extend ", "extend a", "extend b"]
    first, asked = ask(tree_of_thought(ROW, PLAIN, toy(), search(order="depth", threshold=1.5)), toy_model)
    assert first.answer == "ab is it" and "extend b" not in [r.prompt for r in asked]  # the first whole state ends it
    nothing, _ = ask(tree_of_thought(ROW, PLAIN, toy(), search(order="depth", threshold=9.5)), toy_model)
    assert nothing.answer is None and not nothing.samples[0].finished
    short, asked = ask(tree_of_thought(ROW, PLAIN, toy(), search(order="depth", threshold=4.0, nodes=2)), toy_model)
    assert short.answer is None and len([r for r in asked if r.prompt.startswith("extend")]) == 2


@pytest.mark.parametrize("settings, message", [
    ({"beam": 0}, "of at least 1"), ({"order": "depth", "judge": "vote"}, "votes have none")])
def test_bad_search(settings, message):
    with pytest.raises(ValueError, match=message):
        ask(tree_of_thought(ROW, PLAIN, toy(), search(**settings)), toy_model)
    with pytest.raises(ValueError, match="no prompt to judge states by vote"):
        game = game_of_24({**ROW, "numbers": [1, 2, 3, 4]}, PLAIN, step_tokens=9)
        ask(tree_of_thought(ROW, PLAIN, game, search(judge="vote")), toy_model)


def test_steps_are_sampled_from_the_solution_so_far_and_judged_by_the_reward_model():
    steps = {"": ["Start 3", "Start 2"], "Start 2.": ["2 + 3 = 5", "2 + 3 = 6"], "Start 2. 2 + 3 = 5.": ["The answer is 5"] * 2,
             "Start 3.": ["3 + 3 = 6"] * 2, "Start 3. 3 + 3 = 6.": ["The answer is 6"] * 2, "Start 2. 2 + 3 = 6.": ["The answer is 6"] * 2}

    def say(request):
        return steps[request.prompt.rpartition("Answer:")[2].strip()][request.sample]

    wanted = "Start 2. 2 + 3 = 5. The answer is 5."
    judge = scores(lambda text: float(wanted.startswith(text)))
    puzzle = worked_steps(ROW, PLAIN, step_tokens=12)
    found, asked = ask(tree_of_thought(ROW, PLAIN, puzzle, Search(judge="reward", width=2, beam=1, depth=5)), say, judge)
    assert found.answer == "5" and found.samples[0].text == wanted
    assert asked[0].stop[0] == "." and asked[-1].prompt.endswith("Answer: Start 2. 2 + 3 = 5.")
    chat = worked_steps(ROW, CHAT, step_tokens=12).extend(("Start 2.",))
    assert chat[-1] == {"role": "assistant", "content": "Start 2."}


def test_game_of_24_keeps_the_rules_and_is_solved():
    puzzle = game_of_24({**ROW, "numbers": [4, 9, 10, 13]}, PLAIN, step_tokens=40)
    offered = "13 - 9 = 4 (left: 4 4 10)\n10 - 4 = 7 (left: ...)\n9 * 9 = 81\n13 - 9 = 4\n10 / 4 = 5/2"
    assert puzzle.read((), offered) == ["13 - 9 = 4", "10 / 4 = 5/2"]  # wrong sum, a number used twice, and the same again are left out
    state = ("13 - 9 = 4", "10 - 4 = 6", "4 * 6 = 24")
    assert puzzle.finished(state) and eval(puzzle.answer(state)) == 24
    assert sorted(re.findall(r"\d+", puzzle.answer(state)), key=int) == ["4", "9", "10", "13"]
    assert puzzle.extend(state[:1]).endswith("Numbers: 4 4 10\nNext steps:\n")
    assert puzzle.rate("6 * 4 = 24\nsure") > puzzle.rate("likely") > puzzle.rate("impossible") > puzzle.rate("?")

    def say(request):  # proposes every step there is, and knows that 24 alone is worth something in the end
        numbers = request.prompt.rpartition("Numbers: ")[2].split("\n")[0].split()
        if request.stage.startswith("value"):
            return "sure" if numbers in (["24"], ["4", "6"], ["4", "4", "10"]) else "impossible"
        return "\n".join(f"{a} {sign} {b} = {eval(a + sign + b):g}" for i, a in enumerate(numbers) for j, b in enumerate(numbers)
                         if i != j and "/" not in a + b for sign in "+-*")
    found, _ = ask(tree_of_thought(ROW, PLAIN, puzzle, search(depth=3, beam=2, width=40)), say)
    assert eval(found.answer) == 24
    with pytest.raises(ValueError, match='has 3 "numbers", not 4'):
        game_of_24({**ROW, "numbers": [1, 2, 3]}, PLAIN, step_tokens=9)


def test_refine_stops_at_no_fault_at_a_repeat_and_at_its_rounds():
    def model(*reviews, refined="The answer is 5."):
        said = iter(reviews)
        return lambda r: next(said) if r.stage.startswith("review") else "The answer is 4." if r.stage == "worked" else refined

    right, asked = ask(self_refine(ROW, CHAT), model("Step 1 is wrong.", "No mistake."))
    assert [r.stage for r in asked] == ["worked", "review/0", "refine/0", "review/1"]
    assert right.answer == "5" and right.answers == ("4", "5")
    assert right.cost.requests == 4 and asked[2].prompt[-2]["content"] == "Step 1 is wrong."
    at_once, asked = ask(self_refine(ROW, CHAT), model("No mistake."))
    assert len(asked) == 2 and at_once.answer == "4"
    same, asked = ask(self_refine(ROW, PLAIN), model("Wrong.", "Wrong.", refined="The answer is 4."))
    assert len(asked) == 3 and same.answer == "4"
    numbers = iter(range(9))
    _, asked = ask(self_refine(ROW, PLAIN, rounds=2),
                   lambda r: "Wrong." if r.stage.startswith("review") else f"The answer is {next(numbers)}.")
    assert len(asked) == 5
    lost, _ = ask(self_refine(ROW, PLAIN, rounds=1), model("Wrong.", refined="I do not know"))
    assert lost.answer == "4"  # a refinement that states nothing does not take the answer away
    assert not finds_no_fault("There is no mistake except in step 2.") and finds_no_fault("There is no mistake.")
    with pytest.raises(ValueError, match="at least one round"):
        ask(self_refine(ROW, PLAIN, rounds=0), model())


def test_gain_is_high_where_votes_are_contested_and_few():
    assert doubt({}) == 0.5 and doubt({"a": 1}) == pytest.approx(1 / 4) and doubt({"a": 3}) == pytest.approx(1 / 16)
    order = [gain(counts) for counts in ({}, {"a": 1, "b": 1}, {"a": 1}, {"a": 10, "b": 10}, {"a": 3}, {"a": 9, "b": 1})]
    assert order == sorted(order, reverse=True) and order[0] == pytest.approx(0.25)


def test_a_budget_looks_at_a_question_once_a_sample(monkeypatch):
    looked = []
    monkeypatch.setattr(allocation, "gain", lambda counts: looked.append(1) or 1.0)
    rows = [{**ROW, "id": str(i)} for i in range(60)]
    fake = Fake(lambda r: "The answer is 5.")
    [(_, solutions)] = run([budgeted(rows, [()] * 60, PLAIN, budget=50 * 60, most=5, temperature=1.0, round_size=4)], fake, batch_size=8)
    assert len(looked) <= sum(s.cost.requests for s in solutions) and {s.cost.requests for s in solutions} == {5}


def test_budget_goes_to_the_contested_question_and_is_kept():
    rows = [{**ROW, "id": name} for name in ("sure", "contested", "mute")]
    fake = Fake(lambda r: "The answer is 5." if r.question == "sure" else
                f"The answer is {r.sample % 2}." if r.question == "contested" else "I do not know at")

    def allocate(batch_size, budget=160):
        fake.asked = []
        [(_, solutions)] = run([budgeted(rows, [()] * 3, PLAIN, budget=budget, most=30, temperature=1.0, round_size=2)], fake,
                               batch_size=batch_size)
        return solutions, fake.asked
    solutions, asked = allocate(8)
    used = dict(zip(("sure", "contested", "mute"), (s.cost.requests for s in solutions), strict=True))
    assert used["contested"] > 2 * used["sure"] and used["contested"] > used["mute"] >= 1
    assert 160 - 50 < sum(s.cost.generated_tokens for s in solutions) <= 160  # less than one answer at full length is left
    assert allocate(1) == (solutions, asked)
    with pytest.raises(ValueError, match="at least 50 tokens a question"):
        allocate(8, budget=149)


def test_scheduler_keeps_few_strategies_alive_and_lets_each_go_on():
    alive, most, began, batches = set(), [0], [], []

    def strategy(i, rounds):
        alive.add(i)
        began.append(i)
        most[0] = max(most[0], len(alive))
        for stage in range(rounds):
            yield [Request(prompt="", question=str(i), stage=str(stage))]
        alive.discard(i)
        return i

    def generate(requests):
        batches.append([int(r.question) for r in requests])
        return [Result(text="", prompt_tokens=1, generated_tokens=1, finish="stop") for _ in requests]
    finished = list(run((strategy(i, 7 if i == 0 else 1) for i in range(1000)), SimpleNamespace(generate=generate), batch_size=10))
    assert most[0] <= 10 and began == list(range(1000)) and sorted(finished) == [(i, i) for i in range(1000)]
    assert [0 in batch for batch in batches[:8]] == [True] * 7 + [False]  # its next round is in the very next batch
    assert {len(batch) for batch in batches[:-1]} == {10}  # and what it does not need goes to others


def test_a_wide_round_of_others_does_not_hold_back_who_began_first():
    batches = []

    def strategy(i):  # a narrow round, a wide one, a narrow one
        for stage, width in enumerate((1, 10, 1)):
            yield [Request(prompt="", question=str(i), stage=str(stage), sample=n) for n in range(width)]

    def generate(requests):
        batches.append([(int(r.question), r.stage) for r in requests])
        return [Result(text="", prompt_tokens=1, generated_tokens=1, finish="stop") for _ in requests]
    list(run((strategy(i) for i in range(10)), SimpleNamespace(generate=generate), batch_size=10))
    assert (0, "2") in batches[2]  # its last round follows its wide one; in a plain queue it would wait for nine of them
