import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_fn import checkpoint, conversion, convert
from lumina_fn.errors import InputError
from lumina_fn.formats import safe_pickle
from tests.support.folders import (
    SMALL,
    TOKENIZER,
    golden,
    identical,
    parameters,
    read_hf,
    small_state,
    write_hf,
    write_mindspeed,
)
from tests.support.paths import ROOT

TO = conversion.WRITERS


def command(*argv: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "lumina_fn.convert", *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def refused(*argv: object) -> str:
    with pytest.raises(InputError) as error:
        convert.main([str(a) for a in argv])
    return str(error.value)


def source(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    write_hf(folder, small_state(dtype), SMALL | config, shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    (folder / "generation_config.json").write_text('{"top_k": 5}')
    (folder / "run_me.py").write_text("")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["native", "mindspeed", "native mindspeed", "mindspeed native"])
def test_there_and_back_is_the_identity(tmp_path, dtype, way):
    here = first = source(tmp_path / "first", dtype)
    for i, to in enumerate([*way.split(), "hf"]):
        conversion.convert(here, tmp_path / str(i), TO[to])
        here = tmp_path / str(i)
    assert identical(read_hf(here), small_state(dtype))
    assert json.loads((here / "config.json").read_text()) == json.loads((first / "config.json").read_text())
    index = json.loads((here / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == small_state().keys()
    assert all((here / file).is_file() for file in index["weight_map"].values())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (here / name).read_bytes() == (first / name).read_bytes()
    assert not (here / "run_me.py").exists()


def test_mixed_dtypes_are_kept(tmp_path):
    state = small_state()
    state["lm_head.weight"] = state["lm_head.weight"].float()
    conversion.convert(write_hf(tmp_path / "a", state, SMALL), tmp_path / "b", TO["native"])
    conversion.convert(tmp_path / "b", tmp_path / "c", TO["mindspeed"])
    conversion.convert(tmp_path / "c", tmp_path / "d", TO["hf"])
    assert identical(read_hf(tmp_path / "d"), state)


def test_a_mindspeed_folder_is_what_torch_and_mindspeed_read(tmp_path):
    conversion.convert(source(tmp_path / "a"), tmp_path / "b", TO["mindspeed"])
    assert (tmp_path / "b" / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    file = tmp_path / "b" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    for mmap in (True, False):
        loaded = torch.load(file, weights_only=True, mmap=mmap)
        assert list(loaded) == ["model"]
        assert identical(loaded["model"], small_state())
        assert not mmap or all(t.data_ptr() % 64 == 0 for t in loaded["model"].values())
    assert zipfile.ZipFile(file).testzip() is None


def test_a_mindspeed_checkpoint_with_megatron_arguments_is_read(tmp_path):
    state = {key: torch.nn.Parameter(t) for key, t in small_state().items()}
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous().T  # stored column by column
    args = argparse.Namespace(path=Path("/"), dtype=torch.bfloat16, nested={(1, 2): {3}})
    folder = write_mindspeed(tmp_path / "m", state, args=args, iteration=5, rng_state=[{"a": b"bytes"}])
    conversion.convert(folder, tmp_path / "hf", TO["hf"])
    assert identical(read_hf(tmp_path / "hf"), small_state())


def test_a_model_without_a_hugging_face_config_gets_one(tmp_path):
    conversion.convert(source(tmp_path / "a"), tmp_path / "n", TO["native"])
    file = tmp_path / "n" / "config.json"
    native = json.loads(file.read_text())
    native["model"]["masked_ids"] = [3, 5]
    native["ids"] = {"start": 1, "end": 2, "newline": 3, "sep": 4, "size0": 5, "code0": 10, "codes": 16}
    for config in (None, SMALL):  # none, and one that describes another model
        file.write_text(json.dumps(native | {"source_config": config}))
        conversion.convert(tmp_path / "n", tmp_path / "hf", TO["hf"], overwrite=True)
        assert checkpoint.load_model(tmp_path / "hf")[1] == checkpoint.load_model(tmp_path / "n")[1]


def test_a_movqgan_checkpoint_becomes_a_native_folder_only(tmp_path):
    state = parameters(golden("m2_small_ch32_122")[0])
    torch.save(
        {"state_dict": state | {"loss.weight": torch.zeros(1)}, "hyper_parameters": argparse.Namespace(a=1)},
        tmp_path / "m.ckpt",
    )
    code, out, _ = command(tmp_path / "m.ckpt", tmp_path / "n", "--to", "native")
    assert code == 0
    assert "loss.weight" in out
    params, _ = checkpoint.load_vq(tmp_path / "n", dtype=torch.bfloat16)
    assert torch.equal(params.codebook, state["quantize.embedding.weight"])
    assert "--to native" in refused(tmp_path / "m.ckpt", tmp_path / "h", "--to", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.ckpt", "n"]


def test_the_command_says_what_it_did_and_what_it_ignored(tmp_path):
    state = small_state() | {"model.vqmodel.[red]\x1b[31mx": torch.zeros(2)}
    code, out, err = command(write_hf(tmp_path / "a", state, SMALL), tmp_path / "b", "--to", "native")
    assert (code, err) == (0, "")
    assert "model.vqmodel.[red]\\x1b[31mx" in out
    assert str(tmp_path / "b") in out


def test_user_mistakes_are_one_line_and_write_nothing(tmp_path):
    a = source(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = command(a, tmp_path / "there", "--to", "native")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'there'} exists: give a new place, or --overwrite to replace it\n"
    assert "--overwrite" in refused(a, tmp_path / "there", "--to", "native")
    assert "which this run reads" in refused(a, tmp_path, "--to", "native", "--overwrite")
    assert "loop" in refused(a, tmp_path / "loop" / "x", "--to", "native")
    assert "expected" in refused(tmp_path / "empty", tmp_path / "b", "--to", "native")
    assert "does not exist" in refused(tmp_path / "nowhere", tmp_path / "b", "--to", "native")
    assert "--to" in refused(a, tmp_path / "b")
    assert "invalid choice" in refused(a, tmp_path / "b", "--to", "onnx")
    assert "cannot write" in refused(a, a / "config.json" / "b", "--to", "native")
    with (a / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "model-00001-of-00002.safetensors" in refused(a, tmp_path / "b", "--to", "native")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    a = source(tmp_path / "a")
    (tmp_path / "secret").write_text("{}")
    (a / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"vocab\.json"):
        conversion.convert(a, tmp_path / "b", TO["native"])
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["checkpoint.copy_companions", "files.sync"])
def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path, stop):
    """The process dies after all the weights are written, or after everything but the final rename."""
    a = source(tmp_path / "a")
    code = (
        "import os, sys, threading, time\nfrom lumina_fn import checkpoint, conversion, convert\nfrom lumina_fn.disk import files\n"
        f"def hang(*_): os.write(1, b'.'); time.sleep(60)\n{stop} = hang\n"
        "for to, write in conversion.WRITERS.items():\n"
        "  threading.Thread(target=conversion.convert, args=(sys.argv[1], f'{sys.argv[2]}/{to}', write)).start()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(a), str(tmp_path / "out")], stdout=subprocess.PIPE, cwd=ROOT
    ) as child:
        for _ in TO:
            assert child.stdout.read(1) == b"."
        child.send_signal(signal.SIGKILL)
    rest = list((tmp_path / "out").iterdir())
    assert len(rest) == len(TO)
    assert all(path.name.startswith(".") for path in rest)
    for path in [*rest, *(tmp_path / "out" / to for to in TO)] if stop != "files.sync" else []:
        with pytest.raises(InputError):
            checkpoint.load_model(path)
    for to, write in TO.items():
        conversion.convert(a, tmp_path / "out" / to, write)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(TO)


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


class Stateful:
    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        raise AssertionError("a stranger's code ran")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_that_would_run_a_command_only_gives_its_tensors(tmp_path, protocol):
    Evil.mark = tmp_path / "ran"
    state = parameters(golden("m2_small_ch32_122")[0])
    evil = {"state_dict": state, "hyper_parameters": Evil(), "callbacks": {Evil: Evil()}, "loops": Stateful()}
    torch.save(evil, tmp_path / "m.ckpt", pickle_protocol=protocol)
    params, _ = checkpoint.load_vq(tmp_path / "m.ckpt", dtype=torch.bfloat16)
    assert torch.equal(params.codebook, state["quantize.embedding.weight"])
    assert not Evil.mark.exists()
    torch.save(Evil(), tmp_path / "m.ckpt", pickle_protocol=protocol)
    with pytest.raises(InputError, match=r"m\.ckpt"):
        checkpoint.load_vq(tmp_path / "m.ckpt")
    assert not Evil.mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cposix\nsystem\n(S'touch ran'\ntR.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.",  # STACK_GLOBAL
        b"(S'touch ran'\niposix\nsystem\n.",  # INST
        b"(cposix\nsystem\nS'touch ran'\no.",  # OBJ
        b"cposix\nsystem\n(S'touch ran'\nt\x81.",  # NEWOBJ
        b"cposix\nsystem\n(S'touch ran'\nt}\x92.",  # NEWOBJ_EX
        b"cbuiltins\ngetattr\n(cos\nstr\nS'system'\ntR(S'touch ran'\ntR.",  # a call of what a call gave
        b"ccollections\nOrderedDict\n}S'__setstate__'\ncposix\nsystem\nsbS'touch ran'\nb.",  # BUILD on a class
        b"ccollections\nOrderedDict\n)RN}S'__class__'\ncposix\nsystem\ns\x86b.",  # BUILD with slots
        b"\x82\x01(S'touch ran'\ntR.",  # EXT1
        b"Pwhatever\n.",
        b"(S'storage'\nctorch\nsystem\nS'0'\nS'cpu'\nK\x01tQ.",
    ],
)
def test_no_program_of_a_pickle_does_anything(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    value = safe_pickle.loads(program)
    assert type(value) in (safe_pickle.Inert, safe_pickle.Global, safe_pickle.StorageRef, dict)
    assert not (tmp_path / "ran").exists()
    assert set(sys.modules) == before


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8))
def test_a_damaged_pickle_is_a_value_error_at_worst(protocol, changes):
    data = bytearray(
        pickle.dumps({"a": [1, (2.5, None)], "n": argparse.Namespace(z={3}), "f": frozenset([b"x"])}, protocol=protocol)
    )
    for place, byte in changes:
        data[place % len(data)] = byte
    with suppress(ValueError):
        safe_pickle.loads(bytes(data))


@pytest.mark.parametrize(
    "program",
    [
        b"Nr\xff\xff\xff\xffe.",  # LONG_BINPUT: a memo as long as its largest index would take 64 GB
        b"(" * 100_000 + b".",
        b"]" + b"]" * 50_000 + b"a" * 50_000 + b"e.",
        b"\x8e" + (1 << 62).to_bytes(8, "little") + b"x.",  # BINBYTES8 of 4 EB
        b"\x8b\xff\xff\xff\x7f1.",  # LONG4
        b"N" * (safe_pickle.MAX_OPS + 2) + b".",
        b"N" * (safe_pickle.MAX_BYTES + 1),
        b"",
        b"N",
        b".",
        b"0.",
        b"e.",
    ],
)
def test_bombs_and_nonsense_in_a_pickle_are_refused(program):
    with pytest.raises(ValueError, match=r"^.{5,200}$"):
        safe_pickle.loads(program)


def rewritten(file: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace a torch file's members by what `change(name, data)` makes of them."""
    with zipfile.ZipFile(file) as old:
        members = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, data in members.items():
            new.writestr(name, data)


def test_bombs_and_damage_in_a_zip_are_refused(tmp_path):
    state = parameters(golden("m2_small_ch32_122")[0])
    file = tmp_path / "m.ckpt"

    def refuses(text: str) -> None:
        with pytest.raises(InputError, match=text) as error:
            checkpoint.load_vq(file)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)

    def saved() -> None:
        torch.save(state, file)

    saved()
    rewritten(file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    refuses("compressed")
    saved()
    rewritten(file, lambda name, data: bytes(len(data)) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED)
    refuses("compressed")
    saved()
    rewritten(file, lambda name, data: data + bytes(9 << 20) if name.endswith("data.pkl") else data)
    refuses("bytes")
    saved()
    rewritten(file, lambda name, data: data[: len(data) // 2] if name.endswith("data/0") else data)
    refuses("larger than its storage")
    saved()
    rewritten(file, lambda name, data: b"big" if name.endswith("byteorder") else data)
    refuses("little endian")
    saved()
    file.write_bytes(file.read_bytes()[:-1000])
    refuses("torch file")
    saved()
    data = bytearray(file.read_bytes())
    codebook = data.index(bytes(state["quantize.embedding.weight"].view(torch.uint8).flatten().tolist()))
    data[codebook + 5] ^= 1
    file.write_bytes(data)
    refuses("damaged")
    torch.save(state, file, _use_new_zipfile_serialization=False)
    refuses("torch < 1.6")
    file.write_bytes(b"")
    refuses("torch file")
    wide = torch.zeros(1).as_strided((1 << 40,), (0,))
    torch.save({"quant_conv.bias": wide}, file)
    refuses("larger than its storage")
    one = torch.zeros(1 << 16)
    torch.save({str(i): one for i in range(50)}, file)
    refuses("more bytes")
