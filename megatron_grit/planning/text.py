"""A plan as a text for a terminal."""

from __future__ import annotations

from collections import defaultdict

from megatron_grit.planning.plan import GIB, Estimate, Plan

_SHOWN = 10


def format_plan(plan: Plan) -> str:
    """The configured mesh in full, then the others, one line each."""
    lines = _assumptions(plan)
    if plan.configured is not None:
        lines += ["", *_in_full(plan.configured, plan)]
    else:
        lines += ["", "The configuration is impossible:", *(f"  {problem}" for problem in plan.problems)]
    lines += ["", *_ranked(plan), *_refused(plan)]
    if plan.evaluation:
        lines += ["", "Not in the step time:", *(f"  {line}" for line in plan.evaluation)]
    if plan.retro_project is not None:
        command = f"megatron-grit build-db --project-dir {plan.retro_project} --dry-run"
        lines += ["", f"Time, disk and memory of building the database: {command}, with the settings of the build"]
    return "\n".join(lines)


def format_bytes(count: float) -> str:
    """GiB, or MiB below one."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def _assumptions(plan: Plan) -> list[str]:
    machine, lengths = plan.machine, plan.lengths
    return [
        f"Assumed: {lengths.text_tokens} tokens a text, {lengths.sequence_tokens} tokens a sequence, of which "
        f"{lengths.supervised_share:.0%} are labels;",
        f"  {machine.peak_tflops:g} TFLOP/s a device at {machine.efficiency:.0%}; {machine.link_gbs:g} GB/s in a node "
        f"of {machine.devices_per_node}, {machine.network_gbs:g} GB/s between nodes, nothing overlapped; "
        f"{format_bytes(plan.memory_bytes)} of memory",
    ]


def _in_full(estimate: Estimate, plan: Plan) -> list[str]:
    parameters, memory, flops, seconds = estimate.parameters, estimate.memory, estimate.flops, estimate.step_time
    workload = estimate.workload
    fits = "fits" if memory.peak <= plan.memory_bytes else "DOES NOT FIT"
    active = "" if parameters.active == parameters.total else f", {parameters.active:,} active"
    parts = ("compute", "bubble", "tensor", "context", "pipeline", "expert", "data")
    return [
        f"Mesh: {estimate.mesh}",
        f"Parameters: {parameters.total:,}{active}; {parameters.rank:,} on a rank of pipeline stage {memory.stage}",
        f"Rows a step: {', '.join(f'{rows.rows} {rows.kind}' for rows in workload.kinds)}, "
        f"{sum(rows.tokens for rows in workload.kinds):,} tokens",
        f"Memory a rank: {format_bytes(memory.peak)}, {fits}; the worst moment: {memory.worst_moment}",
        *(f"  {kind:<12}{format_bytes(count):>14}" for kind, count in memory.kinds.items() if count),
        f"FLOPs a step: {flops.total:.3e} ("
        + "".join(f"{kind} {count:.3e}, " for kind, count in flops.passes.items())
        + "".join(f"{name} loss {count:.1e}, " for name, count in flops.losses.items())
        + f"recompute {flops.recompute:.1e})",
        f"Step time: {seconds.total:.2f} s ("
        + ", ".join(f"{part} {getattr(seconds, part):.2f}" for part in parts if getattr(seconds, part))
        + ")",
    ]


def _ranked(plan: Plan) -> list[str]:
    if not plan.candidates:
        smallest = f"; the smallest takes {format_bytes(plan.too_large[0].memory.peak)}" if plan.too_large else ""
        return [f"No mesh of {plan.world_size} processes fits{smallest}."]
    lines = [f"Meshes that fit, fastest first ({len(plan.candidates)}):"]
    for estimate in plan.candidates[:_SHOWN]:
        lines.append(
            f"  {estimate.step_time.total:9.2f} s {format_bytes(estimate.memory.peak):>12}  {_sizes(estimate)}"
        )
    if plan.too_large:
        lines.append(f"{len(plan.too_large)} more do not fit.")
    return lines


def _sizes(estimate: Estimate) -> str:
    return estimate.mesh.partition(" = ")[2]


def _refused(plan: Plan) -> list[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for refusal in plan.refused:
        by_reason[refusal.reason].append(refusal.mesh.partition(" = ")[2])
    if not by_reason:
        return []
    lines = [f"Impossible ({len(plan.refused)}), most frequent reason first; --json has all:"]
    for reason, meshes in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:_SHOWN]:
        more = f" and {len(meshes) - 1} more" if len(meshes) > 1 else ""
        lines.append(f"  {meshes[0]}{more}: {reason}")
    return lines
