"""What each layer of a stage lets a token see, by differentiation.

A forward pass of the run's own chunk of layers is tapped: every layer is fed the same random states instead of what
the layer below gives, so that its output depends on nothing else and one layer's fault cannot hide behind another's.
The gradient of some tokens' outputs with respect to the states of a token is exactly zero where they do not see it:
attention weights of hidden keys are exactly zero, in bf16 as well, and everything else in a layer works on each token
alone, an expert's queue included, since no token is ever dropped.

Shape suffix legend: T = tokens of the row, L = tokens that this rank holds, P = probes, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import window_of_layer
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.audit.rows import AuditRow, random_states
from megatron_grit.training.audit.undisturbed import gather_tokens, held_tokens

_SHORT_WINDOW = 3
"""Rows of an audit are shorter than the windows of real models, so the window is shortened for the time."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the largest state, between equal segments at two places of a row."""


@dataclass(frozen=True)
class AttentionPass:
    """A forward pass, and what it is to show."""

    name: str
    row: AuditRow
    causal: bool
    window: int | None
    """Sliding window that the layers are given. A bidirectional pass is to take no notice of it."""
    whole: bool
    """Whether layers are looked at as a whole. What is not attention knows nothing of the pass, and costs most of it:
    one pass does it, and the others leave it out."""

    def visible(self) -> Tensor:
        """bool [T, T]."""
        return self.row.visible(self.causal, self.window if self.causal else None)


@dataclass
class _Tap:
    """One layer in a tapped pass."""

    number: int
    attention: Tensor | None = None
    """[L, 1, D]: what its attention adds to each token."""
    output: Tensor | None = None
    """[L, 1, D]."""
    angles: Tensor | None = None
    """Rotary angles that it was given, [L, 1, 1, H]; under sequence parallelism of all tokens of the group."""


def attention_passes(config: RunConfig, rows: Sequence[AuditRow]) -> list[AttentionPass]:
    """The passes that this run trains: one for each kind of row, and one more where a sliding window is longer than
    the rows of an audit."""
    window = config.model.sliding_window
    short = None if window is None else min(window, _SHORT_WINDOW)
    passes: list[AttentionPass] = []
    for row in rows:
        if row.row.embeds and not config.embedding.causal:
            passes.append(AttentionPass("bidirectional pass", row, False, short, not passes))
            continue
        name = "causal embedding pass" if row.row.embeds else "causal pass"
        passes.append(AttentionPass(name, row, True, window, not passes))
        if short != window:
            passes.append(AttentionPass(f"{name} with a sliding window", row, True, short, False))
    return passes


def audit_layers(
    chunk: GritDecoder, attention_pass: AttentionPass, config: RunConfig, context: ParallelContext
) -> str | None:
    """Audit one chunk of layers in one pass. Collective over the ranks of the stage.

    Returns:
        What is wrong, in words; None where nothing is.
    """
    row = attention_pass.row
    share = RowShare.of_row(row.row, context)
    index_L = None if share is None else share.index_L
    held_L = held_tokens(row.length, index_L, context)
    full_T1D = random_states(row, chunk.config.hidden_size, seed=1)
    states_L1D = full_T1D[held_L.cpu()].to(context.device, chunk.config.params_dtype).requires_grad_()
    with _tapped(chunk, states_L1D, attention_pass) as (taps, embedded):
        chunk(row.row, Output.HIDDEN)
    where = f"pipeline stage {context.pipeline_rank}"
    angles_at = torch.arange(row.length, device=context.device) if index_L is None else index_L
    problem = _check_embedded(embedded, row, held_L, context)
    for tap in taps:
        problem = problem or _check_angles(tap, row, angles_at, context)
    for tap in taps:
        found = _check_reach(tap, states_L1D, held_L, attention_pass, context)
        found = found or _check_places(tap, held_L, row, context)
        problem = problem or (f"layer {tap.number}, {found}" if found else None)
    problem = problem or _check_windows(chunk, config)
    return f"{where}, {attention_pass.name}: {problem}" if problem else None


