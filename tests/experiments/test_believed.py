"""Nothing wrong is believed: weights that are no numbers, shards that are not what was written, settings that no optimizer survives."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.demo.tasks import LM, VQ
from experiments.finetuning import checks
from experiments.finetuning.settings import Settings
from experiments.sample import Settings as SampleSettings
from lumina_fn import checkpoint, data, train
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.formats import tensor_files
from lumina_fn.process.flags import parse
from lumina_fn.vocab import Ids
from tests.support.small_run import CODES

IDS = Ids(1, 2, 3, 4, 5, 100, CODES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("folder", "load"), [(LM, checkpoint.load_model), (VQ, checkpoint.load_vq)])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, folder, load, bad):
    there = shutil.copytree(folder, tmp_path / "model")
    file = next(there.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, file)
    with pytest.raises(InputError, match=f"{file.name}: {name} holds NaN or infinity"):
        load(there)


def test_a_number_that_is_none_is_found_wherever_it_lies():
    """In every chunk, at its ends too, and in a part of a tensor."""
    n = 3 * tensor_files.CHUNK // 4 + 5
    for at in (0, n // 2, n - 1):
        x = torch.zeros(n)
        x[at] = math.nan
        with pytest.raises(InputError, match="w holds NaN"):
            tensor_files.read(tensor_files.Later((n,), torch.float32, lambda x=x: x), "cpu", torch.float32, "w")
    state = train.TrainState(
        *(torch.tensor(0),),
        {"a": torch.ones(3)},
        {"a": torch.ones(3)},
        {"a": torch.ones(3)},
        torch.tensor(0),
        torch.tensor(0),
    )
    assert train.is_finite(state)
    for tree in ("params", "mu", "nu"):
        assert not train.is_finite(state._replace(**{tree: {"a": torch.tensor([1.0, math.nan, 1.0])}}))


@pytest.fixture
def folder(tmp_path):
    items = [shards.Feature(7 + i, [9] * (3 + i), np.full((8, 4), i % CODES)) for i in range(6)]
    (tmp_path / "set").mkdir()
    shards.write_features(tmp_path / "set", items, shards.Origin(64, 0, IDS, "t", "v"))
    return tmp_path / "set"


def shard_of(folder):
    return next(folder.glob("features-0*.safetensors"))


def test_any_flipped_bit_of_a_shard_is_told_with_its_file(folder):
    file = shard_of(folder)
    content = file.read_bytes()
    for place in range(0, len(content), 37):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=file.name):
            data.FeatureSet(folder)[0]
    file.write_bytes(content)
    assert len(list(data.FeatureSet(folder))) == 6


def test_a_shard_that_changes_while_it_is_in_use(folder):
    features, file = data.FeatureSet(folder), shard_of(folder)
    first, content = features[0], file.read_bytes()
    with file.open("r+b") as opened:  # the same inode: mapped pages would be zeros, or a signal
        opened.truncate(len(content) // 2)
    with pytest.raises(InputError, match=file.name):
        features[5]
    file.write_bytes(content)
    assert features[0] == first
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file)
    with pytest.raises(InputError, match="checksum"):
        features[0]


def test_ids_that_a_set_has_not_name_the_shard_and_the_row(folder):
    """With every checksum right, as somebody makes it who knows how."""
    index = json.loads((folder / "features.json").read_text())
    index["origin"]["ids"]["codes"] = 3
    (folder / "features.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"{shard_of(folder).name}: row 10 holds ids that its set has not"):
        data.FeatureSet(folder)[3]
    index["origin"]["ids"]["codes"], index["largest_id"] = CODES, 8
    (folder / "features.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="row 7 holds ids"):
        data.FeatureSet(folder)[0]
    features = data.FeatureSet(folder)
    features.largest_id = 10**6
    assert features.where(IDS.code0 + 2) == f"row 9 in {shard_of(folder).name}"


def test_a_set_without_checksums_is_read(folder):
    index = json.loads((folder / "features.json").read_text())
    for entry in index["shards"]:
        del entry["sha256"]
    (folder / "features.json").write_text(json.dumps(index))
    features = data.FeatureSet(folder)
    assert (features.unchecked(), len(list(features)), list(features.damaged())) == (1, 6, [])


HERE = ("--model", "m", "--features", "f", "--out", "o")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", "1e38"), "--lr 1e+38: expected at most 1"),
        (("--lr", "0"), "--lr 0.0: expected more than 0"),
        (("--lr", "nan"), "--lr nan: expected more than 0"),
        (("--lr", "inf"), "--lr inf: expected at most 1"),
        (("--weight-decay", "1e308"), "--weight-decay 1e+308: expected at most"),
        (("--weight-decay", "nan"), "--weight-decay nan"),
        (("--z-weight", "1e308"), "--z-weight 1e+308: expected at most 1"),
        (("--clip", "nan"), "--clip nan: expected more than 0"),
        (("--batch", "1000000000"), "--batch 1000000000: expected at most 1048576"),
        (("--micro-batch", "0"), "--micro-batch 0: expected at least 1"),
        (("--caption-drop", "1.5"), "--caption-drop 1.5: expected at most 1"),
        (("--steps", str(10**18)), "expected at most 1000000000"),
        (("--seed", str(10**30)), "--seed"),
        (("--keep", "0"), "--keep 0: expected at least 1"),
    ],
)
def test_settings_have_ranges(flags, said):
    with pytest.raises(InputError) as error:
        parse(Settings, None, [*HERE, *flags])
    assert said in str(error.value)


def test_a_rate_times_decay_that_turns_parameters_around():
    run = parse(Settings, None, [*HERE, "--lr", "1", "--weight-decay", "2", "--clip", "inf"])
    with pytest.raises(InputError, match="must stay above 0"):
        checks.flags(run)


def test_guidance_that_is_no_number():
    for flags in (("--guidance", "nan"), ("--temperature", "inf"), ("--min-p", "nan"), ("--n", str(10**12))):
        with pytest.raises(InputError, match=f"{flags[0]} .*: expected"):
            parse(SampleSettings, None, ["--model", "m", "--vq", "v", "--out", "o", *flags])
