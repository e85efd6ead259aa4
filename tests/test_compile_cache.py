"""A damaged compile cache is emptied, of what Inductor wrote alone, and everything compiled anew, once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumina_fn import compile_cache
from lumina_fn.transform import inductor, jit

CODE = """
import torch
from lumina_fn.transform import inductor, jit
f = jit(lambda x, w: torch.nn.functional.silu(x @ w).sum(0) * 2 + x.amax(), inductor)
print(f(torch.ones(8, 8), torch.full((8, 8), 2.0)).sum().item())
"""


@pytest.mark.slow
def test_a_damaged_cache_is_emptied_and_compiled_anew_once(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))

    def run() -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        )
        return done.stdout, done.stderr

    right, said = run()
    assert said == ""
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
