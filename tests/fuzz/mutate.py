"""Valid bytes made invalid, by a seed: bits and blocks of any format, and the values of JSON."""

import json
import random
import re
from collections.abc import Callable, Sequence

INTERESTING = (0, 1, 2, 127, 128, 254, 255)
NUMBERS = (
    0, -1, 1, 2, 3, 255, 256, 65535, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
WORDS = (
    "", " ", "\0", "\n", "a" * 300, "a" * 70_000, "\ud800", "\u202e", "é" * 100, "\uff0e\uff0e\uff0f", ".", "..", "../outside/secret", "../../etc/passwd",
    "/etc/passwd", "/dev/zero", "/proc/self/environ", "file:///etc/passwd", "~", "link", "folder/secret", "con", "-", "%s%n", "{0.__class__}",
    "__import__('os').system('id')", "true", "1", "1e9", "<eoss>", "<reserved08801>", "F64", "BF16", "I64", "BOOL", "NONE",
)  # fmt: skip


def mutated(seeds: Sequence[bytes], pick: random.Random, words: Sequence[str] = (), json_share: float = 0.0) -> bytes:
    """One of the seeds, changed a few times: as JSON in this share of cases, else as bytes."""
    data = pick.choice(seeds)
    if pick.random() < json_share:
        data = json_mutated(data, pick, (*WORDS, *words))
        if pick.random() < 0.85:
            return data
    for _ in range(pick.choice((1, 1, 1, 2, 3, 8, 40))):
        data = pick.choice(_BYTES)(data, seeds, pick)
    return data


def _span(data: bytes, pick: random.Random) -> tuple[int, int]:
    begin = pick.randrange(len(data) + 1)
    return begin, min(len(data), begin + int(2 ** (pick.random() * 10)))


def _flip(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    if not data:
        return b"\0"
    at = pick.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << pick.randrange(8)]) + data[at + 1 :]


def _set(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    at = pick.randrange(len(data) + 1)
    return data[:at] + bytes([pick.choice((*INTERESTING, pick.randrange(256)))]) + data[at + 1 :]


def _number(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    """A whole number of 2, 4 or 8 bytes over what is there."""
    width, at = pick.choice((2, 4, 8)), pick.randrange(len(data) + 1)
    value = pick.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), pick.randrange(2**16), len(data)))
    return data[:at] + (value % 2 ** (8 * width)).to_bytes(width, pick.choice(("little", "big"))) + data[at + width :]


def _cut(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    return data[: pick.randrange(len(data) + 1)]


def _drop(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    begin, end = _span(data, pick)
    return data[:begin] + data[end:]


def _repeat(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    begin, end = _span(data, pick)
    return data[:begin] + data[begin:end] * pick.choice((2, 2, 3, 50)) + data[end:]


def _noise(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    begin, end = _span(data, pick)
    return data[:begin] + pick.randbytes(end - begin) + data[end:]


def _zero(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    begin, end = _span(data, pick)
    return data[:begin] + bytes(end - begin) + data[end:]


def _splice(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    other = pick.choice(seeds)
    return data[: pick.randrange(len(data) + 1)] + other[pick.randrange(len(other) + 1) :]


def _move(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    begin, end = _span(data, pick)
    to = pick.randrange(len(data) + 1)
    return data[:to] + data[begin:end] + data[to:]


def _digits(data: bytes, seeds: Sequence[bytes], pick: random.Random) -> bytes:
    """Another decimal number for one that is there."""
    found = list(re.finditer(rb"\d+", data[: 1 << 16]))
    if not found:
        return data
    at = pick.choice(found)
    return data[: at.start()] + str(pick.choice(NUMBERS)).encode() + data[at.end() :]


_BYTES = (_flip, _flip, _set, _number, _cut, _drop, _repeat, _noise, _zero, _splice, _move, _digits)


def json_mutated(data: bytes, pick: random.Random, words: Sequence[str]) -> bytes:
    """The JSON (or JSONL) in these bytes with some of its values, names or brackets changed."""
    lines = [data] if _is_json(data) else data.splitlines()
    at = pick.randrange(len(lines))
    if not _is_json(lines[at]):  # a seed with a fault of its own
        return data
    value = json.loads(lines[at])
    for _ in range(pick.choice((1, 1, 2, 4))):
        value = _json(value, pick, words)
    lines[at] = _text(value, pick).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _json(value: object, pick: random.Random, words: Sequence[str]) -> object:
    """The value with one place in it changed; each step down is taken with some chance."""
    if isinstance(value, dict) and value and pick.random() < 0.8:
        name, kind = pick.choice(list(value)), pick.random()
        if kind < 0.72:
            return {**value, name: _json(value[name], pick, words)}
        rest = {key: v for key, v in value.items() if key != name}
        if kind < 0.82:
            return rest
        if kind < 0.92:
            return {**rest, pick.choice((*words, *value)): value[name]}
        if kind < 0.95:
            return {**value, f"{_TWICE}{name}": _leaf(pick, words)}
        return {**value, pick.choice(words): _leaf(pick, words)}
    if isinstance(value, list) and value and pick.random() < 0.8:
        at, kind = pick.randrange(len(value)), pick.random()
        if kind < 0.7:
            return [*value[:at], _json(value[at], pick, words), *value[at + 1 :]]
        if kind < 0.8:
            return value[:at] + value[at + 1 :]
        return value[:at] + [value[at]] * pick.choice((2, 3, 100)) + value[at:]
    if isinstance(value, int | float) and pick.random() < 0.3:
        return pick.choice((lambda: -value, lambda: value + 1, lambda: value * 2, lambda: str(value)))()
    if isinstance(value, str) and pick.random() < 0.3:
        at = pick.randrange(len(value) + 1)
        return value[:at] + pick.choice(words) + value[at:]
    return _leaf(pick, words) if pick.random() < 0.9 else pick.choice(([value], {"a": value}))


def _leaf(pick: random.Random, words: Sequence[str]) -> object:
    make: Sequence[Callable[[], object]] = (
        lambda: pick.choice(NUMBERS), lambda: pick.choice(words), lambda: pick.choice((None, True, False)),
        lambda: pick.choice(([], {}, [[]], [0], [None], [""], {"": None})), lambda: [pick.choice(NUMBERS)] * pick.choice((1, 3, 9, 1000)),
        lambda: f"{_DEEP}{pick.choice((20, 500, 960, 990, 2000, 100_000))}", lambda: _LONG,
    )  # fmt: skip
    return pick.choice(make)()


# What json.dumps does not write: a name that is there already, brackets within brackets (this many), and a number of 5000 digits.
_TWICE, _DEEP, _LONG = "\x01twice", "\x01deep", "\x01long"


def _text(value: object, pick: random.Random) -> str:
    text = json.dumps(value, ensure_ascii=pick.random() < 0.7, indent=pick.choice((None, None, 1)))
    opening, middle, closing = pick.choice((("[", "", "]"), ('{"a":', "1", "}"), ("[", "", "")))
    text = re.sub(r'"\\u0001deep(\d+)"', lambda m: opening * int(m[1]) + middle + closing * int(m[1]), text)
    return text.replace('"\\u0001long"', "7" * 5000).replace("\\u0001twice", "")
