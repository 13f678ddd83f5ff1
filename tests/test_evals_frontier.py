"""The frontier and the table of pairs on records worked by hand."""
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from prompts.intervals import wilson
from stages import evaluation
from stages.evals import commands
from stages.evals import frontier as f
from stages.evals.pairs import pairs
from stages.evals.scoring import clusters_of, shares
from stages.evals.statistics import compare, holm, mcnemar
from stages.run.manifest import Manifest


def row(i, answers, *, tokens=10, cost=None, template=None, gold="1"):
    """A record as the evaluation leaves it, its votes in `answers` ('1' is right); with `cost`: (requests, prompt, generated)."""
    counts = [a for a in answers if a is not None]
    answer = max(counts, key=counts.count, default=None)
    named = dict(zip(("requests", "prompt_tokens", "generated_tokens"), cost, strict=True)) if cost else None
    return {"id": i, "gold": gold, "answer": answer, "correct": answer == gold, "tie": False, "difficulty": 1,
            "samples": [{"answer": a, "correct": a == gold, "tokens": tokens} for a in answers], **({"cost": named} if named else {}),
            **({"template": template} if template else {})}


def made(right: dict[str, list[str]], **more):
    return {strategy: [row(str(i), list(answers), **more) for i, answers in enumerate(rows)] for strategy, rows in right.items()}


def test_points_of_a_vote_by_hand():
    records = [row("a", "112", tokens=10, cost=(3, 60, 30)), row("b", "222", tokens=20, cost=(3, 90, 60))]
    one, two, three = f.points_of("self_consistency", records)
    assert [p.k for p in (one, two, three)] == [1, 2, 3]
    assert one.right.tolist() == pytest.approx([2 / 3, 0]) and three.right.tolist() == [1, 0]
    assert two.right.tolist() == pytest.approx([1 / 3 + 2 / 3 / 2, 0])  # 11 in one pair of three; 12 and 12 tie: half of them begins with 1
    assert one.prompt.tolist() == [20, 30] and one.generated.tolist() == [10, 20]
    assert two.tokens(True).tolist() == [60, 100] and two.tokens(False).tolist() == [20, 40]
    [whole] = f.points_of("tree", records)
    assert whole.k is None and whole.right.tolist() == [1, 0] and whole.tokens(True).tolist() == [90, 150]


def test_one_form_may_be_right_in_one_way_of_writing_and_wrong_in_another():
    """In the game of 24 all that makes 24 is one candidate, and some of it uses the wrong numbers: the first seen stands for all."""
    record = row("a", ["4*6*1*1", "24", "3*8"], gold="4*6*1*1") | {"answer_type": "expression"}
    assert [p.right.tolist() for p in f.points_of("self_consistency", [record])] == [pytest.approx([1 / 3])] * 3


def test_the_ledger_counts_and_where_there_is_none_it_is_said():
    """A strategy's critique is in its cost and not among its samples; without a cost its prompts are unknown, and left out for all."""
    ledger = made({"critique": ["1", "1"]}, tokens=10, cost=(3, 100, 55))
    plain = made({"direct": ["1", "2"]}, tokens=7)
    both = f.frontier(ledger)
    assert both["counted"] == "prompt and generated" and both["points"][0]["tokens"] == 155
    mixed = f.frontier(ledger | plain)
    assert mixed["counted"] == "generated" and [p["tokens"] for p in mixed["points"]] == [55, 7]
    assert [p["prompt_tokens"] for p in mixed["points"]] == [100, None]


def test_chains_that_stopped_early_are_no_curve():
    records = [row("a", "11"), row("b", "1212")]
    assert [p.k for p in f.points_of("self_consistency", records)] == [None]


def test_pareto_by_hand():
    #          cheapest, dominated by first, better, dearer and no better, equal to the third
    assert f.pareto([1, 2, 3, 4, 3], [0.5, 0.4, 0.7, 0.7, 0.7]) == [True, False, True, False, True]
    # two kinds of cost: the last needs less of the second
    assert f.pareto([(1, 5), (2, 6), (3, 1)], [0.5, 0.5, 0.4]) == [True, False, True]


