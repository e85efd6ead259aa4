"""Memory that is refused: recognised, told in one line with the plan's numbers, and no loss of what was saved."""

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import finetune
from experiments.finetuning import loop
from experiments.finetuning.settings import Settings
from experiments.launching import distributed
from experiments.launching.distributed import ALONE, World
from experiments.planning import memory
from lumina_fn import checkpoint, data, prompt
from lumina_fn.config import LUMINA_7B
from lumina_fn.costs import footprint
from lumina_fn.costs.cost import Setup
from lumina_fn.disk import reading
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.process import entry, out_of_memory
from lumina_fn.process.flags import parse
from lumina_fn.process.out_of_memory import OutOfMemory
from lumina_fn.state import manifest
from tests.support.paths import ROOT

LM = ROOT / "experiments/demo/assets/lm"
MANY = 24  # rows of 320 tokens, that take 0.9 GB in one micro batch
COMMON = ("--batch", MANY, "--compile", "off", "--device", "cpu", "--save-every", 1, "--log-every", 1)


class Alien(RuntimeError):
    """As torch.OutOfMemoryError, torch_npu's and XLA's errors are RuntimeErrors of names of their own."""


REFUSED = [
    (MemoryError(), ""),
    (np._core._exceptions._ArrayMemoryError((2**30,), np.dtype("f8")), "8.6 GB more were asked for"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.1 GB more were asked for"),
    (torch.OutOfMemoryError("whatever a later version says"), ""),
    (Alien("NPU out of memory. Tried to allocate 512.00 MiB (NPU 0; 60.97 GiB"), "536.9 MB more were asked for"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "0.0 MB more"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9000000000 bytes."), "9.0 GB more"),
    (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), ""),
    (RuntimeError("std::bad_alloc"), ""),
    (RuntimeError("could not create a primitive"), ""),
    (RuntimeError("EL0004: Failed to allocate memory, error code is 207001"), ""),
    (RuntimeError("can't start new thread"), "no memory, or no process"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    (ImportError("libtorch.so: failed to map segment from shared object"), ""),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),  # aarch64: an order of imports
    InputError("prompt 1: 'out of memory' is too long"),
    KeyError("out of memory"),
]


@pytest.mark.parametrize(("error", "words"), REFUSED, ids=lambda x: type(x).__name__)
def test_a_refusal_is_recognised(error, words):
    assert out_of_memory.told(error).startswith(words)
    assert bool(words) == bool(out_of_memory.told(error))
    assert out_of_memory.line(error).startswith("out of memory")


@pytest.mark.parametrize("error", OTHERS, ids=lambda x: type(x).__name__)
def test_another_error_is_none(error):
    assert out_of_memory.told(error) is None
    assert out_of_memory.line(error) is None


def test_what_was_made_of_a_refusal_is_one():
    def fail(between, cause):
        try:
            try:
                raise MemoryError
            except MemoryError as error:
                raise between from (error if cause else None)
        except type(between) as error:
            return error

    assert out_of_memory.told(fail(InputError("m.safetensors cannot be read"), True)) == ""
    assert out_of_memory.told(fail(KeyError("x"), False)) == ""
    circle = KeyError("a")
    circle.__cause__ = KeyError("b")
    circle.__cause__.__context__ = circle
    assert out_of_memory.told(circle) is None


@pytest.mark.parametrize("error", [MemoryError(), InputError("a file cannot be read"), OutOfMemory("out of memory: x")])
def test_a_command_ends_with_a_line(error, capsys):
    def main(argv):
        raise error from (MemoryError() if isinstance(error, InputError) else None)

    with pytest.raises(SystemExit) as ended:
        entry.run(main)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith("error: out of memory: ")


def test_a_command_names_its_flags():
    @memory.lowered_by("lower --batch")
    def main(error):
        raise error

    for _ in range(2):
        with pytest.raises(OutOfMemory, match=r"^out of memory \(9.0 MB more were asked for\): lower --batch$"):
            main(RuntimeError("can't allocate memory: you tried to allocate 9000000 bytes"))
    with pytest.raises(InputError, match=r"^a mistake$"):
        main(InputError("a mistake"))


def test_a_file_takes_no_more_memory_than_it_has(tmp_path):
    (tmp_path / "small").write_bytes(b"abc")
    assert reading.contents(tmp_path / "small", sys.maxsize // 2) == b"abc"


def test_a_group_leaves_the_least_of_its_own_and_of_those_around_it(tmp_path):
    def group(folder, names, limit, use, cache):
        (tmp_path / folder).mkdir(parents=True)
        for name, value in zip((*names, "memory.stat"), (limit, use, cache), strict=True):
            (tmp_path / folder / name).write_text(f"{value}\n")

    names = {version: (limit, use) for version, limit, use, _ in memory.VERSIONS}
    group("m/a/b", names[""], "max", 10, "inactive_file 1")
    (tmp_path / "m/a").joinpath("memory.max").write_text("100\n")
    (tmp_path / "m/a").joinpath("memory.current").write_text("70\n")
    (tmp_path / "m/a").joinpath("memory.stat").write_text("anon 1\ninactive_file 5\n")
    group("m/memory", names["memory"], 1000, 1200, "inactive_file 500\ntotal_inactive_file 50")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("4:cpu,memory:/not/seen/from/inside\n3:cpuset:/x\n0::/a/b\n")
    assert list(memory._in_cgroups(tmp_path, tmp_path / "m")) == [35, 0]
    assert list(memory._in_cgroups(tmp_path / "nothing", tmp_path)) == []


def test_processes_share_what_is_free(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_available", lambda proc: 1200)
    monkeypatch.setattr(memory, "_in_cgroups", lambda *_: iter([900]))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert memory.free(cpu) == 900
    assert memory.free(cpu, 4) == 225


def test_a_device_tells_what_is_free(monkeypatch):
    module = type("module", (), {"mem_get_info": staticmethod(lambda device: (device.index, 64))})
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert memory.free(torch.device("cuda:7"), 8) == 7


@pytest.mark.parametrize(
    ("setup", "ways"),
    [
        (Setup(micro_batch=4), "lower --micro-batch, or give --remat all"),
        (Setup(micro_batch=4, remat=True), "lower --micro-batch"),
        (Setup(devices=2, strategy="no"), "give --remat all, or give --strategy fsdp"),
        (Setup(devices=2, remat=True), memory.SHARED),
    ],
)
def test_ways_are_those_that_are_left_and_lower_the_peak(setup, ways):
    assert memory.ways(LUMINA_7B, setup) == ways


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Items of 290 tokens for the demo's model."""
    known, rng = prompt.load_tokenizer(LM), np.random.default_rng(0)
    pictures = [rng.integers(0, known.ids.codes, (16, 16)) for _ in range(MANY)]
    made = [shards.Feature(i, data.text_ids(known, f"picture {i}", x, True), x) for i, x in enumerate(pictures)]
    folder = tmp_path_factory.mktemp("memory") / "features"
    folder.mkdir()
    shards.write_features(folder, made, shards.Origin(128, 0, known.ids, known.fingerprint, "vq"))
    return folder


def argv(features: Path, out: Path, *flags) -> list[str]:
    return [*map(str, ("--model", LM, "--features", features, "--out", out, *COMMON, *flags))]


def room(features: Path, out: Path, *flags, world: World = ALONE) -> memory.Room:
    run = parse(Settings, None, argv(features, out, *flags))
    longest = int(data.FeatureSet(features).lengths().max())
    cfg = checkpoint.read_config(LM)
    return memory.room(run, world, replace(cfg, masked_ids=()), longest, torch.device("cpu"), torch.float32)


# Runs a finetune as its command does, with 0.8 GB more than its imports took; without flags, that on stdin without a limit first.
LIMITED = """
import json, resource, sys
from pathlib import Path
from experiments import finetune
from experiments.finetuning import loop
from experiments.launching import processes
from experiments.planning import memory
from experiments.launching import start
from lumina_fn.state import orbax_bridge
orbax_bridge.load()
processes.reset_peak()
before = processes.resident()
if len(sys.argv) == 1:
    argv = json.loads(sys.stdin.read())
    assert finetune.main(argv) == 0
    peak = processes.peak()
limit = memory._kilobytes(memory.PROC / "self/status", "VmSize") + 800_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
if len(sys.argv) == 1:
    import torch
    print(json.dumps([before, peak, memory.free(torch.device("cpu")), memory.free(torch.device("cpu"), 4)]))
else:
    start.run(finetune.main)
"""


def limited(*words: str, given: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, *words], cwd=ROOT, capture_output=True, text=True, input=given,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def test_a_run_that_is_refused_memory_ends_with_a_line_and_goes_on_from_its_checkpoint(features, tmp_path):
    out = tmp_path / "run"
    assert finetune.main(argv(features, out, "--steps", 1, "--micro-batch", 8)) == 0
    ended = limited(*argv(features, out, "--steps", 2, "--micro-batch", MANY, "--remat", 0))
    assert ended.returncode == 1, ended.stderr
    takes = out_of_memory.size(room(features, out, "--micro-batch", MANY, "--remat", 0).needed)
    note, on, line = ended.stderr.splitlines()
    assert note.startswith(f"note: a step is predicted to need {takes} (plan), ")
    assert " are free: lower --micro-ba" in note
    assert on == "going on after step 1"
    assert line.startswith("error: out of memory in step 2 (")
    assert " MB more were asked for): " in line
    assert f" of --micro-batch {MANY} needs about {takes} (plan), " in line
    assert line.endswith(" were free: lower --micro-batch, or give --remat all")
    assert manifest.newest_good(out / "checkpoints") == 1
    assert finetune.main(argv(features, out, "--steps", 2, "--micro-batch", 8)) == 0
    assert manifest.newest_good(out / "checkpoints") == 2


def test_what_is_predicted_is_what_a_run_takes_and_what_is_free_is_below_the_limit(features, tmp_path):
    flags = ("--steps", 1, "--micro-batch", MANY, "--save-every", 0)
    done = limited(given=json.dumps(argv(features, tmp_path / "run", *flags)))
    assert done.returncode == 0, done.stderr
    before, peak, free, quarter = json.loads(done.stdout.splitlines()[-1])
    assert room(features, tmp_path / "run", *flags).needed == pytest.approx(peak - before, rel=0.3)
    assert 0.7e9 < free <= 0.8e9
    assert quarter > 0.7e9


def test_room_is_what_the_plan_says(features, tmp_path, monkeypatch):
    """Of a rank's share, in rows as long as the longest; compiled blocks are traced where they may not fit."""
    monkeypatch.setattr(memory, "free", lambda device, processes: 4 * 10**9 // processes)
    flags = ("--micro-batch", 24, "--remat", "all", "--reduce-dtype", "bfloat16", "--no-sync")
    found = room(features, tmp_path, *flags, world=World(0, 4, 0, 2))
    expected = Setup(
        4, "fsdp", 2, 320, 6, 1, remat=6, reduce_dtype=torch.bfloat16, sync=False, compiled=False, cpu=True
    )
    assert found.setup == expected
    assert found.free == 2 * 10**9
    assert room(features, tmp_path, "--pack", 1000).setup.tokens == 1000
    assert room(features, tmp_path, "--pack", 8).setup.tokens == data.FeatureSet(features).lengths().max()  # rows grow
    cfg = checkpoint.read_config(LM)
    compiled = replace(expected, devices=1, compiled=True)
    exact, eager = (footprint.peak(cfg, replace(compiled, compiled=c)) for c in (True, False))
    assert exact != eager
    assert memory.Room(cfg, compiled, 1).needed == exact
    assert memory.Room(cfg, compiled, 10**12).needed == eager
    needed = memory.Room(cfg, expected, None).needed
    for free, fits in ((None, True), (10**12, True), (needed, True), (needed - 1, False)):
        assert (memory.Room(cfg, expected, free).note() is None) is fits


def test_a_step_that_surely_fits_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(footprint, "peak", None)
    assert memory.Room(checkpoint.read_config(LM), Setup(cpu=True), 10**12).note() is None


def test_a_checkpoint_that_is_being_written_is_finished_first(features, tmp_path, monkeypatch):
    """Of the first step, that a wait in the saving thread holds up, while the second is refused memory."""
    import time

    make, taken = loop.train.make_train_step, []

    def refusing(*args, **kw):
        step = make(*args, **kw)

        def second_fails(state, batch):
            taken.append(1)
            if len(taken) == 2:
                raise RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB")
            return step(state, batch)

        return second_fails

    monkeypatch.setattr(loop.train, "make_train_step", refusing)
    monkeypatch.setattr(World, "background_barrier", lambda self: lambda: time.sleep(0.5))
    out = tmp_path / "run"
    with pytest.raises(OutOfMemory, match=r"^out of memory in step 2 \(2\.1 GB more"):
        finetune.main(argv(features, out, "--steps", 3, "--micro-batch", 8))
    assert manifest.newest_good(out / "checkpoints") == 1


@pytest.mark.parametrize("error", [MemoryError(), InputError("a file cannot be read")])
def test_a_rank_says_it_with_its_number(error, monkeypatch):
    class Ended(BaseException):
        pass

    def ending(code, reason):
        raise Ended(code, reason)

    monkeypatch.setattr(distributed, "Ending", lambda *_: ending)
    monkeypatch.setattr(distributed, "watch_launcher", lambda _: None)
    monkeypatch.setattr(distributed, "_join", lambda *_: (ALONE, lambda: None))

    def main(argv, world):
        raise error from (MemoryError() if isinstance(error, InputError) else None)

    here = distributed.Place(0, 1, 0, 1, "", 0, True, True)
    with pytest.raises(Ended) as ended:
        distributed.run_rank(main, here, None)
    assert ended.value.args[0] == 1
    assert ended.value.args[1].startswith("out of memory: ")
