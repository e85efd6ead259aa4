"""Results as a reader sees them: a line each on the terminal, the README's table and its chart, one number in each cell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- make bench writes this -->", "<!-- as far as here -->"
RATIOS = ("cpu_ratio", "wall_ratio", "rss_ratio")
Result = Mapping[str, Any]  # a row of results.json
# What the README shows: rows with another side, by what each does and what it is compared with.
SHOWN = {
    "train_348m_t2048": ("forward and backward, 348M, 2048 tokens", "transformers, Chameleon"),
    "train_348m_t2048_remat": ("the same with remat", "transformers, Chameleon"),
    "decode_plain": ("sampling, 348M", "transformers, generate"),
    "decode_guided": ("sampling with guidance, 348M", "transformers, generate"),
    "vq_encode_512": ("MoVQGAN encode, 512 px", "diffusers, VQModel"),
    "vq_decode_512": ("MoVQGAN decode, 512 px", "diffusers, VQModel"),
    "fsdp_w2": ("sharded step, 2 processes", "torch, FSDP"),
    "checkpoint_1g4": ("checkpoint complete, 1.4 GB", "torch, dcp.async_save"),
    "convert_7b": ("convert 7.88B, synced to disk", "cp, not synced"),
}


def told(row: Result) -> str:
    """A row on one line."""
    ratios = [f"{name.removesuffix('_ratio')} {row[name]:.3g}x" for name in RATIOS if row[name] is not None]
    asked = [f"{key} {row['measured'][key]} ({bound})" for key, bound in row["target"].items() if key not in RATIOS]
    return f"{row['name']}: {', '.join(ratios + asked)}; {'met' if row['met'] else 'MISSED: ' + row['reason']}"


def markdown(results: Result) -> str:
    """The README's table: ratios are theirs over ours."""
    lines = ["| task | beside | times as fast | times less memory |", "|---|---|---:|---:|"]
    for row in _shown(results):
        numbers = (f"{row[name]:.2f}" if row[name] is not None else "" for name in ("wall_ratio", "rss_ratio"))
        lines.append(f"| {' | '.join((*SHOWN[row['name']], *numbers))} |")
    return "\n".join(lines)


def inserted(text: str, results: Result) -> str:
    """A text with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"


def draw(path: Path, results: Result) -> None:
    """The same as a bar chart: an SVG whose bars say how many times as fast ours is."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "lumina", "font.family": "DejaVu Sans", "svg.fonttype": "path"})
    import matplotlib.pyplot as plt

    rows = [row for row in _shown(results) if row["wall_ratio"] is not None][::-1]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.1), layout="constrained")
    speeds = [row["wall_ratio"] for row in rows]
    bars = axis.barh(range(len(rows)), speeds, color=["#3b6fb6" if speed >= 1 else "#b0662f" for speed in speeds])
    axis.bar_label(bars, [f"{speed:.1f}x" for speed in speeds], padding=4)
    axis.set_yticks(
        range(len(rows)), [f"{SHOWN[row['name']][0]}\nvs {SHOWN[row['name']][1]}" for row in rows], fontsize=8
    )
    axis.axvline(1, color="0.4", linewidth=1, linestyle=":")
    axis.set_xlim(0, max(speeds) * 1.12)
    axis.set_xlabel("times as fast as the other (dotted: equally fast); 2 CPU cores, float32")
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _shown(results: Result) -> list[Result]:
    by_name = {row["name"]: row for row in results["rows"]}
    return [by_name[name] for name in SHOWN if name in by_name]