def test_budget_is_matched_between_measured_points_only():
    curve = f.points_of("self_consistency", [row("a", "112", tokens=10), row("b", "222", tokens=10)])
    assert f.at_budget(curve, 9.9, True) is None and f.at_budget(curve, 30.1, True) is None
    k, right = f.at_budget(curve, 25, True)
    assert k == pytest.approx(2.5) and right.tolist() == pytest.approx([(2 / 3 + 1) / 2, 0])  # half with 2 chains, half with 3
    assert f.at_budget(curve, 10, True)[0] == 1.0 and f.at_budget(curve, 30, True)[1].tolist() == [1, 0]
    assert f.at_budget([], 10, True) is None


def test_a_mixture_of_votes_has_the_cost_and_accuracy_on_the_line():
    """What the interpolation claims, done: each question is given 2 or 3 chains by a coin, and voted on."""
    rng = random.Random(0)
    records = [row("a", "112", tokens=10), row("b", "122", tokens=10)]
    k, right = f.at_budget(f.points_of("self_consistency", records), 24, True)
    spent = got = 0
    for _ in range(20_000):
        for r in records:
            draw = rng.sample([s["answer"] for s in r["samples"]], 3 if rng.random() < k - 2 else 2)
            spent, got = spent + 10 * len(draw), got + (max(dict.fromkeys(draw), key=draw.count) == "1")
    assert spent / 40_000 == pytest.approx(24, abs=0.1) and got / 40_000 == pytest.approx(right.mean(), abs=0.01)


def test_frontier_of_a_task():
    rng = random.Random(1)
    votes = [[rng.choices("123", [0.55, 0.25, 0.2])[0] for _ in range(8)] for _ in range(60)]
    cells = {"direct": [row(str(i), [rng.choices("12", [0.2, 0.8])[0]], tokens=5) for i in range(60)],
             "self_consistency": [row(str(i), v, tokens=40) for i, v in enumerate(votes)],
             "tree": [row(str(i), [rng.choices("12", [0.3, 0.7])[0]], tokens=180) for i in reversed(range(60))]}  # another order
    found = f.frontier(cells)
    points = {(p["strategy"], p["k"]): p for p in found["points"]}
    assert found["n"] == 60 and len(points) == 10 and [points["self_consistency", k]["tokens"] for k in (1, 8)] == [40, 320]
    one, direct = points["self_consistency", 1], points["direct", None]
    assert one["accuracy"] == pytest.approx(np.mean(shares(cells["self_consistency"])))
    assert direct["ci95"] == list(wilson(round(direct["accuracy"] * 60), 60)) and direct["pareto"]
    assert not points["tree", None]["pareto"] and points["tree", None]["pareto_share"] < 0.05 and direct["pareto_share"] == 1.0
    [match] = found["matched"]
    assert found["unmatched"] == ["direct"] and match["strategy"] == "tree" and match["k"] == pytest.approx(4.5)
    between = [points["self_consistency", k]["accuracy"] for k in (4, 5)]
    assert match["against_accuracy"] == pytest.approx(sum(between) / 2) and match["difference"] < 0 and match["ci95"][1] < 0
    assert match["difference"] == pytest.approx(match["accuracy"] - match["against_accuracy"]) and match["n"] == 60 and match["p"] < 0.01


def test_cells_of_different_problems_are_refused():
    cells = {"direct": [row("a", "1"), row("b", "1")], "tree": [row("a", "1"), row("c", "1")]}
    with pytest.raises(ValueError, match="sft, maths: 2 problems were asked of one strategy and not of another, such as 'b'"):
        f.frontier(cells, "sft, maths")
    with pytest.raises(ValueError, match="2 problems were asked"):
        pairs({("sft", "maths", strategy): rows for strategy, rows in cells.items()})


