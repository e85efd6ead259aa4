"""Numbers that a user gives: each flag says which make sense, and no other is begun with."""

import importlib
import math
from dataclasses import is_dataclass
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest

from experiments.finetuning.settings import Settings
from lumina_fn import export
from lumina_fn.errors import InputError
from lumina_fn.process.flags import _given, parse
from lumina_fn.process.ranges import Range

# Not plan: it checks its own numbers.
COMMANDS = ("finetuning.settings", "pretokenize", "sample", "dataset", "migrate")
SIZES = {"size", "width", "height"}  # in pixels: those of a list


def numbers(command: str):
    """A command's flags that are numbers: name, type, range."""
    module = importlib.import_module(f"experiments.{command}")
    for kind in filter(is_dataclass, vars(module).values()):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            number = _given(get_args(hint)[0]) if get_origin(hint) is Annotated else None
            if number in (int, float):
                yield name, number, next((mark for mark in hint.__metadata__ if isinstance(mark, Range)), None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range_with_an_end(command):
    found = list(numbers(command))
    assert found
    for name, number, within in found:
        assert name in SIZES or within is not None, name
        assert number is float or name in SIZES or within.most < math.inf, name


FLOATS = [name for name, number, _ in numbers("finetuning.settings") if number is float]


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "-inf", "1e400"])
@pytest.mark.parametrize("name", FLOATS)
def test_no_float_of_a_fine_tune_is_out_of_its_range(name, text):
    given = ["--model", "m", "--features", "f", "--out", "o", f"--{name.replace('_', '-')}={text}"]
    if name == "clip" and float(text) == math.inf:  # nothing is clipped
        assert parse(Settings, None, given).clip == math.inf
        return
    with pytest.raises(InputError, match=r"expected (at|more than)"):
        parse(Settings, None, given)


def test_a_float_without_a_range_is_finite():
    from experiments.plan import Settings as Plan

    with pytest.raises(InputError, match=r"^--efficiency nan: expected a finite number$"):
        parse(Plan, None, ["--devices", "1", "--efficiency", "nan"])


@pytest.mark.parametrize("flag", ["--weight-decay", "--clip", "--z-weight"])
@pytest.mark.parametrize("text", ["nan", "-1", "-inf", "words"])
def test_an_export_takes_the_same_ranges(flag, text):
    with pytest.raises(
        InputError, match=rf"{flag} {text}(\.0)?: expected|argument {flag}: invalid float value: '{text}'"
    ):
        parse(export.Settings, None, ["m", "o", "--what", "step", "--target", "cpu", f"{flag}={text}"])
