"""The benchmark of reward training counts what it says it counts."""
import pytest

from stages.evals.bench_reward import VARIANTS, arguments, one, rankings, summary


def test_rankings_are_of_k_different_places_and_no_ties():
    from stages.data.tokenizer import train_tokenizer

    bpe = train_tokenizer(["How many pens does Tom have?"], vocab_size=300)
    rows = rankings(bpe, 5, 8)
    assert len(rows) == 5 and all(sorted(row["ranks"]) == list(range(1, 9)) and len(row["response_ids"]) == 8 for row in rows)
    assert rows == rankings(bpe, 5, 8) and len({tuple(ids) for ids in rows[0]["response_ids"]}) > 1


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_pairs_encode_each_response_k_minus_one_times(variant):
    given = arguments(["--steps", "1", "--batch-size", "2", "--responses", "4", "--num-layers", "1", "--vocab-size", "300"])
    found = one(variant, 32, given)
    assert found["comparisons"] == 2 * 6 and found["encoded"] == (24 if variant == "RewardTrainer, fp32" else 8)
    assert found["seconds"] > 0 and found["comparisons_per_s"] == pytest.approx(12 / found["seconds"])


def test_ratios_are_within_rounds():
    def run(variant, speed, encoded):
        return {"variant": variant, "width": 8, "comparisons_per_s": speed, "encoded_per_s": encoded, "peak_bytes": 2**30}

    runs = [run("RewardTrainer, fp32", 10, 20), run("ranked", 70, 20), run("RewardTrainer, fp32", 5, 10), run("ranked", 40, 12),
            run("RewardTrainer, fp32", 20, 40), run("ranked", 100, 30)]
    table = summary(runs, 8).splitlines()
    assert len(table) == 4 and "| - | - | 7.00 (5.00 to 8.00) | 1.00 (0.75 to 1.20) | 1.00 |" in table[3]


def test_settings_that_cannot_be_compared():
    with pytest.raises(ValueError, match="responses 3 x batch_size 1"):
        arguments(["--responses", "3", "--batch-size", "1"])
