"""Results on disk: Markdown, CSV, JSON and PNG an experiment, and one HTML page of them all."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larosa.reproduce.cache import write_whole
from larosa.reproduce.results import Results


@dataclass(frozen=True)
class Section:
    """An experiment's results with what belongs beside them; `missing` says why there are none."""

    name: str
    title: str
    claim: str
    results: Results
    missing: str | None = None


def write_section(folder: Path, section: Section, settings: dict[str, Any]) -> list[Path]:
    """Write an experiment's files and name them.

    Raises:
        LarosaError: the folder cannot be written to.
    """
    contents: dict[str, str | bytes] = {f"{section.name}.md": markdown(section, settings)}
    contents |= {f"{table.name}.csv": table.csv() for table in section.results.tables}
    contents |= {f"{picture.name}.png": picture.png for picture in section.results.pictures}
    contents[f"{section.name}.json"] = json.dumps(to_dict(section, settings), indent=2) + "\n"
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def to_dict(section: Section, settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON form of an experiment's results."""
    return {
        "name": section.name,
        "title": section.title,
        "paper": section.claim,
        "missing": section.missing,
        "settings": settings,
        "tables": [table.to_dict() for table in section.results.tables],
        "pictures": [f"{picture.name}.png" for picture in section.results.pictures],
        "notes": section.results.notes,
    }


def markdown(section: Section, settings: dict[str, Any]) -> str:
    """An experiment's results as one Markdown page; pictures are files beside it."""
    parts = [f"# {section.title} ({section.name})", f"In the paper: {section.claim}"]
    parts += [
        table.markdown().rstrip()
        if len(table.rows) <= _LONG_TABLE
        else f"**{table.title}**: {len(table.rows)} rows in [{table.name}.csv]({table.name}.csv)"
        for table in section.results.tables
    ]
    parts += [f"![{picture.caption}]({picture.name}.png)\n\n{picture.caption}" for picture in section.results.pictures]
    parts.append("\n".join(f"- {note}" for note in section.results.notes))
    parts.append("Settings:\n\n" + "\n".join(f"- {key}: `{value}`" for key, value in settings.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def page(sections: list[Section], settings: dict[str, Any], model: str) -> str:
    """All results as one HTML page that needs nothing else: opens from disk, images included."""
    links = "".join(f'<a href="#{section.name}">{html.escape(section.name)}</a>' for section in sections)
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in settings.items()
    )
    used = f"<table><tbody>{rows}</tbody></table>"
    body = "".join(_section_html(section, used) for section in sections)
    title = f"{html.escape(Path(model).name)}: the LaRoSA paper's tables and figures"
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f'<body><nav><strong>larosa reproduce</strong>{links}<a href="#settings">settings</a></nav>\n'
        f"<main><h1>{title}</h1><p>The tables and figures of <em>La RoSA: Enhancing LLM Efficiency via Layerwise "
        "Rotated Sparse Activation</em> (arXiv 2507.01299), measured on this model. Divergence (KL) from the dense "
        "model comes first and perplexity beside it: a model can lower its perplexity by becoming less sure of "
        f"itself, while it moves away from the dense one.</p>{body}\n"
        f'<section id="settings"><h2>Settings</h2>{used}</section></main></body></html>\n'
    )


def _section_html(section: Section, used: str) -> str:
    parts = [
        f'<section id="{section.name}">',
        f"<h2>{html.escape(section.title)} <small>{html.escape(section.name)}</small></h2>",
        f'<p class="claim"><b>In the paper:</b> {html.escape(section.claim)}</p>',
    ]
    if section.missing is not None:
        parts.append(f'<p class="missing">Not run: {html.escape(section.missing)}</p>')
    for table in section.results.tables:
        # A long table is there for those who want it, out of the way of the rest.
        long = len(table.rows) > _LONG_TABLE
        parts.append(
            f"<details><summary>{html.escape(table.title)}</summary>{table.html()}</details>" if long else table.html()
        )
    for picture in section.results.pictures:
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        caption = html.escape(picture.caption)
        parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    if section.results.notes:
        parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in section.results.notes) + "</ul>")
    if section.missing is None:
        parts.append(f"<details><summary>Settings</summary>{used}</details>")
    return "".join([*parts, "</section>\n"])


#: Tables with more rows are folded away in HTML and left to CSV in Markdown.
_LONG_TABLE = 40

_STYLE = """
:root { --line: #d9dde3; --soft: #f5f7f9; --text: #1b1f24; --quiet: #57606a; --accent: #0072b2; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { margin: 0; color: var(--text); background: #fff; font: 16px/1.55 system-ui, sans-serif; display: flex; }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; flex: 0 0 12rem; padding: 1.5rem 1rem;
  background: var(--soft); border-right: 1px solid var(--line); display: flex; flex-direction: column; gap: .35rem; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
main { flex: 1 1 auto; min-width: 0; max-width: 84rem; padding: 1.5rem 2.5rem 4rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h2 small { color: var(--quiet); font-weight: normal; }
.claim { color: var(--quiet); }
.missing { background: #fff4e5; border-left: 4px solid #e69f00; padding: .5rem .8rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .88rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.scroll td { white-space: nowrap; }
th { border-bottom: 2px solid var(--quiet); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:hover { background: var(--soft); }
td code { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: .9rem; }
ul { padding-left: 1.2rem; font-size: .92rem; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 50rem) {
  body { display: block; }
  nav { position: static; height: auto; flex-flow: row wrap; }
  main { padding: 1rem; }
}
@media print { nav { display: none; } }
"""
