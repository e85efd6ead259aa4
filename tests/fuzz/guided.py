"""The same readers under the same law, with inputs that libFuzzer grows from what code each one reaches.

    python -m tests.fuzz.guided --cases 2000

Needs atheris (the extra `fuzz`). The mutations that tests.fuzz.run makes by a seed know the formats; these find what nobody thought of.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

if os.environ.get("FUZZ_FORMAT"):  # the process that fuzzes: what it runs must count its branches
    with atheris.instrument_imports(include=["lumina_fn", "zipfile", "pickletools"]):
        from tests.fuzz import formats, law, playground
else:
    from tests.fuzz import formats, law, playground

LARGEST = 1 << 16  # bytes of an input


def fuzz(name: str, root: Path, corpus: Path, options: list[str]) -> None:
    """Play a format in this process until libFuzzer ends it."""
    at = playground.ground(root)
    form = formats.FORMATS[name](at)
    for i, seed in enumerate(form.seeds):
        (corpus / str(i)).write_bytes(seed)
    for seed in form.seeds:  # what is imported late is not limited by the law's memory
        form.place(seed)
        law.warm(form.read)
    law.arm(limited=False)  # libFuzzer bounds memory itself

    def one(data: bytes) -> None:
        form.place(data)
        law.judge(form.read, at.folder, at.outside, form.refusal, form.writes)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.fuzz.guided", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000, help="of each format (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer (default: %(default)s)")
    parser.add_argument(
        "--saved", type=Path, default=Path("runs/fuzz"), help="where inputs that break the law are left"
    )
    parser.add_argument(
        "formats", nargs="*", metavar="FORMAT", help=f"one of {', '.join(formats.FORMATS)} (default: all)"
    )
    run = parser.parse_args()
    run.saved.mkdir(parents=True, exist_ok=True)
    broken = 0
    print(f"{'format, guided by coverage':28}{'cases':>8}{'branches':>10}", flush=True)
    for name in run.formats or formats.FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            root, corpus = Path(folder) / "ground", Path(folder) / "corpus"
            corpus.mkdir()
            saved = f"{run.saved.resolve()}/{name.replace(' ', '_')}-"
            options = [
                f"-runs={run.cases}", f"-seed={run.seed}", f"-max_len={LARGEST}", f"-artifact_prefix={saved}", "-rss_limit_mb=4096", "-timeout=60",
                "-print_final_stats=1", "-verbosity=1",
            ]  # fmt: skip
            code = "import sys; from pathlib import Path; from tests.fuzz import guided; guided.fuzz(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, name, root, corpus, *options],
                env={**os.environ, "FUZZ_FORMAT": name}, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
        count, cover = (
            re.findall(pattern, done.stderr)[-1:] or ["?"] for pattern in (r"Done (\d+) runs", r"cov: (\d+)")
        )
        print(f"{name:28}{count[0]:>8}{cover[0]:>10}", flush=True)
        if done.returncode:
            broken += 1
            print(f"{name}: {done.stderr[-1500:]}\nsaved under {saved}", file=sys.stderr, flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
