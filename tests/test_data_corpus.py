"""The corpus: streamed, filtered, screened against evaluation sets, mixed by weight; and the curriculum's rows as they always were."""
import gzip
import hashlib
import importlib.util
import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest
from datasets import load_from_disk

from stages import prepare
from stages.data import corpora, packing
from stages.data.documents import Documents, Drops, gather, mixture
from stages.data.overlap import contamination, drop_near_duplicates
from stages.data.quality import Rules, language_fault
from stages.data.tokenizer import _Ids, encoder, fertility, train_tokenizer
from stages.run.config import build_config
from stages.run.console import Timer

PROSE = ("We walked along the river that evening and talked of the boats which used to stop there. It was late in the year, and most of "
         "them had left for the south with their nets and barrels. Nobody was to be seen on the quay but an old man with a dog.")


def gathered(folder, texts, source="s", heldout_share=0.0, **more):
    documents, drops = Documents(folder), Drops()
    rows = texts if isinstance(texts, list) and texts and isinstance(texts[0], dict) else [
        {"text": text, "kind": "k", "phase": "main", "source": source} for text in texts]
    gather(iter(rows), documents, drops, heldout_share=heldout_share, **more)
    return documents, drops


def run(folder, **values):
    return prepare.main(build_config(prepare.PrepareConfig, {
        "run_dir": str(folder / "prepare"), "vocab_size": 300, "row_length": 64, "num_problems": {}, **values}))


def rows_of(folder):
    return np.array(load_from_disk(str(folder)).with_format("numpy")[:]["input_ids"])


def test_rows_of_the_curriculum_are_those_of_the_first_commit(tmp_path):
    """Measured at commit 242435c, before the corpus was streamed. A change of generator, tokenizer or packing must mean to change it."""
    made = run(tmp_path, num_documents=300, num_easy_documents=100, vocab_size=1024, row_length=128, num_problems={"test": 3})
    digest = hashlib.sha256()
    for part in ("train-easy", "train", "heldout", "heldout-kinds/worked"):
        digest.update(rows_of(made.product("tokens") / part).astype(np.int64).tobytes())
    assert digest.hexdigest() == "345b60b0855f9a3582ca46659dc347c634f0936c5ff1cc2ffb81326386b124d7"


def test_settings_that_came_later_count_once_they_are_set():
    before = build_config(prepare.PrepareConfig, {}).fingerprinted()
    assert not {"weights", "near_duplicates", "quality", "languages", "decontaminate"} & set(before) and "row_length" in before
    assert build_config(prepare.PrepareConfig, {"near_duplicates": "drop"}).fingerprinted() == {**before, "near_duplicates": "drop"}


# Reading


def test_a_text_is_cut_alike_however_it_comes_in_pieces():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(["\n", "\n\n", "a", "bb ", "\r\n", "ccc", "\x0b"]) for _ in range(rng.randint(0, 40)))
        size, limit = rng.randint(1, 9), rng.choice([1, 5, 20])
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        assert list(corpora.cut(pieces, limit)) == list(corpora.cut([text], limit))


def test_a_line_that_never_ends_is_cut_too(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 100)
    found = list(corpora.cut(("x" * 50 for _ in range(20)), 60))
    assert "".join(found) == "x" * 1000 and max(map(len, found)) <= 200


