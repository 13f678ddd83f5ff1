"""The figures of a cell, and paired comparisons of cells, worked by hand. (Samples from elsewhere: test_evals_recorded.py.)"""
from dataclasses import replace

import pytest

from prompts.intervals import wilson
from prompts.records import Request, Result, Step
from prompts.strategies import conclude
from stages.evals import scoring


def made(id, gold, *texts):
    row = {"id": id, "task": "t", "difficulty": 1, "question": "?", "answer": gold, "solutions": [["Start 2."]]}
    samples = [Result(text=t, prompt_tokens=4, generated_tokens=8, finish="stop" if t.endswith(".") else "length") for t in texts]
    trace = tuple(Step(Request(prompt="?", question=id), sample) for sample in samples)
    return scoring.record(row, replace(conclude(samples), trace=trace))


def test_cell_by_hand():
    records = [made("a", "2", "Start 2. The answer is 2.", "The answer is 3."), made("b", "4", "The answer is 4.", "Start 2. The answer")]
    cell = scoring.summary(records)
    assert (cell["accuracy"], cell["n"], cell["unparsed"], cell["ties"], cell["tokens_mean"]) == (1.0, 2, 1, 1, 16.0)
    assert cell["finished"] == 0.75 and cell["in_format"] == 0.75 and cell["unparsed_rate"] == 0.25
    # all right; nothing right; answer right; a step right but no answer, no end and one sentence too many
    assert cell["gold_score"] == pytest.approx((1.5 + 0 + 1 + 0.5 - 0.3) / 4)
    sampled = scoring.sampled_summary(records)
    assert sampled["accuracy"] == 0.5 and sampled["tokens_mean"] == 8.0 and sampled["unparsed_rate"] == 0.25
    assert sampled["pass_at_k"] == {"1": 0.5, "2": 1.0}  # either chain of two; both problems have one that is right
    # 0 and 1 within each problem, half of them right in both: all of the spread is within
    assert sampled["variance"]["within"] == 0.5 and sampled["variance"]["between"] == 0


def test_chains_that_are_all_wrong_have_an_interval():
    wrong = scoring.sampled_summary([made(id, "2", "The answer is 1.", "The answer is 3.") for id in "abcd"])
    assert wrong["accuracy"] == 0 and wrong["bootstrap95"] == list(wilson(0, 4)) and wrong["pass_at_k"]["2"] == 0
    assert scoring.sampled_summary([made("a", "2", "The answer is 2.")])["variance"] is None


def test_comparisons_pair_by_problem():
    greedy = [made("a", "2", "The answer is 2."), made("b", "4", "The answer is 1."), made("c", "4", "The answer is 1.")]
    votes = [made("c", "4", "The answer is 4.", "The answer is 1."), made("a", "2", "The answer is 2.", "The answer is 2."),
             made("b", "4", "The answer is 1.", "The answer is 1.")]  # another order
    cells = {("sft", "t", "zero_shot_cot"): greedy, ("sft", "t", "self_consistency"): votes}
    found = {(c["a"], c["b"]): c for c in scoring.comparisons(cells)}
    greedy_pair = found["sft/self_consistency", "sft/zero_shot_cot"]
    assert (greedy_pair["only_a"], greedy_pair["only_b"]) == (1, 0) and greedy_pair["difference"] == pytest.approx(1 / 3)
    assert found["sft/self_consistency", "sft/sampled_cot"]["difference"] == pytest.approx((0.5 + 0 + 0) / 3)


def test_cells_count_what_the_program_says_where_equality_cannot_judge():
    row = {"id": "a", "task": "game24", "difficulty": 1, "question": "?", "answer": "(1 * 1) * (4 * 6)", "solutions": [],
           "numbers": [1, 1, 4, 6], "verifier": "game24"}
    results = [Result(text=f"The answer is {answer}.", prompt_tokens=4, generated_tokens=5, finish="stop")
               for answer in ("4 * 6 / 1 / 1", "24", "6 * 4 * 1")]
    records = [scoring.record(row, conclude([result])) for result in results]
    asked = scoring.record(row | {"question": "Why?"}, conclude([results[0]]))  # for who reads the answers, and not kept in memory
    assert asked == records[0] | {"question": "Why?"} and "question" not in scoring.without_texts(asked)
    assert [r["correct"] for r in records] == [r["samples"][0]["correct"] for r in records] == [True, False, False]
    cell = scoring.summary(records)
    assert cell["accuracy"] == 1 / 3 and cell["n"] == 3 and cell["unanswered"] == 0 and scoring.shares(records) == [1, 0, 0]


def test_chains_of_a_vote_that_stopped_early_are_no_draws_of_their_own():
    greedy = [made(id, "2", "The answer is 2.") for id in "ab"]
    early = [made("a", "2", "The answer is 2.", "The answer is 2."), made("b", "2", *["The answer is 2.", "The answer is 1."] * 2)]
    cells = {("sft", "t", "zero_shot_cot"): greedy, ("sft", "t", "self_consistency"): early}
    assert [c["b"] for c in scoring.comparisons(cells)] == ["sft/zero_shot_cot"]


def test_comparisons_count_templates_as_units():
    def side(wrong):
        return [made(str(i), "2", f"The answer is {1 if i // 5 in wrong else 2}.") | {"template": i // 5} for i in range(20)]
    cells = {("sft", task, strategy): side(wrong) for task in "tu" for strategy, wrong in (("direct", {0, 1}), ("zero_shot_cot", {2}))}
    found = {c["task"]: c for c in scoring.comparisons(cells)}
    assert found["t"]["clusters"] == 4 and found["all"]["clusters"] == 8 and found["all"]["n"] == 40  # t's template 0 is not u's
    assert found["t"]["test"] == "sign flips of clusters"


def test_requests_that_are_no_samples_can_lack_room():
    record = made("a", "2", "The answer is 2.") | {"steps": [{"finish": "too_long"}, {"finish": "missing"}, {"finish": "stop"}]}
    cell = scoring.summary([record, made("b", "2", "The answer is 2.")])
    assert (cell["too_long"], cell["missing"]) == (1, 1)
