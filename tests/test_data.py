import gzip
import itertools
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch

from prompts.answers import equal, extract
from stages.data import corpora, curriculum
from stages.data.documents import Documents, Drops, clean, gather
from stages.data.packing import PackedCollator, pack, to_dataset
from stages.data.tokenizer import END, train_tokenizer
from stages.models.sizes import build_decoder, decoder_config


def draw(split, n=400, seed=0, **kwargs):
    return list(itertools.islice(curriculum.problems(seed, split=split, **kwargs), n))


@pytest.fixture(scope="module")
def tokenizer():
    texts = [d["text"] for d in itertools.islice(curriculum.documents(0), 2000)]
    return train_tokenizer(texts, vocab_size=1024)


def test_problems_of_different_splits_share_nothing_to_compute():
    keys = {split: {(p.task, p.key) for p in draw(split, 1500)} for split in curriculum.SPLITS}
    for a, b in itertools.combinations(keys, 2):
        assert not keys[a] & keys[b], (a, b)


def test_no_pretraining_document_holds_a_test_problem():
    test = {p.key for p in draw("test", 4000, tasks={"word_problems": 1.0})}
    asked = {p.key for p in draw("train", 4000, tasks={"word_problems": 1.0})}
    assert test and not test & asked
    questions = {p.question for p in draw("test", 4000)}
    text = "\n".join(d["text"] for d in itertools.islice(curriculum.documents(3), 3000))
    assert not any(q in text for q in questions)


def test_shares_of_the_splits_add_up():
    assert sum(curriculum.SPLITS.values()) == 100


def test_every_solution_leads_to_its_answer():
    for p in draw("train", 600, difficulties=(1, 2, 3, 4, 5)):
        for index in range(len(p.solutions)):
            assert equal(extract(curriculum.response(p, curriculum.WORKED, index)), p.answer)
    p = next(curriculum.problems(1, split="train", tasks={"word_problems": 1.0}, difficulties=(4,)))
    numbers = [int(s) for s in p.question.replace(".", " ").split() if s.isdigit()]
    said = [p.question.split(f"On {day}")[1].split(".")[0] for day in curriculum.DAYS[:4]]
    signs = [1 if "buys" in s or "finds" in s else -1 for s in said]
    assert int(p.answer) == numbers[0] + sum(s * n for s, n in zip(signs, numbers[1:], strict=True))


def test_same_seed_same_documents_and_cue_in_every_problem():
    a = [d["text"] for d in itertools.islice(curriculum.documents(5), 200)]
    assert a == [d["text"] for d in itertools.islice(curriculum.documents(5), 200)]
    assert a != [d["text"] for d in itertools.islice(curriculum.documents(6), 200)]
    for d in itertools.islice(curriculum.documents(5), 300):
        style = d["kind"].removesuffix("-few-shot")
        if style in curriculum.CUES:
            assert d["text"].count(curriculum.CUES[style]) == d["text"].count("Answer:")


def test_unknown_split_and_task():
    with pytest.raises(ValueError, match="unknown split"):
        next(curriculum.problems(0, split="dev"))
    with pytest.raises(ValueError, match="unknown task"):
        next(curriculum.problems(0, split="test", tasks={"sums": 1.0}))


def test_packing_by_hand():
    rows = list(pack([[5, 6, 7], [8], [9, 9, 9, 9, 9, 9]], 6, eos_id=1, pad_id=0))
    assert sorted(rows) == sorted([[5, 6, 7, 1, 8, 1], [9, 9, 9, 9, 9, 9], [1, 0, 0, 0, 0, 0]])