@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_byte_is_named_by_its_place_in_the_file(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(corpora, "PIECE", 7)
    data = "é".encode() * 10 + b"\xc3(" + b"x" * 20
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.txt")
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(ValueError, match="byte 0xc3 at offset 20 is not UTF-8"):
        list(corpora.text_pieces(path))
    assert "".join(corpora.text_pieces(path, decode_errors="replace")) == data.decode(errors="replace")
    path.write_bytes(gzip.compress(data[:19]) if zipped else data[:19])
    with pytest.raises(ValueError, match="byte 0xc3 at offset 18 is not UTF-8"):
        list(corpora.text_pieces(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpora, "PIECE", 1 << 14)
    with (tmp_path / name).open("w") as f:
        for i in range(4000):
            text = f"paragraph {i} " + "word " * 200
            f.write(text + "\n\n" if name == "a.txt" else json.dumps({"text": text}) + "\n")
    documents, drops = Documents(tmp_path), Drops()
    read = corpora.read_documents(str(tmp_path / name), seed=0, num_documents=0)
    tracemalloc.start()
    gather(({**d, "source": "s"} for d in read), documents, drops, heldout_share=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(documents) > 900 and drops.read.total() == len(documents)
    assert peak < 1 << 20 < (tmp_path / name).stat().st_size / 3.5


def test_half_a_surrogate_pair_is_dropped_and_named(tmp_path):
    documents, drops = gathered(tmp_path, ["fine", "half \ud800"])
    assert list(documents) == ["fine"] and drops.reasons == {"not text: half a surrogate pair": 1}
    drops.write(tmp_path / "dropped.jsonl")
    assert json.loads((tmp_path / "dropped.jsonl").read_text())["text"] == "half ?"


def test_dropped_texts_are_sampled_from_all_of_them(tmp_path):
    _, drops = gathered(tmp_path, [f"x{i}" for i in range(1000)], min_chars=5)
    shown = [int(row["text"][1:]) for row in drops.samples["empty or too short after cleaning"]]
    assert drops.reasons.total() == 1000 and len(shown) == 20 and max(shown) > 500  # not the first twenty
    assert drops.by_source == {"s": {"empty or too short after cleaning": 1000}}


# Filters


@pytest.mark.parametrize(("text", "rule"), [
    (PROSE, None),
    ("too short", "min_words"),
    ("a b c " * 30, "min_word_length"),
    ("incomprehensibilities of constitutional parliamentarianism " * 20, "max_word_length"),
    (PROSE + " #" * 9, "max_symbols"),
    (PROSE + " ..." * 9, "max_symbols"),
    ("\n".join(f"- {line}" for line in PROSE.split(". ")), "max_bullet_lines"),
    ("\n".join(f"{part} ..." for part in PROSE.split(". ")), "max_ellipsis_lines"),
    (PROSE + "\n1\n2\n2\n2\n2\n2", "max_duplicate_lines"),
    ("\n".join([PROSE, "a line", "of", "words", *[PROSE[95:220]] * 2]),
     "max_duplicate_line_chars"),
    (PROSE + " " + "3145 2718 1618 " * 6, "min_lettered_words"),
    (" ".join(f"word{i:b}".replace("0", "a").replace("1", "b") for i in range(60)), "min_stop_words"),
    (" ".join(f"{a} old man" for a in PROSE.split()), "max_top_ngram_chars 2"),
    (PROSE + " " + " ".join(PROSE.split()[10:16]), "max_duplicate_ngram_chars 5"),
])
def test_each_rule_of_gopher_drops_what_it_is_for(text, rule):
    assert Rules().fault(text) == (rule and f"quality: {rule}")


def test_rules_can_be_set_and_left_out():
    assert Rules(min_words=2, min_stop_words=0).fault("too short") is None
    text = PROSE + " " + " ".join(PROSE.split()[10:16])
    assert Rules().fault(text) == "quality: max_duplicate_ngram_chars 5" and Rules(max_duplicate_ngram_chars={5: 0.5}).fault(text) is None


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="needs py3langid (requirements-language.lock)")
def test_languages_are_told_apart():
    fault = language_fault(["en"])
    assert fault(PROSE) is None
    assert fault("Wir gingen am Abend den Fluss entlang und sprachen von den Booten, die dort früher anlegten.") == "language: de"
    with pytest.raises(ValueError, match="languages: 'xx' is not one of"):
        language_fault(["xx"])


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is not None, reason="py3langid is installed")
def test_languages_without_the_package_say_what_to_install():
    with pytest.raises(ValueError, match=r"pip install -c requirements\.lock -r requirements-language\.lock"):
        language_fault(["en"])


def test_near_duplicates_go_and_what_they_repeat_is_shown(tmp_path):
    documents, drops = gathered(tmp_path, [PROSE, "Something else entirely, about ships.", PROSE.replace("late", "early"), PROSE + " End."])
    drop_near_duplicates(documents, drops)
    assert list(documents) == [PROSE, "Something else entirely, about ships."] and drops.reasons == {"near-duplicate": 2}
    assert {row["found"] for row in drops.samples["near-duplicate"]} == {PROSE}


# Contamination

QUESTION = "A farmer has seven cows and buys five more at the market on Friday; how many cows does he have then?"


def test_questions_in_training_documents_are_counted_shown_and_removed(tmp_path):
    documents, drops = gathered(tmp_path, [f"He asked: {QUESTION.upper()} Twelve.", PROSE, "What is 2 and 2, and who says so?"])
    sets = {"farm": [QUESTION, "Why?"], "sums": ["What is 2 and 2?"], "clean": ["How many eggs does a hen lay in a week of seven days?"]}
    found = contamination(documents, drops, sets, passed_over="curriculum", drop=False)
    assert {name: (each["questions"], each["found"], each["documents"]) for name, each in found.items()} == {
        "farm": (1, 1, 1), "sums": (1, 1, 1), "clean": (1, 0, 0)}
    assert found["farm"]["examples"][0]["question"] == QUESTION and len(documents) == 3
    assert contamination(documents, drops, sets, passed_over="curriculum", drop=True) == found
    assert list(documents) == [PROSE] and drops.reasons == {"holds a question of farm": 1, "holds a question of sums": 1}


def test_held_out_text_and_what_is_disjoint_by_construction_are_not_looked_at(tmp_path):
    held, drops = gathered(tmp_path, [QUESTION], heldout_share=1.0)
    made, _ = gathered(tmp_path, [QUESTION], source="curriculum")
    for documents in (held, made):
        assert contamination(documents, drops, {"farm": [QUESTION]}, passed_over="curriculum", drop=True)["farm"]["documents"] == 0


# Mixtures


def mixed(folder, weights, total=0):
    rows = [{"text": f"{source} {i:03d} " + "x" * 92, "kind": source, "phase": "main", "source": source}
            for source, count in (("a", 300), ("b", 100)) for i in range(count)]
    documents, _ = gathered(folder, rows)
    times, epochs = mixture(documents, weights, total, seed=0)
    sizes = documents.columns["size"] * times
    return {source: int(sizes[documents.of(source)].sum()) for source in weights}, times, epochs


def test_each_source_gets_its_share_of_the_bytes(tmp_path):
    sizes, times, epochs = mixed(tmp_path, {"a": 1, "b": 3})
    assert sizes == {"a": 9800, "b": 29400} and epochs == pytest.approx({"a": 1 / 3, "b": 3})
    assert set(times[:300]) == {0, 1} and set(times[300:]) == {3}
    sizes, times, epochs = mixed(tmp_path, {"a": 1, "b": 1}, total=98 * 300)
    assert sizes == {"a": 14700, "b": 14700} and set(times[300:]) == {1, 2} and epochs["b"] == 1.5


def test_without_weights_every_document_is_taken_once(tmp_path):
    assert set(mixed(tmp_path, {})[1]) == {1}


# Tokens


def lists(rows):
    return [row.tolist() for row in rows]


def test_the_fast_encoder_gives_what_the_tokenizer_gives():
    rng = random.Random(0)
    tokenizers = [train_tokenizer([PROSE] * 20, vocab_size=400, numbers=numbers) for numbers in ("whole", "digits")]
    points = [c for c in range(1, 0x20000, 3) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"{rng.choice(['', ' ', 'a', '7', chr(10), '.'])}{chr(rng.choice(points))}" for _ in range(60)) for _ in range(300)]
    texts += ["".join(rng.choice(["ab", "river", "17", "é", ".", "\n", " ", "\n\n", "\t", "\u2028", "\0", "\1"][:rng.randint(5, 12)])
                      for _ in range(30)) for _ in range(1000)]
    texts += [PROSE, "", " ", "a\n\n\n b", "12 345", "x" * 300, "\0a", "\1a \0b", "a ", " a", "a\n\nb\nc"]
    for each in tokenizers:
        assert lists(encoder(each, own=True)(texts)) == each(texts)["input_ids"] == lists(encoder(each, own=False)(texts))


