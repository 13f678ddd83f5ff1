"""A report as plain records, and the two ways it is written: one HTML page that needs nothing else, and Markdown beside its figures.

A number in a text carries where it comes from (`number`); the page shows that when one points at it, and `numbers` lists all
of them, so that a test can follow each one back to its manifest.
"""
import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from reward.annotate import HIDDEN

MARKED = re.compile("\x02([^\x02\x03\x04]*)\x03([^\x02\x03\x04]*)\x04")
NUMERIC = re.compile(r"[-+\[]?\d[\d.,]*(e[-+]\d+| ?%| points| GiB|[hm]\d\d[ms]|s|, [-+\d.e]+\])?$|not measured|no |$")


class Figure(NamedTuple):
    """An image `file` inside the report's folder, what it shows, and the runs its numbers come from."""

    file: str
    caption: str
    sources: list[str]


class Table(NamedTuple):
    """Cells are texts; without rows there is the caption alone. `stack` makes a row a block of its own on narrow screens, for tables
    with sentences in them; `folded` shows the caption alone until one asks, for long ones that only detail a figure."""

    header: list[str]
    rows: list[list[str]]
    caption: str
    sources: list[str]
    stack: bool = False
    folded: bool = False


class Section(NamedTuple):
    key: str
    title: str
    paragraphs: list[str]
    figures: list[Figure] = []
    tables: list[Table] = []


class Step(NamedTuple):
    """A stage in the picture of the pipeline: how long it took (empty: missing), its key figure, what its own measures say of it (a
    level of `LEVELS`) and why, and the stages it reads."""

    key: str
    state: str
    figure: str = ""
    level: str = "none"
    why: str = ""
    reads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.key} ({self.state or 'missing'})"


# Symbol and word: the verdict reads without colour, on paper too.
LEVELS = {"pass": "\u2713 passes", "warn": "! warns", "fail": "\u2717 fails", "none": "\u2013 no verdict"}


class Page(NamedTuple):
    """`warnings` are what a reader must know before believing anything; `steps` are the picture of the pipeline."""

    title: str
    lead: str
    warnings: list[str]
    steps: list[Step]
    summary: Table
    sections: list[Section]


def number(text: str, origin: str) -> str:
    """`text` marked with the place that holds the number, such as `runs/tiny/sft/manifest.json#metrics/after/stop_rate`."""
    return f"\x02{text}\x03{origin}\x04"


def plain(text: str) -> str:
    return MARKED.sub(r"\1", text)


def foreign(text: str) -> str:
    """Text of a model or a data set as a page can hold it: what one would not see, or what could pass for a mark of ours, is named."""
    return HIDDEN.sub(lambda m: f"(U+{ord(m[1]):04X})", text.replace("\r\n", "\n").strip())


def texts(page: Page) -> Iterator[str]:
    """Every text of the page in reading order, marks included."""
    yield page.lead
    for step in page.steps:
        yield from (step.figure, step.why)
    yield from page.warnings
    tables = [page.summary]
    for section in page.sections:
        yield from section.paragraphs
        yield from (figure.caption for figure in section.figures)
        tables += section.tables
    for table in tables:
        yield table.caption
        for row in table.rows:
            yield from row


def numbers(page: Page) -> list[tuple[str, str]]:
    """(text, origin) of every marked number."""
    return [match.groups() for text in texts(page) for match in MARKED.finditer(text)]  # type: ignore[misc]


# ---- HTML ----

STYLE = Path(__file__).with_name("page.css")


def marked(text: str) -> str:
    """Escaped HTML with numbers that tell their origin, and `code`."""
    coded = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return MARKED.sub(lambda m: f'<span class="n{" wrap" * (len(m[1]) > 30)}" title="{m[2]}">{m[1]}</span>', coded)


def source_line(sources: list[str]) -> str:
    return "Source: " + "; ".join(sources) if sources else ""


def numeric_columns(table: Table) -> list[bool]:
    return [i > 0 and bool(table.rows) and all(NUMERIC.match(plain(row[i])) for row in table.rows)
            for i in range(len(table.header))]


