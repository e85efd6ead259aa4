"""Every block of the README, of docs/ and of the pages for contributors is run as written, in a copy of the project, or says in a comment what it needs.

A comment `<!-- needs: weights -->` (or hardware, network) right before a block keeps it from being run. Its commands are then called
in an empty folder, where they must fail for want of a file, not of a flag. `<!-- run by: make -->`: the targets themselves.
"""

import importlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from experiments.__main__ import COMMANDS
from lumina_fn.errors import InputError
from tests.support import project_copy
from tests.support.project_copy import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "reference" not in path.parts),
]
CHINESE = {ROOT / "README.zh-CN.md": ROOT / "README.md"} | {
    path: ROOT / "docs" / path.relative_to(ROOT / "docs/zh") for path in sorted((ROOT / "docs/zh").rglob("*.md"))
}
FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN, SHOWN = {"bash", "python"}, {"text", "json"}
NEEDS = {"hardware", "network", "weights"}


class Block(NamedTuple):
    page: str
    line: int
    mark: str | None
    language: str
    text: str


def read(name: str, page: str) -> list[Block]:
    return [
        Block(name, page.count("\n", 0, found.start("text")), found["mark"], found["language"], found["text"])
        for found in FENCE.finditer(page)
    ]


name_of = lambda path: str(path.relative_to(ROOT))
# A page in Chinese has the same blocks, which is tested: they are run once.
BLOCKS = [b for path in PAGES if path not in CHINESE for b in read(name_of(path), path.read_text())]
RUNNABLE = [b for b in BLOCKS if b.language in RUN]
where = lambda block: f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return project_copy.make(tmp_path_factory.mktemp("readme") / "project")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in RUNNABLE if b.mark is None], ids=where)
def test_block_runs(block, copy):
    """The blocks of a page run in order, in one folder: a later one may use what an earlier one left."""
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    environment = project_copy.environment(copy)
    done = subprocess.run([*program, block.text], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=where)
def test_block_is_run_or_says_why_not(block):
    assert block.language in RUN | SHOWN
    if block.mark is None:
        return
    kind, _, what = block.mark.partition(": ")
    assert block.language == "bash"
    assert (kind == "needs" and what in NEEDS) or block.mark == "run by: make"
    if kind == "run by":
        targets = re.findall(r"^make ([\w-]+)", block.text, re.MULTILINE)
        assert targets
        for target in targets:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def ours(block: Block) -> list[list[str]]:
    """The commands of a block that are ours, each as its module and arguments."""
    lines = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    modules = {command.name: command.module for command in COMMANDS}
    ran = [words[2:] for words in lines if words[:2] == ["python", "-m"]]
    return ran + [[modules[words[1]], *words[2:]] for words in lines if words[:1] == ["lumina"]]


@pytest.mark.parametrize(
    "command", [c for b in RUNNABLE if b.mark and b.mark.startswith("needs") for c in ours(b)], ids=" ".join
)
def test_command_that_needs_something_has_the_right_flags(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        importlib.import_module(command[0]).main(command[1:])
    assert "--help" not in str(error.value)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_no_block_is_overlooked():
    for path in PAGES:
        count = len(read(name_of(path), path.read_text()))
        assert len(re.findall(r"^\s*(?:```|~~~)", path.read_text(), re.MULTILINE)) == 2 * count


@pytest.mark.parametrize("page", CHINESE, ids=name_of)
def test_a_page_in_chinese_has_the_headings_and_blocks_of_the_english_one(page):
    shape = lambda path: (
        [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", path.read_text()), re.MULTILINE)],
        [block[2:] for block in read("", path.read_text())],
    )
    assert shape(page) == shape(CHINESE[page])


def test_every_function_on_the_path_of_a_row_is_where_the_page_says():
    page = (ROOT / "docs/explanation/path-of-a-row.md").read_text()
    named = re.findall(r"`(\w+)` in `([\w/]+\.py)`", page)
    assert len(named) >= 25
    for name, file in named:
        assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), (name, file)


def test_private_apis_of_pytorch_are_listed_with_the_module_that_uses_them():
    page = (ROOT / "docs/explanation/private-apis.md").read_text()
    private = re.compile(r"(?:from|import) (torch(?:\.\w+)*\._\w+(?:\.\w+)*)|\b(torch(?:\.\w+)*\._(?!pytree|_)\w+)\b")
    for floor in ("kernels", "ops", "lumina_fn", "experiments"):
        for path in sorted((ROOT / floor).rglob("*.py")):
            names = {a or b for a, b in private.findall(path.read_text())} - {"torch.utils._pytree"}
            if names and "demo" not in path.parts:
                assert str(path.relative_to(ROOT)) in page, (path.name, names)
