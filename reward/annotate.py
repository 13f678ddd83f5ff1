"""The page on which people rank responses, one annotator a browser, and the export of what they said.

    make annotate ARGS="--items responses.jsonl --out labels.jsonl"
    python -m reward.annotate --out labels.jsonl --export preferences.jsonl

docs/annotate.md has the rest. The page is one component of Gradio with a script of its own (annotate.js); everything that decides
anything is in reward/labels.py, and this file imports gradio only to serve it.
"""
import argparse
import hmac
import importlib.util
import os
import re
import socket
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reward.labels import LabelFile, OutdatedError, Queue, RefusedError, duration, export, last_labels, read_items, statistics

HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN = "PLUMBLINE_ANNOTATE_TOKEN"
MIN_TOKEN = 12
# What a browser would not show, or would let reorder the text: controls but tab and line feed, bidi controls, zero-width characters, tags.
# Joiners stay between letters outside ASCII, where Persian, Indic scripts and emoji are written with them.
HIDDEN = re.compile(
    r"([\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    r"\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f]))\1*")
# Entities for the characters of HTML, and for those of the template languages that Gradio knows.
ENTITIES = {ord(c): f"&#{ord(c)};" for c in "&<>\"'`$\\{}"}


def shown(text: str) -> str:
    """The text as HTML that displays it and does nothing else: no tag, template or direction of it has any effect.

    Characters that are invisible or turn the text around become marks with their code point, so that what is read is what is scored.
    """
    def mark(match: re.Match) -> str:
        char, times = match[1], len(match[0])
        name = unicodedata.name(char, "control character").lower()
        return f'<span class="hidden-char" title="{name}">U+{ord(char):04X}{f" ×{times}" if times > 1 else ""}</span>'

    parts, end = [], 0
    text = text.replace("\r\n", "\n")
    for match in HIDDEN.finditer(text):
        parts += [text[end:match.start()].translate(ENTITIES), mark(match)]
        end = match.end()
    return "".join([*parts, text[end:].translate(ENTITIES)])


def prompt_html(prompt: str | list[dict[str, str]]) -> str:
    """A text, or each message under the name of its role."""
    messages = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    return "".join(f'<div class="message"><div class="role">{shown(str(m["role"]))}</div>'
                   f'<div class="text" dir="auto">{shown(m["content"])}</div></div>' for m in messages)


def card_html(position: int, text: str) -> str:
    return (f'<section class="card" data-position="{position}" draggable="false"><button type="button" class="pick" draggable="true" '
            f'data-position="{position}" aria-label="Response {position + 1}"><span class="number">{position + 1}</span>'
            f'<span class="place">choose</span></button><div class="text" dir="auto" tabindex="0">{shown(text)}</div></section>')


def order_text(label: dict[str, Any]) -> str:
    """A label in the numbers of the page, such as "2 > 1 = 3", or why it was skipped."""
    if "skipped" in label:
        return f"skipped: {label['skipped']}"
    ranks = [label["ranks"][index] for index in label["order"]]
    return " > ".join(" = ".join(str(p + 1) for p, r in enumerate(ranks) if r == rank) for rank in sorted(set(ranks)))