def test_templates_widen_the_bands():
    right = ["1"] * 20 + ["2"] * 20
    alone = f.frontier({"direct": [row(str(i), a) for i, a in enumerate(right)]})["points"][0]["ci95"]
    grouped = f.frontier({"direct": [row(str(i), a, template=f"t{i // 5}") for i, a in enumerate(right)]})["points"][0]["ci95"]
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_clusters_of_records():
    rows = [row("a", "1", template="t"), row("b", "1", template="t"), row("c", "1")]
    assert clusters_of(rows) == ["t", "t", ("no template", "c")]
    assert clusters_of(rows[:2]) is None and clusters_of(rows[2:]) is None  # one template; none


def test_every_pair_is_compared_and_p_adjusted_over_the_table():
    rng = random.Random(2)

    def answers(share, votes=1):
        return [[rng.choices("12", [share, 1 - share])[0] for _ in range(votes)] for _ in range(50)]

    cells = {(model, "maths", strategy): [row(str(i), a) for i, a in enumerate(answers(share, 5 if strategy == "self_consistency" else 1))]
             for model, strategy, share in (("sft", "self_consistency", 0.7), ("sft", "zero_shot_cot", 0.6), ("sft", "direct", 0.2),
                                            ("sft", "tree", 0.5), ("ppo", "direct", 0.25))}
    found = pairs(cells)
    names = {(r["a"], r["b"]) for r in found}
    # sampled_cot comes with the vote: five strategies of sft, and ppo against sft on direct
    assert len(found) == len(names) == 5 * 4 / 2 + 1 and all(r["family"] == 11 for r in found)
    assert {("sft/self_consistency", "sft/zero_shot_cot"), ("sft/self_consistency", "sft/sampled_cot"), ("sft/zero_shot_cot", "sft/direct"),
            ("sft/tree", "sft/self_consistency"), ("ppo/direct", "sft/direct")} <= names
    assert [r["p_holm"] for r in found] == holm([r["p"] for r in found])
    greedy = next(r for r in found if (r["a"], r["b"]) == ("sft/zero_shot_cot", "sft/direct"))
    sides = [[float(r["correct"]) for r in cells["sft", "maths", s]] for s in ("zero_shot_cot", "direct")]
    assert greedy["p"] == mcnemar(greedy["only_a"], greedy["only_b"]) and {**greedy, **compare(*sides)} == greedy
    assert pairs({}) == []


def test_flops_by_hand():
    points = [{"model": "small", "parameters": 1e6, "training_tokens": 2e7, "tokens": 100, "accuracy": 0.5},
              {"model": "small", "parameters": 1e6, "training_tokens": 2e7, "tokens": 50, "accuracy": 0.5},
              {"model": "large", "parameters": 1e7, "training_flops": 1e15, "tokens": 10, "accuracy": 0.7}]
    found = f.compute(points)
    assert [p["training_flops"] for p in found] == [1.2e14, 1.2e14, 1e15]  # 6ND; as counted
    assert [p["inference_flops"] for p in found] == [2e8, 1e8, 2e8] and [p["pareto"] for p in found] == [False, True, True]
    assert f.compute([]) == []
    with pytest.raises(ValueError, match="training_flops, or training_tokens"):
        f.compute([{"parameters": 1.0, "tokens": 1.0, "accuracy": 0.1}])


def test_an_evaluation_has_a_frontier_a_model_and_task():
    cells = {(model, task, strategy): [row(str(i), a) for i, a in enumerate(["1", "2"])]
             for model, task, strategy in itertools.product(["sft", "ppo"], ["maths", "letters"], ["direct", "few_shot"])}
    cells["base", "maths", "direct"] = cells["sft", "maths", "direct"]  # a single point is no frontier
    assert [(x["model"], x["task"], len(x["points"])) for x in f.frontiers(cells)] == [
        (m, t, 2) for m in ("sft", "ppo") for t in ("maths", "letters")]


