"""Programs: reloaded they are the functions they came from, to the bit; for an NPU they hold nothing that it cannot run."""

import json
import re
import subprocess
import sys

import pytest
import torch
import torch.utils._pytree as pytree

from lumina_fn import checkpoint, decode, export, model, train
from lumina_fn.config import ModelConfig
from lumina_fn.errors import InputError
from lumina_fn.programs import folder as program_files
from lumina_fn.programs import graphs
from lumina_fn.sharding import Mesh

CFG = ModelConfig(vocab=61, width=128, layers=2, heads=2, kv_heads=1, hidden=96, max_positions=64)
# torch.export copies trees in a way that torch wants no more, and says of a custom op what is no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(CFG.vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    checkpoint.save_model(path, model.init(CFG, seed=1), CFG)
    return path


def exported(folder, out, *flags: str) -> list[dict]:
    assert export.main([str(folder), str(out), "--target", "cpu", *flags]) == 0
    return json.loads((out / "report.json").read_text())["programs"]


def same(got: dict, want) -> None:
    leaves = pytree.tree_leaves(want)
    assert len(got) == len(leaves)
    for (name, a), b in zip(got.items(), leaves, strict=True):
        assert torch.equal(a, b), name


def test_forward_of_any_length(folder, tmp_path, capsys):
    (told,) = exported(folder, tmp_path / "out", "--what", "forward", "--batch", "2")
    run, params = program_files.load(tmp_path / "out", told["file"]), model.init(CFG, seed=2)
    for length in (2, 7, 64):
        tokens = ids(2, length, seed=length)
        same(run(graphs.ForwardInputs(tokens, params)), model.forward(params, tokens, CFG))
    assert told["parameters"] == sum(x.numel() for x in pytree.tree_leaves(params))
    assert told["ops"]["lumina.attention_fwd.default"] == CFG.layers
    assert told["sizes"] == {told["inputs"][0]["shape"][1]: [2, CFG.max_positions]}
    assert (told["inputs"][1]["name"], told["inputs"][1]["shape"]) == ("params.embed", [CFG.vocab, CFG.width])
    assert "forward-b2.pt2" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
def test_step(folder, tmp_path, packed):
    flags = ("--what", "step", "--batch", "2", "--tokens", "12", "--remat", "all", *["--packed"] * packed)
    (told,) = exported(folder, tmp_path / "out", *flags)
    opt = train.AdamW()
    state = train.init_state(model.init(CFG, seed=3), opt)
    first = torch.tensor([[0] * 5 + [5] * 7, [0] * 12])
    batch = (
        train.Packed(ids(2, 12), ids(2, 12, seed=1), first) if packed else train.Batch(ids(2, 12), ids(2, 12, seed=1))
    )
    lr = torch.tensor(1e-2)
    got = program_files.load(tmp_path / "out", told["file"])(graphs.StepInputs(state, batch, lr))
    after, metrics = train.make_update(CFG, opt, None, train.Options(remat=True))(state, batch, lr)
    same(got, {"state": after, "metrics": metrics})
    assert not torch.equal(after.params.embed, state.params.embed)
    assert "state.params.blocks.0.q" in got
    # remat: the forward's ops once more in the backward
    kind = "packed_attention" if packed else "attention"
    assert told["ops"][f"lumina.{kind}_fwd.default"] == 2 * told["ops"][f"lumina.{kind}_bwd.default"] == 2 * CFG.layers


