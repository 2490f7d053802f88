"""Kill -9 during training and saving, many times: is the newest checkpoint always whole, and always the right one?

A tiny model is trained with a checkpoint after every step and killed, over and over, in one directory. Half of the
kills come at a random time, half just before the n-th call that makes, renames, syncs or deletes something on disk. The
next run then has to

- find a checkpoint no older than any that was visible before, and no leftovers of the killed run next to it,
- load it (which compares every file with the manifest) and hold the weights, moments and step counts that the run that
  was never interrupted held at that step, bit for bit,
- continue, each step again bit for bit.

Runs are forked from this process, which has imported the engine and done nothing else, so a round takes a second or
two. With ``--torchrun`` some rounds are started as users start them.

Example:
    python -m benchmarks.kill_campaign --kills 200 --torchrun 4
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.killable_runs import (
    KEEP,
    PHASES,
    STEPS,
    Job,
    Plan,
    free_port,
    make_config,
    make_retro_config,
    write_data,
    write_database,
)
from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import CheckpointConfig
from megatron_grit.training import checkpoint
from megatron_grit.training.checkpoint import list_checkpoints

ROOM = 10
"""A directory that comes so near to the end of the uninterrupted run is emptied."""
MAX_SECONDS = 120.0
POINTS = 90
"""Calls on disk that are died at: more than a save makes with the removal of an old checkpoint."""


@dataclass
class Tally:
    """What a series of kills came to."""

    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    loaded: int = 0
    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    most_bytes: int = 0


class Campaign:
    """Kills in one directory, compared with one uninterrupted run.

    Args:
        folder: holds the data.
        asynchronous: as ``checkpoint.asynchronous``.
        num_ranks: processes of a run.
        draw: random numbers.
        reads: whether the model reads neighbors.
    """

    def __init__(
        self, folder: Path, asynchronous: bool, num_ranks: int, draw: random.Random, reads: bool = False
    ) -> None:
        self.name = f"{'asynchronous' if asynchronous else 'synchronous'}, {num_ranks} rank{'s' * (num_ranks > 1)}"
        self.name += ", reads neighbors" * reads
        self.output = folder / self.name.replace(", ", "_").replace(" ", "_")
        self.config = (make_retro_config if reads else make_config)(folder, self.output, asynchronous)
        self.num_ranks, self.draw, self.tally = num_ranks, draw, Tally()
        self.points = draw.sample(range(1, POINTS + 1), POINTS)
        self.floor = 0
        self.reference: dict[int, str] = {}
        self.span = 0.5
        """Seconds from a step to the next with its checkpoint, as last seen."""

    def train_reference(self) -> None:
        """The run that is never interrupted, and saves once."""
        job = Job(replace(self.config, checkpoint=CheckpointConfig(save_interval=0)), self.num_ranks, Plan())
        for message in job.messages(MAX_SECONDS):
            if "failed" in message:
                raise SystemExit(f"{self.name}: the uninterrupted run fails: {message['failed']}")
            if "step" in message:
                self.reference[message["step"]] = message["digest"]
        if job.wait() != [0] * self.num_ranks or len(self.reference) != STEPS:
            raise SystemExit(f"{self.name}: the uninterrupted run did not end within {MAX_SECONDS:.0f} s")
        job.close()
        shutil.rmtree(self.output)

    def plan(self, number: int) -> Plan:
        """In turn: at a random time, and at every call on disk, in some order."""
        stagger = self.draw.random() * 0.1 if self.num_ranks > 1 and self.draw.random() < 0.5 else 0.0
        if not self.floor:
            return Plan(after_steps=2, delay=self.draw.random() * self.span, stagger=stagger)
        if number % 2:
            return Plan(point=self.points[number // 2 % POINTS], rewrite=number % 16 == 1, stagger=stagger)
        if number % 20 == 0:
            return Plan(delay=self.draw.random(), stagger=stagger)
        steps, delay = self.draw.randrange(3), self.draw.random() * 1.2 * self.span
        return Plan(after_steps=steps, delay=delay, stagger=stagger)

    def kill_once(self, plan: Plan) -> None:
        """One run from start to its violent end."""
        if self.floor > STEPS - ROOM:
            shutil.rmtree(self.output)
            self.floor = 0
        job = Job(self.config, self.num_ranks, plan)
        until = time.monotonic() + (plan.delay if plan.after_steps is None and plan.point is None else MAX_SECONDS)
        left = plan.after_steps
        while time.monotonic() < until and not job.someone_died():
            for message in job.messages(min(0.05, until - time.monotonic())):
                self.judge(message)
                if left is not None and ("restored" in message or "step" in message):
                    left -= "step" in message
                    if left == 0:
                        until, left = time.monotonic() + plan.delay, None
        phase = job.phase.read()
        job.kill(self.draw.sample(range(self.num_ranks), self.num_ranks), plan.stagger)
        statuses = job.wait()
        for message in job.close():
            self.judge(message)
        if -signal.SIGKILL in statuses:
            self.tally.kills += 1
            self.tally.phases[phase] += 1
        self.look()

    def judge(self, message: dict[str, Any]) -> None:
        """Compare what a run says with the uninterrupted one."""
        wrong = self.tally.wrong
        if "failed" in message:
            wrong.append(f"rank {message['rank']} ends with {message['failed']}")
        elif "step" in message:
            self.tally.steps += 1
            if message["after"]:
                self.span = 0.7 * self.span + 0.3 * message["after"]
            if message["digest"] != self.reference[message["step"]]:
                wrong.append(f"step {message['step']} is another one after a resume")
        else:
            step, visible = message["restored"], [f"step_{self.floor:08d}"] if self.floor else []
            if step != self.floor:
                wrong.append(f"restored step {step}, step {self.floor} was there")
            elif step:
                self.tally.loaded += 1
            if step and message["digest"] != self.reference[step]:
                wrong.append(f"step {step} is restored wrong")
            if message["beside"][-1:] != visible or len(message["beside"]) > KEEP + 1:
                wrong.append(f"beside step {step} there are {message['beside']}")

    def look(self) -> None:
        """What the killed run left to be seen."""
        found = list_checkpoints(self.output)
        newest = int(found[-1].name.split("_")[1].removesuffix(".replaced")) if found else 0
        if newest < self.floor:
            self.tally.wrong.append(f"step {self.floor} was there and is gone")
        self.floor = newest
        sizes = (path.stat().st_size for path in self.output.rglob("*") if path.is_file())
        self.tally.most_bytes = max(self.tally.most_bytes, sum(sizes))

    def run(self, num_kills: int) -> Tally:
        """Kill so many times, and load what the last one left."""
        began = time.monotonic()
        if not self.reference:
            self.train_reference()
        with tqdm(total=num_kills, unit="kill", disable=None) as progress:
            for number in itertools.count():
                if self.tally.kills >= num_kills or self.tally.wrong:
                    break
                self.kill_once(self.plan(number))
                progress.update(self.tally.kills - progress.n)
        kills, phases = self.tally.kills, Counter(self.tally.phases)
        self.kill_once(Plan(after_steps=1))
        self.tally.kills, self.tally.phases = kills, phases  # that one only looked
        self.tally.seconds += time.monotonic() - began
        return self.tally


def kill_torchrun(campaign: Campaign, num_kills: int) -> Tally:
    """Runs under torchrun, all of their processes killed at a random time; forked ranks look at what they left."""
    began, total = time.monotonic(), Tally()
    config_path = campaign.output.with_suffix(".yaml")
    save_config(campaign.config, config_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(campaign.num_ranks)]
    launch += ["--master-port", "{port}", "-m", "megatron_grit.cli.train", "--config", str(config_path)]
    for _ in range(num_kills):
        if campaign.floor > STEPS // 2:
            shutil.rmtree(campaign.output)
            campaign.floor = 0
        command = [part.format(port=free_port()) for part in launch]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + MAX_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            found = list_checkpoints(campaign.output)
            if found and int(found[-1].name[5:13]) > campaign.floor:
                break
            time.sleep(0.05)
        time.sleep(campaign.draw.random() * 3 * campaign.span)
        for pid in [*children_of(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.2)
        total.kills += 1
        total.phases["training"] += 1
        campaign.look()
        before = campaign.tally
        campaign.tally = total
        kills, phases = total.kills, Counter(total.phases)
        campaign.kill_once(Plan(after_steps=1))
        total.kills, total.phases, campaign.tally = kills, phases, before
    total.seconds = time.monotonic() - began
    return total


def children_of(pid: int) -> list[int]:
    """Processes that a process started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def copy_to_name() -> None:
    """A checkpoint is copied to its name, file by file, instead of renamed."""
    rename = Path.rename

    def copy(self: Path, target: Path) -> Path:
        if not self.name.endswith(".partial"):
            return rename(self, target)
        for path in sorted(self.rglob("*"), key=lambda path: path.name != "state.json"):
            if path.is_file():
                (target / path.relative_to(self)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / path.relative_to(self))
                time.sleep(0.1)
        shutil.rmtree(self)
        return target

    Path.rename = copy  # type: ignore[method-assign, assignment]


