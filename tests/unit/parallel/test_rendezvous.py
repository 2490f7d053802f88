"""Processes of one attempt meet, whatever an earlier one left in the store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_grit.errors import JobError
from megatron_grit.parallel.rendezvous import agree_on_name


def names(store: dist.Store, world_size: int, seconds: float = 10.0) -> list[str]:
    """The name that each rank comes to."""
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        found[rank] = agree_on_name(store, rank, world_size, seconds)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_attempt_has_one_name_of_its_own(world_size: int) -> None:
    """The launcher hands every attempt the same store."""
    store = dist.HashStore()
    attempts = [names(store, world_size) for _ in range(3)]
    assert all(len(set(attempt)) == 1 for attempt in attempts)
    assert len({attempt[0] for attempt in attempts}) == 3


def test_what_is_written_under_a_name_is_not_seen_by_the_next_attempt() -> None:
    store = dist.HashStore()
    first, second = (dist.PrefixStore(names(store, 2)[0], store) for _ in range(2))
    first.set("address", "of a process that is gone")
    assert first.check(["address"]) and not second.check(["address"])


@pytest.mark.parametrize(("rank", "whom"), [(0, "for the other ranks"), (1, "for rank 0")])
def test_ranks_that_do_not_come_end_the_wait(rank: int, whom: str) -> None:
    """Though an earlier attempt was complete."""
    store = dist.HashStore()
    names(store, 2)
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(JobError, match=whom):
        agree_on_name(store, rank, 2, seconds=0.1)
