"""Kinds of work share the device by time, whatever a pass of each takes."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_grit.serving.turns import Turns

KINDS = ("embed", "generate")


class Timed:
    """Turns on a clock that passes alone move."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()
        self.turns = Turns(KINDS, lambda: self.now)

    def work(self, kind: str, seconds: float, passes: int) -> None:
        with self.turns.at_work(kind):
            for number in range(passes):
                self.turns.next_pass(kind)
                if not number:
                    time.sleep(0.1)  # until the others wait
                self.order.append(kind)
                self.now += seconds

    def together(self, *works: tuple[str, float, int]) -> None:
        threads = [threading.Thread(target=self.work, args=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize(("embedding", "generating"), [(1.0, 1.0), (10.0, 1.0), (0.125, 1.0)])
def test_both_kinds_get_half_of_the_time(embedding: float, generating: float) -> None:
    """Each waits for a pass of the other at most before it may make up for it."""
    seconds, longest = {"embed": embedding, "generate": generating}, max(embedding, generating)
    timed = Timed()
    timed.together(*((kind, seconds[kind], round(40 * longest / seconds[kind])) for kind in KINDS))
    spent = dict.fromkeys(KINDS, 0.0)
    for kind in timed.order:
        spent[kind] += seconds[kind]
        assert abs(spent["embed"] - spent["generate"]) <= longest
    assert spent == dict.fromkeys(KINDS, 40 * longest) == timed.turns.seconds


def test_a_kind_that_wanted_nothing_saves_up_no_time() -> None:
    timed = Timed()
    timed.work("embed", 1.0, 500)
    timed.order.clear()
    timed.together(*((kind, 1.0, 20) for kind in KINDS))
    # Whoever begins is alone at first.
    assert set(timed.order[1:5]) == set(KINDS), timed.order


def test_who_pauses_at_work_makes_up_for_it() -> None:
    """Texts of the next request are tokenised without the device, which is given back for that time."""
    timed, paused, go_on = Timed(), threading.Event(), threading.Event()

    def embed() -> None:
        with timed.turns.at_work("embed"):
            timed.turns.next_pass("embed")
            timed.turns.give_back("embed")
            paused.set()
            assert go_on.wait(20)
            for _ in range(30):
                timed.turns.next_pass("embed")
                timed.order.append("embed")
                timed.now += 1.0

    thread = threading.Thread(target=embed)
    thread.start()
    assert paused.wait(20)
    timed.work("generate", 1.0, 10)
    go_on.set()
    timed.work("generate", 1.0, 10)
    thread.join(20)
    assert timed.order[:10] == ["generate"] * 10 and timed.order[11:20] == ["embed"] * 9, timed.order


def test_work_that_fails_gives_the_device_back() -> None:
    timed = Timed()
    with pytest.raises(ZeroDivisionError), timed.turns.at_work("embed"):
        timed.turns.next_pass("embed")
        raise ZeroDivisionError
    timed.together(("generate", 1.0, 2))
    assert timed.order == ["generate"] * 2
