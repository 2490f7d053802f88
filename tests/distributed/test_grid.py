"""Every kind of layout against plain torch in fp64: two steps' metrics, every parameter's gradient, the embeddings'.

Named layouts (tests/distributed/grid_cases.py), and a handful drawn from all that config/checks/run.py lets through;
``python -m benchmarks.layout_grid`` draws any number more.

Silent errors of the engine, and what fails when their fix is taken out:

====================================================  ================================================================
batched exchanges of an interleaved pipeline on gloo  here, pp2_vpp2-batched
one Adam step for all parameters after a resume       tests/distributed/test_resume.py, "adam"
a bidirectional pass without a mask is causal         here, dp2-causal; tests/unit/models/test_leaks.py
losses times the context parallel size                here, cp2-scaled
middle stages without segment boundaries              here, pp4-boundaries
experts of another tensor parallel size (0.16)        here, moe_etp2-reduction, moe_tp2_sp_etp1-reduction
router z-loss as a mean of means                      here, moe_cp2_etp2-z_loss
====================================================  ================================================================
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_grit import compat
from tests.distributed.grid_cases import NAMED, Case, draw_case
from tests.distributed.grid_damage import DAMAGED, DAMAGED_IN_0_16
from tests.distributed.grid_run import Job, References, Verdict, judge, run_jobs
from tests.harness.ranks import run_on_ranks

FAST = 2  # processes
SEED = 1
DRAWN: dict[str, Case] = {f"drawn{number}": draw_case(SEED, number, (2,)) for number in range(12)}
DRAWN |= {f"drawn{number}": draw_case(SEED, number, (4, 8)) for number in range(12, 24)}
CASES = NAMED | DRAWN
BROKEN = DAMAGED | (DAMAGED_IN_0_16 if compat.engine_version() < (0, 17) else {})


class Grid:
    """Verdicts on the cases, computed once a number of processes."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.references = References(factory.mktemp("references"))
        self.verdicts: dict[str, Verdict] = {}

    def of(self, name: str) -> Verdict:
        """The verdict on a case, sound or damaged."""
        if name not in self.verdicts:
            size = CASES[BROKEN[name][0] if name in BROKEN else name].processes
            jobs = self.jobs(size)
            ranks = run_on_ranks(run_jobs, size, self.factory.mktemp("ranks"), jobs)
            for job in jobs:
                reports = [rank[job.name] for rank in ranks]
                self.verdicts[job.name] = judge(self.references.of(job.case), reports)
        return self.verdicts[name]

    def jobs(self, size: int) -> list[Job]:
        """Everything for a number of processes."""
        sound = [self.references.job(name, case) for name, case in CASES.items() if case.processes == size]
        damaged = [
            self.references.job(name, CASES[of], damage)
            for name, (of, damage) in BROKEN.items()
            if CASES[of].processes == size
        ]
        return sound + damaged


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory)


def marked(names: dict[str, str]) -> list[Any]:
    """Parameters, slow where more than two processes run."""
    marks = {name: () if CASES[of].processes <= FAST else pytest.mark.slow for name, of in names.items()}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize("name", marked({name: name for name in CASES}))
def test_layout_equals_the_reference(grid: Grid, name: str) -> None:
    assert grid.of(name).problems == []
    if name in NAMED:
        # Losses are compared relative to at least 1, so here relative to themselves.
        metrics = grid.references.of(NAMED[name])[0].metrics
        assert all(value > 1 for key, value in metrics.items() if key.startswith("loss"))


@pytest.mark.parametrize("name", marked({name: of for name, (of, _) in BROKEN.items()}))
def test_what_is_taken_out_is_missed(grid: Grid, name: str) -> None:
    """Each damage leaves a run that looks well, and the comparison above tells."""
    verdict = grid.of(name)
    assert verdict.problems and max(verdict.gradient, verdict.second) > 1e-3
