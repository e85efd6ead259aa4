"""A damaged compile cache is emptied, of what Inductor wrote alone, and everything compiled anew, once.

A library that would end the process, or compute something else, is not loaded.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumina_fn.disk import compile_cache, locks
from lumina_fn.errors import InputError
from lumina_fn.process import startup
from lumina_fn.transform import inductor, jit
from tests.support.paths import ROOT

CODE = """
import torch
from lumina_fn.transform import inductor, jit
f = jit(lambda x, w: torch.nn.functional.silu(x @ w).sum(0) * 2 + x.amax(), inductor)
print(f(torch.ones(8, 8), torch.full((8, 8), 2.0)).sum().item())
"""
KEY = "c" + "a2" * 26
ELF = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"


def run() -> tuple[str, str]:
    """What a process says that compiles a small graph."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout, done.stderr


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def overwritten(data: bytes) -> bytes:
    """Its second tenth, where code and relocations are, is something else."""
    n = len(data) // 10
    return data[:n] + b"\xcc" * n + data[2 * n :]


@pytest.mark.slow
def test_a_library_that_would_crash_is_not_loaded(cache):
    right, _ = run()
    for harm in (overwritten, lambda data: data[: len(data) // 5], lambda data: b""):
        [library] = cache.glob("*/*.main.so")
        library.write_bytes(harm(library.read_bytes()))
        again, said = run()
        assert again == right
        assert said.count("\n") == 1
        assert f"removed, and compiled anew: {library.name}" in said
    assert run() == (right, "")
    for path in cache.glob("*/*.sha256"):  # nobody has loaded it: what was cut is found all the same
        path.unlink()
    library.write_bytes(library.read_bytes()[: -library.stat().st_size // 5])
    assert run()[0] == right


@pytest.mark.slow
def test_a_place_that_is_a_file_keeps_nothing_and_stops_nothing(cache):
    cache.write_text("mine")
    out, said = run()
    assert out
    assert said.count("\n") == 1
    assert f"no compile cache can be kept in {str(cache)!r}" in said
    assert cache.read_text() == "mine"


def test_the_folder_that_pytorch_would_make_is_known():
    assert startup._default_cache() == compile_cache.default_cache_dir()


def test_a_library_is_whole_or_cut():
    whole = ELF.read_bytes()
    assert not compile_cache._is_cut(whole)
    for n in (0, 1, 4, 40, 63, 64, 100, 4096, len(whole) // 2, len(whole) - 1):
        assert compile_cache._is_cut(whole[:n]) == (n == 0 or n >= 4)  # less is no library at all, which nobody loads


@pytest.mark.parametrize("name", [f"ab/{KEY}.main.so", f"q7/{KEY}.so", f"ab/{KEY}.py", "ab/notes.so", f"mine/{KEY}.so"])
@pytest.mark.parametrize("harm", [None, lambda data: data[:-1], overwritten, lambda data: b""])
def test_what_is_not_as_its_seal_says_is_removed(tmp_path, caplog, name, harm: Callable[[bytes], bytes] | None):
    data = Path(compile_cache.__file__).read_bytes()
    path = tmp_path / name
    path.parent.mkdir()
    (tmp_path / "locks").mkdir()
    path.write_bytes(data if harm is None else harm(data))
    seal = compile_cache._seal_of(path)
    seal.write_bytes(compile_cache._hash(data))
    compile_cache._mend(tmp_path)
    removed = harm is not None and KEY in name and "mine" not in name
    assert path.exists() == seal.exists() == (not removed)
    assert [path.name in record.getMessage() for record in caplog.records] == [True] * removed


def test_what_another_process_is_writing_stays(tmp_path, caplog):
    (tmp_path / "ab").mkdir()
    (tmp_path / "locks").mkdir()
    path = tmp_path / "ab" / f"{KEY}.main.so"
    path.write_bytes(b"")
    with (tmp_path / "locks" / f"{KEY}.lock").open("w") as lock:
        assert locks.take(lock.fileno())
        compile_cache._mend(tmp_path)
    assert path.exists()
    assert not caplog.records


def test_another_users_folder_in_tmp_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "default_cache_dir", lambda: str(tmp_path / "torchinductor_me"))
    assert compile_cache._problem(tmp_path / "torchinductor_me") is None
    monkeypatch.setattr(compile_cache.os, "geteuid", lambda: os.getuid() + 1)
    assert compile_cache._problem(tmp_path / "torchinductor_me") == "it is another user's"
    (tmp_path / "chosen").mkdir()
    assert compile_cache._problem(tmp_path / "chosen") is None
    monkeypatch.setattr(compile_cache.os, "access", lambda path, mode: False)
    assert compile_cache._problem(tmp_path / "chosen") == "Permission denied"


def test_no_room_for_compiled_code_is_a_line(monkeypatch):
    def full(graph, examples):
        raise RuntimeError(f"OSError: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}")  # as Inductor says it

    monkeypatch.setattr(compile_cache.torch._inductor, "compile", full)
    with pytest.raises(InputError, match=r"No space left on device.*TORCHINDUCTOR_CACHE_DIR.*--compile off"):
        jit(lambda x: x * 2, inductor)(torch.ones(3))


@pytest.mark.slow
def test_a_damaged_cache_is_emptied_and_compiled_anew_once(cache):
    right, said = run()
    assert said == ""
    for path in cache.glob("*/*.sha256"):
        path.unlink()
    programs = list(cache.glob("*/*.py"))
    assert programs
    for path in programs:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (cache / "thesis.tex").write_text("years")
    (cache / "ab").mkdir(exist_ok=True)
    (cache / "ab" / "notes.py").write_text("mine")
    again, said = run()
    assert again == right
    assert said.count("\n") == 1
    assert "was damaged" in said
    assert run() == (right, "")
    assert [(cache / name).exists() for name in ("thesis.tex", "ab/notes.py")] == [True, True]


def test_an_error_of_the_graph_itself_is_raised(monkeypatch):
    def fails(graph, examples):
        raise RuntimeError("not the cache's fault")

    monkeypatch.setattr(compile_cache.torch._inductor, "compile", fails)
    with pytest.raises(RuntimeError, match="not the cache's fault"):
        jit(lambda x: x * 2, inductor)(torch.ones(3))
