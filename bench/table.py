"""Results as a reader sees them: a line each, and the README's table."""

from collections.abc import Mapping
from typing import Any

BEGIN, END = "<!-- make bench writes this -->", "<!-- as far as here -->"
RATIOS = ("cpu_ratio", "wall_ratio", "rss_ratio")
SPREADS = {"cpu_ratio": "cpu_spread", "wall_ratio": "wall_spread"}
Result = Mapping[str, Any]  # a row of results.json


def told(row: Result) -> str:
    """A row on one line."""
    ratios = [f"{name.removesuffix('_ratio')} {_ratio(row, name)}" for name in RATIOS if row[name] is not None]
    return f"{row['name']}: {', '.join(ratios) or _others(row)}; {'met' if row['met'] else 'MISSED: ' + row['reason']}"


def markdown(results: Result) -> str:
    """The README's table, with what bounds it."""
    ceilings = results["ceilings"]
    lines = [
        f"Ceilings of the machine in the same run, with one and two threads: sgemm {ceilings['sgemm_gflops_1']} and "
        f"{ceilings['sgemm_gflops_2']} GFLOP/s, copying {ceilings['copy_gb_s_1']} and {ceilings['copy_gb_s_2']} GB/s, reading "
        f"{ceilings['read_gb_s_1']} and {ceilings['read_gb_s_2']} GB/s.",
        "",
        "| row | CPU time | wall time | peak memory | beside it (ours / theirs) | asked | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        asked = ", ".join(f"{_plain(key)} {bound}" for key, bound in row["target"].items())
        cells = [f"`{row['name']}` ({row['means']})", *(_ratio(row, name) for name in RATIOS), _others(row), asked]
        lines.append(f"| {' | '.join(cells)} | {'yes' if row['met'] else 'no: ' + row['reason']} |")
    return "\n".join(lines)


def inserted(text: str, results: Result) -> str:
    """A text with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"


def _ratio(row: Result, name: str) -> str:
    if row[name] is None:
        return ""
    spread = row["measured"].get(SPREADS.get(name))
    return f"{row[name]:.3g}x" + (f" ({spread[0]:.3g} to {spread[1]:.3g})" if spread else "")


def _others(row: Result) -> str:
    """What was measured beside the ratios; what both sides took as `ours / theirs`."""
    told = []
    for key, value in row["measured"].items():
        twin = f"their_{key.removeprefix('our_')}"
        if key.startswith("our_") and twin in row["measured"]:
            told.append(f"{_plain(key.removeprefix('our_'))} {_value(value)} / {_value(row['measured'][twin])}")
        elif not key.startswith("their_") and not key.endswith("_spread"):
            told.append(f"{_plain(key)} {_value(value)}")
    return ", ".join(told)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{_plain(key)}: {_value(item)}' for key, item in value.items())})"
    if isinstance(value, list):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(key: str) -> str:
    """A key's words, its unit set apart: our_wall_s is `our wall s`."""
    return key.replace("_", " ")
