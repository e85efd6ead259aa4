"""What the command `plan` prints, and how it answers mistakes."""

import json
import re
import subprocess
import sys

import pytest

from experiments import plan
from experiments.planning import plan as planning
from lumina_fn import checkpoint, model
from lumina_fn.process import entry
from tests.support import folders
from tests.support.paths import ROOT
from tests.support.planned_steps import TINY

SLOW = pytest.mark.slow
GROWING = (lambda n: 7 + 3 * n, lambda n: 5 * n + max(0, 9 * (n - 4)), lambda n: n * n, lambda n: 39 + n // 20)


@pytest.mark.parametrize("grows", GROWING)
@pytest.mark.parametrize("room", [0, 1, 10, 33, 40, 100])
def test_the_largest_that_fits(grows, room):
    assert planning.largest(grows, room, 20) == max((n for n in range(1, 21) if grows(n) <= room), default=0)


SMALL = [
    "--width",
    "32",
    "--heads",
    "4",
    "--layers",
    "2",
    "--hidden",
    "48",
    "--vocab",
    "96",
    "--seq",
    "90",
    "--compile",
    "off",
]
PLAN = "import sys; from experiments import plan; plan.main(sys.argv[1:])"
# Not ru_maxrss: that begins with the size of the process that started this one.
USED = "import resource; from experiments.launching import processes; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, processes.peak())"


def call(*flags: object, code: str = PLAN) -> str:
    """What the command prints, in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@SLOW
def test_a_table_has_a_column_for_each_number_of_devices():
    lines = call("--devices", 1, 2, 16, *SMALL).splitlines()
    table = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    assert {len(row) for row in table} == {4}
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in table}
    assert rows["per device, of"] == ["1", "2", "16"]
    assert "micro batches of 1 x 96 tokens (samples of 90, padded)" in lines
    parameters = [float(cell.split()[0]) for cell in rows["parameters, MB"]]
    assert parameters == sorted(parameters, reverse=True)


@SLOW
def test_json_holds_a_plan_for_each():
    flags = ["--batch", 24, "--micro-batch", 2, "--strategy", "hybrid", "--shard-size", 2, "--json"]
    two, four = json.loads(call("--devices", 2, 4, *SMALL, *flags))
    for one in (two, four):
        assert sum(one["at_peak"].values()) == one["peak"]
        assert sum(one["seconds"].values()) == pytest.approx(one["step_seconds"])
        assert one["at_peak"]["parameters"] == two["at_peak"]["parameters"]  # halves of a copy, on any number
    assert (two["micro_batches"], four["micro_batches"]) == (6, 3)
    assert four["seconds"]["reductions"] > 0


@SLOW
def test_this_machine_is_measured():
    one, two = json.loads(call("--devices", 1, 2, *SMALL, "--device", "cpu", "--efficiency", 0.5, "--json"))
    assert 0 < one["mfu"] < 0.5
    assert two["seconds"]["compute"] == pytest.approx(2 * one["seconds"]["compute"])  # they share its cores


def test_a_folder_needs_its_config_alone(tmp_path, capsys):
    checkpoint.save_model(tmp_path / "native", model.init(TINY), TINY)
    folders.write_hf(tmp_path / "hf", folders.small_state(), folders.SMALL)
    for path in [*(tmp_path / "native").iterdir(), *(tmp_path / "hf").iterdir()]:
        if path.name != "config.json":
            path.unlink()
    assert planning.read_config(tmp_path / "native") == TINY
    assert planning.read_config(tmp_path / "hf").width == folders.SMALL["hidden_size"]
    assert plan.main(["--devices", "1", "--model", str(tmp_path / "hf"), "--compile", "off", "--layers", "3"]) == 0
    assert "3 layers, width 16, 4 heads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--devices 0", "--devices 0: expected"),
        ("--devices 8 -2", "--devices -2: expected"),
        ("--devices 12", "--devices 12: expected whole nodes of --devices-per-node 8"),
        ("--devices two", "--devices"),
        ("--devices 8 --layers -1", "--layers -1: expected"),
        ("--devices 8 --seq 0", "--seq 0: expected"),
        ("--devices 8 --micro-batch 0", "--micro-batch 0: expected"),
        ("--devices 8 --width 100", "width 100 / heads 32: expected an even whole number"),
        ("--devices 8 --kv-heads 5", "kv heads 5: expected a divisor of the 32 heads"),
        ("--devices 8 --device 910C", "--device 910C: expected one of 910B,"),
        ("--devices 8 --efficiency 1.5", "--efficiency 1.5: expected a fraction"),
        ("--devices 8 --efficiency 0", "--efficiency 0.0: expected a fraction"),
        ("--devices 8 --strategy hybrid --shard-size 3", "--shard-size 3: expected a divisor of the 8 devices"),
        ("--devices 8 --strategy zero9", "zero9"),
        ("--devices 8 --model nowhere", "nowhere/config.json: No such file"),
        ("--devices 8 --model experiments/demo/assets/vq", "describes no Lumina transformer"),
    ],
)
def test_a_mistake_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        entry.run(lambda _: plan.main(flags.split()))
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert message in line


def test_without_flags_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        entry.run(lambda _: plan.main([]))
    *usage, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert usage[0].startswith("usage: ")
    assert line.startswith("error: expected --devices INT; see ")


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """What the command prints of the 7B, and in the last line what that took."""
    return call("--devices", 8, 16, 64, "--remat", "all", code=f"{PLAN}; {USED}").splitlines()


@SLOW
def test_the_7b_is_planned_in_seconds_and_not_allocated(shown):
    seconds, size = map(float, shown[-1].split())
    assert seconds < 60  # of a processor: others may be using it too
    assert size < 1e9


def cells(line: str) -> list[str]:
    return [cell.strip(" `*") for cell in line.split("|")[1:-1]]


def page(head: str) -> list[list[str]]:
    """The rows of the table in docs/numbers.md whose first line begins so."""
    text = (ROOT / "docs/numbers.md").read_text()
    return [cells(line) for line in text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]]


@SLOW
def test_the_numbers_on_the_page_are_what_is_printed(shown):
    """Some of the printed rows are left out there; a cell that holds two numbers is two cells."""
    printed = {cells(line)[0].split(",")[0]: cells(line)[1:] for line in shown if line.startswith("|")}
    numbers = lambda text: re.findall(r"[\d.]+", text)
    for part, head in enumerate(("GB when the peak occurs", "GB at its own largest moment")):
        for name, *values in page(head):
            assert values == [numbers(cell)[part] for cell in printed[name]], name
    for head in ("whole device", "a step"):
        for name, *values in page(head):
            key = name.split(",")[0].removeprefix("part ").removesuffix(" of the device")
            assert values == [numbers(cell)[0] for cell in printed[key]], name


@SLOW
def test_what_remat_auto_saves_is_what_is_printed():
    found = json.loads(call("--devices", 8, 16, 64, "--json"))
    text = (ROOT / "docs/how-to/memory-and-speed.md").read_text()
    rows = {cells(line)[0]: cells(line)[1:] for line in text.split("With `--remat auto`")[1].splitlines()[2:7]}
    assert rows["blocks computed again, of 32"] == [f"{one['recomputed']}" for one in found]
    assert rows["predicted peak, GB"] == [f"{one['peak'] / 1e9:.2f}" for one in found]
    assert rows["predicted step, s"] == [f"{one['step_seconds']:.2f}" for one in found]
    [whole] = json.loads(call("--devices", 8, "--remat", "all", "--json"))
    assert found[0]["step_seconds"] <= 0.85 * whole["step_seconds"]
    assert all(one["of_memory"] <= 0.9 for one in found)


@SLOW
def test_the_roofline_on_the_page_is_what_is_printed_and_what_plan_says():
    flags = ("--devices", 8, "--seq", 1024, "--remat", "all")
    printed = [cells(line) for line in call(*flags, "--roofline").splitlines() if line.startswith("|")]
    text = (ROOT / "docs/numbers.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("| strategy | micro batch |")]
    assert len(tables) == 2
    for rows in zip(*(map(cells, table.splitlines()[2:]) for table in tables), strict=True):
        (strategy, micro, mfu, *_), (_, _, peak, *_) = rows
        assert [f"{strategy}, micro batch {micro}", f"{mfu}% ({peak})"] in printed
    prefetched = ("--forward-prefetch", "--backward-prefetch", "--micro-batch", 4, "--strategy", "sdp", "--json")
    [one] = json.loads(call(*flags, *prefetched))
    assert ["sdp, micro batch 4", f"{one['mfu']:.1%} ({one['peak'] / 1e9:.0f})"] in printed