def view(queue: Queue, annotator: str, message: str = "") -> dict[str, Any]:
    """What the page shows an annotator: the task with its responses in the annotator's order, or that all is done."""
    key = queue.current(annotator)
    done, left, seconds = queue.progress(annotator)
    figures = "".join(f"<tr><td>{shown(name)}</td><td>{shown(figure)}</td></tr>"
                      for name, figure in [*statistics(queue.counted()), *queue.agreement()])
    page: dict[str, Any] = {
        "annotator": annotator, "message": message, "done": done, "left": left, "undo": done > 0,
        "progress": f"{done} done, {left} left" + (f", about {duration(seconds)}" if seconds is not None and left else ""),
        "figures": f"<table>{figures}</table>" if figures else "No labels yet.", "task": None}
    if key is None:
        return page
    item_id, criterion = key
    item = queue.items[item_id]
    before = queue.done.get(annotator, {}).get(key)
    order = queue.order(annotator, item_id)
    page["task"] = {"id": item_id, "criterion": criterion, "version": queue.version(annotator, item_id), "replace": before is not None}
    page |= {"prompt": prompt_html(item["prompt"]), "cards": "".join(card_html(p, item["responses"][i]) for p, i in enumerate(order)),
             "num": len(order), "longest": max(map(len, item["responses"])),
             "asked": f"Criterion: {criterion}" if len(queue.criteria) > 1 or criterion != "overall" else "",
             "before": f"Your label so far: {order_text(before)}" if before else "", "comment": before["comment"] if before else ""}
    return page


def respond(queue: Queue, asked: Any) -> dict[str, Any]:
    """One request of the page: {"do": start | submit | undo | keep, "annotator", ...}. A refused label gives {"refused": why} alone."""
    try:
        if not isinstance(asked, dict):
            raise RefusedError("the request is no object")
        annotator = queue.known_name(asked.get("annotator"))
        do = asked.get("do")
        if do == "submit":
            queue.submit(annotator, asked)
        elif do == "undo":
            queue.undo(annotator)
        elif do == "keep":
            queue.keep(annotator)
        elif do != "start":
            raise RefusedError(f"unknown request {do!r}")
        return view(queue, annotator)
    except OutdatedError as error:
        return view(queue, annotator, str(error))
    except RefusedError as error:
        return {"refused": str(error)}
    except OSError as error:
        return {"refused": f"NOT SAVED, the label is still here: {error.strerror or error}. Try again when the disk is in order."}


