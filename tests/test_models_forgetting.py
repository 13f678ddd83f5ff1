"""Which checkpoint to keep, by hand; what the watch sees, keeps on disk and forgets; KL from the base against a direct computation."""
import json
import math
import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from stages.data.packing import PackedCollator, pack
from stages.models import forgetting
from stages.models import heldout as heldout_module
from stages.models.finetuning import DialogueCollator
from stages.models.forgetting import FEWEST_ROWS, Neutral, Watch, above, backward_transfer, mean, recommend, rows_within
from stages.models.heldout import heldout, measured, summarised
from stages.models.verdict import verdict

VOCAB = 48
COLLATOR = PackedCollator(eos_id=1, pad_id=0)


def losses(*sums, count=1):
    """Rows as `measured` returns them."""
    return [[value, 0, count] for value in sums]


# Three rows of one token. Against the best (mean 2): `near` loses 1, -.1 and -.6, on average .1 with an error of
# sqrt((.81 + .04 + .49) / 2 * 3) / 3 = .4726; `far` loses .5, 0 and .1, on average .2 with an error of sqrt(.14 / 2 * 3) / 3 = .1528.
BEST, NEAR, FAR = losses(1, 2, 3), losses(2, 1.9, 2.4), losses(1.5, 2, 3.1)


def test_above_by_hand():
    assert above(BEST, NEAR) == pytest.approx((0.1, math.sqrt(2.01) / 3))
    assert above(BEST, FAR) == pytest.approx((0.2, math.sqrt(0.21) / 3))
    uneven = [[3.0, 0, 2], [4.0, 0, 4]], [[4.0, 0, 2], [6.0, 0, 4]]  # 1 and 2 nats more on 2 and 4 tokens: .5 a token in both
    assert above(*uneven) == pytest.approx((0.5, 0.0)) and mean(uneven[0]) == pytest.approx(7 / 6)


@pytest.mark.parametrize(("learning", "forgotten", "step", "equal"), [
    ([FAR, BEST], [1.0, 2.0], 1, [1]),  # a checkpoint beyond one error of the best never wins, however little it forgot
    ([NEAR, BEST], [1.0, 2.0], 0, [0, 1]),  # within one error it does
    ([NEAR, BEST], [2.0, 1.0], 1, [0, 1]),
    ([NEAR, BEST, FAR, NEAR], [1.0, 1.0, 0.0, 1.0], 3, [0, 1, 3]),  # among equals that forgot as much: the later
    ([BEST, BEST], [0.0, 0.0], 1, [0, 1]),  # without a base corpus, too
    ([BEST], [9.0], 0, [0])])
def test_recommend_by_hand(learning, forgotten, step, equal):
    assert recommend(learning, forgotten) == (step, equal)


def test_the_rule_is_one_standard_error():
    inside, outside = losses(1.5, 1.99, 3), losses(1.5, 2.02, 3)  # means .1633 and .1733, errors sqrt(.2550) / 3 = .1683 and .1634
    assert above(BEST, inside) == pytest.approx((0.1633, 0.1683), abs=1e-4)
    assert above(BEST, outside) == pytest.approx((0.1733, 0.1634), abs=1e-4)
    assert recommend([inside, outside, BEST], [1.0, 0.0, 2.0]) == (0, [0, 2])


def test_backward_transfer_by_hand():
    # tasks 0 and 1 stood at .9 and .8 when they were learned and stand at .6 and .9 in the end: (-.3 + .1) / 2
    assert backward_transfer([[0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.6, 0.9, 0.7]]) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="two tasks or more, got 1"):
        backward_transfer([[0.5]])


@pytest.mark.parametrize(("lengths", "tokens", "count"), [
    ([5] * 20, 50, 10), ([5] * 20, 54, 10), ([5] * 20, 0, FEWEST_ROWS), ([5] * 3, 0, 3), ([5] * 20, 1e9, 20), ([], 10, 0),
    ([*[1] * 10, 100, 1], 50, 10)])  # the first that does not fit ends it: what stands after a long row is not picked out
def test_rows_within(lengths, tokens, count):
    assert rows_within(lengths, tokens) == count


def model_of(seed: int):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
                                        num_key_value_heads=2, intermediate_size=16, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def models():
    return model_of(0), model_of(1)


@pytest.fixture(scope="module")
def packed():
    rng = random.Random(0)
    rows = pack([[rng.randint(2, VOCAB - 1) for _ in range(rng.randint(3, 30))] for _ in range(40)], 64, eos_id=1, pad_id=0)
    return [{"input_ids": row} for row in rows]


@pytest.fixture(scope="module")
def dialogues():
    rng = random.Random(1)
    ids = [[rng.randint(2, VOCAB - 1) for _ in range(rng.randint(4, 12))] for _ in range(24)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]], "source": "ab"[number % 3 > 0]} for number, row in enumerate(ids)]


