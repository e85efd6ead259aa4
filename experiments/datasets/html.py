"""A dataset's report as one HTML page that loads nothing: plots are inline SVG, pictures are inline JPEG."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from PIL import Image

from lumina_fn import as_seen
from lumina_fn.errors import printable

SIDE = 160  # pixels of a picture shown
LONGEST = 600  # characters of a caption, name or reason
# The rows of a table, the groups, and the pictures of a group that are shown; report.json has all.
LISTED, GROUPS, MEMBERS = 200, 24, 8
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top; overflow-wrap: anywhere }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.plots, .pictures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
figure { margin: 0; max-width: 340px } .pictures figure { width: 160px } figcaption { font-size: 12px; color: #555; overflow-wrap: anywhere }
svg { width: 340px; height: 170px } .pictures img { max-width: 160px; max-height: 160px; border: 1px solid #ccc }
.group { border-left: 3px solid #2a6f97; padding-left: 12px; margin: 12px 0 }
"""


def page(report: Mapping[str, Any], pictures: Mapping[int, Sequence[Image.Image]]) -> str:
    """The page. `pictures` holds, by row, the pictures that can be shown. All text from a dataset is escaped."""
    counts, notes = report["counts"], report["notes"]
    parts = [
        f"<h1>{_text(report['source'])}</h1>",
        _table([("rows", counts["rows"]), ("done" if report["kind"] == "features" else "usable", counts["done"]),
                ("quarantined", counts["quarantined"])]),
        _section("Some of it", _samples(report["samples"], pictures)),
        _section("Tokens", _plots([("tokens of an item", report["tokens"]["item"]),
                                   ("tokens before the picture", report["tokens"]["text"])])),
        _section("Sizes", _sizes(report["sizes"])),
        *([_section("Pictures", _table([(as_seen.SAID[note], len(rows)) for note, rows in notes.items()]))] if notes else []),
        _section("Prompts", _prompts(report["prompts"])),
        _section("Equal files", _groups(report["pictures"]["exact"], pictures)),
        _section(
            f"Near-duplicates among {report['pictures']['looked_at']} pictures looked at "
            f"(at most {report['pictures']['distance']} of 64 bits of the difference hash)",
            _groups(report["pictures"]["near"], pictures),
        ),
        _section("Quarantined", _quarantine(report["quarantine"])),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        # If any text passes unescaped, it can neither run nor load anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(report['source'])}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def shown_rows(report: Mapping[str, Any]) -> list[int]:
    """The rows whose pictures the page shows."""
    groups = [*report["pictures"]["exact"][:GROUPS], *report["pictures"]["near"][:GROUPS]]
    rows = [s["row"] for s in report["samples"]] + [row for group in groups for row in group[:MEMBERS]]
    return list(dict.fromkeys(rows))


def _text(value: object) -> str:
    said = printable(value)
    return escape(said if len(said) <= LONGEST else said[:LONGEST] + "...", quote=True)


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body or '<p>none</p>'}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    cell = lambda v: f'<td class="n">{v}</td>' if isinstance(v, int) else f"<td>{_text(v)}</td>"
    return "<table>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def _more(shown: int, count: int) -> str:
    return f"<p>and {count - shown} more, in report.json</p>" if count > shown else ""


def _samples(samples: Sequence[Mapping[str, Any]], pictures: Mapping[int, Sequence[Image.Image]]) -> str:
    figures = [_figure(s["row"], pictures, s["prompt"] or s["file"] or "") for s in samples]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _figure(row: int, pictures: Mapping[int, Sequence[Image.Image]], caption: str) -> str:
    shown = "".join(f'<img alt="row {row}" src="{_inline(image)}">' for image in pictures.get(row, ()))
    return f"<figure>{shown}<figcaption>row {row}{': ' + _text(caption) if caption else ''}</figcaption></figure>"


