"""HTML of a report: one page that needs no other file, no network and no script.

Text becomes `Html` in `text` alone, which escapes it; mypy refuses a str where Html belongs.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NewType

from training.report.figures import Picture

Html = NewType("Html", str)

STYLE = """\
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --quiet: #57606a;
  --line: #d5d9de; --tint: #f3f5f7; --link: #0060a0; --mark: #fff4e0; --edge: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15191e; --ink: #e3e7eb; --quiet: #a3adb8;
  --line: #3a424b; --tint: #1f252c; --link: #7cc4f0; --mark: #33290f; --edge: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem;
  border-bottom: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
a { color: var(--link); } nav a { display: inline-block; margin-right: 1rem; padding: 0.2rem 0; }
p, figcaption { max-width: 46rem; } figcaption, .quiet { color: var(--quiet); font-size: 0.9rem; }
figure { margin: 1rem 0; min-width: 0; } img { display: block; max-width: 100%; height: auto; }
.grid { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.wide { overflow-x: auto; } .wide img { max-width: none; }
table { border-collapse: collapse; font-size: 0.95rem; }
th, td { padding: 0.25rem 0.7rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); } td.number { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide th[scope=row] { white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.note { background: var(--mark); border-left: 4px solid var(--edge); padding: 0.5rem 0.8rem;
  margin: 0.8rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.7rem; margin: 1rem 0; padding: 0; }
.tiles div { background: var(--tint); border-radius: 0.4rem; padding: 0.5rem 0.9rem; }
.tiles dt { color: var(--quiet); font-size: 0.85rem; } .tiles dd { margin: 0; font-size: 1.3rem; }
.pair { border-left: 3px solid var(--line); padding: 0 0 0 0.8rem; margin: 1rem 0; }
.pair p { margin: 0; }
.pair dl { display: grid; grid-template-columns: 6.2rem 1fr; gap: 0.1rem 0.5rem; margin: 0; }
.pair dt { color: var(--quiet); font-size: 0.85rem; padding-top: 0.1rem; }
.pair dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 30rem) { table { font-size: 0.85rem; } .pair dl { grid-template-columns: 1fr; }
  .pair dt { padding-top: 0.3rem; } }
pre { background: var(--tint); padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
code { overflow-wrap: anywhere; background: var(--tint); padding: 0 0.2rem; }
pre code { padding: 0; overflow-wrap: normal; } summary { cursor: pointer; padding: 0.2rem 0; }
"""
# What the page may load: nothing but what is in it, even if an escape were forgotten somewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def text(value: object) -> Html:
    """Any text as HTML that shows it."""
    return Html(html.escape(str(value)))


def joined(parts: Iterable[Html], between: str = "\n") -> Html:
    return Html(between.join(parts))


def element(name: str, content: Html, **attributes: str) -> Html:
    """An element; `class_` stands for the attribute class, `aria_label` for aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{content}</{name}>")


def paragraph(value: str) -> Html:
    return element("p", text(value))


def note(value: str) -> Html:
    """Something that the reader should not miss."""
    return element("p", text(value), class_="note", role="note")


def missing(what: str, verb: str) -> Html:
    """Says which verb makes what is not there yet."""
    command = element("code", text(f"python -m training {verb}"))
    return element("p", Html(f"{text(what)}: not there yet; run {command}"), class_="note",
                   role="note")  # fmt: skip


def section(identity: str, title: str, *parts: Html) -> Html:
    heading = element("h2", text(title))
    return element("section", joined([heading, *parts]), id=identity)


def details(summary: str, *parts: Html) -> Html:
    return element("details", joined([element("summary", text(summary)), *parts]))


def tiles(figures: Iterable[tuple[str, str]]) -> Html:
    """The few figures that come first, large."""
    shown = [
        element("div", Html(element("dt", text(name)) + element("dd", text(value))))
        for name, value in figures
    ]
    return element("dl", joined(shown), class_="tiles")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """The first column names a row, the others hold figures."""

    def row(cells: Sequence[str], kind: str) -> Html:
        first = element("th", text(cells[0]), scope="col" if kind == "th" else "row")
        others = [element(kind, text(cell), class_="number") for cell in cells[1:]]
        return element("tr", joined([first, *others], ""))

    body = element("tbody", joined(row(cells, "td") for cells in rows))
    grid = element("table", Html(element("thead", row(head, "th")) + body))
    return element("div", grid, class_="wide")


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """Names and what they are."""
    shown = [
        element("tr", Html(element("th", text(name), scope="row") + element("td", text(value))))
        for name, value in rows
    ]
    return element("table", element("tbody", joined(shown)), class_="facts")


def listing(value: str) -> Html:
    return element("pre", element("code", text(value)), tabindex="0")


def grid(parts: Iterable[Html]) -> Html:
    return element("div", joined(parts), class_="grid")


def figure(picture: Picture, described: str, caption: Html, wide: bool = False) -> Html:
    """A picture, the one of two that suits the reader's page.

    Args:
        described: what it shows, for those who do not see it.
        wide: keeps its size, and is scrolled sideways where the page is narrower.
    """

    def data(theme: str) -> str:
        return "data:image/png;base64," + base64.b64encode(picture.files[theme]).decode()

    shown = element("picture", Html(
        f'<source media="(prefers-color-scheme: dark)" srcset="{data("dark")}">'
        f'<img src="{data("light")}" alt="{text(described)}" width="{picture.width}" '
        f'height="{picture.height}">'
    ))  # fmt: skip
    if wide:
        # Keys scroll only what can be focused, and what can be focused needs a name.
        shown = element("div", shown, class_="wide", tabindex="0", role="region",
                        aria_label="a figure that may be wider than the page")  # fmt: skip
    below = element("figcaption", caption) if caption else Html("")
    return element("figure", Html(shown + below))


def sentence(value: str) -> Html:
    """Text of unknown language, in the direction of its first strong character."""
    return element("bdi", text(value), lang="", dir="auto")


def pair(heading: str, rows: Iterable[tuple[str, str]]) -> Html:
    """Sentences that belong together, each with its role."""
    shown = [
        Html(element("dt", text(role)) + element("dd", sentence(value), dir="auto"))
        for role, value in rows
    ]
    head = element("p", text(heading), class_="quiet")
    return element("div", Html(head + element("dl", joined(shown))), class_="pair")


def document(title: str, parts: Iterable[Html], contents: Iterable[tuple[str, str]]) -> Html:
    """The whole page.

    Args:
        contents: identity and title of each section.
    """
    links = joined(element("a", text(name), href=f"#{identity}") for identity, name in contents)
    return Html(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<nav aria-label="Contents">{links}</nav>
</header>
<main>
{joined(parts)}
</main>
</body>
</html>
"""
    )
