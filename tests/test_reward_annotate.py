"""The page: text of any kind is only shown; what people do with mouse and keys is what the file says, in a real browser."""
import hashlib
import html
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from reward import annotate
from reward.annotate import admits, checked_access, main, respond, shown
from reward.labels import LabelFile, Queue, shown_order

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = ["<img src=x onerror=window.pwned=9>\u200b<b>in bold</b>",
           "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><svg onload=window.pwned=3>",
           "![](http://127.0.0.1:9/track.png) [x](javascript:window.pwned=4) ${window.pwned=5} `${window.pwned=6}` "
           "{{constructor.constructor('window.pwned=7')()}} </div></section><style>*{display:none}</style> &lt; &amp;",
           "\u202eright to left\u202c \u2066never closed, zero\u200bwidth\u200b\u200b\u200b, nul \0, escape \x1b[31m, \r\nline",
           "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 "
           "\U0001f468\u200d\U0001f469\u200d\U0001f467 a\u200db a\U000e0041\U000e0042", "x" * 50_000, "word " * 10_000]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_only_shown(text):
    made = shown(text)
    marks = re.findall(r'<span class="hidden-char" title="[a-z0-9 -]+">U\+[0-9A-F]{4,5}(?: ×\d+)?</span>', made)
    rest = re.sub(r'<span class="hidden-char"[^>]*>[^<]*</span>', "", made)
    assert not set(rest) & set("<>\"'`$\\{}") and all(re.fullmatch(r"#\d+", e) for e in re.findall(r"&([^;]*);", rest))
    assert html.unescape(rest) == annotate.HIDDEN.sub("", text.replace("\r\n", "\n"))
    assert len(marks) == made.count("<span")


@pytest.mark.parametrize(("text", "expected"), [
    ("a\u202eb", 'a<span class="hidden-char" title="right-to-left override">U+202E</span>b'),
    ("\u200b" * 3 + "\ufeff", '<span class="hidden-char" title="zero width space">U+200B ×3</span>'
                              '<span class="hidden-char" title="zero width no-break space">U+FEFF</span>'),
    ("\0\t\n", '<span class="hidden-char" title="control character">U+0000</span>\t\n'),
    ("a\u200db", 'a<span class="hidden-char" title="zero width joiner">U+200D</span>b'),
    ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"), ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
    ("1 < 2", "1 &#60; 2")])
def test_what_one_would_not_see_is_marked(text, expected):
    assert shown(text) == expected


@pytest.fixture
def queue(tmp_path):
    items = [{"id": f"p{i}", "prompt": "q", "responses": ["a", "b", "c"]} for i in range(3)]
    file = LabelFile(tmp_path / "labels.jsonl")
    yield Queue(items, file, overlap=1.0)
    file.close()


