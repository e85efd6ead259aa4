"""A pickle of lists, dicts, ints and strings, read without executing it; any other content is an error that names it.

Only the operations that build those four types are implemented: none of them imports, calls or sets anything.
"""

import pickletools
import struct
from typing import TypeVar

T = TypeVar("T")
MAX_BYTES = 8 << 20  # features of 10,240 tokens and as many labels take 100 KB
MAX_DEPTH = 16  # of lists and dicts that are open at once
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_RUN_OF, _RUN, MAX_RUN = ord("J"), struct.Struct("<Bi"), 1024  # ids above 65,535
_INTS = {ord("K"): struct.Struct("<B"), ord("M"): struct.Struct("<H")}
_TEXTS = {ord("X"): struct.Struct("<I"), 0x8C: struct.Struct("<B"), 0x8D: struct.Struct("<Q")}
_PUTS = {ord("q"): 1, ord("r"): 4}
_GETS = {ord("h"): 1, ord("j"): 4}
_SKIPPED = {0x80: 1, 0x95: 8}  # PROTO, FRAME


def loads(data: bytes) -> object:
    """The pickled value. A list may contain itself: limit the depth when walking into it.

    Raises ValueError, which names the unsupported content, for any other pickle.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"the pickle has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        return _run(data)
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"malformed pickle ({type(error).__name__})") from error


def _run(data: bytes) -> object:
    stack: list = []
    outer: list[list] = []  # the stacks below each mark
    memo: dict[int, object] = {}
    at = 0
    while True:
        op = data[at]
        at += 1
        if op == _RUN_OF:  # nearly all of a feature file: a run of them is read at once
            codes = data[at - 1 : at - 1 + MAX_RUN * _RUN.size : _RUN.size]
            count = min(len(codes) - len(codes.lstrip(b"J")), (len(data) - at + 1) // _RUN.size)
            end = at - 1 + max(count, 1) * _RUN.size
            stack.extend(value for _, value in _RUN.iter_unpack(_taken(data, at - 1, end - at + 1)))
            at = end
        elif op in _INTS:
            stack.append(_INTS[op].unpack_from(data, at)[0])
            at += _INTS[op].size
        elif op in _TEXTS:
            (length,) = _TEXTS[op].unpack_from(data, at)
            at += _TEXTS[op].size
            stack.append(_taken(data, at, length).decode())
            at += length
        elif op in _PUTS:
            memo[int.from_bytes(_taken(data, at, _PUTS[op]), "little")] = stack[-1]
            at += _PUTS[op]
        elif op in _GETS:
            stack.append(memo[int.from_bytes(_taken(data, at, _GETS[op]), "little")])
            at += _GETS[op]
        elif op in _SKIPPED:
            at += len(_taken(data, at, _SKIPPED[op]))
        else:
            match chr(op):
                case ".":
                    return stack.pop()
                case "(":
                    outer.append(stack)
                    stack = []
                    if len(outer) > MAX_DEPTH:
                        raise ValueError(f"the pickle is more than {MAX_DEPTH} deep")
                case "]":
                    stack.append([])
                case "}":
                    stack.append({})
                case "e":
                    items, stack = stack, outer.pop()
                    _of(list, stack[-1]).extend(items)
                case "a":
                    item = stack.pop()
                    _of(list, stack[-1]).append(item)
                case "u":
                    items, stack = stack, outer.pop()
                    _put(stack[-1], items)
                case "s":
                    value, key = stack.pop(), stack.pop()
                    _put(stack[-1], [key, value])
                case "\x94":  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                case "\x8a":  # LONG1
                    length = data[at]
                    stack.append(int.from_bytes(_taken(data, at + 1, length), "little", signed=True))
                    at += 1 + length
                case _:
                    raise ValueError(
                        f"the pickle asks for {_asked(data, at, stack)}: only lists, dicts, ints and strings are read"
                    )


def _taken(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise IndexError
    return data[at : at + length]


def _of(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        raise TypeError
    return value


def _put(target: object, items: list) -> None:
    if any(type(key) not in (int, str) for key in items[::2]):
        raise ValueError("a dict's key is neither an int nor a string")
    _of(dict, target).update(zip(items[::2], items[1::2], strict=True))


def _asked(data: bytes, at: int, stack: list) -> str:
    """The name of an unsupported operation, and of the class or function that it refers to."""
    name = _NAMES.get(data[at - 1], f"operation {data[at - 1]}")
    if name in ("GLOBAL", "INST"):
        words = [line.decode(errors="replace") for line in data[at : at + 200].split(b"\n")[:2]]
        return f"{name} {'.'.join(words)}"
    if name == "STACK_GLOBAL":
        return f"{name} {'.'.join(str(part)[:100] for part in stack[-2:] if type(part) is str)}"
    return name