def test_a_special_token_in_a_text_is_plain_text():
    tokenizer = train_tokenizer([PROSE], vocab_size=300)
    for text in ("a<|endoftext|>b", "a <|endoftext|>  b"):  # the second does not go word by word
        [ids] = lists(encoder(tokenizer, own=True)([text]))
        assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == text


def test_the_encoder_forgets_before_it_grows_too_large(monkeypatch):
    monkeypatch.setattr("stages.data.tokenizer.CACHED", 12)
    tokenizer = train_tokenizer([PROSE], vocab_size=300)
    kept = _Ids(tokenizer)
    monkeypatch.setattr("stages.data.tokenizer._Ids", lambda _: kept)
    encode = encoder(tokenizer, own=True)
    for text in (PROSE, "other words here"):
        assert lists(encode([text])) == tokenizer([text])["input_ids"]
    assert "here" in kept and kept.chars == sum(map(len, kept)) < 30


def test_fertility_by_hand():
    tokenizer = train_tokenizer(["17 18 17 18"] * 50, vocab_size=300)
    digits = train_tokenizer(["17 18 17 18"] * 50, vocab_size=300, numbers="digits")
    assert fertility(tokenizer, ["a 17, 18 b", "none"]) == (2, 2, 4)
    assert fertility(digits, ["a 17, 18 b", "none"]) == (4, 2, 4)


