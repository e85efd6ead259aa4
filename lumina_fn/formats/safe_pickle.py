"""Read the pickle inside a torch file without executing it: nothing is imported or called, no attribute is set.

A pickle is a program for a small stack machine. This machine supports dicts, lists, numbers and strings, and the few records by
which torch describes a tensor (its rebuild functions and storages). A caller may name classes whose objects it wants to read: each
becomes a `Record` of its arguments and state. Anything else (a class, a function, an object's state) becomes an `Inert` with its
name only.
"""

import pickletools
import struct
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_BYTES = 8 << 20  # a 7.88B model's takes 50 KB
MAX_OPS = 500_000  # a state dict needs about 40 for each tensor
MAX_RANK = 8


class StorageRef(NamedTuple):
    """A storage that the pickle refers to; its bytes are another member of the zip file."""

    kind: str  # torch's legacy storage class, such as BFloat16Storage
    key: str  # the member data/KEY of the zip file
    numel: int


class TensorRef(NamedTuple):
    """A tensor that the pickle refers to: a strided view of a storage."""

    storage: StorageRef
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Global(NamedTuple):
    """The name of a class or function. It is never looked up."""

    module: str
    name: str


class Inert(NamedTuple):
    """The substitute for anything else in the pickle; `what` names it."""

    what: str


@dataclass(eq=False)  # as a dict's key it is compared by identity: nothing foreign is hashed
class Record:
    """An object of a class that the caller named: its arguments and its state. The class is never looked up."""

    kind: Global
    args: tuple
    state: object = None


_REBUILD_TENSOR = (
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch_npu.utils.storage", "_rebuild_npu_tensor"),  # the same four arguments first, storage on the CPU
)
_REBUILD_PARAMETER = (
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
)
_REBUILD_TYPED = Global("torch._tensor", "_rebuild_from_type_v2")
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def loads(
    data: bytes, records: Set[Global] = frozenset(), max_bytes: int = MAX_BYTES, max_ops: int = MAX_OPS
) -> object:
    """The pickled value: dicts (entries with string or Record keys only), lists, tuples, plain values, TensorRefs, Records, Inerts.

    `records` names the classes that become Records. Raises ValueError if the pickle is malformed or larger than the bounds.
    """
    if len(data) > max_bytes:
        raise ValueError(f"the pickle has {len(data)} bytes, more than {max_bytes}")
    try:
        return _run(data, records, max_ops)
    except (IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"malformed pickle ({type(error).__name__})") from error


def _run(data: bytes, records: Set[Global], max_ops: int) -> object:
    stack: list = []
    marked: list[list] = []
    memo: dict[int, object] = {}
    arg: Any  # its type depends on the operation
    for count, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        if count > max_ops:
            raise ValueError(f"the pickle has more than {max_ops} operations")
        op = opcode.name
        if op in _VALUES:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _TUPLES:
            stack[-_TUPLES[op] :] = [_exactly(stack, _TUPLES[op])]
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        else:
            match op:
                case "STOP":
                    return stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST" | "EMPTY_SET":  # a set as a list: nothing foreign is hashed or compared
                    stack.append([])
                case (
                    "TUPLE"
                    | "FROZENSET"
                    | "LIST"
                    | "DICT"
                    | "APPENDS"
                    | "ADDITEMS"
                    | "SETITEMS"
                    | "POP_MARK"
                    | "INST"
                    | "OBJ"
                ):
                    items, stack = stack, marked.pop()
                    _close(op, arg, items, stack)
                case "APPEND":
                    _extend(stack[-2], [stack.pop()])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _update(stack[-1], [key, value])
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(Global(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(Global(module, name) if type(module) is type(name) is str else Inert("a global"))
                case "REDUCE":
                    args, function = stack.pop(), stack.pop()
                    stack.append(_reduced(function, args, records))
                case "BUILD":  # an object's state: kept for a Record, ignored otherwise
                    state = stack.pop()
                    if type(stack[-1]) is Record:
                        stack[-1].state = state
                case "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(_record(function, args, records) or Inert("an object"))
                case "NEWOBJ_EX":
                    del stack[-3:]
                    stack.append(Inert("an object"))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "PERSID" | "EXT1" | "EXT2" | "EXT4":
                    stack.append(Inert("an extension or a persistent id"))
                case "DUP":
                    stack.append(stack[-1])
                case "POP":
                    if stack:
                        stack.pop()
                    else:
                        stack = marked.pop()
                case _:
                    raise ValueError(f"the pickle uses {op}")
    raise ValueError("the pickle has no end")


def _exactly(stack: list, n: int) -> tuple:
    if len(stack) < n:
        raise IndexError
    return tuple(stack[-n:])


def _close(op: str, arg: object, items: list, stack: list) -> None:
    """Apply an operation that consumes the items above a mark."""
    match op:
        case "TUPLE" | "FROZENSET":
            stack.append(tuple(items))
        case "LIST":
            stack.append(items)
        case "DICT":
            stack.append({})
            _update(stack[-1], items)
        case "APPENDS" | "ADDITEMS":
            _extend(stack[-1], items)
        case "SETITEMS":
            _update(stack[-1], items)
        case "INST" | "OBJ":
            stack.append(Inert("an object"))


def _extend(target: object, items: list) -> None:
    if type(target) is list:
        target.extend(items)


def _update(target: object, items: list) -> None:
    if type(target) is dict:
        target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if type(k) in (str, Record))


def _record(function: object, args: object, records: Set[Global]) -> Record | None:
    return Record(function, args) if type(function) is Global and type(args) is tuple and function in records else None


def _reduced(function: object, args: object, records: Set[Global]) -> object:
    if type(function) is not Global or type(args) is not tuple:
        return Inert("a call")
    if record := _record(function, args, records):
        return record
    if function == Global("collections", "OrderedDict"):
        return {}
    if function in _REBUILD_TENSOR:
        return _tensor(args)
    if function in _REBUILD_PARAMETER and args and type(args[0]) is TensorRef:
        return args[0]
    if function == _REBUILD_TYPED and len(args) > 2 and args[0] in _REBUILD_TENSOR and type(args[2]) is tuple:
        return _tensor(args[2])
    return Inert(f"{function.module:.99}.{function.name:.99}")  # one per call: a long name must not fill memory


def _tensor(args: tuple) -> TensorRef | Inert:
    if len(args) < 4 or type(args[0]) is not StorageRef:
        return Inert("a tensor without a storage")
    storage, offset, shape, stride = args[:4]
    if type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= MAX_RANK:
        raise ValueError(f"a tensor's shape and strides do not match, or have more than {MAX_RANK} axes")
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor's sizes are not whole numbers")
    return TensorRef(storage, offset, shape, stride)


def _storage(pid: object) -> StorageRef | Inert:
    match pid:
        case ("storage", Global("torch", kind), str(key), str(), int(numel)) if (
            type(pid) is tuple and type(kind) is str
        ):
            return StorageRef(kind, key, numel)
    return Inert("a persistent id")
