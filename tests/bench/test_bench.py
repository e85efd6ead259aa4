"""What bench's rows are made of. The comparisons themselves need the peers, and are run by `make bench`."""

import json
import os
import time

import pytest
import torch

from bench import ceilings, harness, language, table, waiting
from bench.harness import Bench, Runs, Sample
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.process.flags import parse
from tests.support.project_copy import ROOT

TINY = ModelConfig(vocab=64, width=16, layers=2, heads=2, kv_heads=2, hidden=24)


def adding(seconds: float, result: float) -> Bench:
    return Bench(lambda: [result, 1.0], lambda: time.sleep(seconds))


def broken() -> Bench:
    raise ValueError("nothing to run")


def dying() -> Bench:
    return Bench(lambda: [torch._C._abort()], lambda: None)


@pytest.mark.slow
def test_sides_run_in_turn_in_processes_of_their_own():
    found = harness.in_turn({"slow": (adding, 0.2, 3.0), "fast": (adding, 0.1, 3.0)}, 3)
    assert [len(runs.samples) for runs in found.values()] == [3, 3]
    assert 0.2 <= found["slow"].wall < 1.0
    assert 0.1 <= found["fast"].wall < 0.9
    assert all(runs.cpu < 0.1 for runs in found.values())
    assert all(10e6 < runs.imported <= runs.peak for runs in found.values())


@pytest.mark.slow
def test_sides_that_compute_something_else_are_not_timed():
    with pytest.raises(RuntimeError, match=r"fast is 3\.3e-02 from slow, expected at most 1e-04"):
        harness.in_turn({"slow": (adding, 9.0, 3.0), "fast": (adding, 9.0, 3.1)}, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "said"), [(broken, "nothing to run"), (dying, "a side's process ended with -6")])
def test_a_side_that_fails_says_why(side, said):
    with pytest.raises(RuntimeError, match=said):
        harness.in_turn({"ours": (side,)}, 1)


def test_a_row_is_judged_by_what_was_measured():
    samples = lambda *seconds: [Sample(s, 2 * s) for s in seconds]
    ours, theirs = Runs(samples(1, 2, 1), 100, 10), Runs(samples(2, 3, 3), 250, 10)
    target = {"wall_ratio": ">= 1.9", "rss_ratio": ">= 2.5", "rate": ">= 5"}
    row = harness.speed_row("some", target, ours, theirs, measured={"rate": 4.0}, limit="the disk")
    assert (row.cpu_ratio, row.wall_ratio, row.rss_ratio) == (2.0, 2.0, 2.5)
    assert row.measured["wall_spread"] == [1.5, 3.0]
    assert not row.met
    assert row.reason == "rate is 4.0, not >= 5; the disk"
    met = harness.speed_row("some", {"wall_ratio": ">= 2"}, ours, theirs, measured={}, limit="the disk")
    assert (met.met, met.reason) == (True, "")


@pytest.mark.parametrize(
    ("value", "bound", "fine"), [(1.0, ">= 1", True), (0.99, ">= 1", False), (1.0, "<= 1", True), (None, "<= 1", False)]
)
def test_bounds(value, bound, fine):
    assert harness.holds(value, bound) == fine


@pytest.mark.slow
def test_our_side_of_the_language_rows_is_the_gradient_of_the_loss():
    from lumina_fn import model, train

    batch = language.batch_of(TINY, 12)
    grads, (loss, _) = torch.func.grad_and_value(train.loss, has_aux=True)(model.init(TINY), batch, TINY)
    expected = language._told(loss, grads.embed, grads.blocks[0].q, grads.blocks[-1].down, grads.head.unembed)
    for remat in (False, True):
        torch.testing.assert_close(
            torch.tensor(language.ours(TINY, 12, remat).check()), torch.tensor(expected), rtol=1e-4, atol=1e-4
        )


def test_a_product_of_the_ceiling_is_counted_right():
    assert ceilings.FLOPS == ceilings.TIMES * 2 * ceilings.SIDE**3


def results() -> dict:
    return json.loads((ROOT / "bench/results.json").read_text())


def test_the_readmes_table_is_that_of_the_results():
    for name in ("README.md", "README.zh-CN.md"):
        readme = (ROOT / name).read_text()
        assert table.inserted(readme, results()) == readme, name


def test_the_results_hold_what_they_say():
    names = [row["name"] for row in results()["rows"]]
    assert len(set(names)) == len(names)
    for row in results()["rows"]:
        values = row["measured"] | {name: row[name] for name in table.RATIOS}
        assert row["met"] == all(harness.holds(values[key], bound) for key, bound in row["target"].items()), row["name"]
        assert row["met"] or row["reason"], row["name"]


def test_an_unknown_part_is_refused():
    from bench.__main__ import Settings, main

    assert parse(Settings, None, []).quick is False
    with pytest.raises(InputError, match="--only speed: expected some of language, decoding"):
        main(["--only", "speed"])


def policy() -> Bench:
    told = lambda: [float(os.environ.get(waiting.POLICY) == "passive")]
    return Bench(told, lambda: time.sleep(0.01 + told()[0] / 10))


@pytest.mark.slow
def test_one_side_waits_and_the_other_spins(monkeypatch):
    monkeypatch.setenv(waiting.POLICY, "active")  # of whoever runs the bench: for neither side
    found = waiting.in_turn((policy,), 2, 1)
    assert found["spinning"].wall < 0.1 < found["passive"].wall
    assert os.environ[waiting.POLICY] == "active"


def test_the_gain_of_waiting_is_the_time_without_it():
    runs = lambda *seconds: Runs([Sample(s, s) for s in seconds], 0, 0)
    row = waiting._row("finetune", 2, {"spinning": runs(3, 4, 8), "passive": runs(2, 2, 2)})
    assert (row.name, row.wall_ratio, row.met) == ("waiting_finetune_busy", 2.0, True)
    assert row.measured["wall_spread"] == [1.5, 4.0]
    assert not waiting._row("finetune", 2, {"spinning": runs(1), "passive": runs(1)}).met
