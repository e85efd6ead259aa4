"""The command: prompts in, a folder of pictures out; and what it says to bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from PIL import Image

from experiments import sample as command
from lumina_fn import checkpoint, model, prompt, sample, vq
from lumina_fn.config import ModelConfig, VQConfig
from lumina_fn.process import entry
from tests.support import folders

CODES = 64
VQ = VQConfig(channels=8, multipliers=(1, 1, 1, 1), res_blocks=1, codes=CODES, groups=4)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A tokenizer's folder and its ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, folders.write_tokenizer(folder, CODES)


def save_lm(path, tokens, **changes):
    folder, ids = tokens
    sizes = {
        "vocab": ids.code0 + CODES,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "hidden": 24,
        "max_positions": 160,
    }
    cfg = ModelConfig(**(sizes | {"ids": ids} | changes))
    checkpoint.save_model(path, pytree.tree_map(lambda t: t * 10, model.init(cfg)), cfg, source=folder)
    return path


def save_vq(path, **changes):
    cfg = VQConfig(**(vars(VQ) | changes))
    checkpoint.save_vq(path, vq.init(cfg), cfg)
    return path


@pytest.fixture(scope="module")
def lm(tokens, tmp_path_factory):
    return save_lm(tmp_path_factory.mktemp("lm") / "lm", tokens)


@pytest.fixture(scope="module")
def small_vq(tmp_path_factory):
    return save_vq(tmp_path_factory.mktemp("vq") / "vq")


@pytest.fixture
def call(tmp_path, lm, small_vq, monkeypatch, capsys):
    """Run the command in this process: exit code and the lines on stderr."""

    def call(*flags, out=tmp_path / "out", model=lm, vq=small_vq, width=32, height=64):
        argv = [
            "--model",
            model,
            "--vq",
            vq,
            "--out",
            out,
            "--width",
            width,
            "--height",
            height,
            "--device",
            "cpu",
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            entry.run(command.main)
        return ended.value.code, capsys.readouterr().err.splitlines()

    return call


def lines(tmp_path, *prompts, name="prompts.txt"):
    (tmp_path / name).write_text("\n".join(prompts), encoding="utf-8")
    return tmp_path / name


def test_pictures_are_what_the_model_draws_and_the_vq_decodes(call, tmp_path, lm, small_vq):
    path = lines(tmp_path, "a red circle", "", "ein grüner Kreis [bold]x[/bold]")
    assert call("--prompts", path, "--n", 2, "--batch", 3, "--seed", 5, "--guidance", 2, "--min-p", 0.05) == (0, [])
    about = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(a["file"], a["prompt_index"], a["picture_index"]) for a in about] == [
        ("0000_00.png", 0, 0), ("0000_01.png", 0, 1), ("0001_00.png", 1, 0), ("0001_01.png", 1, 1),
    ]  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {a["file"] for a in about} | {
        "samples.jsonl",
        ".lumina.json",
    }
    (params, cfg), (vq_params, vq_cfg) = checkpoint.load_model(lm), checkpoint.load_vq(small_vq)
    tokenizer = prompt.load_tokenizer(lm)
    for a in about:
        codes = sample.generate(
            params, prompt.prompt_ids(tokenizer, a["prompt"], 32, 64), cfg, height=64, width=32, guidance=2.0, min_p=0.05,
            seed=5, index=(a["prompt_index"], a["picture_index"]),
        )  # fmt: skip
        image = ((vq.decode(vq_params, codes[None], vq_cfg)[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0)
        with Image.open(tmp_path / "out" / a["file"]) as picture:
            assert (picture.size, picture.mode) == ((32, 64), "RGB")
            assert np.abs(np.asarray(picture, dtype=float) - image.numpy()).max() <= 1  # convolutions of another batch


def test_the_same_seed_gives_the_same_files(call, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("--prompt", "a cat", "--seed", seed, out=tmp_path / out) == (0, [])
    files = [(tmp_path / out / "0000_00.png").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_compiled_block_changes_no_picture(call, tmp_path):
    for out, compiled in (("a", "off"), ("b", "blocks")):
        assert call("--prompt", "a cat", "--compile", compiled, out=tmp_path / out) == (0, [])
    files = [(tmp_path / out / "0000_00.png").read_bytes() for out in "ab"]
    assert files[0] == files[1]


def test_the_reference_schedule_and_greedy(call, tmp_path):
    greedy = ("--prompt", "a cat", "--temperature", 0, "--top-k", 40)
    assert call(*greedy, "--guidance", 2, "--guidance-schedule", "reference", out=tmp_path / "a") == (0, [])
    assert call(*greedy, "--guidance", 4, out=tmp_path / "b") == (0, [])
    assert (tmp_path / "a" / "0000_00.png").read_bytes() == (tmp_path / "b" / "0000_00.png").read_bytes()


def test_a_vq_with_fewer_codes_than_the_model_s_ids_draws_its_own(call, tmp_path):
    code, (note,) = call("--prompt", "a cat", vq=save_vq(tmp_path / "vq", codes=20))
    assert code == 0
    assert "20 codes" in note
    assert str(CODES) in note


def test_a_model_that_masks_image_ids_still_draws(call, tmp_path, tokens):
    masked = save_lm(tmp_path / "lm", tokens, masked_ids=tuple(range(tokens[1].code0, tokens[1].code0 + CODES)))
    assert call("--prompt", "a cat", out=tmp_path / "a", model=masked) == (0, [])
    assert call("--prompt", "a cat", out=tmp_path / "b") == (0, [])
    assert (tmp_path / "a" / "0000_00.png").read_bytes() == (tmp_path / "b" / "0000_00.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "either --prompt TEXT or --prompts FILE"),
        (("--prompt", "a", "--prompts", "b"), "either --prompt TEXT or --prompts FILE"),
        (("--prompt", "  "), "no prompt in it"),
        (("--prompts", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--prompt", "a <eoss> b"), "prompt 1: the prompt holds the control token <eoss>"),
        (("--prompt", "word " * 500), "longer than the model's context"),
        (("--prompt", "a", "--width", 40), "width 40"),
        (("--prompt", "a", "--height", 0), "height 0"),
        (("--prompt", "a", "--width", 4096), "width 4096"),
        (("--prompt", "a", "--width", "wide"), "--width"),
        (("--prompt", "a", "--n", 0), "n 0"),
        (("--prompt", "a", "--batch", 0), "batch 0"),
        (("--prompt", "a", "--guidance", "nan"), "guidance nan"),
        (("--prompt", "a", "--guidance-schedule", "other"), "guidance-schedule"),
        (("--prompt", "a", "--top-k", 0), "--top-k 0"),
        (("--prompt", "a", "--temperature", -1), "temperature -1"),
        (("--prompt", "a", "--min-p", 1), "min_p 1"),
        (("--prompt", "a", "--device", "toaster"), "--device toaster"),
        (("--prompt", "a", "--model", "/nowhere"), "/nowhere"),
        (("--prompt", "a", "--vq", "/nowhere"), "/nowhere"),
    ],
    ids=str,
)
def test_bad_calls_exit_2_with_one_line(call, tmp_path, flags, said):
    code, (line,) = call(*flags)
    assert code == 2
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_bad_files_and_folders_exit_2(call, tmp_path, tokens, lm, small_vq):
    def refused(*flags, **places):
        code, (line,) = call(*flags, **places)
        assert code == 2
        assert not (tmp_path / "out").exists()
        return line

    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    assert "not UTF-8" in refused("--prompts", tmp_path / "latin.txt")
    assert "no prompt in it" in refused("--prompts", lines(tmp_path, "", " "))
    assert "prompt 2: " in refused("--prompts", lines(tmp_path, "a", "<reserved08801>"))
    assert "expected a MoVQGAN" in refused("--prompt", "a", vq=lm)
    assert "1 pixels" in refused("--prompt", "a", vq=save_vq(tmp_path / "flat", multipliers=(1,), attn_levels=()))
    short = save_lm(tmp_path / "short", tokens, vocab=tokens[1].code0 + CODES - 1)
    assert f"is not below {tokens[1].code0 + CODES - 1}" in refused("--prompt", "a", model=short)


def test_an_existing_folder_is_kept_unless_told(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, (line,) = call("--prompt", "a")
    assert (code, (tmp_path / "out" / "mine").read_text()) == (2, "x")
    assert "--overwrite" in line
    code, (line,) = call("--prompt", "a", "--overwrite")
    assert (code, (tmp_path / "out" / "mine").read_text()) == (2, "x")
    assert "holds mine" in line
    (tmp_path / "out" / "mine").unlink()
    assert call("--prompt", "a", "--overwrite") == (0, [])
    assert call("--prompt", "b", "--overwrite") == (0, [])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0000_00.png", "samples.jsonl", ".lumina.json"}


def test_overwrite_never_removes_what_is_read(call, tmp_path, lm):
    prompts = lines(tmp_path, "a")
    for out, flags in ((lm, ("--prompt", "a")), (tmp_path, ("--prompts", prompts))):
        code, (line,) = call(*flags, "--overwrite", out=out)
        assert code == 2
        assert "which this run reads" in line
    assert prompts.exists()


def test_escapes_in_a_prompt_reach_no_terminal(call, tmp_path, capsys):
    assert call("--prompt", "a \x1b[31mred\x1b[0m cat [link=x]") == (0, [])
    code, (line,) = call("--prompt", "a", out=tmp_path / "\x1b[2Jout", vq="/no\x1b[2Jwhere")
    assert code == 2
    assert "\x1b" not in line


def test_runs_as_a_module(tmp_path, lm, small_vq):
    argv = ["--model", lm, "--vq", small_vq, "--out", tmp_path / "out", "--prompt", "a", "--width", 32, "--height", 32]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sample", *map(str, argv)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"1 picture: {tmp_path / 'out'}\n"


def test_dtypes(call, tmp_path):
    for dtype in ("bfloat16", "float64"):
        assert call("--prompt", "a", "--dtype", dtype, out=tmp_path / dtype) == (0, [])
    assert torch.get_default_dtype() == torch.float32
