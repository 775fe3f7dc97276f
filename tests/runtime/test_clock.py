"""The clock of fits: the wall's, or the processor's."""

from __future__ import annotations

import time

import pytest

from convexhead.runtime import clock


def test_it_follows_the_wall_until_it_is_told_to_follow_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_now", time.perf_counter)  # put back afterwards
    began = clock.now()
    time.sleep(0.2)
    assert clock.now() - began >= 0.2

    clock.count_processor_time()
    began = clock.now()
    time.sleep(0.2)
    assert clock.now() - began < 0.1  # asleep, it takes nothing
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert clock.now() - began >= 0.1
