"""The laws' subcommands: one JSON object each, one line on bad input and nothing written; tables read with their faults named."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from stages.laws.commands import command
from stages.laws.emergence import emergence, exact_match, monotone
from stages.laws.fit import law
from stages.laws.points import read_columns
from stages.laws.variants import effective_tokens, supported, without_excess

TRUE = (0.3, 20.0, 300.0, 0.4, 0.5)
SELECT = ["--n-column", "size", "--where", "kind=a", "--draws", "20"]


def table(path, columns, *values):
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in zip(*values, strict=True))]))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    N, D = np.repeat([5e4, 1e5, 2e5, 5e5], 3), np.tile([3e5, 1e6, 4e6], 4)
    loss = law(TRUE, N, D) * np.exp(2e-3 * np.random.default_rng(0).standard_normal(12))
    return table(tmp_path / "runs.csv", ["size", "D", "C", "loss", "kind", "run"], [*N, 1], [*D, 1], [*(9 * N * D), 1], [*loss, "nan"],
                 [*"a" * 12, "b"], [*range(12), 12])


def printed(capsys, *arguments):
    assert command(list(arguments)) == 0
    return json.loads(capsys.readouterr().out)


def test_subcommands_print_json(runs, tmp_path, capsys):
    fit = str(tmp_path / "fit.json")
    found = printed(capsys, "fit", runs, *SELECT, "--out", fit)
    assert found["alpha"] == pytest.approx(0.4, rel=0.05) and "draws" not in found and "overtraining" in found
    assert {"nominal", "measured", "num_heldout"} <= set(found["coverage"]) and found["projection"]["excess"] < 1e-6
    written = json.loads((tmp_path / "fit.json").read_text())
    assert len(written["draws"]) == 20 and written["conventions"]["flops"] == "6 N D" and "not stated" in written["conventions"]["N"]
    predicted = printed(capsys, "predict", fit, "--params", "9e5", "--tokens", "1.6e6")
    low, high = predicted["loss"]["interval"]
    assert predicted["loss"]["widened"]["interval"][0] <= low < high <= predicted["loss"]["widened"]["interval"][1]
    assert predicted["loss"]["widened"]["reach"] == pytest.approx(9e5 * 1.6e6 / 2e12)
    assert low < predicted["loss"]["value"] < high and predicted["coverage"] == written["coverage"]
    assert predicted["loss"]["value"] == pytest.approx(float(law(TRUE, 9e5, 1.6e6)), rel=0.01)
    figures = printed(capsys, "plan", fit, "--flops", "1e13")
    assert figures["N"]["value"] * figures["D"]["value"] * 6 == pytest.approx(1e13)
    back = printed(capsys, "plan", fit, "--loss", str(figures["loss"]["value"]))
    assert back["flops"]["value"] == pytest.approx(1e13)
    used = printed(capsys, "plan", fit, "--loss", str(figures["loss"]["value"]), "--inference-tokens", "1e9", "--price-ratio", "2")
    assert used["N"]["value"] < figures["N"]["value"] and used["saved_share"]["value"] > 0
    report = printed(capsys, "holdout", runs, *SELECT, "--train-below-flops", "2e12")
    assert report["num_fitted"] + report["num_heldout"] == 12 and report["rolling"]["nominal"] == 0.95
    assert all(6 * row["N"] * row["D"] >= 2e12 for row in report["runs"])
    assert printed(capsys, "holdout", runs, *SELECT, "--fraction", "0.25")["num_heldout"] == 3


def test_figures_are_told_in_one_line_too(runs, tmp_path, capsys):
    fit = str(tmp_path / "fit.json")
    assert command(["fit", runs, *SELECT, "--n-convention", "matmul", "--out", fit]) == 0
    capsys.readouterr()
    assert command(["predict", fit, "--params", "9e5", "--tokens", "1.6e6"]) == 0
    printed = capsys.readouterr()
    loss = json.loads(printed.out)["loss"]
    assert printed.err.splitlines()[0] == ("loss {:.4g} [{:.4g}, {:.4g}], N 9e+05, D 1.6e+06".format(loss["value"], *loss["interval"]))
    assert command(["plan", fit, "--flops", "1e13"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert all(f"{name} {found[name]['value']:.4g} [" in printed.err.splitlines()[0] for name in ("N", "D", "loss"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["fti"], "unknown command 'fti': did you mean 'fit'?"),
    ([], "no command and no --config: give fit, predict, plan, holdout, isoflop or emergence with a table or fit.json, or --config "
     "recipes/<recipe>/scaling.yaml to train a ladder")])
def test_what_is_no_command_says_which_there_are(arguments, message):
    done = subprocess.run([sys.executable, "-m", "stages.scaling", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr == f"error: {message}\n"


def test_a_reader_that_has_seen_enough_is_no_error(runs, tmp_path):
    assert command(["fit", runs, *SELECT, "--out", str(tmp_path / "fit.json")]) == 0
    ask = [sys.executable, "-m", "stages.scaling", "predict", str(tmp_path / "fit.json"), "--params", "9e5", "--tokens", "1.6e6"]
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    done = subprocess.run(ask, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0 and done.stderr.startswith("loss ") and "error" not in done.stderr and "Broken" not in done.stderr


def test_conventions_travel_with_the_fit(runs, tmp_path, capsys):
    fit = str(tmp_path / "fit.json")
    conventions = printed(capsys, "fit", runs, *SELECT, "--c-column", "C", "--d-column", "D", "--n-convention", "matmul",
                          "--out", fit)["conventions"]
    assert conventions["flops_per_unit"] == pytest.approx(9) and "9 to 9 times N D" in conventions["flops"]
    assert conventions["N"] == "column size, matmul"
    figures = printed(capsys, "plan", fit, "--flops", "1e13")
    assert figures["N"]["value"] * figures["D"]["value"] * 9 == pytest.approx(1e13) and figures["conventions"] == conventions
    stands_for_D = printed(capsys, "fit", runs, *SELECT, "--c-column", "C")
    assert stands_for_D["conventions"]["D"] == "column C / 6 N" and stands_for_D["range"]["D"] == pytest.approx([4.5e5, 6e6])


def test_warnings_go_to_people_and_predictions(runs, tmp_path, capsys):
    fit = str(tmp_path / "fit.json")
    assert command(["fit", runs, *SELECT, "--out", fit]) == 0
    assert "warning: what N counts is not stated" in capsys.readouterr().err
    assert any("not stated" in text for text in printed(capsys, "predict", fit, "--params", "1e5", "--tokens", "1e6")["warnings"])


def test_repeated_data_and_experts_are_profiled(tmp_path, capsys):
    N, unique = np.tile(np.repeat([1e7, 4e7, 1.6e8, 6e8], 3), 2), np.tile([2e8, 1e9, 5e9], 8)
    D = unique * np.repeat([1, 20], 12)
    loss = law((1.87, 521.0, 1488.0, 0.353, 0.353), N, effective_tokens(D, unique, 15.0))
    repeated = table(tmp_path / "repeated.csv", ["N", "D", "U", "T", "loss"], N, D, unique, 4 * N, loss)
    fit = str(tmp_path / "fit.json")
    found = printed(capsys, "fit", repeated, "--unique-column", "U", "--draws", "5", "--out", fit)
    assert found["repetition"]["best"] == pytest.approx(15, rel=0.15) and "R* = 15" in found["conventions"]["D"]
    few = printed(capsys, "predict", fit, "--params", "1e8", "--tokens", "1e10", "--unique-tokens", "1e9")["loss"]["value"]
    assert few == pytest.approx(float(law((1.87, 521.0, 1488.0, 0.353, 0.353), 1e8, effective_tokens(1e10, 1e9, 15.0))), rel=2e-3)
    assert found["excess"]["best"] > 100  # parameters count in full here, also where the text supports fewer
    assert few > 1.01 * printed(capsys, "predict", fit, "--params", "1e8", "--tokens", "1e10", "--unique-tokens", "1e10")["loss"]["value"]
    refused(capsys, ["predict", fit, "--params", "1e8", "--tokens", "1e10"], "fitted with --unique-column: give --unique-tokens")
    refused(capsys, ["fit", repeated, "--unique-column", "U", "--total-column", "T"], "one profile at a time")
    refused(capsys, ["fit", repeated, "--total-column", "N"], "--total-column N equals --n-column N in every row")
    open_profile = printed(capsys, "fit", repeated, "--total-column", "T", "--draws", "5", "--out", fit)
    assert open_profile["experts"]["interval"] == [None, None]  # idle parameters in one proportion are only another unit
    assert any("experts profile is open" in text for text in open_profile["warnings"])
    assert printed(capsys, "predict", fit, "--params", "1e8", "--total-params", "4e8", "--tokens", "1e10")["loss"]["value"] > 0


def test_parameters_in_excess_are_profiled_where_there_are_some(tmp_path, capsys):
    N, unique = np.tile(np.repeat([1e7, 1e8, 1e9, 8e9], 3), 3), np.tile([2e8, 1e9, 5e9], 12)
    D, true = unique * np.repeat([1, 8, 40], 12), {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353}
    constants = tuple(true.values())
    worth = without_excess(N, supported(true, unique), 5.3)
    loss = law(constants, worth, effective_tokens(D, unique, 15.4))
    repeated = table(tmp_path / "excess.csv", ["N", "D", "U", "loss"], N, D, unique, loss)
    fit = str(tmp_path / "fit.json")
    found = printed(capsys, "fit", repeated, "--unique-column", "U", "--draws", "5", "--out", fit)
    assert found["excess"]["interval"][0] < 5.3 < found["excess"]["interval"][1] and "in excess" in found["conventions"]["N"]
    asked = printed(capsys, "predict", fit, "--params", "4e9", "--tokens", "1e10", "--unique-tokens", "1e9")["loss"]["value"]
    told = law(constants, without_excess(4e9, supported(true, 1e9), 5.3), effective_tokens(1e10, 1e9, 15.4))
    assert asked == pytest.approx(float(told), rel=0.02)
    assert asked > 1.02 * float(law(constants, 4e9, effective_tokens(1e10, 1e9, 15.4)))  # what the parameters would do if all counted


def test_isoflop_states_its_bias(tmp_path, capsys):
    C = np.repeat(np.geomspace(1e17, 1e20, 4), 9)
    N = np.sqrt(C / 6) * np.tile(np.geomspace(1 / 64, 64, 9), 4) * 0.3
    path = table(tmp_path / "iso.csv", ["C", "N", "loss"], C, N, law((1.7, 400.0, 400.0, 0.4, 0.3), N, C / 6 / N))
    found = printed(capsys, "isoflop", path, "--c-column", "C")
    assert found["bias"]["alpha"] == pytest.approx(0.4, rel=1e-3) and 1.02 < found["bias"]["factor_on_N"] < 1.1
    assert found["bias"]["a_by_the_sum"] == pytest.approx(3 / 7, rel=1e-3) and found["a"] == pytest.approx(3 / 7, abs=0.03)
    assert "bias" not in printed(capsys, "isoflop", path, "--c-column", "C", "--method", "akima")
    refused(capsys, ["isoflop", path], "needs --c-column")
    twice = table(tmp_path / "two.csv", ["C", "N", "loss"], [*C, *C], [*N, *N], [*law((1.7, 400.0, 400.0, 0.4, 0.3), N, C / 6 / N)] * 2)
    assert printed(capsys, "isoflop", twice, "--c-column", "C")["warnings"][0].startswith("36 rows repeat a size")


def test_settings_that_cannot_be_are_refused_before_the_fit(runs, tmp_path, capsys):
    refused(capsys, ["fit", runs, *SELECT[:-1], "-3"], "--draws -3 must not be negative")
    refused(capsys, ["fit", runs, *SELECT, "--out", str(tmp_path / "none" / "fit.json")], "there is no folder")


def refused(capsys, arguments, message):
    assert command(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


BAD = {
    "few": ("N,D,loss\n" + "\n".join(f"{n}e5,{n}e6,3.{9 - n}" for n in range(1, 6)), "5 runs of 5 sizes"),
    "negative": ("N,D,loss\n1e5,1e6,3\n2e5,2e6,-1\n", "loss is -1 in some row: it must be positive"),
    "same D": ("N,D,loss\n" + "\n".join(f"{n}e5,1e6,3.{9 - n}" for n in range(1, 9)), "D is 1e+06 in every row"),
    "column": ("N,tokens,loss\n1e5,1e6,3\n", "has no column 'D': it has N, tokens, loss"),
    "nan": ("N,D,loss\n1e5,1e6,3\n2e5,2e6,nan\n", "line 3: loss is nan, not finite"),
    "empty": ("N,D,loss\n1e5,1e6,3\n2e5,,3\n", "line 3: D is '', not a number"),
    "word": ("N,D,loss\n1e5,1e6,three\n", "line 2: loss is 'three', not a number"),
    "nothing": ("N,D,loss\n", "has no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_one_line_and_no_fit(case, tmp_path, capsys):
    text, message = BAD[case]
    (tmp_path / "runs.csv").write_text(text)
    refused(capsys, ["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "fit.json")], message)
    assert not (tmp_path / "fit.json").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["fit", "none.csv"], "does not exist"), (["fit", "RUNS", "--where", "kind"], "'kind' is no condition"),
    (["fit", "RUNS", "--n-column", "size", "--where", "kind=c"], "no usable rows with kind=c"),
    (["fit", "RUNS", *SELECT, "--drop-worst", "7"], "less 7, cannot determine"),
    (["fit", "RUNS", *SELECT, "--drop-worst", "-1"], "not be negative"),
    (["fit", "RUNS", *SELECT, "--floor", "9"], "between 0 and the lowest loss"),
    (["fit", "RUNS", *SELECT, "--delta", "0"], "must be positive"),
    (["predict", "RUNS", "--params", "1", "--tokens", "1"], "is not JSON"),
    (["holdout", "RUNS", *SELECT, "--train-below-flops", "1"], "0 runs lie below"),
    (["emergence", "RUNS", "--smooth-column", "loss"], "has no column 'flops'"),
    (["emergence", "RUNS", "--flops-column", "C", "--accuracy-column", "D", "--smooth-column", "loss", "--without", "kind=typo"],
     "--without kind=typo leaves out nothing")])
def test_bad_arguments_are_one_line(arguments, message, runs, capsys):
    refused(capsys, [runs if word == "RUNS" else word for word in arguments], message)


def test_far_questions_are_refused_unless_asked_for(runs, tmp_path, capsys):
    fit = str(tmp_path / "fit.json")
    printed(capsys, "fit", runs, *SELECT, "--out", fit)
    far = ["predict", fit, "--params", "1e12", "--tokens", "1e12"]
    refused(capsys, far, "times outside the runs")
    assert printed(capsys, *far, "--max-ratio", "1e99")["loss"]["value"] > 0.25
    refused(capsys, ["plan", fit, "--flops", "1e30"], "times outside the runs")
    refused(capsys, ["plan", fit, "--loss", "0.1"], "does not lie above E")
    (tmp_path / "other.json").write_text('{"E": 1}')
    refused(capsys, ["plan", str(tmp_path / "other.json"), "--flops", "1e13"], "does not hold the numbers E, A, B, alpha, beta")


def test_tables_are_read_and_faults_named(tmp_path):
    (tmp_path / "a.csv").write_text("kind,N,loss\nx,1e5,3.5\ny,1,\nz,2,4\n")
    columns = {"N": "N", "loss": "loss"}
    assert read_columns(tmp_path / "a.csv", columns, where=["kind=x"])["loss"].tolist() == [3.5]
    assert read_columns(tmp_path / "a.csv", columns, without=["kind=y"])["N"].tolist() == [1e5, 2]
    kept = read_columns(tmp_path / "a.csv", columns | {"name": "kind"}, labels=("name",), skip_missing=True)
    assert kept["name"].tolist() == ["x", "z"] and kept["skipped"] == 1
    (tmp_path / "b.jsonl").write_text('{"N": 1, "loss": 3}\n{"N": 1,\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: not JSON"):
        read_columns(tmp_path / "b.jsonl", columns)
    (tmp_path / "c.jsonl").write_text('[1]\n')
    with pytest.raises(ValueError, match=r"line 1: expected an object"):
        read_columns(tmp_path / "c.jsonl", columns)
    with pytest.raises(ValueError, match=r"expected a \.csv or \.jsonl"):
        read_columns(__file__, columns)


def test_a_sharp_metric_jumps_where_the_smooth_score_does_not():
    """Schaeffer et al. 2023: per-token log-probability falls straight, an answer of ten tokens is right suddenly; the map explains it."""
    flops = np.geomspace(1e18, 1e24, 25)
    logprob = -0.25 * (24.2 - np.log10(flops))
    accuracy = exact_match(logprob, 10)
    assert exact_match(np.log(0.9), 3) == pytest.approx(0.729)
    found = emergence(flops, accuracy, logprob)
    assert found["r2_smooth"] == pytest.approx(1) and found["r2_accuracy"] < 0.7 and found["r2_predicted"] > 0.999
    assert monotone(np.array([3.0, 1, 2]), np.array([0.1, 0.9, 0.5]), np.array([1.5, 9])) == pytest.approx([0.7, 0.1])  # lower is better
    unrelated = emergence(flops, accuracy, np.random.default_rng(0).standard_normal(25))
    assert unrelated["r2_predicted"] < found["r2_accuracy"]  # a score that says nothing predicts nothing
    with pytest.raises(ValueError, match="3 models"):
        emergence(flops[:3], accuracy[:3], logprob[:3])
