"""Write down, beside this file, what the pinned torch_npu wheel offers, so that a machine without it can check and export.

    python -m kernels.vendored.generate UNPACKED_WHEEL

Reads the wheel's YAML and the syntax of its Python; nothing of it is imported.
"""

import ast
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import torch
import yaml

HERE = Path(__file__).parent


def schemas(wheel: Path) -> list[str]:
    """Every op of namespace npu as torch_npu registers it, sorted."""
    listed = yaml.safe_load((wheel / "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml").read_text())
    declared = lambda section: (f"npu::{entry['func']}" for entry in listed[section] if isinstance(entry, dict))
    parsed = {section: {_name(s): s for s in map(_parse, declared(section))} for section in ("custom", "symint")}
    # Of an op in both sections the one with symbolic sizes is registered; in symint alone are ops of aten.
    return sorted(_registered(str(parsed["symint"].get(name, schema))) for name, schema in parsed["custom"].items())


def _parse(schema: str) -> torch.FunctionSchema:
    return torch._C.parse_schema(schema)


def _name(schema: torch.FunctionSchema) -> str:
    return f"{schema.name}.{schema.overload_name}"


SEVERAL_OUTPUTS = re.compile(r"(Tensor\(\w!\) \w+, )+Tensor\(\w!\) \w+\) -> ")


def _registered(schema: str) -> str:
    """A schema of the YAML with what torch_npu's code generator makes of it: `input` for `self`, one list for several outs."""
    schema = re.sub(r"\bself\b", "input", schema)
    listed, several = SEVERAL_OUTPUTS.subn("Tensor[] out) -> ", schema)
    if not several or ".out(" not in schema:
        return schema
    arguments, returns = listed.split(" -> ")
    return f"{arguments} -> {re.sub(r'Tensor.[a-z]!.', 'Tensor', returns)}"


REGISTER = "register_fx_node_ge_converter"


def converters(wheel: Path) -> list[str]:
    """Every op that torchair converts to a GE graph, sorted; most of those it registers only raise, and are left out."""
    found = set()
    for path in (wheel / "torch_npu/dynamo/torchair").rglob("*.py"):
        if REGISTER not in (source := path.read_text()):
            continue
        with warnings.catch_warnings(action="ignore"):  # about the wheel's regular expressions
            tree = ast.parse(source)
        bodies = {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for op, function in _registrations(tree):
            # A bare name is a variable: of an op that its author's own code registers.
            if "." in op and not _only_raises(bodies[function]):
                found.add(op)
    return sorted(found)


def _registrations(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each op that a file registers, and the name of the function that converts it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if _registers(decorator):
                    yield _op(decorator.args[0]), node.name
        elif isinstance(node, ast.Call) and _registers(node.func) and isinstance(node.args[0], ast.Name):
            yield _op(node.func.args[0]), node.args[0].id


def _registers(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(REGISTER)


def _op(node: ast.AST) -> str:
    """aten.add.Tensor of torch.ops.aten.add.Tensor, or of getattr(torch.ops.aten.add, "Tensor", None)."""
    if isinstance(node, ast.Call):
        owner, name = node.args[:2]
        assert isinstance(name, ast.Constant), ast.unparse(node)
        node = ast.Attribute(owner, str(name.value))
    return ast.unparse(node).removeprefix("torch.ops.")


def _only_raises(body: list[ast.stmt]) -> bool:
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return isinstance(body[documented], ast.Raise)


def version(wheel: Path) -> str:
    """The version of an unpacked torch_npu wheel."""
    (folder,) = wheel.glob("torch_npu-*.dist-info")
    return folder.name.removeprefix("torch_npu-").removesuffix(".dist-info")


def files(wheel: Path) -> dict[str, str]:
    """The name and the text of each file."""
    lines = {"npu_schemas.txt": schemas(wheel), "ge_converters.txt": converters(wheel)}
    source = f"# of torch_npu {version(wheel)}, by python -m kernels.vendored.generate\n"
    return {name: source + "".join(f"{line}\n" for line in some) for name, some in lines.items()}


def main(wheel: str) -> None:
    """Write the list of ops and the list of converters of an unpacked wheel beside this file."""
    for name, text in files(Path(wheel)).items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
