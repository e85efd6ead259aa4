"""The report on a dataset: numbers computed from what is known of its rows, and the same numbers as lines of text."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.datasets import duplicates
from experiments.datasets.inspection import Look
from lumina_fn import as_seen
from lumina_fn.errors import printable

FORMAT = "lumina_fn/report/1"
BINS = 20
ASPECTS = (2.0 ** np.arange(-2, 2.01, 0.25)).tolist()  # width / height; wider and taller ones count at the ends
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
FIRST = 10  # lines of a list in the text
_KNOWN = re.compile(r"no such file|the path leads outside|decompression bomb|cannot be read")


def summary(source: str, kind: str, looks: Sequence[Look], distance: int, sampled: Sequence[Look]) -> dict[str, Any]:
    """The report as values of JSON. `distance` is the limit for near-duplicates, in bits; `sampled` are the rows that it shows."""
    done = [look for look in looks if look.reason is None]
    bad = [look for look in looks if look.reason is not None]
    return {
        "format": FORMAT,
        "source": source,
        "kind": kind,
        "counts": {"rows": len(looks), "done": len(done), "quarantined": len(bad)},
        "quarantine": {
            "reasons": dict(Counter(reason_class(look.reason) for look in bad).most_common()),
            "rows": [{"row": look.row, "file": look.file, "reason": look.reason} for look in bad],
        },
        "sizes": {
            "source": _sizes([look.source for look in looks if look.source]),
            "crop": _sizes([look.crop for look in done if look.crop]),
        },
        "tokens": {
            "item": _spread([look.tokens for look in done if look.tokens is not None]),
            "text": _spread([look.text for look in done if look.text is not None]),
        },
        "prompts": _prompts(looks, done),
        "pictures": _pictures(done, distance),
        "notes": {
            name: [{"row": look.row, "file": look.file} for look in done if name in look.notes]
            for name in as_seen.NOTES
            if any(name in look.notes for look in done)
        },
        "samples": [{"row": look.row, "file": look.file, "prompt": look.prompt} for look in sampled],
    }


def reason_class(reason: str) -> str:
    """The reason without paths, numbers and details, so that reasons of one kind are equal."""
    if known := _KNOWN.search(reason):
        return known[0]
    if reason.startswith("expected {"):
        return "not a row"
    return re.sub(r"\d+", "N", re.split(r"[:;(]", reason)[0]).strip()[:80]


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    if not sizes:
        return None
    aspects = np.clip([w / h for w, h in sizes], ASPECTS[0], ASPECTS[-1])
    return {
        "common": [{"width": w, "height": h, "count": n} for (w, h), n in Counter(sizes).most_common(100)],
        "different": len(set(sizes)),
        "width": _spread([w for w, _ in sizes]),
        "height": _spread([h for _, h in sizes]),
        "aspect": {"edges": ASPECTS, "counts": np.histogram(aspects, ASPECTS)[0].tolist()},
    }


def _spread(values: Sequence[int]) -> dict[str, Any] | None:
    """Quantiles and histogram of whole numbers."""
    if not values:
        return None
    low, high = min(values), max(values)
    width = max(-(-(high + 1 - low) // BINS), 1)
    edges = list(range(low, high + 1 + width, width))
    return {
        "count": len(values),
        "total": int(sum(values)),
        "mean": sum(values) / len(values),
        "min": low,
        "max": high,
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)},
        "histogram": {"edges": edges, "counts": np.histogram(values, edges)[0].tolist()},
    }


def _prompts(looks: Sequence[Look], done: Sequence[Look]) -> dict[str, Any]:
    known = [look.prompt for look in looks if look.prompt is not None]
    groups = duplicates.same(look.prompt or look.text_sha256 for look in done)
    return {
        "known": len(known),
        "empty": sum(not text.strip() for text in known),
        "characters": _spread([len(text) for text in known]),
        "words": _spread([len(text.split()) for text in known]),
        "duplicates": [{"prompt": done[g[0]].prompt, "rows": [done[i].row for i in g]} for g in groups],
    }


def _pictures(done: Sequence[Look], distance: int) -> dict[str, Any]:
    """Groups of exact duplicates, by the hash of the file, and of near-duplicates among the other pictures."""
    exact = duplicates.same(look.sha256 for look in done)
    again = {i for group in exact for i in group[1:]}
    seen = [look for i, look in enumerate(done) if look.fingerprint and i not in again]
    near = duplicates.near([look.fingerprint for look in seen], distance)
    return {
        "looked_at": sum(look.fingerprint is not None for look in done),
        "distance": distance,
        "exact": [[done[i].row for i in group] for group in exact],
        "near": [[seen[i].row for i in group] for group in near],
    }


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    return "\n".join(printable(line) for line in _lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    counts, prompts, pictures = report["counts"], report["prompts"], report["pictures"]
    done = "done" if report["kind"] == "features" else "usable"
    yield f"{report['source']}: {counts['rows']} rows, {counts['done']} {done}, {counts['quarantined']} quarantined"
    for reason, n in report["quarantine"]["reasons"].items():
        yield f"  {n:>8}  {reason}"
    yield from _some([f"row {r['row']} ({r['file']}): {r['reason']}" for r in report["quarantine"]["rows"]])
    for name, title in (("source", "sizes of the files"), ("crop", "sizes as encoded")):
        if sizes := report["sizes"][name]:
            yield f"{title}: {sizes['different']} different"
            yield from _some([f"{s['width']}x{s['height']}: {s['count']}" for s in sizes["common"]])
            yield "  aspect (width / height)"
            yield from _bars(sizes["aspect"], lambda edge: f"{edge:.2f}")
    for values, title in (
        (report["tokens"]["item"], "tokens of an item"),
        (report["tokens"]["text"], "of these before the picture"),
        (prompts["characters"], "characters of a prompt"),
    ):
        if values:
            yield f"{title}: {_quantiles(values)}"
            yield from _bars(values["histogram"], lambda edge: f"{edge}")
    for note, rows in report["notes"].items():
        yield f"pictures {as_seen.SAID[note]}: {len(rows)}"
        yield from _some([f"row {r['row']} ({r['file']})" for r in rows])
    yield f"prompts: {prompts['known']} known, {prompts['empty']} empty, {_groups(prompts['duplicates'])} that are equal"
    said = [(f" {d['prompt']!r:.100}" if d["prompt"] else "", d["rows"]) for d in prompts["duplicates"]]
    yield from _some([f"{len(rows)} times{text}: rows {_rows(rows)}" for text, rows in said])
    yield f"pictures: {_groups(pictures['exact'])} of equal files"
    yield from _some([f"rows {_rows(rows)}" for rows in pictures["exact"]])
    yield f"near-duplicates: {_groups(pictures['near'])} among {pictures['looked_at']} pictures looked at"
    yield from _some([f"rows {_rows(rows)}" for rows in pictures["near"]])


def _quantiles(values: dict[str, Any]) -> str:
    shown = ", ".join(f"{float(q):.0%} {v:.0f}" for q, v in values["quantiles"].items())
    return f"{values['min']} to {values['max']}, mean {values['mean']:.1f}; {shown}; {values['total']} in all"


def _groups(groups: Sequence[Any]) -> str:
    return f"{len(groups)} group{'' if len(groups) == 1 else 's'}"


def _rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:FIRST])) + (f" and {len(rows) - FIRST} more" if len(rows) > FIRST else "")


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"    {line}" for line in lines[:FIRST])
    if len(lines) > FIRST:
        yield f"    and {len(lines) - FIRST} more"


def _bars(histogram: dict[str, Any], name) -> Iterator[str]:
    edges, counts = histogram["edges"], histogram["counts"]
    for (low, high), n in zip(pairwise(edges), counts, strict=True):
        if n:
            yield f"    {name(low):>8} to {name(high):<8} {n:>8} {'#' * max(round(40 * n / max(counts)), 1)}"
