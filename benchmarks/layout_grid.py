"""Layouts drawn at random against plain torch in fp64: losses, every parameter's gradient, the embeddings' gradient.

A case is a layout (tensor, sequence, pipeline, interleaved, context, expert, expert tensor and data parallel, overlap),
a model (dense or a mixture, heads, norms, positions, biases, a window, tied or not, with a projection or not), what is
trained (objective, pooling, contrastive and token loss, their weights), GradCache and recompute as configured, and rows
(one or several a rank, with uneven segments, instructions, padding, equal texts). What config/checks/run.py refuses is
not drawn. The comparison is tests/distributed/grid_run.py's: losses within 1e-6, gradients within 1e-5, relative.

Results are appended to --results, and cases that are there already are not run again. The first case that fails ends
the run with status 1 and the command that repeats it.

Example:
    python -m benchmarks.layout_grid --cases 500 --seed 0 --results layout_grid.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.distributed.grid_cases import Case, config_of, draw_case
from tests.distributed.grid_run import References, Verdict, judge, layout_of, run_jobs
from tests.harness.ranks import run_on_ranks

CASES_AT_ONCE = 12
"""One start of the processes runs so many."""


class CaseError(Exception):
    """A case that is beyond the bounds, or did not run."""


def run_block(cases: dict[int, Case]) -> dict[int, Verdict]:
    """Run cases of one number of processes.

    Raises:
        CaseError: a rank failed, or did not end.
    """
    with tempfile.TemporaryDirectory() as directory:
        references = References(Path(directory))
        jobs = [references.job(f"case {number}", case) for number, case in cases.items()]
        world_size = next(iter(cases.values())).processes
        try:
            ranks = run_on_ranks(run_jobs, world_size, Path(directory), jobs)
        except AssertionError as error:
            raise CaseError(f"one of the cases {', '.join(map(str, cases))} did not run:\n{error}") from error
        return {
            number: judge(references.of(case), [rank[f"case {number}"] for rank in ranks])
            for number, case in cases.items()
        }


def blocks(cases: dict[int, Case]) -> Iterator[dict[int, Case]]:
    """Cases of equal numbers of processes together, in their order."""
    waiting: dict[int, dict[int, Case]] = {}
    for number, case in cases.items():
        block = waiting.setdefault(case.processes, {})
        block[number] = case
        if len(block) == CASES_AT_ONCE:
            yield waiting.pop(case.processes)
    yield from waiting.values()


def repeat_command(arguments: argparse.Namespace, number: int) -> str:
    """The command that runs one case again."""
    processes = " ".join(map(str, arguments.processes))
    return f"python -m benchmarks.layout_grid --seed {arguments.seed} --case {number} --processes {processes}"


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not in the results yet; returns all results.

    Raises:
        CaseError: at the first case that fails.
    """
    from tqdm import tqdm

    allowed = tuple(arguments.processes)
    series = {"seed": arguments.seed, "of": list(allowed)}
    done = {record["case"]: record for record in read_results(arguments.results) if record["series"] == series}
    numbers = range(arguments.cases) if arguments.case is None else [arguments.case]
    wanted = {number: draw_case(arguments.seed, number, allowed) for number in numbers}
    if arguments.case is not None:
        print(json.dumps(wanted[arguments.case].describe(), indent=2))
        done = {}
    missing = {number: case for number, case in wanted.items() if number not in done}
    progress = tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="case")
    for block in blocks(missing):
        try:
            verdicts = run_block(block)
        except CaseError as error:
            raise CaseError(f"{error}\nTo repeat: {repeat_command(arguments, next(iter(block)))}") from error
        for number, verdict in verdicts.items():
            if verdict.problems:
                raise CaseError(f"case {number}: {verdict.problems}\nTo repeat: {repeat_command(arguments, number)}")
            config = config_of(block[number])
            facts = features(config) | {"processes": block[number].processes, "layout": layout_of(config)}
            done[number] = {"series": series, "case": number, "verdict": asdict(verdict), "features": facts}
            if arguments.results is not None and arguments.case is None:
                with open(arguments.results, "a") as file:
                    file.write(json.dumps(done[number]) + "\n")
        progress.update(len(block))
    progress.close()
    return [done[number] for number in wanted]


def read_results(path: Path | None) -> list[dict[str, Any]]:
    """What earlier runs wrote; a line that was cut short by a kill is left out."""
    if path is None or not path.exists():
        return []
    lines = path.read_text().split("\n")
    if lines[-1]:
        path.write_text("\n".join(lines[:-1]) + "\n" if lines[:-1] else "")
    return [json.loads(line) for line in lines[:-1]]


def features(config: Any) -> dict[str, Any]:
    """What a table is made of."""
    parallel, model = config.parallel, config.model
    return {
        "tensor": parallel.tensor,
        "sequence parallel": parallel.sequence_parallel,
        "pipeline": parallel.pipeline,
        "virtual pipeline": parallel.virtual_pipeline or 1,
        "context": parallel.context,
        "expert": parallel.expert if model.num_experts else None,
        "expert tensor": (parallel.expert_tensor or parallel.tensor) if model.num_experts else None,
        "overlap": parallel.overlap,
        "model": "mixture" if model.num_experts else "dense",
        "objective": config.training.objective,
        "grad_cache": config.training.grad_cache,
        "recompute": config.training.recompute,
    }


def print_table(records: list[dict[str, Any]]) -> None:
    """Cases and largest errors for each value of each feature."""
    print(f"{'':22s}{'cases':>7s}{'loss':>10s}{'gradient':>10s}{'embeddings':>12s}{'1 - cosine':>12s}")

    def line(title: str, chosen: list[dict[str, Any]]) -> None:
        verdicts = [record["verdict"] for record in chosen]
        worst = [max(verdict[kind] for verdict in verdicts) for kind in ("loss", "gradient")]
        texts = [verdict for verdict in verdicts if verdict["text_gradient"] is not None]
        of_texts = f"{'-':>12s}{'-':>12s}"
        if texts:
            error, cosine = max(v["text_gradient"] for v in texts), min(v["text_cosine"] for v in texts)
            of_texts = f"{error:12.1e}{max(0.0, 1 - cosine):12.1e}"
        print(f"{title:22s}{len(chosen):7d}{worst[0]:10.1e}{worst[1]:10.1e}{of_texts}")

    line("all", records)
    for name in [name for name in records[0]["features"] if name != "layout"]:
        for value in sorted(
            {record["features"][name] for record in records}, key=lambda value: (str(type(value)), value)
        ):
            if value is not None:
                line(f"{name} {value}", [record for record in records if record["features"][name] == value])
    print(f"{len({record['features']['layout'] for record in records})} different layouts")


def main() -> int:
    """Parse the command line, run and print a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers to draw from")
    parser.add_argument("--case", type=int, help="run this one alone, and print what it is")
    parser.add_argument("--results", type=Path, help="JSON lines of earlier runs, which are kept and appended to")
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        records = run(arguments)
    except CaseError as error:
        print(f"layout_grid: error: {error}", file=sys.stderr)
        return 1
    print_table(records)
    print(f"{len(records)} cases, none beyond the bounds; {time.perf_counter() - started:.0f} s for this run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