def forget_steps() -> None:
    """Adam's step counts are not given back to parameters one by one, and nobody looks."""
    checkpoint._separate_adam_steps = lambda optimizer: None
    checkpoint.check_optimizer_step = lambda path, optimizer, saved: None


FAULTS = {"copy": copy_to_name, "adam-steps": forget_steps}


def print_table(tallies: dict[str, Tally]) -> None:
    """One line for each kind of run."""
    columns = ["runs", "kills", *PHASES, "loaded", "steps compared", "wrong", "MiB", "s"]
    print("| " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * (len(columns) - 1))
    for name, tally in tallies.items():
        phases = " | ".join(str(tally.phases[phase]) for phase in PHASES)
        print(
            f"| {name} | {tally.kills} | {phases} | {tally.loaded} | {tally.steps} | {len(tally.wrong)} "
            f"| {tally.most_bytes / 2**20:.1f} | {tally.seconds:.0f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of forked runs, three in four of one rank")
    parser.add_argument("--retro", type=int, default=24, help="of forked runs that read neighbors, half of one rank")
    parser.add_argument("--torchrun", type=int, default=4, help="kills of runs of two ranks under torchrun")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--break", dest="fault", choices=list(FAULTS), help="a saver with a fault, which must be found")
    options = parser.parse_args()
    if options.fault:
        FAULTS[options.fault]()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    draw, tallies = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        campaigns = [Campaign(folder, asynchronous, ranks, draw) for ranks in (1, 2) for asynchronous in (True, False)]
        shares = {1: options.kills * 3 // 8, 2: options.kills - 2 * (options.kills * 3 // 8)}
        for number, campaign in enumerate(campaigns):
            share = shares[1] if campaign.num_ranks == 1 else (shares[2] + number % 2) // 2
            if share:
                tallies[campaign.name] = campaign.run(share)
                print(f"{campaign.name}: {campaign.tally.kills} kills, {len(campaign.tally.wrong)} wrong", flush=True)
        if options.retro:
            write_database(folder)
        for ranks in (1, 2) if options.retro else ():
            campaign = Campaign(folder, True, ranks, draw, reads=True)
            tallies[campaign.name] = campaign.run((options.retro + ranks - 1) // 2)
            print(f"{campaign.name}: {campaign.tally.kills} kills, {len(campaign.tally.wrong)} wrong", flush=True)
        if options.torchrun:
            tallies["asynchronous, torchrun, 2 ranks"] = kill_torchrun(campaigns[2], options.torchrun)
    print_table(tallies)
    for name, tally in tallies.items():
        for text in tally.wrong:
            print(f"{name}: {text}")
    if options.json:
        options.json.write_text(json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1))
    return 1 if any(tally.wrong for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
