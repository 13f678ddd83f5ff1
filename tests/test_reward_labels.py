"""Labels: whole or not at all, on the disk before anything else happens, and each prompt with whom it belongs to."""
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from reward import labels, preferences
from reward.labels import LabelFile, OutdatedError, Queue, RefusedError, export, ranks_of, read_items, shown_order

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def made_items(num=4, responses=3):
    return [{"id": f"p{i}", "prompt": f"question {i}", "responses": [f"{i}{'abcdefgh'[j]}" for j in range(responses)]} for i in range(num)]


@pytest.fixture
def made(tmp_path):
    opened = []

    def make(items=None, **settings):
        for file in opened:
            file.close()
        opened[:] = [LabelFile(tmp_path / "labels.jsonl")]
        return Queue(items or made_items(), opened[0], **settings)

    yield make
    for file in opened:
        file.close()


def answer(queue, annotator, groups=None, **more):
    item_id, criterion = queue.current(annotator)
    order = queue.order(annotator, item_id)
    chosen = {} if "skip" in more else {"groups": groups if groups is not None else [[p] for p in range(len(order))]}
    return {"id": item_id, "criterion": criterion, "version": queue.version(annotator, item_id), **chosen, **more}


def label(queue, annotator, groups=None, **more):
    return queue.submit(annotator, answer(queue, annotator, groups, **more))


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("groups", "order", "ranks"), [
    ([[1], [0, 2]], [2, 0, 1], [1, 2, 2]),
    ([[0, 1], [2]], [0, 1, 2], [1, 1, 3]),  # as in sport: two firsts, then a third
    ([[2], [1], [0]], [1, 2, 0], [1, 3, 2]),
    ([[0, 1, 2]], [2, 1, 0], [1, 1, 1])])
def test_ranks_follow_the_responses_not_the_page(groups, order, ranks):
    assert ranks_of(groups, order) == ranks


@pytest.mark.parametrize(("groups", "said"), [
    ([], "nothing is ranked yet"), (None, "no list"), ([0, 1, 2], "no list"), ([[0], [2]], "no rank yet: response 2"),
    ([[0], [1], [1], [2]], "response 2 is ranked twice"), ([[0], [1], [3]], "no response 3: 3 are shown"),
    ([[0], [1], [-1]], "no response -1"),
    ([[0], [1], ["2"]], "no response '2'"), ([[0], [1], [True]], "no response True"), ([[0, 1, 2], [0]], "ranked twice")])
def test_half_a_ranking_is_refused(groups, said):
    with pytest.raises(RefusedError, match=said):
        ranks_of(groups, [2, 0, 1])


def test_the_order_is_each_annotators_own_and_stays():
    assert shown_order("ana", "p1", 5) == shown_order("ana", "p1", 5) == [1, 4, 0, 2, 3]
    firsts = Counter(shown_order(f"annotator {n}", "p1", 4)[0] for n in range(4000))
    assert all(abs(firsts[r] - 1000) < 150 for r in range(4))  # 5.5 standard deviations of a fair die
    assert len({tuple(shown_order("ana", f"p{n}", 4)) for n in range(200)}) == 24


def test_a_label_is_a_preference_and_says_what_was_shown(made, tmp_path):
    queue = made([{"id": "x", "prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b", "c"], "origin": {"model": "sha256:1"},
                   "prompt_ids": [1], "response_ids": [[2], [3], [4]]}], clock=(clock := Clock()))
    queue.current("ana")
    clock.now = 12.34
    order = shown_order("ana", "x", 3)
    got = label(queue, "ana", [[2], [0, 1]], comment=" close ")
    assert lines(tmp_path) == [got]
    assert preferences.check(got, "here")["ranks"] == [{order[2]: 1}.get(r, 2) for r in range(3)]
    assert got["time"].endswith("Z") and got["seconds"] == 12.3 and got["comment"] == "close" and got["order"] == order
    assert (got["annotator"], got["simulated"], got["criterion"], got["origin"]) == ("ana", False, "overall", {"model": "sha256:1"})
    assert (got["prompt_ids"], got["response_ids"]) == ([1], [[2], [3], [4]])