def admits(token: str, name: str, given: str) -> bool:
    """Whether a name and an access token open the page; the comparison takes as long for every wrong token."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()) and bool(name.strip())


def checked_access(host: str, token: str | None) -> None:
    """Raises ValueError for a page that strangers could reach, or a token that they could guess."""
    if token is None and host not in LOOPBACK:
        raise ValueError(f"--host {host} lets others reach the page: set an access token in {TOKEN} (or --token), or leave --host out")
    if token is not None and len(token) < MIN_TOKEN:
        raise ValueError(f"the access token has {len(token)} characters: use at least {MIN_TOKEN}, as from `openssl rand -hex 16`")


class Limits:
    """Refuses requests that are too big or too many, before anything reads them: an ASGI middleware.

    A client (by address) may ask `per_minute` times a minute, over all that a page loads, and try `logins` times to log in; a proxy in
    front makes all clients one. A body may have `max_bytes`, whatever its header says.
    """

    def __init__(self, app: Any, *, per_minute: int = 1200, logins: int = 10, max_bytes: int = 1 << 20,
                 clock: Callable[[], float] = time.monotonic):
        self.app, self.max_bytes, self.clock = app, max_bytes, clock
        self.allowed = {"all": per_minute, "login": logins}
        self.asked: dict[tuple[str, str], list[float]] = {}  # when each client asked in the last minute

    def too_many(self, client: str, kind: str) -> bool:
        now = self.clock()
        if len(self.asked) > 10_000:  # addresses of nobody who is here now
            self.asked = {key: times for key, times in self.asked.items() if times[-1] > now - 60}
        times = [t for t in self.asked.get((client, kind), []) if t > now - 60]
        self.asked[client, kind] = [*times[-self.allowed[kind]:], now]
        return len(times) >= self.allowed[kind]

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client, read = (scope.get("client") or ("unknown",))[0], 0
        login = scope["path"].rstrip("/").endswith("/login") and scope["method"] == "POST"

        async def refuse(status: int, why: str) -> None:
            headers = [(b"content-type", b"text/plain"), (b"retry-after", b"60")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": why.encode()})

        if self.too_many(client, "all") or (login and self.too_many(client, "login")):
            await refuse(429, "too many requests: wait a minute")
            return
        lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
        if any(not value.isdigit() or int(value) > self.max_bytes for value in lengths):
            await refuse(413, f"the request is larger than {self.max_bytes:,} bytes")
            return

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= self.max_bytes else {"type": "http.disconnect"}  # sent in chunks, without a length

        await self.app(scope, counted, send)


def serve(queue: Queue, guidelines: str, host: str, port: int, token: str | None) -> None:
    """Serve the page until interrupted. Nothing is asked of any other machine: no analytics, no fonts, no update check."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}, port {port} ({error.strerror or error}): give another --port") from None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join({*os.environ.get("NO_PROXY", "").split(","), *LOOPBACK} - {""})
    import gradio as gr
    from starlette.middleware import Middleware

    def act(asked):
        return respond(queue, asked)

    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title="Ranking responses", analytics_enabled=False) as page:
        with gr.Accordion("Guidelines", open=False):
            gr.Markdown(guidelines, elem_id="guidelines")
        gr.HTML("", html_template='<div id="annotate"></div>', js_on_load=(HERE / "annotate.js").read_text(encoding="utf-8"),
                server_functions=[act], elem_id="annotate-frame")
    page.launch(server_name=host, server_port=port, share=False, quiet=True, show_error=False, run_history=False, footer_links=[],
                app_kwargs={"middleware": [Middleware(Limits)]}, theme=theme, css_paths=[HERE / "annotate.css"], prevent_thread_lock=True,
                auth=(lambda name, given: admits(token, name, given)) if token is not None else None,
                auth_message="Your name, and the access token as the password")
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C stops it; every label is on the disk)", flush=True)
    page.block_thread()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reward.annotate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", metavar="FILE", help=".jsonl, .jsonl.gz or .parquet of {id, prompt, responses}; preferences work too")
    parser.add_argument("--out", required=True, metavar="LABELS", help="the file of labels (.jsonl): made, or continued")
    parser.add_argument("--export", metavar="FILE", help="write the labels that count as preferences (.jsonl or .parquet) and end")
    parser.add_argument("--criteria", nargs="+", metavar="NAME", help="a ranking for each, in turn (default: overall); --export: these")
    parser.add_argument("--overlap", type=float, default=0.0, metavar="SHARE", help="of the prompts, for every annotator (default: 0)")
    parser.add_argument("--guidelines", default=str(HERE / "annotate.md"), metavar="FILE", help="what annotators are told, in Markdown")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another than this machine's own needs a token")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--token", default=os.environ.get(TOKEN), help=f"access token; better in {TOKEN}, where `ps` cannot show it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    try:
        if given.export:
            print(export(given.out, given.export, given.criteria or ()))
            return 0
        if not given.items:
            raise ValueError("--items is missing: a file of prompts with responses (or --export FILE to write the labels as preferences)")
        checked_access(given.host, given.token)
        guidelines = Path(given.guidelines).read_text(encoding="utf-8")
        items = read_items(given.items)
        if Path(given.out).exists() and Path(given.out).samefile(given.items):
            raise ValueError(f"{given.out} is the file of items: give --out another name")
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("the page needs gradio: `make annotate` installs it, or pip install 'gradio>=6.31,<7'")
        file = LabelFile(given.out)
        if file.torn:
            print(f"{given.out}: the last line was torn ({file.torn} bytes, as after a power cut) and is set aside in {file.aside}")
        queue = Queue(items, file, given.criteria or ("overall",), given.overlap)
        counted = last_labels(file.labels)
        unknown = sum(label["id"] not in queue.items for label in counted)
        print(f"{len(items):,} prompts, {len(queue.shared)} for every annotator; {given.out} holds {len(counted):,} labels"
              + (f", {unknown} of prompts that are not in {given.items}" if unknown else ""))
        serve(queue, guidelines, given.host, given.port, given.token)
    except KeyboardInterrupt:
        print("stopped: the same command continues")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
