"""The rules of the house that a machine can check: floors, one place for the device, nothing run from a file, silence below."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FLOORS = ("kernels", "ops", "lumina_fn", "experiments", "bench")  # each imports only floors before it
FILES = [path.relative_to(ROOT) for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
LINES = 300  # of a file that is read in one sitting
DEVICE = Path("kernels/ascend_graph.py")
# Where argv is read and lines are printed, below experiments: three mains, and what parses flags and ends a command.
MAINS = {
    Path("lumina_fn/convert.py"),
    Path("lumina_fn/export.py"),
    Path("lumina_fn/process/entry.py"),
    Path("lumina_fn/process/flags.py"),
    Path("lumina_fn/process/startup.py"),
    Path("kernels/bench.py"),
    Path("kernels/benchmark.py"),
    Path("kernels/vendored/generate.py"),
}
TALK = {"print", "input", "sys.argv", "os.environ", "os.getenv", "sys.stdout", "argparse"}
UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "eval", "exec"}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named(tree: ast.AST) -> set[str]:
    """Every name and dotted name in use, and everything imported."""
    return {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)} | set(imports(tree))


def faults(path: Path, source: str) -> list[str]:
    """What is wrong with a file of the house."""
    tree, floor = ast.parse(source), FLOORS.index(path.parts[0])
    used, found = named(tree), []
    for module in {m.split(".")[0] for m in imports(tree)}:
        if module in FLOORS[floor + 1 :]:
            found.append(f"imports {module}, a floor above")
        if module == "tests" or (module in {"torch_npu", "torchair"} and path != DEVICE):
            found.append(f"imports {module}")
    found += [f"{name} runs what a file says" for name in used & UNSAFE]
    if floor < FLOORS.index("experiments") and path not in MAINS:
        found += [f"{name} below experiments" for name in used & TALK]
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("a bare except")
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False:
            found += [f"{node.arg}=False"] * (node.arg == "weights_only")
        if isinstance(node, ast.Global):
            found.append("a global that changes")
    if source.count("\n") > LINES:
        found.append(f"{source.count(chr(10))} lines, more than {LINES}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_the_rules(path):
    assert faults(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("kernels/a.py", "import ops", "imports ops, a floor above"),
        ("ops/a.py", "from lumina_fn.model import init", "imports lumina_fn, a floor above"),
        ("lumina_fn/a.py", "def f():\n    from experiments import demo", "imports experiments, a floor above"),
        ("ops/a.py", "import torch_npu", "imports torch_npu"),
        ("kernels/ascend.py", "from torchair import ge", "imports torchair"),
        ("experiments/a.py", "from tests import folders", "imports tests"),
        ("lumina_fn/a.py", "import pickle\npickle.loads(b'')", "pickle.loads runs what a file says"),
        ("experiments/a.py", "from pickle import load", "pickle.load runs what a file says"),
        ("experiments/a.py", "torch.load(p, weights_only=False)", "weights_only=False"),
        ("lumina_fn/a.py", "print(1)", "print below experiments"),
        ("ops/a.py", "import os\nx = os.environ['A']", "os.environ below experiments"),
        ("kernels/a.py", "from sys import argv", "sys.argv below experiments"),
        ("lumina_fn/a.py", "try:\n    f()\nexcept:\n    pass", "a bare except"),
        ("experiments/a.py", "def f():\n    global x", "a global that changes"),
        ("experiments/a.py", "x = 1\n" * 301, "301 lines, more than 300"),
    ],
)
def test_rule_catches(path, source, fault):
    assert faults(Path(path), source) == [fault]


@pytest.mark.parametrize("path", ["lumina_fn/convert.py", "experiments/a.py", "kernels/bench.py"])
def test_mains_may_talk(path):
    assert faults(Path(path), "import sys\nprint(sys.argv)") == []


def test_ascend_may_import_its_device():
    assert faults(DEVICE, "import torch_npu") == []


def used(tree: ast.AST) -> Iterator[str]:
    """What is imported at run time, wherever in a file."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield from imports(ast.Module([node], [])) if isinstance(node, ast.Import | ast.ImportFrom) else used(node)


def rooms(floor: str) -> dict[str, set[str]]:
    """For each room and each module of a floor that stands in none, those that it imports."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / floor).rglob("*.py"):
        own = path.relative_to(ROOT / floor).parts[0].removesuffix(".py")
        names = {name.split(".")[1] for name in used(ast.parse(path.read_text())) if name.startswith(f"{floor}.")}
        here = {n for n in names if (ROOT / floor / n).is_dir() or (ROOT / floor / f"{n}.py").exists()}
        found.setdefault(own, set()).update(here - {own})
    return found


def test_no_room_of_the_model_s_floor_imports_one_that_imports_it():
    found = rooms("lumina_fn")
    del found["__init__"]
    assert len(list(graphlib.TopologicalSorter(found).static_order())) >= len(found)


def test_what_a_command_is_made_of_imports_no_command():
    """The demo calls commands, as a user does."""
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "devices", "ascend_env"}
    for room, names in rooms("experiments").items():
        if (ROOT / "experiments" / room).is_dir() and room != "demo":
            assert not names & commands, room


@pytest.mark.parametrize("folder", ["lumina_fn", "experiments", "tests", "kernels", "ops", "docs"])
def test_a_folder_fits_on_a_screen(folder):
    shown = [path.name for path in (ROOT / folder).iterdir() if path.name != "__pycache__"]
    assert len(shown) <= 36


# More than six parameters, each with its reason. kernels and ops take tensors one by one, as PyTorch's dispatcher does.
MANY = {
    "lumina_fn/sample.py generate": "the public contract",
    "lumina_fn/train.py make_train_step": "the public contract",
    "lumina_fn/loss.py loss": "the public contract, and two seams",
}


def test_what_travels_together_is_one_value():
    found = set()
    for floor in ("lumina_fn", "experiments", "bench"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                    if len([name for name in names if name not in ("self", "cls")]) > 6:
                        found.add(f"{path.relative_to(ROOT)} {node.name}")
    assert found == set(MANY)


def test_every_public_function_of_the_library_says_what_comes_out():
    for floor in ("lumina_fn", "ops", "kernels"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                overload = "overload" in [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and not overload:
                    assert ast.get_docstring(node) or node.name in ("main", "Settings"), f"{path.name} {node.name}"