def test_requests_of_the_page(queue, monkeypatch):
    first = respond(queue, {"do": "start", "annotator": " ana "})
    assert first["annotator"] == "ana" and first["progress"] == "0 done, 3 left" and first["cards"].count("<section") == 3
    submit = {"do": "submit", "annotator": "ana", **first["task"]}
    assert respond(queue, submit | {"groups": []}) == {"refused": "nothing is ranked yet: choose the best response first"}
    assert respond(queue, submit) == {"refused": "the ranking is no list of groups"}
    assert respond(queue, {"do": "dance", "annotator": "ana"})["refused"] and respond(queue, [1])["refused"] == "the request is no object"
    assert "name" in respond(queue, {"do": "start"})["refused"]
    monkeypatch.setattr(annotate.Queue, "submit", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert respond(queue, submit | {"groups": [[0], [1], [2]]})["refused"].startswith("NOT SAVED, the label is still here: No space")
    monkeypatch.undo()
    second = respond(queue, submit | {"groups": [[2], [0, 1]], "comment": "why"})
    assert second["task"]["id"] == "p1" and second["progress"].startswith("1 done, 2 left, about 0 s") and second["message"] == ""
    again = respond(queue, submit | {"groups": [[0], [1], [2]]})  # a double click
    assert again["task"]["id"] == "p1" and "label already" in again["message"] and len(queue.file.labels) == 1
    back = respond(queue, {"do": "undo", "annotator": "ana"})
    assert back["task"]["replace"] and back["before"] == "Your label so far: 3 > 1 = 2" and back["comment"] == "why"
    assert respond(queue, {"do": "keep", "annotator": "ana"})["task"]["id"] == "p1"
    for _ in range(2):
        task = respond(queue, {"do": "start", "annotator": "ana"})["task"]
        last = respond(queue, {"do": "submit", "annotator": "ana", **task, "skip": "<b>"})
    assert last["task"] is None and last["undo"] and last["figures"].startswith("<table><tr><td>ana</td><td>1 ranked, 2 skipped")
    assert respond(queue, {"do": "undo", "annotator": "ana"})["before"] == "Your label so far: skipped: <b>"  # the page sets it as text


def test_access():
    assert admits("0123456789ab", "ana", "0123456789ab")
    assert not admits("0123456789ab", "ana", "0123456789ac") and not admits("0123456789ab", " ", "0123456789ab")
    assert not admits("0123456789ab", "ana", "\ud800é")
    checked_access("127.0.0.1", None)
    checked_access("0.0.0.0", "0123456789ab")
    for host in ("0.0.0.0", "::", "192.168.1.2", "127.0.0.1.evil.example"):
        with pytest.raises(ValueError, match="lets others reach the page"):
            checked_access(host, None)
    with pytest.raises(ValueError, match="use at least 12"):
        checked_access("127.0.0.1", "short")


def write_items(path, responses, num=1):
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"question {i}", "responses": responses}) + "\n" for i in range(num)))
    return path