def test_a_model_s_training_is_that_of_its_stages():
    cells = {(model, "maths", strategy): [row("a", "1", cost=(1, 30, 10)), row("b", "2", cost=(1, 30, 20))]
             for model in ("base", "sft", "ppo", "other") for strategy in ("direct", "few_shot")}
    runs = {"pretrain": {"counts": {"flops": 1e13, "matmul_parameters": 1000}, "parents": {"prepare": ""}},
            "sft": {"counts": {"flops": 2e12}, "parents": {"prepare": "", "pretrain": ""}},
            "ppo": {"counts": {}, "parents": {"sft": ""}}}
    found = f.computed(f.frontiers(cells), runs)
    assert [(p["model"], p["training_flops"], p["inference_flops"]) for p in found] == [
        *[("base", 1e13, 2 * 1000 * 45)] * 2, *[("sft", 1.2e13, 2 * 1000 * 45)] * 2]  # PPO's FLOPs were not counted
    assert [p["pareto"] for p in found] == [True, True, False, False]
    runs["ppo"] = {"counts": {"flops": 3e12}, "parents": {"sft": ""}}  # on a rule: no reward model
    assert [p["training_flops"] for p in f.computed(f.frontiers(cells), runs)][-1] == 1.5e13
    runs["ppo"]["parents"] = {"sft": "", "reward_model": ""}
    assert "ppo" not in {p["model"] for p in f.computed(f.frontiers(cells), runs)}  # the reward model is not there
    runs |= {"reward_model": {"counts": {"flops": 4e12}, "parents": {"sft": "", "preferences": ""}},
             "preferences": {"counts": {"flops": 0}, "parents": {"sft": ""}}}  # people ranked: no model computed anything
    assert [p["training_flops"] for p in f.computed(f.frontiers(cells), runs)][-1] == 1.9e13
    del runs["preferences"]["counts"]["flops"]
    assert "ppo" not in {p["model"] for p in f.computed(f.frontiers(cells), runs)}
    assert f.computed(f.frontiers(cells), {}) == []


def priced(model, parameters, accuracy, *, k=None, training=1e12, tokens=100, task="maths"):
    return {"model": model, "task": task, "strategy": "self_consistency" if k else "zero_shot_cot", "k": k, "parameters": parameters,
            "training_flops": training, "inference_flops": 2.0 * parameters * tokens, "tokens": tokens, "counted": "prompt and generated",
            "accuracy": accuracy, "ci95": [accuracy - 0.1, accuracy + 0.1], "n": 50, "pareto": True}


SMALL = [priced("sft", 1e5, 0.5), priced("sft", 1e5, 0.75, k=8, tokens=800), priced("sft", 1e5, 0.3, task="letters")]
LARGE = [priced("sft", 1e6, 0.7, training=1e13), priced("ppo", 1e6, 0.9, training=2e13)]


def test_sizes_stand_side_by_side():
    found = f.joined([SMALL, LARGE])
    assert [p["model"] for p in found] == ["sft 100k"] * 3 + ["sft 1M", "ppo 1M"]
    assert [p["pareto"] for p in found] == [True, True, True, False, True]  # eight answers of the small one are cheaper and better
    with pytest.raises(ValueError, match="two evaluations hold a model 'sft 1M'"):
        f.joined([LARGE, SMALL, LARGE[:1]])


def test_the_cheapest_way_depends_on_how_much_is_asked():
    points = [p for p in f.joined([SMALL, LARGE]) if p["task"] == "maths"]
    vote, greedy, ppo = points[1], points[2], points[3]
    assert f.cheapest(points, 0.7, 0) == (vote, 1.6e8) and f.cheapest(points, 0.7, 1e4) == (vote, 1e12 + 1.6e12)
    assert f.cheapest([greedy, ppo], 0.7, 1e4) == (greedy, 1e13 + 2e12)  # as dear an answer, less training
    cheap = {**ppo, "inference_flops": 1e8}
    assert f.cheapest([greedy, cheap], 0.7, 1e4)[0] is greedy and f.cheapest([greedy, cheap], 0.7, 1e6)[0] is cheap
    assert f.cheapest(points, 0.95, 1e4) is None


