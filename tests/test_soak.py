"""A short soak: what a manager has does not grow with the VMs that have lived in it (long: ``make soak``)."""

import asyncio

from tools.soak import growth, soak


def test_nothing_grows_with_the_lives_that_a_manager_has_led() -> None:
    counts = asyncio.run(soak(400, batches=4))
    assert [count.failed for count in counts] == [0, 0, 0, 0]
    for what in ("descriptors", "threads", "tasks", "files"):
        assert growth(counts, what) <= 0.01, (what, counts)
