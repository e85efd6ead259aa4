"""Pickles, good and evil, and programs for the stack machine that reads them."""

import collections
import os
import pickle
import pickletools
import random
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.mutate import mutated

_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
_PARTS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"X\x04\0\0\0true",
    b"\x8c\x02id", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 8, b"\x85R", b"(tR", b"(lR", b")R", b"h\0", b"q\0", b"\x94", b"2",
    b"}(", b"u", b"](", b"e", b"s", b"a", b"b", b"Q", b"0", b"(", b"1", b"\x81", b"\x93", b"G?\xf0\0\0\0\0\0\0", b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff", b"I" + b"9" * 5000 + b"\n", b"p99999999999999999999\n", b"r\xff\xff\xff\xff", b".",
)  # fmt: skip


class Evil:
    """Pickles as a call that leaves a file where none may be."""

    def __init__(self, outside: Path) -> None:
        self.outside = outside

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.outside / 'pwned'}",)


class _Opened(Evil):
    def __reduce__(self) -> tuple:
        return open, (str(self.outside / "pwned"), "w")


class _Stateful:
    def __setstate__(self, state: object) -> None:
        raise AssertionError("a foreign object's state was set")

    def __getstate__(self) -> object:
        return {"x": 1}


def seeds(outside: Path) -> list[bytes]:
    values = [
        {"a": [1, 2.5, "text", None, True, (1, 2, 3, 4)], "b": {"c": b"bytes", "d": 1 << 70}}, [[1, 2, 3] * 20, {"ids": list(range(300))}],
        collections.OrderedDict(x=1), {1, 2}, frozenset("ab"), Evil(outside), [_Opened(outside)], {"x": _Stateful()}, print, Path, "", [], -1,
    ]  # fmt: skip
    recursive: list = []
    recursive.append(recursive)
    return [pickle.dumps(value, protocol) for value in (*values, recursive) for protocol in range(6)]


def mutated_pickle(seeds: Sequence[bytes], pick: random.Random) -> bytes:
    """A pickle with other bytes, or with operations put in, left out, repeated or moved."""
    data = pick.choice(seeds)
    if pick.random() < 0.5:
        return mutated([data], pick)
    at = [place for _, _, place in pickletools.genops(data)]
    ops = [data[begin:end] for begin, end in zip(at, [*at[1:], len(data)], strict=True)]
    for _ in range(pick.choice((1, 1, 2, 5, 20))):
        i = pick.randrange(len(ops) + 1)
        match pick.randrange(5):
            case 0:
                ops[i:i] = [pick.choice(_PARTS)]
            case 1:
                ops[i:i] = [pick.choice(_OPCODES) + pick.randbytes(pick.choice((0, 1, 4)))]
            case 2:
                del ops[i : i + pick.choice((1, 1, 2, 5))]
            case 3:
                ops[i:i] = ops[max(0, i - pick.randrange(1, 6)) : i] * pick.choice((1, 2, 200))
            case 4:
                ops[i:i] = [pick.choice(ops or [b"."])]
    return b"".join(ops)
