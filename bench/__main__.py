"""Everything that is compared: ceilings of this machine, then each row beside its peer, in one go.

    make bench          all of it, about an hour; writes bench/results.json, the READMEs' table and their chart
    make bench-quick    a few minutes: fewer sizes, runs and tokens; writes runs/bench-quick.json

Each side computes in a fresh process with two threads, and sides take turns. A row that misses its target says so and why.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bench import ceilings, checkpoint, convert, decoding, fsdp, language, pictures, startup, table, waiting
from bench.harness import Row
from lumina_fn.disk import files
from lumina_fn.errors import InputError
from lumina_fn.process import entry
from lumina_fn.process.flags import parse

RESULTS = Path(__file__).parent / "results.json"
READMES = tuple(RESULTS.parents[1] / name for name in ("README.md", "README.zh-CN.md"))
CHART = RESULTS.parents[1] / "docs/speed.svg"
PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "language": language.rows,
    "decoding": decoding.rows,
    "pictures": pictures.rows,
    "fsdp": fsdp.rows,
    "checkpoint": checkpoint.rows,
    "convert": convert.rows,
    "startup": startup.rows,
    "waiting": waiting.rows,
}


@dataclass(frozen=True)
class Settings:
    quick: Annotated[bool, "a few minutes: fewer sizes, runs and tokens"] = False
    only: Annotated[tuple[str, ...], f"some of {', '.join(PARTS)}; other rows of OUT stay as they are"] = tuple(PARTS)
    out: Annotated[Path, "where the results go"] = RESULTS


def main(argv: Sequence[str] | None) -> int:
    run = parse(Settings, __doc__, argv)
    if unknown := [name for name in run.only if name not in PARTS]:
        raise InputError(f"--only {unknown[0]}: expected some of {', '.join(PARTS)}")
    os.environ.pop("OMP_WAIT_POLICY", None)  # of `make`: both sides of a row have the default, except in `waiting`
    before = json.loads(run.out.read_text()) if run.out.exists() and set(run.only) != set(PARTS) else {"rows": []}
    measured = ceilings.measured()
    print(", ".join(f"{name} {value}" for name, value in measured.items()), flush=True)
    rows = {row["name"]: row for row in before["rows"]}
    for name in run.only:
        print(f"\n{name}", flush=True)
        for row in PARTS[name](run.quick):
            rows[row.name] = row._asdict()
            print(table.told(rows[row.name]), flush=True)
    results = {"ceilings": measured, "quick": run.quick, "rows": list(rows.values())}
    run.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(run.out, json.dumps(results, indent=1) + "\n")
    if run.out == RESULTS:
        for readme in READMES:
            files.write_atomic(readme, table.inserted(readme.read_text(), results))
        table.draw(CHART, results)
    met = [row["name"] for row in rows.values() if row["met"]]
    print(f"\n{len(met)} of {len(rows)} targets are met; {run.out}")
    return 0


if __name__ == "__main__":
    entry.run(main)
