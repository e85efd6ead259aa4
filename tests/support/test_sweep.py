"""Sweeps: every part is played by some seed, and what is listed is there."""

import re

from tests.support.paths import ROOT
from tests.support.sweep import LONGEST, PARTS, SWEEPS, TOGETHER, chosen, unit


def test_all_parts_together_play_each_unit_once():
    units = {f"tests/a.py::test_{i}" for i in range(37)}
    parts = [chosen(units, seed) for seed in range(PARTS)]
    assert sorted(name for part in parts for name in part) == sorted(units)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_blocks_of_a_page_are_one_unit():
    first, second = (unit(f"tests/test_pages.py::test_block_runs[docs/tutorial.md:{line}]") for line in (3, 40))
    assert first == second is not None
    assert unit("tests/test_pages.py::test_block_runs[README.md:3]") is None


def test_the_longest_files_are_there():
    assert [file for file in LONGEST if not (ROOT / file).exists()] == []


def test_every_listed_name_is_a_test():
    for name in (*SWEEPS, *TOGETHER):
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test.partition('[')[0]}", (ROOT / file).read_text(), re.MULTILINE), name
