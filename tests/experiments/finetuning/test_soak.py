"""Ten of the trials of `make soak`."""

import pytest

from tests import soak


@pytest.mark.slow
def test_nothing_is_lost_to_kill_9():
    assert soak.soak(10, seed=1, say=lambda text: None).total() == 10
