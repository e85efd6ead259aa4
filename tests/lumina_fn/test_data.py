"""Feature sets give back the items that went in; order, batches and caption drop are functions of their keys."""

import json
import math

import numpy as np
import pytest
import torch

from lumina_fn import data, prompt
from lumina_fn.errors import InputError
from lumina_fn.features import shards
from lumina_fn.vocab import IGNORE, PAD
from tests.support.paths import GOLDENS

TOKENIZER = prompt.load_tokenizer(GOLDENS / "tokens" / "toy_tokenizer_bpe")
ORIGIN = shards.Origin(size=768, seed=0, ids=TOKENIZER.ids, tokenizer=TOKENIZER.fingerprint, vq="none")


def features(sizes):
    random = np.random.default_rng(0)
    for row, size in enumerate(sizes):
        codes = random.integers(0, 16384, size)
        yield shards.Feature(2 * row, data.text_ids(TOKENIZER, f"cat {row}", codes, row % 2 == 0), codes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ITEMS", 3)
    shards.write_features(tmp_path, features([(4, 8), (8, 4), (4, 4), (12, 4), (4, 4), (8, 8), (4, 4)]), ORIGIN)
    return tmp_path


def test_items_come_back(folder):
    items = data.FeatureSet(folder)
    expected = [
        data.training_item(TOKENIZER, f"cat {f.row // 2}", f.codes, with_size=f.row % 4 == 0)
        for f in features([(4, 8), (8, 4), (4, 4), (12, 4), (4, 4), (8, 8), (4, 4)])
    ]
    assert len(items) == 7
    assert list(items) == expected
    assert items[-1] == expected[-1]
    assert [items.feature(i).row for i in range(7)] == [0, 2, 4, 6, 8, 10, 12]
    assert list(items.lengths()) == [len(ids) for ids, _ in expected]
    assert items.largest_id == max(max(ids) for ids, _ in expected)
    assert items.origin == ORIGIN
    with pytest.raises(IndexError):
        items[7]


def test_at_most_2_2_bytes_per_token_at_768(tmp_path):
    shards.write_features(tmp_path, features([(96, 96)] * 10), ORIGIN)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 2.2 * sum(data.FeatureSet(tmp_path).lengths())


def shard(folder, number):
    (path,) = folder.glob(f"features-{number:05d}-*")
    return path


def test_a_truncated_shard_is_an_input_error(folder):
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="features-00001"):
        data.FeatureSet(folder)
    path.unlink()
    with pytest.raises(InputError, match="features-00001"):
        data.FeatureSet(folder)


def test_a_shard_with_other_items_is_an_input_error(folder):
    """Of the same size: it is seen once it is opened."""
    path = shard(folder, 1)
    more, less = [(len(f.text), f.codes.size) for f in features([(12, 4), (4, 4), (8, 8)])], path.stat().st_size
    assert len(more) == 3
    path.write_bytes(shard(folder, 0).read_bytes().ljust(less, b" ")[:less])
    with pytest.raises(InputError, match=r"not whole|not the index's"):
        list(data.FeatureSet(folder))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "[" * 100_000, '{"format": "other"}', '{"format": "lumina_fn/features/2"}']
)
def test_a_folder_that_is_no_feature_set_is_an_input_error(folder, text):
    (folder / "features.json").write_text(text)
    with pytest.raises(InputError, match=r"features\.json"):
        data.FeatureSet(folder)
    (folder / "features.json").unlink()
    with pytest.raises(InputError, match="pretokenize"):
        data.FeatureSet(folder)


@pytest.mark.parametrize(
    "change", [{"largest_id": "9"}, {"largest_id": math.nan}, {"count": 1.0}, {"count": 8}, {"items": 5}]
)
def test_an_index_with_odd_numbers_is_an_input_error(folder, change):
    index = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps(index | change))
    with pytest.raises(InputError, match=r"features\.json|index-"):
        data.FeatureSet(folder)


def test_an_index_cannot_name_files_elsewhere(folder):
    index = json.loads((folder / "features.json").read_text())
    (folder / "inner").mkdir()
    name = index["shards"][0]["file"]
    index["shards"][0]["file"] = f"../{folder.name}/inner/../{name}"
    (folder / "features.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no file's name"):
        data.FeatureSet(folder)
    index["shards"][0]["file"] = "/etc/passwd"
    (folder / "features.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="passwd"):
        data.FeatureSet(folder)


def test_the_order_is_a_permutation_given_by_seed_and_epoch():
    first = data.order(100, 0, 0).tolist()
    assert sorted(first) == list(range(100)) != first
    assert data.order(100, 0, 0).tolist() == first
    assert len({tuple(data.order(100, s, e)) for s in range(3) for e in range(3)}) == 9
    assert first[:8] == [93, 61, 75, 9, 36, 39, 85, 55]  # another stream would break every resumed run


def test_caption_drop_is_given_by_seed_epoch_and_item():
    draws = [[data.drops_caption(0.1, 0, e, i) for i in range(2000)] for e in range(2)]
    assert draws[0] != draws[1]
    assert draws[0] == [data.drops_caption(0.1, 0, 0, i) for i in range(2000)]
    assert 0.08 < np.mean(draws) < 0.12
    assert not any(data.drops_caption(0.0, 0, 0, i) for i in range(50))
    assert all(data.drops_caption(1.0, 0, 0, i) for i in range(50))


def test_batches_are_padded_and_cut():
    items = [([1, 2, 3], [IGNORE, 2, 3]), (list(range(10, 80)), [IGNORE] * 70)]
    tokens, labels = data.batch(items, max_positions=200)
    assert tokens.shape == labels.shape == (2, 128)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens[0].tolist() == [1, 2, 3] + [PAD] * 125
    assert labels[0].tolist() == [IGNORE, 2, 3] + [IGNORE] * 125
    assert tokens[1, :70].tolist() == items[1][0]
    tokens, labels = data.batch(items, max_positions=48)
    assert tokens.shape == (2, 48)
    assert tokens[1].tolist() == items[1][0][:48]


def test_a_fingerprint_sees_every_bit_shape_and_type():
    a = {"x": torch.arange(6.0), "y": (torch.ones(2),)}
    others = [
        {**a, "x": torch.arange(6.0).reshape(2, 3)},
        {**a, "x": torch.arange(6.0).half()},
        {**a, "y": (-torch.ones(2),)},
    ]
    assert data.fingerprint(a) == data.fingerprint({"x": torch.arange(6.0), "y": (torch.ones(2),)})
    assert len({data.fingerprint(t) for t in [a, *others]}) == 4