def evaluation_of(folder, points, problems="sha256:1"):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"compute": points}))
    (folder / "manifest.json").write_text(json.dumps({"stage": "evaluation", "fingerprint": "f",
                                                      "inputs": {"prompts": str(folder), "task maths": problems},
                                                      "products": {"results": {"path": "results.json"}}}))
    return str(folder)


def test_command_puts_evaluations_together(tmp_path, capsys):
    runs = [evaluation_of(tmp_path / name, points) for name, points in (("small", SMALL), ("large", LARGE))]
    commands.frontier([*runs, "--questions", "1e4", "--out", str(tmp_path / "out")])
    assert len(json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]) == 5
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {"maths.svg", "letters.svg"}
    shown = (tmp_path / "out" / "frontier.md").read_text()
    assert shown.strip() in capsys.readouterr().out
    assert "| sft 100k | 1e+12 | 0.500 [0.400, 0.600], 20M | 0.750 [0.650, 0.850], 160M | 0.300 [0.200, 0.400], 20M | - |" in shown
    assert "| maths | 0.7 | sft 100k, vote of 8: 160M | sft 100k, vote of 8: 2.6e+12 |" in shown
    assert "| maths | 0.8 to 0.9 | ppo 1M, zero_shot_cot: 200M | ppo 1M, zero_shot_cot: 2.2e+13 |" in shown
    assert "0.95" not in shown  # nobody is so good
    with pytest.raises(ValueError, match="asked other problems"):
        commands.frontier([runs[0], evaluation_of(tmp_path / "other", LARGE, "sha256:2"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="no model of these evaluations has a price"):
        commands.frontier([evaluation_of(tmp_path / "none", []), "--out", str(tmp_path / "out")])
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps({"stage": "sft", "products": {"model": {"path": "model"}}}))
    with pytest.raises(ValueError, match="is a sft run: give finished evaluations"):
        commands.frontier([str(tmp_path / "sft"), "--out", str(tmp_path / "out")])


def test_command_is_reached_by_its_name(tmp_path):
    """Through the command line of the stage, as the documents give it."""
    run = evaluation_of(tmp_path / "small", SMALL)
    done = subprocess.run([sys.executable, "-m", "stages.evaluation", "frontier", run, "--out", str(tmp_path / "out")],
                          capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "frontier.md").is_file(), done.stderr
    done = subprocess.run([sys.executable, "-m", "stages.evaluation", "frontir", run], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'frontir': give score, frontier, emergence, or --config")


def finished(folder, counts, **parents):
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"stage": folder.name, "fingerprint": f"f {folder.name}", "parents": parents,
                                                      "counts": counts, "products": {}}))
    return Manifest(folder)


def test_ppo_alone_is_priced_by_the_runs_it_came_from(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("pretrain", "sft", "ppo", "reward_model")}
    finished(tmp_path / "pretrain", {"flops": 1e13, "matmul_parameters": 1000})
    finished(tmp_path / "sft", {"flops": 2e12}, pretrain="f pretrain")
    ppo = finished(tmp_path / "ppo", {"flops": 3e12}, sft="f sft", reward_model="not there")
    found = evaluation.ancestry({"ppo": ppo}, paths)
    assert list(found) == ["ppo", "sft", "pretrain"]
    cells = {("ppo", "maths", strategy): [row("a", "1", cost=(1, 30, 10))] for strategy in ("direct", "few_shot")}
    runs = {name: run.data for name, run in found.items()}
    assert f.computed(f.frontiers(cells), runs) == []  # what it learned from is not there, and neither is its price
    runs["ppo"] = ppo.data | {"parents": {"sft": "f sft"}}
    assert [p["training_flops"] for p in f.computed(f.frontiers(cells), runs)] == [1.5e13] * 2
    (tmp_path / "pretrain" / "manifest.json").write_text(json.dumps({"stage": "pretrain", "fingerprint": "another"}))
    assert list(evaluation.ancestry({"ppo": ppo}, paths)) == ["ppo", "sft"]  # what is there now is not what SFT was made from
