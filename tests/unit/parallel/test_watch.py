"""What ranks know of each other when one is gone or stuck. Processes in earnest: tests/e2e/test_recovery.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from megatron_grit.parallel import positions
from megatron_grit.parallel.stuck_report import Answer, ranks_text, stacks_of_this_process, stuck_report
from megatron_grit.parallel.watch import is_broken_connection, is_timeout
from megatron_grit.store.environment import is_alive


def answer(rank: int, position: positions.Position, stacks: str | None = "  thread MainThread\n") -> Answer:
    record = {"host": "node7 pid:[1]", "pid": 100 + rank, "time": time.time()} | position.as_record()
    return Answer(rank, record, stacks)


def test_ranks_that_stand_alike_are_one_line_and_the_last_come_first() -> None:
    now = time.monotonic()
    ahead = positions.Position("gradient reduction", 3, None, None, now - 20, count=40)
    behind = positions.Position("generative forward and backward", 3, 1, 4, now - 30, count=31)
    text = stuck_report("why", [answer(rank, behind if rank == 2 else ahead) for rank in range(6)])
    lines = text.splitlines()
    assert lines[0].startswith("megatron-grit: why. ")
    assert lines[1] == "  rank 2: generative forward and backward of step 3, row 2 of 4, for 30 s"
    assert lines[2] == "  ranks 0-1, 3-5: gradient reduction of step 3, for 20 to 20 s"
    assert lines[3] == "Stacks of ranks 0-5:"


def test_a_rank_that_does_not_answer_or_was_never_heard_of_is_named() -> None:
    position = positions.Position("saving", 3, None, None, time.monotonic())
    text = stuck_report("why", [answer(0, position), answer(1, position, None), Answer(2, None, None)])
    assert "  rank 1 (process 101 on node7) does not answer: " in text
    assert "  rank 2: never heard of\n" in text and "  rank 2 does not answer" in text


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([8, 0, 2, 1], "ranks 0-2, 8")])
def test_ranks_text(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def test_stacks_show_where_the_main_thread_is() -> None:
    stacks = stacks_of_this_process()
    assert "thread MainThread" in stacks and "test_stacks_show_where_the_main_thread_is" in stacks


def test_positions_keep_their_step_and_count() -> None:
    positions.enter("loading data", 7)
    before = positions.current()
    positions.at("first pass", 0, 3)
    after = positions.current()
    assert str(after) == "first pass of step 7, row 1 of 3" and after.count == before.count + 1
    assert str(positions.Position.from_record(after.as_record())) == str(after)


def test_a_position_costs_microseconds() -> None:
    """A step notes one for each row and a dozen more; the bound is for a busy machine."""
    began = time.process_time()
    for row in range(1000):
        positions.at("first pass", row, 1000)
    assert (time.process_time() - began) / 1000 < 100e-6


def test_alive_means_running_or_stopped() -> None:
    assert is_alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 600
    while is_alive(child.pid) and time.monotonic() < deadline:  # ended, and not waited for
        time.sleep(0.01)
    assert not is_alive(child.pid) and child.poll() == 0
    assert not is_alive(child.pid)
    assert is_alive(10**30), "what is no process id is in doubt"


def test_which_exceptions_tell_of_other_ranks() -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:23457")
    late = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation")
    assert is_broken_connection(closed) and not is_timeout(closed)
    assert is_broken_connection(late) and is_timeout(late)
    assert is_broken_connection(dist.DistBackendError("NCCL error"))
    assert not is_broken_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken_connection(ValueError("timed out"))