def test_collator_resets_positions_and_hides_padding_and_starts():
    batch = PackedCollator(eos_id=1, pad_id=0)([{"input_ids": [5, 6, 1, 7, 1, 0]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 1, -100, 1, -100]]


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_losses_and_gradients_equal_separate_ones(tokenizer, architecture):
    documents = tokenizer(["Tom has 3 apples.", "List: a b c. Again: a b c.", "Amy went to the river."])["input_ids"]
    config = decoder_config(tokenizer, architecture=architecture, hidden_size=32, num_layers=2, num_heads=2)
    model = build_decoder(config, seed=0, head_std=0.2)
    for p in model.parameters():  # zeroed projections would make attention invisible to this test
        torch.nn.init.normal_(p, std=0.2) if p.ndim == 2 else None
    collator = PackedCollator(eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)

    def loss_and_gradient(rows):
        model.zero_grad()
        total = 0.0
        for row in rows:
            batch = collator([{"input_ids": row}])
            n = int((batch["labels"] != -100).sum())
            loss = model(**batch, use_cache=False).loss * n
            loss.backward()
            total += loss.item()
        return total, model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    packed = list(pack(documents, 64, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id))
    assert len(packed) == 1
    separate = [[*ids, tokenizer.eos_token_id] for ids in documents]
    together, apart = loss_and_gradient(packed), loss_and_gradient(separate)
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    assert torch.allclose(together[1], apart[1], atol=1e-4)


def test_dataset_is_two_bytes_a_token(tmp_path):
    rows = to_dataset([[1, 2, 3, 4]] * 100, 4, vocab_size=600)
    assert rows.features["input_ids"].feature.dtype == "uint16" and rows.data.nbytes < 100 * 4 * 2 + 200


def test_tokenizer_encodes_anything_and_renders_turns(tokenizer):
    for text in ["naïve 漢字 🙂\n\tx", " Tom has 17 apples."]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer.encode(" 17")) == 1
    assert len(train_tokenizer(["17 18 17 18"] * 50, vocab_size=400, numbers="digits").encode(" 17")) == 2
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|> hi<|assistant|> yes.<|end|>"
    masks = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    learned = [i for i, m in zip(masks["input_ids"], masks["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(learned) == " yes.<|end|>" and learned[-1] == tokenizer.convert_tokens_to_ids(END)


def test_tokenizer_too_small():
    with pytest.raises(ValueError, match="set it higher"):
        train_tokenizer(["a"], vocab_size=100)


def select(texts, folder, **kwargs):
    documents, drops = Documents(folder), Drops()
    gather(({"text": t, "kind": "k", "phase": "main", "source": "s"} for t in texts), documents, drops, heldout_share=0.5, **kwargs)
    return documents, drops


def test_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path):
    kept, drops = select(["one  two", "one two", " \n", "café", "cafe\u0301"], tmp_path)
    assert list(kept) == ["one two", "café"]
    assert drops.reasons == {"exact duplicate": 2, "empty or too short after cleaning": 1}
    assert drops.lines()[0] == "5 documents read, 2 kept"


def test_split_follows_the_text_alone(tmp_path):
    def sides(texts):
        kept = select(texts, tmp_path)[0]
        return dict(zip(kept, kept.columns["heldout"].tolist(), strict=True))

    texts = [f"document {i}" for i in range(200)]
    side = sides(texts)
    shuffled = texts[:150]
    random.Random(0).shuffle(shuffled)
    assert sides(shuffled).items() <= side.items()
    assert 60 < sum(side.values()) < 140


def test_clean():
    assert clean("a\x00b\r\nc  \t d \n\n\n\ne") == "ab\nc d\n\ne"


def test_plain_text_is_cut_at_blank_lines(tmp_path):
    file = tmp_path / "play.txt"
    file.write_text("\n\n".join(f"speech {i} " + "x" * 30 for i in range(10)))
    documents = [d["text"] for d in corpora.read_documents(str(file), seed=0, num_documents=0, document_chars=100)]
    assert len(documents) == 5 and all(len(d) < 110 for d in documents)
    assert sum(d.count("speech") for d in documents) == 10


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b"abc\xff", "offset 3 is not UTF-8"),
    ("a.txt", b"PK\0\x01", "is binary"),
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "a.jsonl, line 2 is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl, line 2 must be a JSON object"),
    ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text in column 'text': it has body"),
    ("a.parquet", b"nonsense", "is not a readable parquet file"),
    ("a.json", b'[{"text": "x"}, "y"]', "a.json, row 1 must be a JSON object, got str"),
    ("a.json", b"3", "a.json, line 1 must be a JSON object, got int"),
    ("a.pdf", b"text\nx\n", "a.pdf: cannot tell what it holds by its name: give .txt, .md, .jsonl"),
    ("a.txt.gz", b"", "cannot tell what it holds by its name"),
    ("a.csv", b"text,kind\na,b\n\n\"c\nd\",e\nf\n", "a.csv, line 6 has 1 cells, but the header names 2: text, kind"),
    ("a.csv", b"text,text\na,b\n", "a.csv, line 1: columns need names, each its own: got text, text"),
    ("a.csv", b"text\n\"a\"b\n", "a.csv, line 2 is not csv"),
    ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 20, "is not a whole gzip file"),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(corpora.read_documents(str(tmp_path / name), seed=0, num_documents=0))
    assert message in str(error.value)