def test_decoding(folder, tmp_path):
    (told,) = exported(folder, tmp_path / "out", "--what", "decode", "--batch", "2", "--tokens", "16")
    params = model.init(CFG, seed=4)
    cache = decode.empty_cache(params, CFG, 2, 16)
    decode.prefill(params, [ids(5), ids(3, seed=1)], cache, CFG)
    lengths, tokens = torch.tensor([5, 3]), ids(2, seed=2)
    run = program_files.load(tmp_path / "out", told["file"])
    got = run(graphs.DecodeInputs(tokens, lengths, cache, params))
    logits, new = decode.step(params, tokens, lengths, cache, CFG)
    same(got, {"logits": logits, "cache": new})
    x = decode.extend(params, tokens[:, None], lengths.tolist(), cache, CFG)  # writes over the cache
    torch.testing.assert_close(logits, model.unembed(params.head, x, CFG)[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(new, cache, atol=1e-6, rtol=0)


def test_a_bucket_each(folder, tmp_path):
    told = exported(folder, tmp_path / "out", "--what", "decode", "--batch", "1", "3", "--tokens", "8", "16")
    assert [p["file"] for p in told] == [f"decode-b{b}-s{s}.pt2" for b in (1, 3) for s in (8, 16)]
    assert [p["inputs"][0]["shape"] for p in told] == [[1], [1], [3], [3]]


def test_sharded_step_gathers_each_block_twice():
    mesh = Mesh("0", 0, 8, "meta")
    function = graphs.step(CFG, train.AdamW(), mesh, batch=1, tokens=8)
    counts = [str(n.target) for n in graphs.export(function, graphs.CPU).program.graph.nodes]
    assert counts.count("lumina.all_gather.default") == 2 * CFG.layers + 2
    assert counts.count("lumina.reduce_scatter.default") == CFG.layers + 2


ON_NPU = """if True:
    import sys, torch
    from lumina_fn import export
    from lumina_fn.process import entry
    from lumina_fn.programs import folder, graphs
    from lumina_fn.errors import InputError
    from lumina_fn.programs.graphs import Function
    for what in (["forward"], ["step", "--tokens", "16", "--remat", "all"], ["step", "--tokens", "16", "--packed", "--devices", "8"],
                 ["decode", "--tokens", "16"]):
        assert export.main([sys.argv[1], sys.argv[2] + str(len(what)) + what[0], "--target", "npu", "--what", *what]) == 0
    def unknown(x):
        return x.cummax(0).values
    try:
        graphs.export(Function(unknown, [torch.empty(4, device="meta")]), graphs.NPU)
    except InputError as error:
        print("refused:", error)
    lacking = graphs.NPU._replace(ops=graphs.NPU.ops - {"npu.npu_swiglu.default"})
    folder.TARGETS["npu"] = lacking, torch.bfloat16
    sys.argv[1:] = [sys.argv[1], sys.argv[2] + "lacking", "--target", "npu", "--what", "forward"]
    entry.run(export.main)
"""


@pytest.mark.slow
def test_for_an_npu(folder, tmp_path):
    """In a process of its own: device npu, once declared, stays."""
    command = (sys.executable, "-W", "ignore", "-c", ON_NPU, str(folder), str(tmp_path / "out"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "cummax" in next(line for line in done.stdout.splitlines() if line.startswith("refused"))
    # What is refused is looked for in the model, where it can be written otherwise, and not in the kernel that stands for it.
    assert re.fullmatch(r"error: .* npu\.npu_swiglu\.default \(lumina_fn/\w+\.py:\d+ in \w+\); .*\n", done.stderr), (
        done.stderr
    )
    assert not (tmp_path / "outlacking").exists()
    for out, fused in (
        ("1forward", {"npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_fusion_attention", "npu_swiglu"}),
        ("5step", {"npu_rms_norm_backward", "npu_fusion_attention_grad", "npu_swiglu_backward", "npu_rotary_mul"}),
        ("6step", {"npu_fusion_attention", "npu_fusion_attention_grad"}),
        ("3decode", {"npu_fused_infer_attention_score", "npu_scatter_nd_update"}),
    ):
        (told,) = json.loads((tmp_path / f"out{out}" / "report.json").read_text())["programs"]
        assert {f"npu.{op}.default" for op in fused} <= told["ops"].keys()
        assert not [op for op in told["ops"] if op.startswith("lumina")]
        assert set(told["ops"]) <= graphs.converters()
        if out == "1forward":
            assert told["sizes"] == {told["inputs"][0]["shape"][1]: [2, CFG.max_positions]}
        else:
            assert told["sizes"] == {}
        if out == "6step":
            assert told["ops"]["_c10d_functional.all_gather_into_tensor.default"] == 2 * CFG.layers + 2


@pytest.mark.parametrize(
    ("what", "flags", "named"),
    [
        ("forward", ["--packed", "--devices", "4", "--remat", "all"], "packed"),
        ("forward", ["--tokens", "8"], "tokens"),
        ("decode", ["--devices", "4"], "devices"),
        ("decode", ["--weight-decay", "0.5"], "weight-decay"),
    ],
)
def test_a_flag_of_no_use_is_an_error(what, flags, named, folder, tmp_path):
    with pytest.raises(InputError, match=f"^--{named}: --what {what} does not take it"):
        export.main([str(folder), str(tmp_path / "out"), "--target", "cpu", "--what", what, *flags])
    assert not (tmp_path / "out").exists()


def test_mistakes_have_one_line(folder, tmp_path):
    call = lambda *args: export.main([str(folder), str(tmp_path / "out"), "--target", "cpu", "--what", *args])
    with pytest.raises(InputError, match=r"--tokens 65: .* has 64 positions"):
        call("step", "--tokens", "65")
    with pytest.raises(InputError, match="--batch 0: expected at least 1"):
        call("step", "--batch", "0")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        call("decode", "--tokens", "8")
    assert list((tmp_path / "out").iterdir()) == []
