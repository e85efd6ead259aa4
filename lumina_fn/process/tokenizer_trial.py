"""Load an unknown tokenizer.json in a separate process first: the library may abort, loop or panic on it.

Files that passed are remembered for this user, by the hash of their bytes and the library's version.
"""

import base64
import hashlib
import json
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from lumina_fn.disk import files
from lumina_fn.errors import InputError, printable

MAX_BYTES = 64 << 20  # limit of tokenizer.json; the released one has 11 MB
MEMORY = 3 << 30  # bytes of address space for the trial; the released tokenizer takes a seventh
SECONDS = 60  # limit of the trial; the released tokenizer takes 1
GROWTH = 32  # factor by which a normalizer may lengthen a text; NFKC turns one character into 18
# Ordinary texts, texts on which regular expressions are slow, and texts of the largest length of a caption.
TEXTS = (  # text and number of repetitions
    ("", 1),
    ("a red circle", 1),
    ("Generate an image of 768x768 according to the following prompt:\n一只猫 🐈 e\u0301", 1),
    ("".join(map(chr, range(32, 127))), 1),
    ("a", 100_000),
    (" \n\t", 30_000),
    ("猫", 30_000),
)
TRIAL = f"""
import os, resource, sys
os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS + 5}, {SECONDS + 5}))  # where nobody is left to end it
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import tokenizers
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
tokenizer.no_truncation()
tokenizer.no_padding()
own = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
for text, times in (*{TEXTS!r}, *((text, 1) for text in own[:1000])):
    tokenizer.encode(text * times, add_special_tokens=False)
"""


def check(data: bytes, path: Path, known: Path | None) -> None:
    """Raise InputError if loading these bytes of `path`, or encoding some texts with them, crashes or does not end.

    Ordinary errors of the library are left to the caller, who loads the file. `known` is the folder of remembered files.
    """
    name = hashlib.sha256(version("tokenizers").encode() + TRIAL.encode() + data).hexdigest()
    if known is not None and (known / name).is_file():
        return
    problem, passed = _tried(data)
    if problem is not None:
        raise InputError(printable(f"{path}: not a tokenizer: loading it {problem}; get it again from who made it"))
    if passed and known is not None:
        with suppress(OSError, InputError):  # the folder cannot be written: the next run tries again
            known.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.write_atomic(known / name, "")


def _tried(data: bytes) -> tuple[str | None, bool]:
    """What is wrong (None: nothing), and whether the trial was completed."""
    with suppress(ValueError, RecursionError, AttributeError):  # the library itself reports such faults
        if _growth(json.loads(data).get("normalizer")) > GROWTH:  # a letter that may not occur in the texts
            return f"is not tried: its normalizer makes texts more than {GROWTH} times longer", False
    try:
        command = [sys.executable, "-I", "-c", TRIAL]
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {SECONDS:g} seconds", False
    except OSError:  # no such command if Python is embedded
        return None, False
    told = done.stderr.decode(errors="replace").strip().splitlines()
    why = next((line for line in reversed(told) if "memory" in line), told[-1] if told else "")
    if done.returncode < 0:
        return f"ends the process (signal {-done.returncode}{f': {why:.200}' if why else ''})", False
    if b"panicked at" in done.stderr:  # in this process it would print those lines
        return f"makes the tokenizers library panic ({why:.200})", False
    return None, done.returncode == 0


def _growth(normalizer: object) -> int:
    """The approximate factor by which a normalizer may lengthen a text; more than GROWTH if it is too large."""
    match normalizer:
        case {"type": "Sequence", "normalizers": list(parts)}:
            times = 1
            for part in parts:
                times = min(times * _growth(part), GROWTH + 1)
            return times
        case {"type": "Replace", "content": str(text), "pattern": pattern}:  # a regular expression may match nothing
            return max(1, len(text)) + (not (isinstance(pattern, dict) and pattern.get("String")) and bool(text))
        case {"type": "Precompiled", "precompiled_charsmap": str(text)}:  # a trie's length, the trie, strings
            table = base64.b64decode(text)
            return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
    return 1


def known_folder() -> Path | None:
    """The folder where this user's tested tokenizers are remembered; None for a user without a home."""
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "lumina_fn" / "tokenizers"
    return None