def test_shards_hold_every_row_in_order_and_one_shard_is_as_before(tmp_path, monkeypatch):
    rows = [[i, i + 1, i + 2, i + 3] for i in range(10)]
    assert packing.save_rows(iter(rows), 4, tmp_path / "one", vocab_size=100) == 10
    packing.to_dataset(rows, 4, vocab_size=100).save_to_disk(tmp_path / "before")
    assert [(path.name, path.read_bytes()) for path in sorted((tmp_path / "one").iterdir())] == [
        (path.name, path.read_bytes()) for path in sorted((tmp_path / "before").iterdir())]
    monkeypatch.setattr(packing, "SHARD_TOKENS", 12)
    for _ in range(2):  # the second time over what is there
        assert packing.save_rows(iter(rows), 4, tmp_path / "more", vocab_size=100) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "more", "one"] and rows_of(tmp_path / "more").tolist() == rows
    assert len(list((tmp_path / "more").glob("*.arrow"))) == 4
    with pytest.raises(ValueError, match="no rows"):
        packing.save_rows(iter([]), 4, tmp_path / "none", vocab_size=100)


# The stage


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(0)
    words = PROSE.replace(".", "").split()

    def written(name, count):
        texts = [" ".join(rng.choice(words) for _ in range(40)) + f" {name} {i * 37}." for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return texts

    web = written("web", 120)
    written("code", 40)
    with (folder / "web.jsonl").open("a") as f:
        for text in [web[0] + " Again.", web[1], f"Quiz: {QUESTION}", "..."]:
            f.write(json.dumps({"text": text}) + "\n")
    (folder / "quiz.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "12"}) + "\n")
    return folder


def test_every_screen_in_one_run(sources, tmp_path):
    web, code = (str(sources / f"{name}.jsonl") for name in ("web", "code"))
    made = run(tmp_path, sources=[web, code], weights={web: 1, code: 1}, near_duplicates="drop", min_chars=5, heldout_share=0.1,
               quality={"min_words": 3, "min_stop_words": 0, "max_top_ngram_chars": {}, "max_duplicate_ngram_chars": {}},
               decontaminate="drop", evaluation_sets=[f"quiz=problems:{sources / 'quiz.jsonl'}"])
    notes = made.data["notes"]
    assert notes["dropped"] == {"exact duplicate": 1, "near-duplicate": 1, "holds a question of quiz": 1,
                                "empty or too short after cleaning": 1}
    assert notes["dropped_by_source"] == {web: notes["dropped"]}
    shown = [json.loads(line) for line in made.product("dropped").read_text().splitlines()]
    assert {row["reason"] for row in shown} == set(notes["dropped"]) and {row["source"] for row in shown} == {web}
    assert notes["contamination"]["quiz"] | {"examples": 0} == {"questions": 1, "found": 1, "documents": 1, "examples": 0}
    assert made.metrics["contamination/quiz"] == {"value": 1.0, "n": 1}
    assert notes["sources"][code]["epochs"] > 1 > notes["sources"][web]["epochs"]
    both = sum(notes["sources"][source]["tokens"] + notes["sources"][source]["documents"] for source in (web, code))
    assert both == made.counts["train_tokens"] + made.counts["heldout_tokens"]
    for source in (web, code):
        each = notes["sources"][source]
        assert made.metrics[f"bytes_per_token/{source}"] == {"value": each["bytes"] / each["tokens"], "n": each["tokens"]}
        assert made.metrics[f"tokens_per_number/{source}"]["value"] > 1 >= made.metrics[f"tokens_per_digit/{source}"]["value"] > 0
    assert {"reading", "near-duplicates", "contamination", "tokenizer", "tokens"} == set(notes["seconds"])
    assert made.data["inputs"]["evaluation set quiz"].startswith("sha256:")


@pytest.mark.parametrize("foreign", [False, True])
def test_products_do_not_depend_on_the_number_of_workers(sources, tmp_path, monkeypatch, foreign):
    monkeypatch.setattr("stages.run.workers.ALONE_S", -1)
    monkeypatch.setattr("stages.data.documents.BATCH_CHARS", 1000)
    monkeypatch.setattr("stages.data.overlap.BATCH", 7)
    monkeypatch.setattr(prepare, "BATCH", 7)
    own = {}
    if foreign:
        train_tokenizer([PROSE] * 9, vocab_size=300).save_pretrained(tmp_path / "own")
        own = {"tokenizer": str(tmp_path / "own")}
    made = [run(tmp_path / str(workers), sources=[str(sources / "web.jsonl"), str(sources / "code.jsonl")], near_duplicates="drop",
                min_chars=5, quality={"min_words": 3, "min_stop_words": 0, "max_top_ngram_chars": {}, "max_duplicate_ngram_chars": {}},
                decontaminate="drop", evaluation_sets=[f"quiz=problems:{sources / 'quiz.jsonl'}"], workers=workers, **own)
            for workers in (1, 2, 3)]
    for several in made[1:]:
        assert {key: several.data[key] for key in ("fingerprint", "products", "metrics", "counts")} == {
            key: made[0].data[key] for key in ("fingerprint", "products", "metrics", "counts")}
        assert {**several.data["notes"], "seconds": 0} == {**made[0].data["notes"], "seconds": 0}
    assert made[0].data["notes"]["dropped"]["near-duplicate"] == 1


def test_by_default_contamination_is_counted_and_nothing_dropped(sources, tmp_path):
    made = run(tmp_path, sources=[str(sources / "web.jsonl")], heldout_share=0.1, evaluation_sets=[f"problems:{sources / 'quiz.jsonl'}"],
               num_problems={"test": 4, "sft": 2})
    found = made.data["notes"]["contamination"]
    assert {name: each["documents"] for name, each in found.items()} == {"problems": 1, "problems/test": 0}
    assert made.data["notes"]["dropped"] == {"exact duplicate": 1}


def test_text_that_is_repeated_too_often_is_warned_of(sources, tmp_path, capsys):
    web, code = (str(sources / f"{name}.jsonl") for name in ("web", "code"))
    run(tmp_path, sources=[web, code], weights={web: 1, code: 9}, train_bytes=100_000)
    said = [line for line in capsys.readouterr().out.splitlines() if "epochs" in line]
    assert len(said) == 2 and "warning: beyond 4" in said[1] and "code.jsonl: 12.7" in said[1] and "warning" not in said[0]


def test_the_tokenizer_of_a_mixture_sees_all_its_sources(tmp_path):
    for name, word in (("a", "abab"), ("b", "qzqz")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(60)))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    settings = {"sources": [a, b], "tokenizer_documents": 40, "vocab_size": 320}
    first, weighted = (run(tmp_path, **settings, **more).metrics[f"bytes_per_token/{b}"]["value"]
                       for more in ({}, {"weights": {a: 1, b: 1}}))
    assert weighted > 1.3 * first


@pytest.mark.parametrize(("given", "message"), [
    ({"weights": {"WEB": 0}}, "weights: .*web.jsonl has 0.0, which must be above 0: leave the source out instead"),
    ({"weights": {"WEB": -1}}, "which must be above 0"),
    ({"weights": {"web": 1}}, "weights: 'web' is none of the sources"),
    ({"sources": ["WEB", "CODE"], "weights": {"WEB": 1}}, "weights: .*code.jsonl has none; give every source one"),
    ({"train_bytes": 100}, "train_bytes 100 divides text by weights: give every source one in weights"),
    ({"train_bytes": -1, "weights": {"WEB": 1}}, "train_bytes -1 .*: give a number above 0"),
    ({"weights": {"WEB": 1}, "heldout_share": 1.0}, "has a weight but no training document"),
    ({"quality": {"min_word": 3}}, "quality: unknown key 'min_word', did you mean 'min_words'"),
    ({"quality": {"min_words": "many"}}, "quality: min_words: got 'many'"),
    ({"quality": {}}, r"no document is left of .*web.jsonl: all 124 were dropped \(124 quality: min_words\)"),
    ({"sources": ["WEB", "EMPTY"]}, "no document is left of .*empty.txt: it holds none"),
    ({"sources": ["BINARY"]}, "binary.txt is binary"),
    ({"evaluation_sets": ["gsm8k:missing.jsonl"]}, "missing.jsonl"),
    ({"heldout_share": 2}, "heldout_share 2 is a share of the documents: set it between 0 and 1"),
    ({"heldout_share": 0}, "heldout_share 0 is a share"),
    ({"vocab_size": 10, "sources": ["missing.txt"]}, "vocab_size 10 is smaller than 262"),  # said before anything is read
    ({"near_duplicates": True}, r"near_duplicates: got True \(bool, as YAML reads yes, no, on and off\), expected keep | drop"),
    ({"evaluation_sets": ["problems:QUIZ", "problems:QUIZ"]}, "two evaluation_sets of one name"),
])
def test_bad_input_is_one_clear_line(sources, tmp_path, given, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"PK\0\x01")
    names = {"WEB": sources / "web.jsonl", "CODE": sources / "code.jsonl", "EMPTY": tmp_path / "empty.txt",
             "BINARY": tmp_path / "binary.txt", "QUIZ": sources / "quiz.jsonl"}
    text = json.dumps(given)
    for name, path in names.items():
        text = text.replace(name, str(path))
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, **{"sources": [str(sources / "web.jsonl")], **json.loads(text)})
    assert "\n" not in str(error.value) and not (tmp_path / "prepare").exists()


def test_timer_keeps_both_clocks():
    timer = Timer()
    with timer("work"):
        sum(itertools.repeat(1, 300_000))
    assert 0 < timer.seconds["work"]["processor"] <= timer.seconds["work"]["wall"] + 0.05