@pytest.mark.parametrize(("flags", "said"), [
    ("--out {t}/l.jsonl", "--items is missing"), ("--items {t}/none --out {t}/l.jsonl", "does not exist"),
    ("--items {t}/i.jsonl --out {t}/i.jsonl", "is the file of items"),
    ("--items {t}/i.jsonl --out {t}/l.jsonl --host 0.0.0.0", "PLUMBLINE_ANNOTATE_TOKEN"),
    ("--items {t}/i.jsonl --out {t}/l.jsonl --guidelines {t}/none.md", "none.md"),
    ("--export {t}/e.jsonl --out {t}/l.jsonl", "does not exist"),
    ("--items {t}/i.jsonl --out {t}/l.jsonl", "the page needs gradio: `make annotate` installs it")])
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(annotate.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("PLUMBLINE_ANNOTATE_TOKEN", raising=False)
    write_items(tmp_path / "i.jsonl", ["a", "b"])
    assert main(flags.format(t=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


# --- in a browser ---

class Server:
    """The page, served from a folder by the real command line; `kill` is kill -9."""

    def __init__(self, folder: Path, *flags: str, **environment: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.flags, self.environment, self.url = folder, flags, environment, f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        self.log = (self.folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reward.annotate", "--items", str(self.folder / "items.jsonl"), "--out",
             str(self.folder / "labels.jsonl"), "--port", str(self.port), *self.flags],
            cwd=ROOT, env={**os.environ, **self.environment}, stdout=self.log, stderr=self.log)
        for _ in range(600):
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def labels(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "labels.jsonl").read_text().splitlines()]


@pytest.fixture
def serve(tmp_path, chromium):
    pytest.importorskip("gradio", reason="gradio is missing (make test-browser installs it)")
    servers = []

    def start(responses=("a", "b", "c"), num=3, flags=(), **environment):
        write_items(tmp_path / "items.jsonl", list(responses), num)
        servers.append(Server(tmp_path, *flags, **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def enter(chromium):
    """Open the page as an annotator; errors of the page's script and requests to other hosts fail the test."""
    contexts, wrong = [], []

    def open_page(server, annotator, login=None):
        context = chromium.new_context(viewport={"width": 1400, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None)
        page.goto(server.url)
        if login:
            page.locator("input").first.fill(annotator)
            page.locator("input[type=password]").fill(login)
            page.keyboard.press("Enter")
        else:
            page.fill(".name", annotator)
            page.keyboard.press("Enter")
        page.wait_for_selector(".who")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def done(page, num):
    page.wait_for_function("n => document.querySelector('.progress')?.textContent.startsWith(n + ' done')", arg=num)


def ranks_as_shown(label):
    return [label["ranks"][index] for index in label["order"]]


@pytest.mark.browser
def test_browser_rank_tie_undo_skip_reload(serve, enter):
    server = serve(("a", "b", "c", "d"), num=4)
    page = enter(server, "ana")
    assert page.is_disabled("[data-do=submit]")
    page.keyboard.press("Enter")  # nothing is chosen: nothing happens but a message
    assert "needs a place" in page.text_content(".said") and server.labels() == []
    for key in ["3", "1", "=", "2", "4", "4", "Backspace", "2", "4", "Enter"]:  # 4 in and out again, 2 taken back and put third
        page.keyboard.press(key)
    done(page, 1)
    assert ranks_as_shown(server.labels()[0]) == [2, 3, 1, 4]
    page.click(".card[data-position='1'] .text")
    page.click(".card[data-position='0'] .pick")
    page.click("[data-do=tie]")
    page.click(".card[data-position='3'] .pick")
    assert page.text_content(".card[data-position='3'] .place") == "2nd, tied"
    page.click("[data-do=rest]")
    page.fill(".comment", "by mouse")
    page.click("[data-do=submit]")
    done(page, 2)
    assert ranks_as_shown(server.labels()[1]) == [2, 1, 4, 2] and server.labels()[1]["comment"] == "by mouse"
    page.keyboard.press("u")
    page.wait_for_selector("[data-do=keep]")
    assert page.text_content(".said") == "Your label so far: 2 > 1 = 4 > 3" and page.input_value(".comment") == "by mouse"
    for key in ["1", "r", "Enter"]:
        page.keyboard.press(key)
    page.wait_for_function("!document.querySelector('[data-do=keep]')")
    assert [r["id"] for r in server.labels()] == ["p0", "p1", "p1"] and ranks_as_shown(server.labels()[2]) == [1, 2, 2, 2]
    page.keyboard.press("s")
    page.keyboard.press("Enter")  # without a reason
    page.wait_for_function("document.querySelector('.said').textContent === 'say why you skip this prompt'")
    page.keyboard.type("1 2 = u: typed, not done")
    page.keyboard.press("Enter")
    done(page, 3)
    assert server.labels()[3]["skipped"] == "1 2 = u: typed, not done" and "ranks" not in server.labels()[3]
    before = page.inner_text(".cards")
    page.reload()
    done(page, 3)
    assert page.inner_text(".cards") == before
    for key in ["1", "2", "3", "4", "Enter"]:
        page.keyboard.press(key)
    page.wait_for_selector("text=All done")
    assert len(server.labels()) == 5


@pytest.mark.browser
def test_browser_drag(serve, enter):
    server = serve(("a", "b", "c"))
    page = enter(server, "ana")
    page.drag_and_drop(".pick[data-position='2']", ".gap")
    page.drag_and_drop(".pick[data-position='0']", ".gap[data-gap='1']")
    page.drag_and_drop(".pick[data-position='1']", ".gap[data-gap='0']")
    assert page.inner_text(".strip").split() == ["best", "2", ">", "3", ">", "1", "worst"]
    page.drag_and_drop(".chip[data-position='1']", ".group[data-group='2']")
    assert page.inner_text(".strip").split() == ["best", "3", ">", "1", "=", "2", "worst"]
    page.drag_and_drop(".chip[data-position='2']", ".gap[data-gap='2']")
    page.click("[data-do=submit]")
    done(page, 1)
    assert ranks_as_shown(server.labels()[0]) == [1, 1, 3]


@pytest.mark.browser
def test_browser_keyboard_alone_without_digits(serve, enter):
    server = serve([str(i) for i in range(12)], num=1)
    page = enter(server, "ana")
    page.focus(".card[data-position='11'] .pick")  # the twelfth has no key of its own: Tab goes there
    page.keyboard.press("Space")
    page.keyboard.press("0")
    page.keyboard.press("r")
    page.focus("[data-do=submit]")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=All done")
    assert ranks_as_shown(server.labels()[0]) == [3] * 9 + [2, 3, 1]


@pytest.mark.browser
def test_browser_hostile_text_is_only_shown(serve, enter):
    server = serve(HOSTILE, num=2)
    page = enter(server, "<img src=x onerror=window.pwned=8>")
    order = shown_order("<img src=x onerror=window.pwned=8>", "p0", len(HOSTILE))
    for position, index in enumerate(order):
        text = page.locator(f".card[data-position='{position}'] .text")
        visible = text.evaluate("e => { const c = e.cloneNode(true); c.querySelectorAll('.hidden-char').forEach(m => m.remove());"
                                "return c.textContent }")
        assert visible == annotate.HIDDEN.sub("", HOSTILE[index].replace("\r\n", "\n"))
        assert text.evaluate("e => [...e.children].every(c => c.className === 'hidden-char')")
        card, inner = (page.locator(f".card[data-position='{position}'] {s}".strip()).bounding_box() for s in ("", ".text"))
        assert card["width"] <= 1400 and inner["height"] <= 0.56 * 900
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing runs out of the page
    for key in ["1", "r", "Enter"]:
        page.keyboard.press(key)
    done(page, 1)
    page.click("summary")
    assert page.evaluate("window.pwned") is None and server.labels()[0]["responses"] == HOSTILE


@pytest.mark.browser
def test_browser_two_annotators_at_once(serve, enter):
    server = serve(num=8, flags=("--overlap", "0.25"))
    pages = {name: enter(server, name) for name in ("ana", "bob")}
    for page in pages.values():
        page.keyboard.press("1")
    for turn in range(1, 4):
        for page in pages.values():
            for key in ["1", "2", "3", "Enter"][turn == 1:]:
                page.keyboard.press(key)
            done(page, turn)
    labels = server.labels()
    ids = {name: {r["id"] for r in labels if r["annotator"] == name} for name in pages}
    assert len(labels) == 6 and all(len(i) == 3 for i in ids.values())
    by_both = ids["ana"] & ids["bob"]
    by_hash = sorted((f"p{i}" for i in range(8)), key=lambda i: hashlib.sha256(i.encode()).digest())
    assert by_both <= set(by_hash[:2])


@pytest.mark.browser
def test_browser_kill_9_and_resume(serve, enter):
    server = serve(num=4)
    page = enter(server, "ana")
    for turn in range(1, 3):
        for key in ["1", "2", "3", "Enter"]:
            page.keyboard.press(key)
        done(page, turn)
    for key in ["2", "1", "3"]:
        page.keyboard.press(key)
    server.kill()
    assert len(server.labels()) == 2  # what the page called done is in the file
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.said').textContent.startsWith('Not saved')")
    assert page.inner_text(".strip").split() == ["best", "2", ">", "1", ">", "3", "worst"]
    with (server.folder / "labels.jsonl").open("a") as f:
        f.write('{"id": "p2", "respo')  # as after a power cut
    server.start()
    page.keyboard.press("Enter")  # the page goes on where it was, without a reload
    done(page, 3)
    assert "set aside" in (server.folder / "server.log").read_text()
    assert ranks_as_shown(server.labels()[2]) == [2, 1, 3] and (server.folder / "labels.jsonl.torn").read_text() == '{"id": "p2", "respo\n'
    page.reload()
    done(page, 3)


@pytest.mark.browser
def test_browser_token(serve, enter, chromium):
    server = serve(flags=("--host", "0.0.0.0"), PLUMBLINE_ANNOTATE_TOKEN="0123456789abcdef")
    body = json.dumps({"data": {"do": "start", "annotator": "x"}, "session_hash": "s", "component_id": 4, "fn_name": "act"}).encode()
    for path in ("gradio_api/component_server", "gradio_api/upload", "gradio_api/queue/join"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server.url + path, body, {"Content-Type": "application/json"}), timeout=10)
        assert refused.value.code == 401, path
    page = chromium.new_page()
    page.goto(server.url)
    page.locator("input").first.fill("ana")
    page.locator("input[type=password]").fill("0123456789abcdeg")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Incorrect")
    assert not page.query_selector(".card")
    page.close()
    page = enter(server, "ana", login="0123456789abcdef")
    assert page.text_content(".who") == "ana" and page.query_selector(".card")  # no name is asked for twice
