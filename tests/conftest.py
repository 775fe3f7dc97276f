"""Annotations are checked, and nothing is left in the cache folder of whoever runs the tests."""

import os
import tempfile

# Before torch is loaded: several workers with two threads each wait for each other several times as long as they work
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import annotations

annotations.install()
# Notes about verified shards
_cache = tempfile.TemporaryDirectory(prefix="convexhead-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tables are slow, too."""
    for item in items:
        if item.get_closest_marker("table"):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    annotations.calls.clear()