def _inline(image: Image.Image) -> str:
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _groups(groups: Sequence[Sequence[int]], pictures: Mapping[int, Sequence[Image.Image]]) -> str:
    shown = []
    for rows in groups[:GROUPS]:
        figures = "".join(_figure(row, pictures, "") for row in rows[:MEMBERS])
        shown.append(f'<div class="group pictures">{figures}{_more(min(len(rows), MEMBERS), len(rows))}</div>')
    return "".join(shown) + _more(len(shown), len(groups))


def _plots(plots: Sequence[tuple[str, Mapping[str, Any] | None]]) -> str:
    figures = [_plot(title, v["histogram"], "{:.0f}".format, _quantiles(v)) for title, v in plots if v]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _quantiles(values: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{float(q):.0%} {v:.0f}" for q, v in values["quantiles"].items())
    return f"{values['min']} to {values['max']}, mean {values['mean']:.1f}; {shown}"


def _sizes(sizes: Mapping[str, Any]) -> str:
    parts = []
    for name, title in (("source", "of the files"), ("crop", "as encoded")):
        if values := sizes[name]:
            plots = [
                _plot(f"aspect (width / height) {title}", values["aspect"], "{:.2f}".format, ""),
                _plot(f"width {title}", values["width"]["histogram"], "{:.0f}".format, _quantiles(values["width"])),
                _plot(f"height {title}", values["height"]["histogram"], "{:.0f}".format, _quantiles(values["height"])),
            ]
            common = [(f"{s['width']} x {s['height']}", s["count"]) for s in values["common"][:12]]
            parts.append(
                f'<div class="plots">{"".join(plots)}</div>{_table(common)}{_more(len(common), values["different"])}'
            )
    return "".join(parts)


def _plot(title: str, histogram: Mapping[str, Any], name: Callable[[float], str], caption: str) -> str:
    """A histogram as SVG; a bar shows its count under the pointer."""
    edges, counts = histogram["edges"], histogram["counts"]
    left, bottom, width, height, top = 44, 140, 290, 110, max(counts)
    step = width / len(counts)
    bars = []
    for i, (n, (low, high)) in enumerate(zip(counts, pairwise(edges), strict=True)):
        tall = height * n / top
        bars.append(
            f'<rect x="{left + i * step:.1f}" y="{bottom - tall:.1f}" width="{max(step - 1, 1):.1f}" height="{tall:.1f}" fill="#2a6f97">'
            f"<title>{name(low)} to {name(high)}: {n}</title></rect>"
        )
    some = sorted({0, len(counts) // 2, len(counts)})
    ticks = "".join(
        f'<text x="{left + i * step:.1f}" y="{bottom + 15}" font-size="11" text-anchor="middle" fill="#444">{name(edges[i])}</text>'
        for i in some
    )
    return (
        f'<figure><svg viewBox="0 0 345 170" role="img"><text x="{left}" y="18" font-size="13" fill="#222">{_text(title)}</text>'
        f'<text x="{left - 6}" y="{bottom - height + 8}" font-size="11" text-anchor="end" fill="#444">{top}</text>'
        f'{"".join(bars)}<line x1="{left}" x2="{left + width}" y1="{bottom}" y2="{bottom}" stroke="#444"/>{ticks}</svg>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _prompts(prompts: Mapping[str, Any]) -> str:
    same = prompts["duplicates"]
    rows = [("known", prompts["known"]), ("empty", prompts["empty"]), ("groups of equal ones", len(same))]
    plots = _plots([("characters of a prompt", prompts["characters"]), ("words of a prompt", prompts["words"])])
    listed = [(f"{len(d['rows'])} times", d["prompt"] or f"row {d['rows'][0]}'s") for d in same[:GROUPS]]
    return f"{_table(rows)}{plots}{_table(listed)}{_more(len(listed), len(same))}"


def _quarantine(quarantine: Mapping[str, Any]) -> str:
    rows = quarantine["rows"]
    if not rows:
        return ""
    listed = [(r["row"], r["file"] or "", r["reason"]) for r in rows[:LISTED]]
    return f"{_table([(n, reason) for reason, n in quarantine['reasons'].items()])}<p></p>{_table(listed)}{_more(len(listed), len(rows))}"
