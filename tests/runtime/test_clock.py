"""The clock of fits: the wall's, or the processor's."""

from __future__ import annotations

import importlib.util
import time

from convexhead.runtime import clock as clock_of_fits


def test_it_follows_the_wall_until_it_is_told_to_follow_the_processor() -> None:
    spec = importlib.util.spec_from_file_location("clock", clock_of_fits.__file__)
    clock = importlib.util.module_from_spec(spec)  # one of its own: that of fits goes on with the wall's
    spec.loader.exec_module(clock)
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