@contextmanager
def _tapped(
    chunk: GritDecoder, states_L1D: Tensor, attention_pass: AttentionPass
) -> Iterator[tuple[list[_Tap], list[Tensor]]]:
    """Feed every layer these states, and keep what it gives. Second: the word embedding's output, on the first."""
    taps: list[_Tap] = []
    embedded: list[Tensor] = []
    handles = []
    windows = []
    if chunk.pre_process:
        handles.append(chunk.embedding.register_forward_hook(lambda module, args, output: embedded.append(output)))
    else:
        chunk.set_input_tensor(states_L1D.detach())
    for layer in chunk.decoder.layers:
        tap = _Tap(layer.layer_number)
        taps.append(tap)
        core = layer.self_attention.core_attention
        windows.append((core, core.sliding_window))
        core.sliding_window = attention_pass.window

        def feed(module: Any, args: Any, kwargs: dict[str, Any], tap: _Tap = tap) -> tuple[Any, dict[str, Any]]:
            tap.angles = kwargs.get("rotary_pos_emb")
            return args, kwargs | {"hidden_states": states_L1D}

        def keep_attention(module: Any, args: Any, output: tuple[Tensor, Any], tap: _Tap = tap) -> None:
            tap.attention = output[0]

        def keep_output(module: Any, args: Any, output: tuple[Tensor, Any], tap: _Tap = tap) -> None:
            tap.output = output[0]

        handles.append(layer.register_forward_pre_hook(feed, with_kwargs=True))
        handles.append(layer.self_attention.register_forward_hook(keep_attention))
        if attention_pass.whole:
            handles.append(layer.register_forward_hook(keep_output))
        else:
            layer.mlp.forward = _pass_through
    try:
        yield taps, embedded
    finally:
        for handle in handles:
            handle.remove()
        for core, configured in windows:
            core.sliding_window = configured
        for layer in chunk.decoder.layers:
            layer.mlp.__dict__.pop("forward", None)