def table_html(table: Table) -> str:
    if not table.rows:
        return f'<div class="table"><div class="caption">{marked(table.caption)}</div></div>'
    aligned = numeric_columns(table)
    kinds = [' class="num"' if numeric else "" for numeric in aligned]
    head = "".join(f"<th{kind}>{html.escape(cell)}</th>" for cell, kind in zip(table.header, kinds, strict=True))
    body = []
    for row in table.rows:
        cells = [f'<td{kind} data-label="{html.escape(name)}">{marked(cell)}</td>' if table.stack else f"<td{kind}>{marked(cell)}</td>"
                 for cell, kind, name in zip(row, kinds, table.header, strict=True)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    rows, look, caption = "\n".join(body), " class=stack" if table.stack else "", marked(table.caption)
    inside = (f'<div class="scroll"><table{look}><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
              + source_html(table.sources))
    if table.folded:
        return f'<details class="table"><summary>{caption} ({len(table.rows)} rows)</summary>{inside}</details>'
    return f'<div class="table"><div class="caption">{caption}</div>{inside}</div>'


def source_html(sources: list[str]) -> str:
    """The small line; more than two runs unfold on demand."""
    line = html.escape(source_line(sources))
    if len(sources) > 2:
        return f'<details class="source"><summary>Source: {len(sources)} runs</summary>{line}</details>'
    return f'<span class="source">{line}</span>'


def figure_html(figure: Figure, folder: Path) -> str:
    data = base64.b64encode((folder / figure.file).read_bytes()).decode()
    kind = "svg+xml" if figure.file.endswith(".svg") else "png"
    return (f'<figure><img alt="{html.escape(plain(figure.caption))}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{marked(figure.caption)}{source_html(figure.sources)}</figcaption></figure>")


def step_html(step: Step, read: bool) -> str:
    """Its box in the picture; an arrow goes on from what another stage reads."""
    head = f'<a href="#{step.key}">{html.escape(step.name)}</a>'
    if not step.state:
        return f'<li class="missing">{head}<div class="why">{marked(step.why)}</div></li>'
    reads = f'<div class="reads">reads {html.escape(", ".join(step.reads))}</div>' if step.reads else ""
    return (f'<li class="{step.level}{" read" * read}">{head}<div class="verdict">{LEVELS[step.level]}</div>'
            f'<div class="key">{marked(step.figure)}</div><div class="why">{marked(step.why)}</div>{reads}</li>')


def to_html(page: Page, folder: Path) -> str:
    """The page as one file; figures are read from `folder` and put inside."""
    parts = [f"<h1>{html.escape(page.title)}</h1><p>{marked(page.lead)}</p>"]
    used = {name for step in page.steps for name in step.reads}
    if page.steps:
        parts.append('<ol class="pipeline">' + "".join(step_html(step, step.key in used) for step in page.steps) + "</ol>")
    if page.warnings:
        items = "".join(f"<li>{marked(warning)}</li>" for warning in page.warnings)
        parts.append(f'<div class="warn">Before you believe it:<ul>{items}</ul></div>')
    parts.append(f'<div class="summary">{table_html(page.summary)}</div>')
    for section in page.sections:
        parts.append(f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>'
                     + "".join(f"<p>{marked(p)}</p>" for p in section.paragraphs))
        if section.figures:
            parts.append('<div class="figures">' + "\n".join(figure_html(f, folder) for f in section.figures) + "</div>")
        parts.append('<div class="tables">' + "\n".join(map(table_html, section.tables)) + "</div></section>")
    style = STYLE.read_text(encoding="utf-8")
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(page.title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
            + "\n".join(parts) + "\n</body></html>\n")


# ---- Markdown ----

def inert(text: str) -> str:
    """Text in which no tag, link or image of a model's or a data set's has any effect."""
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")


def table_markdown(table: Table) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(inert(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    if not table.rows:
        return [inert(table.caption), ""]
    rule = "|" + "|".join("---:" if numeric else "---" for numeric in numeric_columns(table)) + "|"
    source = [f"<sub>{inert(source_line(table.sources))}</sub>", ""] if table.sources else []
    return [inert(table.caption), "", line(table.header), rule, *map(line, table.rows), "", *source]


def to_markdown(page: Page) -> str:
    """The same report as text; figures are linked where they lie."""
    out = [f"# {inert(page.title)}", "", inert(page.lead), ""]
    if page.steps:
        out += table_markdown(Table(["stage", "verdict", "key figure", "why", "reads"], [
            [s.name, LEVELS[s.level] if s.state else "", s.figure, s.why, ", ".join(s.reads)] for s in page.steps],
            "The pipeline.", []))
    out += [f"> **Note.** {inert(w)}\n" for w in page.warnings]
    out += table_markdown(page.summary)
    for section in page.sections:
        out += [f"## {inert(section.title)}", ""]
        for paragraph in section.paragraphs:
            out += [inert(paragraph), ""]
        for figure in section.figures:
            out += [f"![{inert(figure.caption)}]({figure.file})", "", f"*{inert(figure.caption)}*  ",
                    f"<sub>{inert(source_line(figure.sources))}</sub>", ""]
        for table in section.tables:
            out += table_markdown(table)
    return "\n".join(out).rstrip() + "\n"