def test_neutral_of_the_base_itself(models, packed):
    neutral = Neutral(models[0], packed, COLLATOR)
    looked = neutral.look(models[0])
    assert [row[3] for row in looked] == [0.0] * len(packed) and looked == neutral.before
    assert summarised([row[:3] for row in looked]) == heldout(models[0], packed, COLLATOR)
    predicted = [row[2] for row in looked]
    assert [row[4] for row in looked] == [min(forgetting.POSITIONS, n) for n in predicted] and max(predicted) > forgetting.POSITIONS
    assert neutral.look(models[0], 2) == looked[:2]


@pytest.mark.parametrize("positions", [None, 7])
def test_kl_from_the_base_is_that_of_whole_distributions(models, packed, positions, monkeypatch):
    if positions:
        monkeypatch.setattr(forgetting, "SNAPSHOT_BYTES", 4 * VOCAB * len(packed) * positions)
    base, other = models
    looked = Neutral(base, packed, COLLATOR).look(other)
    for row, found in zip(packed, looked, strict=True):
        batch = COLLATOR([row])
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        with torch.no_grad():
            p, q = (model(**inputs, use_cache=False).logits[0, :-1].double().log_softmax(-1) for model in (base, other))
        kl = (p.exp() * (p - q)).sum(-1)
        places = (batch["labels"][0, 1:] != -100).nonzero().flatten().tolist()
        count = min(len(places), positions or forgetting.POSITIONS)
        chosen = [places[round(i * (len(places) - 1) / (count - 1))] for i in range(count)]
        assert found[4] == count and found[3] == pytest.approx(float(kl[chosen].sum()), rel=1e-4) and found[3] > 0.1
    assert mean(looked) == pytest.approx(heldout(other, packed, COLLATOR)["heldout_loss"]["value"])
    assert mean(looked, 3, 4) == pytest.approx(sum(row[3] for row in looked) / sum(row[4] for row in looked))


def test_a_snapshot_is_bounded(models, packed, monkeypatch):
    monkeypatch.setattr(forgetting, "SNAPSHOT_BYTES", 4 * VOCAB * len(packed) * 5)
    neutral = Neutral(models[0], packed, COLLATOR)
    assert sum(base.numel() * base.element_size() for _, base in neutral.base.values()) <= forgetting.SNAPSHOT_BYTES
    monkeypatch.setattr(forgetting, "SNAPSHOT_BYTES", 1)
    assert Neutral(models[0], packed[:2], COLLATOR).positions == 1  # a vocabulary too large for it still has a figure


def watch_of(folder, models, packed, dialogues, tokens=1e9, neutral=True):
    return Watch(folder, validation=dialogues, sources=[row["source"] for row in dialogues], collator=DialogueCollator(0),
                 neutral=Neutral(models[0], packed, COLLATOR) if neutral else None, tokens=tokens)


def test_a_look(models, packed, dialogues, tmp_path):
    watch = watch_of(tmp_path / "watch", models, packed, dialogues)
    logs = watch.look(models[1], 3)
    whole = summarised(measured(models[1], dialogues, DialogueCollator(0)))
    assert logs["eval_loss"] == pytest.approx(whole["heldout_loss"]["value"])
    assert logs["eval_mean_token_accuracy"] == pytest.approx(whole["heldout_accuracy"]["value"])
    for source in "ab":
        part = [row for row in dialogues if row["source"] == source]
        expected = heldout(models[1], part, DialogueCollator(0))["heldout_loss"]["value"]
        assert logs[f"eval_loss_{source}"] == pytest.approx(expected) == watch.loss_of(watch.points[0], source)
    looked = watch.neutral.look(models[1])
    assert logs["forgetting/base_loss"] == pytest.approx(mean(looked))
    assert logs["forgetting/kl_to_base"] == pytest.approx(mean(looked, 3, 4))
    assert json.loads((tmp_path / "watch" / "3.json").read_text()) == watch.points[0] and watch.seconds > 0


def test_padding_does_not_change_a_look(models, dialogues):
    alone = [measured(models[1], [row], DialogueCollator(0))[0] for row in dialogues]
    for one, many in zip(alone, measured(models[1], dialogues, DialogueCollator(0)), strict=True):
        assert many == pytest.approx(one, rel=1e-5)