def _pass_through(hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """In place of a feed-forward layer: output and bias."""
    return hidden, None


def _check_embedded(embedded: list[Tensor], row: AuditRow, held_L: Tensor, context: ParallelContext) -> str | None:
    """Segments begin with the same tokens, so that their embeddings differ only where positions do not restart."""
    if not embedded:
        return None
    states_TD = gather_tokens(embedded[0][:, 0].float(), held_L, row.length, context)
    return _unlike_first(states_TD, row, "the embedding of token {} is not that of the same token in another segment")


def _check_angles(tap: _Tap, row: AuditRow, index_L: Tensor, context: ParallelContext) -> str | None:
    """Rotary angles restart in each segment."""
    if tap.angles is None:
        return None
    angles_TH = gather_tokens(tap.angles.flatten(1).float(), index_L, row.length, context)
    first, last = row.bounds[0]
    if (angles_TH[first + 1 : last] == angles_TH[first : last - 1]).all(1).any():
        return f"layer {tap.number}, two tokens of a segment have the same rotary angle"
    return _unlike_first(angles_TH, row, f"layer {tap.number}, the rotary angle of token {{}} is not that of its place")


def _unlike_first(values_TD: Tensor, row: AuditRow, message: str) -> str | None:
    longest = max(row.bounds, key=lambda bounds: bounds[1] - bounds[0])
    for number, (first, last) in enumerate(row.bounds, 1):
        same = (values_TD[first:last] == values_TD[longest[0] :][: last - first]).flatten(1).all(1)
        if not same.all():
            token = int((~same).nonzero()[0]) + 1
            what = message.format(f"{token} of segment {number}")
            return f"{what}: positions do not restart in each segment"
    return None


def _probes(attention_pass: AttentionPass) -> list[tuple[str, Tensor]]:
    """Groups of tokens whose outputs are differentiated together, with names: bool [T] each.

    Each costs a backward pass through attention, so a pass has those that tell its mistakes apart.
    """
    row = attention_pass.row
    numbers = range(len(row.bounds))
    probes = [(f"segment {number + 1}", row.span(0, None, slice(number, number + 1))) for number in numbers]
    probes.append(("the first token of each segment", row.span(0, 1)))
    if attention_pass.causal:
        halves = [row.span(0, (last - first) // 2, slice(at, at + 1)) for at, (first, last) in enumerate(row.bounds)]
        probes.append(("the first half of each segment", torch.stack(halves).any(0)))
        probes.append(("all but the last token of each segment", row.span(0, -1)))
    if attention_pass.window is not None:
        probes.append(("the last token of each segment", row.span(-1, None)))
    return probes


def _reach(outputs_L1D: Tensor | None, states_L1D: Tensor, held_L: Tensor, chosen_PT: Tensor) -> Tensor:
    """Largest gradient of each probe's outputs with respect to each token's states: [P, L]."""
    assert outputs_L1D is not None
    weights_T1D = torch.randn(chosen_PT.shape[1], *states_L1D.shape[1:], generator=torch.Generator().manual_seed(2))
    reach = []
    for chosen_T in chosen_PT:
        cotangent = (weights_T1D * chosen_T[:, None, None])[held_L.cpu()].to(outputs_L1D)
        (gradient,) = torch.autograd.grad(outputs_L1D, states_L1D, cotangent, retain_graph=True)
        reach.append(gradient.abs().amax((1, 2)).nan_to_num(nan=torch.inf))
    return torch.stack(reach)


def _check_reach(
    tap: _Tap, states_L1D: Tensor, held_L: Tensor, attention_pass: AttentionPass, context: ParallelContext
) -> str | None:
    row = attention_pass.row
    probes = _probes(attention_pass)
    chosen_PT = torch.stack([chosen_T for _, chosen_T in probes])
    names = [f"attention of {name}" for name, _ in probes]
    reach_PL = _reach(tap.attention, states_L1D, held_L, chosen_PT)
    if attention_pass.whole:
        half_T = row.span(0, (row.bounds[1][1] - row.bounds[1][0]) // 2, slice(1, 2))
        reach_PL = torch.cat([reach_PL, _reach(tap.output, states_L1D, held_L, half_T[None])])
        chosen_PT = torch.cat([chosen_PT, half_T[None]])
        names.append("the first half of segment 2")
        tap.output = None  # its graph is done with
    seen_PT = (gather_tokens(reach_PL.T.float(), held_L, row.length, context) > 0).T.cpu()
    expected_PT = _union(chosen_PT, attention_pass.visible())
    if torch.equal(seen_PT, expected_PT):
        return None
    probe = int((seen_PT != expected_PT).any(1).nonzero()[0])
    extra, missing = seen_PT[probe] & ~expected_PT[probe], expected_PT[probe] & ~seen_PT[probe]
    if extra.any():
        what = f"sees {row.describe(int(extra.nonzero()[0]))}, which it must not"
    else:
        what = f"does not see {row.describe(int(missing.nonzero()[-1]))}, which it must"
    return f"{names[probe]} {what}{_likeness(seen_PT, chosen_PT, attention_pass)}"


def _union(chosen_PT: Tensor, visible_TT: Tensor) -> Tensor:
    """What each probe's tokens see together: bool [P, T]."""
    return chosen_PT.float() @ visible_TT.float() > 0


def _likeness(seen_PT: Tensor, chosen_PT: Tensor, attention_pass: AttentionPass) -> str:
    """The mistake that gives what was seen, if it is a known one."""
    row, causal, window = attention_pass.row, attention_pass.causal, attention_pass.window
    guesses = {
        "as in a causal pass": row.visible(True),
        "as in a bidirectional pass": row.visible(False),
        "as in a causal pass with a sliding window": row.visible(True, window),
        "as with a sliding window": row.visible(False, window),
        "as without the boundaries of segments": row.visible(causal, window if causal else None, False),
    }
    for words, visible_TT in guesses.items():
        if torch.equal(seen_PT, _union(chosen_PT, visible_TT)):
            return f" ({words})"
    return ""


def _check_places(tap: _Tap, held_L: Tensor, row: AuditRow, context: ParallelContext) -> str | None:
    """The first and the last segment are equal, and so is what attention gives them."""
    assert tap.attention is not None
    states_TD = gather_tokens(tap.attention[:, 0].float(), held_L, row.length, context)
    first, last = (states_TD[slice(*row.bounds[at])] for at in (0, -1))
    apart = float((first - last).abs().max() / first.abs().max().clamp(min=1e-30))
    if apart <= _TOLERANCE[tap.attention.dtype]:
        return None
    return f"attention of equal segments differs by {apart:.1%} between two places in the row"


def _check_windows(chunk: GritDecoder, config: RunConfig) -> str | None:
    for layer in chunk.decoder.layers:
        found = layer.self_attention.core_attention.sliding_window
        wanted = window_of_layer(config.model, layer.layer_number - 1)
        if found != wanted:
            return f"layer {layer.layer_number} has the sliding window {found}, the configuration {wanted}"
    return None
