"""One stream out of several sets: the weights kept everywhere, every item in its turn, any place without those before it."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina_fn import data
from lumina_fn.features import mixing, shards
from lumina_fn.features.mixing import Mixture
from lumina_fn.vocab import Ids

IDS = Ids(start=1, end=2, newline=3, sep=4, size0=5, code0=40, codes=16)
weights = st.lists(st.fractions(Fraction(1, 50), 5, max_denominator=50), min_size=1, max_size=5).map(tuple)


@given(weights, st.integers(1, 300))
def test_every_prefix_keeps_the_weights(weights, n):
    counts = [0] * len(weights)
    for place in range(n):
        s, had = mixing.share(place, weights)
        assert had == counts[s]
        counts[s] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (place + 1) * weight / sum(weights)) <= len(weights)


@given(weights, st.integers(0, 10**15))
def test_far_places_are_as_exact_as_near_ones(weights, place):
    s, had = mixing.share(place, weights)
    assert abs(had - place * weights[s] / sum(weights)) <= len(weights)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three sets of 5, 3 and 4 items of different lengths."""

    def write(name, count, side):
        folder = tmp_path_factory.mktemp(name)
        codes = np.random.default_rng(side).integers(0, IDS.codes, (count, side, side))
        features = [shards.Feature(i, [20] * (1 + i), c) for i, c in enumerate(codes)]
        shards.write_features(folder, features, shards.Origin(64, 0, IDS, "tokenizer", "vq"))
        return data.FeatureSet(folder)

    return write("a", 5, 4), write("b", 3, 8), write("c", 4, 4)


HALVES = (Fraction(1, 2), Fraction(3, 10), Fraction(1, 5))


def met(visits):
    return list(zip(*(x.tolist() for x in visits), strict=True))


def test_each_set_shows_its_items_once_in_each_of_its_epochs(sets):
    found = met(Mixture(sets, HALVES).visits(0, range(200), 7))
    for s, features in enumerate(sets):
        own = [(e, i) for which, e, i in found if which == s]
        for epoch in range(len(own) // len(features)):
            part = own[epoch * len(features) : (epoch + 1) * len(features)]
            assert sorted(part) == [(epoch, i) for i in range(len(features))]


def test_without_weights_an_epoch_is_every_item_of_every_set(sets):
    mixture = Mixture(sets)
    for epoch in (0, 1):
        found = met(mixture.visits(epoch, range(len(mixture)), 7))
        assert sorted(found) == [(s, epoch, i) for s, features in enumerate(sets) for i in range(len(features))]


def test_a_set_alone_is_visited_in_its_order(sets):
    expected = data.order(5, 7, 2).tolist()
    assert Mixture(sets[:1]).visits(2, range(5), 7).indices.tolist() == expected
    assert Mixture(sets[:1], (Fraction(1),)).visits(0, range(10, 15), 7).indices.tolist() == expected


@pytest.mark.parametrize("weights", [None, HALVES], ids=["epochs", "weights"])
def test_any_place_is_found_without_those_before_it(sets, weights):
    mixture = Mixture(sets, weights)
    whole = met(mixture.visits(0, range(12), 7))
    assert [met(mixture.visits(0, range(p, p + 1), 7))[0] for p in range(12)] == whole
    assert met(mixture.visits(0, range(5, 5), 7)) == []


def test_equal_sets_are_shuffled_apart(sets):
    found = met(Mixture((sets[0], sets[0]), (Fraction(1), Fraction(1))).visits(0, range(60), 7))
    orders = [[i for which, _, i in found if which == s] for s in (0, 1)]
    assert Counter(orders[0]) == Counter(orders[1])
    assert orders[0] != orders[1]


def test_lengths_and_items_are_those_of_the_sets(sets):
    mixture = Mixture(sets, HALVES)
    visits = mixture.visits(0, range(30), 7)
    assert mixture.lengths_of(visits).tolist() == [len(sets[s][i][0]) for s, _, i in met(visits)]
    for (s, _, i), (feature, dropped) in zip(met(visits), mixture.read(visits, 7, 0.0), strict=True):
        assert feature.row == i
        assert feature.codes.tolist() == sets[s].feature(i).codes.tolist()
        assert not dropped