def test_what_the_disk_did_not_take_does_not_count(made, tmp_path, monkeypatch):
    queue = made()
    label(queue, "ana")
    before = (tmp_path / "labels.jsonl").read_bytes()
    key = queue.current("ana")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(labels.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            label(queue, "ana")
    assert (tmp_path / "labels.jsonl").read_bytes() == before and queue.current("ana") == key and queue.progress("ana")[0] == 1
    label(queue, "ana")
    assert len(lines(tmp_path)) == 2


def test_a_label_is_on_the_disk_before_it_counts(made, tmp_path, monkeypatch):
    queue, seen = made(), []
    sync = os.fsync
    monkeypatch.setattr(labels.os, "fsync", lambda fd: (sync(fd), seen.append((len(lines(tmp_path)), queue.progress("ana")[0]))))
    label(queue, "ana")
    label(queue, "ana")
    assert seen == [(1, 0), (2, 1)]  # (lines in the file, labels counted) when the disk answered


WRITER = """
import sys
from reward.labels import LabelFile, Queue
queue = Queue([{"id": str(i), "prompt": "q", "responses": ["a", "b"]} for i in range(100000)], LabelFile(sys.argv[1]), overlap=1)
for i in range(100000):
    queue.submit("ana", {"id": str(i), "criterion": "overall", "version": queue.version("ana", str(i)), "groups": [[0], [1]]})
    print(i, flush=True)
"""


def test_kill_9_loses_nothing(tmp_path):
    path = tmp_path / "labels.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(50):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = 50 + len(process.stdout.read().split())
    process.wait()
    file = LabelFile(path)
    assert len(file.labels) in (said, said + 1) and not file.torn  # the last one may have been written but not yet said
    file.close()


def test_a_torn_last_line_is_set_aside_wherever_it_tore(made, tmp_path):
    queue = made(made_items(1, responses=2), overlap=1.0)
    label(queue, "ana")
    label(queue, "bob", comment="naïve \n ☃")
    path = tmp_path / "labels.jsonl"
    whole = path.read_bytes()
    queue.file.close()
    start = whole.index(b"\n") + 1
    for content in [whole[:cut] for cut in range(start + 1, len(whole) - 1)] + [whole[:start] + b"\0" * 40, whole[:start] + b"\0\0\n"]:
        path.write_bytes(content)
        file = LabelFile(path)
        assert [r["annotator"] for r in file.labels] == ["ana"] and file.torn == len(content) - start
        assert path.read_bytes() == whole[:start] and file.aside.read_bytes().rstrip(b"\n") == content[start:].rstrip(b"\n")
        file.aside.unlink()
        os.close(file.file)
    path.write_bytes(whole[:-1])  # only the line end is lost
    file = LabelFile(path)
    assert len(file.labels) == 2 and not file.torn and path.read_bytes() == whole and not file.aside.exists()
    queue.file.file = file.file


def test_a_file_of_something_else_is_not_written_to(made, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"half\n{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        LabelFile(path)
    path.write_text('{"id": "x", "prompt": "q", "responses": ["a", "b"]}\n')
    with pytest.raises(ValueError, match="line 1 is not a label: expected annotator, criterion"):
        LabelFile(path)
    path.unlink()
    made()
    with pytest.raises(ValueError, match="being written by another program"):
        LabelFile(path)
    with pytest.raises(ValueError, match="a folder that exists"):
        LabelFile(tmp_path / "none" / "labels.jsonl")


def test_two_annotators_never_have_the_same_prompt_unless_all_do(made):
    queue = made(made_items(20), overlap=0.25)
    assert len(queue.shared) == 5
    seen = {"ana": [], "bob": []}
    for _ in range(40):
        for who in seen:
            if key := queue.current(who):
                seen[who].append(key[0])
                if len(seen[who]) % 3:  # one of three is skipped
                    label(queue, who)
                else:
                    label(queue, who, skip="broken")
    assert set(seen["ana"]) & set(seen["bob"]) == queue.shared and set(seen["ana"]) | set(seen["bob"]) == set(queue.items)
    assert all(len(set(ids)) == len(ids) for ids in seen.values()) and queue.current("ana") is None is queue.current("bob")
    assert made(made_items(20), overlap=0.25).current("cara")[0] in queue.shared  # nothing else is left for a third


def test_many_at_once(made):
    queue = made(made_items(60), overlap=0.2)
    barrier = threading.Barrier(4)

    def work(who):
        barrier.wait()
        while queue.current(who):
            label(queue, who)

    threads = [threading.Thread(target=work, args=(f"annotator {n}",)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    times = Counter(r["id"] for r in queue.file.labels)
    assert {i: times[i] for i in queue.items} == {i: 4 if i in queue.shared else 1 for i in queue.items}


def test_a_prompt_left_alone_goes_to_the_next_and_comes_back_to_nobody(made):
    queue = made(made_items(2), clock=(clock := Clock()))
    late = answer(queue, "ana")
    assert late["id"] == "p0" and label(queue, "bob")["id"] == "p1" and queue.current("bob") is None
    clock.now = labels.HOLD_S + 1
    assert queue.current("bob")[0] == "p0"
    with pytest.raises(OutdatedError, match="went to somebody else"):
        queue.submit("ana", late)
    label(queue, "bob")
    assert queue.current("ana") is None and len(queue.file.labels) == 2


def test_a_page_left_open_over_a_restart_can_still_submit_what_is_free(made):
    queue = made()
    open_page = answer(queue, "ana")
    queue = made()
    assert queue.submit("ana", open_page)["seconds"] is None  # nobody saw when it was shown
    open_page = answer(queue, "ana")
    queue = made()
    assert queue.current("bob")[0] == open_page["id"]
    with pytest.raises(OutdatedError, match="somebody else"):
        queue.submit("ana", open_page)


def test_undo_replaces_and_the_file_keeps_both(made, tmp_path):
    queue = made()
    with pytest.raises(RefusedError, match="no label before"):
        queue.undo("ana")
    label(queue, "ana", [[0], [1], [2]])
    label(queue, "ana", skip="first reason")
    third = queue.current("ana")
    queue.undo("ana")
    queue.undo("ana")
    assert queue.current("ana") == ("p0", "overall")
    with pytest.raises(RefusedError, match="no label before"):
        queue.undo("ana")
    with pytest.raises(OutdatedError, match="your label already"):  # a second click on the page that is gone
        label(queue, "ana", [[2], [1], [0]])
    label(queue, "ana", [[2], [1], [0]], replace=True)
    assert queue.current("ana") == third and [r["id"] for r in lines(tmp_path)] == ["p0", "p1", "p0"]
    queue.undo("ana")
    assert queue.current("ana") == ("p0", "overall")  # the last label, not the last prompt
    queue.keep("ana")
    assert queue.current("ana") == third and queue.progress("ana")[:2] == (2, 2)
    order = shown_order("ana", "p0", 3)
    said = export(tmp_path / "labels.jsonl", tmp_path / "out.jsonl")
    assert said.endswith("1 rankings by 1 annotator; left out: 1 skipped, 1 replaced later")
    records, _ = preferences.read(tmp_path / "out.jsonl")
    assert [(r["id"], r["ranks"]) for r in records] == [("p0", [3 - order.index(r) for r in range(3)])]


def test_resume_from_the_file(made):
    queue = made(made_items(6), overlap=0.5)
    for who in ("ana", "bob", "ana", "ana"):
        label(queue, who)
    state = [queue.current(w) for w in ("ana", "bob")], [queue.progress(w) for w in ("ana", "bob")]
    queue = made(made_items(6), overlap=0.5)
    assert ([queue.current(w) for w in ("ana", "bob")], [queue.progress(w) for w in ("ana", "bob")]) == state


def test_changed_items_are_noticed(made):
    queue = made()
    page = answer(queue, "ana")
    changed = made_items()
    changed[0]["responses"][1] = "other"
    with pytest.raises(OutdatedError, match="was changed since"):
        made(changed).submit("ana", page)
    label(made(), "ana")
    with pytest.raises(ValueError, match="labels of other responses to prompt 'p0'"):
        made(changed)


def test_criteria_are_asked_one_after_the_other(made, tmp_path):
    queue = made(made_items(2), criteria=["helpful", "harmless"])
    assert [label(queue, "ana")["criterion"] for _ in range(4)] == ["helpful", "harmless"] * 2 and queue.current("ana") is None
    assert [r["id"] for r in lines(tmp_path)] == ["p0", "p0", "p1", "p1"] and len({str(r["order"]) for r in lines(tmp_path)[:2]}) == 1
    assert "of other criteria" in export(tmp_path / "labels.jsonl", tmp_path / "out.parquet", ["harmless"])
    assert {r["criterion"] for r in preferences.read(tmp_path / "out.parquet")[0]} == {"harmless"}


def test_time_left_is_the_median_and_shared_out(made):
    queue = made(made_items(13), overlap=3 / 13, clock=(clock := Clock()))
    for seconds in (10, 100, 20):
        queue.current("ana")
        clock.now += seconds
        label(queue, "ana")
    done, left, seconds = queue.progress("ana")
    assert (done, left, seconds) == (3, 10, 200)
    queue.current("bob")
    taken = {r["id"] for r in queue.file.labels}
    assert queue.current("ana") and queue.current("bob")
    opened = {i for i, _ in queue.open.values()} - queue.shared
    pool = set(queue.items) - queue.shared - taken - opened
    mine = (queue.shared - taken) | ({queue.open["ana"][0]} - taken)
    assert queue.progress("ana")[1] == len(mine) + -(-len(pool) // 2)
    assert labels.statistics(queue.counted()) == [("ana", "3 ranked, 0 skipped, 20 s each (median)")]


def test_agreement_is_on_the_page_and_counted_anew_now_and_then(made):
    queue = made(made_items(6), overlap=1.0, clock=(clock := Clock()))

    def rank(annotator, best_first):
        item_id, _ = queue.current(annotator)
        order = queue.order(annotator, item_id)
        label(queue, annotator, [[order.index(i)] for i in best_first])

    assert queue.agreement() == []
    clock.now += labels.AGREEMENT_S + 1
    for _ in range(6):
        rank("ana", [0, 1, 2])
        rank("bob", [0, 1, 2])
    found = dict(queue.agreement())
    assert found["Krippendorff's alpha"].startswith("1.00 [1.00") and found["pairs ordered alike"].startswith("1.00")
    assert "ana with the others" not in found and sum(name.startswith("part ") for name in found) == 5
    for _ in range(6):
        rank("eve", [2, 1, 0])
    assert dict(queue.agreement()) == found  # not yet
    clock.now += labels.AGREEMENT_S + 1
    again = dict(queue.agreement())
    assert again["pairs ordered alike"].startswith("0.33") and again["ana with the others"].startswith("0.50")
    assert again["eve with the others"].startswith("0.00") and float(again["Krippendorff's alpha"].split()[0]) < 0.2


@pytest.mark.parametrize(("name", "known"), [("  Ana  Bell ", "Ana Bell"), ("ANA BELL", "Ana Bell"), ("Ángel", "Ángel")])
def test_a_name_is_known_however_it_is_typed(made, name, known):
    queue = made()
    label(queue, queue.known_name("Ana Bell"))
    assert queue.known_name(name) == known


@pytest.mark.parametrize("name", ["", "  ", None, 3, "x" * 61, "a\u202eb", "a\ud800", "simulated", "Simulated annotator"])
def test_what_is_no_name(made, name):
    with pytest.raises(RefusedError, match="name"):
        made().known_name(name)


@pytest.mark.parametrize(("rows", "said"), [
    ([{"id": "a", "prompt": "q", "responses": ["x", "y"]}] * 2, r"line 2: id 'a' is that of .*line 1 too"),
    ([{"id": "a", "prompt": "q", "responses": ["x"]}], "line 1: 1 responses"),
    ([{"id": "a", "prompt": "q", "responses": "xy"}], "line 1: responses is a str"),
    ([{"id": "a", "prompt": "q"}], "line 1: 0 responses"),
    ([{"id": "a", "prompt": "q", "responses": ["x", " "]}], "line 1: a response is empty text"),
    ([{"id": "a", "prompt": " ", "responses": ["x", "y"]}], "line 1: the prompt is empty text"),
    ([{"id": "a", "prompt": [{"role": "user", "content": ["q"]}], "responses": ["x", "y"]}], "prompt is neither text nor a list"),
    ([{"id": "a", "prompt": "q", "responses": ["x", "\ud800"]}], "half of a surrogate pair"),
    ([{"id": "a", "prompt": "q", "responses": ["x", "y"], "prompt_ids": [1]}], "belong together"),
    ([], "has no prompts")])
def test_items_that_nobody_could_rank(tmp_path, rows, said):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=said) as error:
        read_items(path)
    assert "\n" not in str(error.value)


def test_items_come_from_preferences_pairs_and_parquet(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give --items"):
        read_items(tmp_path / "none.jsonl")
    preferences.write(tmp_path / "a.parquet", [{"id": "x", "prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "annotator": "old",
                                                "criterion": "overall", "order": [1, 0], "gold_scores": [1.0, 0.0]}])
    assert read_items(tmp_path / "a.parquet") == [{"id": "x", "prompt": "q", "responses": ["a", "b"]}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}))
    assert read_items(tmp_path / "b.jsonl") == [{"id": "b.jsonl:1", "prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"]}]


def test_a_preference_file_of_several_annotators_asks_each_prompt_once(tmp_path):
    path = tmp_path / "preferences.parquet"
    row = {"id": "a", "prompt": "q", "responses": ["x", "y"], "criterion": "overall", "simulated": False, "order": [1, 0]}
    preferences.write(path, [row | {"annotator": "ann", "ranks": [1, 2]}, row | {"annotator": "bob", "ranks": [2, 1]},
                             row | {"annotator": "eve", "skipped": "unclear"}])
    assert read_items(path) == [{"id": "a", "prompt": "q", "responses": ["x", "y"]}]


def test_export_says_what_it_cannot_do(made, tmp_path):
    path = tmp_path / "labels.jsonl"
    with pytest.raises(ValueError, match="does not exist"):
        export(path, tmp_path / "out.jsonl")
    queue = made([*made_items(1), {"id": "m", "prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"]}])
    label(queue, "ana", skip="no idea")
    with pytest.raises(ValueError, match=r"no ranking to export \(1 skipped\)"):
        export(path, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="is the file of labels itself"):
        export(path, path)
    label(queue, "ana")
    queue.undo("ana")
    queue.undo("ana")
    label(queue, "ana", replace=True)
    export(path, tmp_path / "out.parquet")  # prompts of text beside prompts of messages
    assert {type(r["prompt"]) for r in preferences.read(tmp_path / "out.parquet")[0]} == {str, list}
    (tmp_path / "out.parquet").unlink()
    with pytest.raises(ValueError, match="must end in"):
        export(path, tmp_path / "out.csv")
    assert not list(tmp_path.glob("*out*"))
    path.write_bytes(path.read_bytes() + b'{"id": "to')
    assert "2 rankings by 1 annotator; left out: 0 skipped, 1 replaced later, 1 torn line" in export(path, tmp_path / "out.jsonl")


def test_settings_are_checked(made):
    with pytest.raises(ValueError, match="a share of the prompts, 0 to 1"):
        made(overlap=1.5)
    with pytest.raises(ValueError, match="expected different names"):
        made(criteria=["a", "a"])
    queue = made()
    with pytest.raises(RefusedError, match="say why"):
        label(queue, "ana", skip="  ")
    with pytest.raises(RefusedError, match="comment is longer"):
        label(queue, "ana", comment="x" * 10_001)
    for wrong in ({"id": "gone"}, {"id": ["p0"]}, {"criterion": None}):
        with pytest.raises(OutdatedError, match="no longer asked for"):
            queue.submit("ana", answer(queue, "ana") | wrong)
    assert queue.file.labels == []