def test_processes_share_the_rows_and_pass_as_often(models, packed, monkeypatch):
    """Engines that divide the weights want as many forward passes everywhere; what pads a process's share is nobody's measurement."""
    rows = packed[:5]
    alone = Neutral(models[0], rows, COLLATOR).look(models[1])
    together, passes = [], []
    for number in range(4):
        gathered = []
        monkeypatch.setattr(heldout_module, "rank", lambda number=number: number)
        monkeypatch.setattr(heldout_module, "world_size", lambda: 4)
        monkeypatch.setattr(heldout_module, "gather", lambda found, kept=gathered: kept.append(found) or found)
        neutral = Neutral(models[0], rows, COLLATOR)
        seen = []
        hook = models[1].register_forward_hook(lambda *args, seen=seen: seen.append(1))
        neutral.look(models[1])
        measured(models[1], rows, COLLATOR, batch_size=1)
        hook.remove()
        together += gathered[1]
        passes.append(len(seen))
    assert passes == [3] * 4  # one of Neutral, and the two of the rank that has two rows
    assert sorted(i for i, _ in together) == list(range(5))
    assert [values for _, values in sorted(together)] == [pytest.approx(row, rel=1e-5) for row in alone]


def test_a_look_reads_what_it_may(models, packed, dialogues, tmp_path):
    watch = watch_of(tmp_path, models, packed, dialogues, tokens=2 * 64 * 9)
    assert watch.neutral_count == 9 < len(packed)
    assert watch.count == rows_within([len(row["input_ids"]) for row in dialogues], 64 * 9)
    watch.look(models[1], 0)
    assert (len(watch.points[0]["validation"]), len(watch.points[0]["neutral"])) == (watch.count, 9)
    alone = watch_of(tmp_path / "b", models, packed, dialogues[:1] * 3, neutral=False)
    assert set(alone.look(models[1], 0)) == {"eval_loss", "eval_mean_token_accuracy"}  # one source, no base corpus


@pytest.mark.parametrize(("started", "step", "told"), [(True, 0, True), (False, 0, False), (True, 2, False)])
def test_the_verdict_says_of_how_many_rows_a_look_is_and_why_kl_is_there_before_training(models, packed, dialogues, tmp_path, capsys,
                                                                                         started, step, told):
    watch = watch_of(tmp_path, models, packed, dialogues, tokens=2 * 64 * 9)
    watch.look(models[1], step)
    watch.look(models[1], 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0, "eval/loss": 3.0, "forgetting/base_loss": 3.0}\n')
    (tmp_path / "figures").mkdir()
    verdict(tmp_path, watch, kept=3, recommended=3, equal=[3], started=started)
    said = capsys.readouterr().out
    assert f"at each look validation is over {watch.count} dialogues, base corpus and KL are over 9 rows" in said
    assert ("the KL at step 0 is that of the chat tokens' start values" in said) == told


def test_a_step_is_looked_at_once(models, packed, dialogues, tmp_path):
    watch = watch_of(tmp_path, models, packed, dialogues)
    first, seconds = watch.look(models[1], 5), watch.seconds
    assert watch.look(models[0], 5) == first and watch.seconds == seconds and len(watch.points) == 1


def test_a_resumed_watch_continues(models, packed, dialogues, tmp_path):
    watch = watch_of(tmp_path / "watch", models, packed, dialogues)
    seen = {step: watch.look(models[step % 2], step) for step in (0, 5, 10, 15)}
    again = watch_of(tmp_path / "watch", models, packed, dialogues)
    again.rewind(10)
    assert [point["step"] for point in again.points] == [0, 5, 10] and again.points == watch.points[:3]  # 10 comes after 5, not before
    assert sorted(path.name for path in (tmp_path / "watch").iterdir()) == ["0.json", "10.json", "5.json"]
    for step in (0, 5, 10):
        assert again.look(None, step) == seen[step]  # read, not measured
    assert again.look(models[1], 15) == seen[15] and again.recommended() == watch.recommended()
    again.rewind(-1)
    assert again.points == [] and not list((tmp_path / "watch").iterdir())


def looks(*rows):
    watch = object.__new__(Watch)
    watch.points = [{"step": step, "validation": row, "neutral": []} for step, row in enumerate(rows)]
    return watch


WORSE = losses(1.5, 2.4, 3.5)  # .5, .4, .5 more: mean .4667, error .0333
START = losses(0, 0, 0)  # the untrained model is no checkpoint, however good


@pytest.mark.parametrize(("rows", "count"), [
    ([BEST], 0), ([BEST, WORSE], 1), ([BEST, WORSE, WORSE], 2), ([WORSE, WORSE, BEST], 0), ([BEST, WORSE, NEAR], 0),
    ([BEST, WORSE, NEAR, WORSE], 1), ([BEST, FAR, FAR], 0)])  # .2 is within twice an error of .1528
def test_worse_in_a_row_by_hand(rows, count):
    assert looks(START, *rows).worse_in_a_row() == count


def test_the_untrained_model_is_not_recommended():
    assert looks(START, WORSE, BEST, NEAR).recommended() == (3, [2, 3])