def test_parquet_json_and_table_sources(tmp_path):
    import pandas

    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "c"}]))
    (tmp_path / "c.csv").write_bytes('\ufefftext,kind\r\n"d, ""e""\nf",x\r\n'.encode())
    (tmp_path / "d.tsv").write_text("kind\ttext\nx\t" + "g" * 200_000)
    texts = [d["text"] for d in corpora.read_documents(str(tmp_path), seed=0, num_documents=0)]
    assert texts == ["a", "b", "c", 'd, "e"\nf', "g" * 200_000]


def test_a_hub_id_offline_and_a_missing_file(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1 is set"):
        list(corpora.read_documents("org/corpus", seed=0, num_documents=1))
    with pytest.raises(ValueError, match="no such file"):
        list(corpora.read_documents("missing.txt", seed=0, num_documents=1))


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset; what is loaded of it is noted."""
    import datasets
    import huggingface_hub

    def repo_info(self, repo_id, **more):
        if repo_id != "org/corpus":
            raise ConnectionError("nobody there")
        return SimpleNamespace(sha=f"commit-of-the-{more['repo_type']}")

    rows, loaded = [{"text": "a", "prompt": "q", "completion": "a"}], {}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(datasets, "load_dataset", lambda source, config, **more: loaded.update(more) or rows)
    corpora.hub_revision.cache_clear()
    yield SimpleNamespace(rows=rows, loaded=loaded)
    corpora.hub_revision.cache_clear()


def read_hub(source="org/corpus"):
    return list(corpora.read_documents(source, seed=0, num_documents=0))


def test_a_hub_dataset_is_read_at_the_revision_that_is_recorded(hub, monkeypatch):
    assert corpora.hash_inputs(["curriculum", "org/corpus"]) == {"org/corpus": "commit-of-the-dataset"}
    assert [d["text"] for d in read_hub()] == ["a"] and hub.loaded["revision"] == "commit-of-the-dataset"
    assert corpora.hash_inputs(["org/absent"]) == {"org/absent": None}
    with pytest.raises(ValueError, match=r"org/absent is neither a local file nor reachable on the hub \(nobody there\)"):
        read_hub("org/absent")
    corpora.hub_revision.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert corpora.hash_inputs(["org/corpus"]) == {"org/corpus": None}


def test_a_hub_row_without_the_text_column_is_named(hub):
    hub.rows.append({"body": "b"})
    with pytest.raises(ValueError, match="org/corpus, row 1 has no text in column 'text': it has body; set text_column"):
        read_hub()


def test_files_are_hashed_as_they_are_found(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "notes.log"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    sources = [str(tmp_path), str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")]
    first = corpora.hash_inputs(sources)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in first.values())
    (tmp_path / "notes.log").write_text("nobody reads this")
    assert corpora.hash_inputs(sources) == first
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n')
    second = corpora.hash_inputs(sources)
    assert [first[source] == second[source] for source in sources] == [False, False, True]
    with pytest.raises(ValueError, match=r"notes.log: cannot tell"):
        corpora.hash_inputs([str(tmp_path / "*")])
