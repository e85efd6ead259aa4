"""Each rung's tests are collected in the venv they are made for, and only there: torch_npu and torch alone do not mix."""

import pytest

from tests.ascend import ladder, torchair_stub

collect_ignore = ladder.elsewhere()
if ladder.here() == ".venv-npu":
    torchair_stub.install()  # before a test file imports kernels.ascend_graph


def pytest_configure(config: pytest.Config) -> None:
    """The plugin, also for a pytest that was started without it."""
    if not config.pluginmanager.has_plugin(ladder.__name__):
        config.pluginmanager.register(ladder, ladder.__name__)
