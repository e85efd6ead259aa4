"""A stranger's tokenizer.json is tried in a process of its own first: the library may abort, loop or panic over it.

What passed is remembered by the hash of its bytes and the library's version, for this user.
"""

import hashlib
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from lumina_fn.disk import files
from lumina_fn.errors import InputError, printable

MAX_BYTES = 64 << 20  # of tokenizer.json; the released one has 11 MB
MEMORY = 3 << 30  # bytes of address space that the trial may take; the released one takes a seventh
SECONDS = 60.0  # the released one takes 1
# Texts as people write them, and what regular expressions are slow with.
TEXTS = (
    "",
    "a red circle",
    "Generate an image of 768x768 according to the following prompt:\n一只猫 🐈 e\u0301",
    "a" * 5000,
    " \n\t" * 2000,
)
TRIAL = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import tokenizers
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
tokenizer.no_truncation()
tokenizer.no_padding()
for text in {TEXTS!r}:
    tokenizer.encode(text, add_special_tokens=False)
"""


def check(data: bytes, path: Path, known: Path | None) -> None:
    """InputError where the library does not come back from loading these bytes of `path`, or from encoding some texts with it.

    An error that it raises is left to who loads them. `known` is the folder of what was tried before.
    """
    name = hashlib.sha256(version("tokenizers").encode() + TRIAL.encode() + data).hexdigest()
    if known is not None and (known / name).is_file():
        return
    if problem := _problem(data):
        raise InputError(
            printable(f"{path}: not a usable tokenizer: loading it {problem}; get it again from who made it")
        )
    if known is not None:
        with suppress(OSError, InputError):  # a place that cannot be written: it is tried again next time
            known.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write_atomic(known / name, "")


def _problem(data: bytes) -> str | None:
    environment = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", TRIAL]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {SECONDS:g} seconds"
    if done.returncode >= 0 or b"ModuleNotFoundError" in done.stderr:
        return None
    told = done.stderr.decode(errors="replace").strip().splitlines()
    why = next((line for line in reversed(told) if "memory" in line), told[-1] if told else "")
    return f"ends the process (signal {-done.returncode}{f': {why:.200}' if why else ''})"


def known_folder() -> Path | None:
    """Where this user's tried tokenizers are remembered; None for a user without a home."""
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "lumina_fn" / "tokenizers"
    return None
