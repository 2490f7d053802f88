"""Which attention backend a run gets, and that a forward pass never waits for its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_grit import compat
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import ConfigError
from megatron_grit.models.attention import select_backend
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.models.layer_specs import transformer_config
from megatron_grit.parallel.context import ParallelContext
from tests.rows import TWO_PASSES, VOCAB, make_row, tiny_config

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def engine_config(precision: str = "bf16", context: int = 1, **model: Any) -> Any:
    config = tiny_config(**model)
    config.training.precision, config.parallel.context = precision, context  # type: ignore[assignment]
    return transformer_config(config)


@pytest.fixture
def with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(compat, "have_varlen_attention", lambda: True)


@pytest.mark.usefixtures("with_both")
def test_auto_takes_the_first_that_can() -> None:
    assert select_backend("auto", CUDA, engine_config()) == "te"
    assert select_backend("auto", CPU, engine_config()) == "sdpa"
    assert select_backend("auto", CUDA, engine_config(context=2)) == "varlen"
    assert select_backend("auto", CUDA, engine_config(context=2, attention_dropout=0.1)) == "sdpa"
    # Neither has fp32 kernels, or such heads: the first step would end in the middle of a kernel call.
    assert select_backend("auto", CUDA, engine_config("fp32")) == "sdpa"
    assert select_backend("auto", CUDA, engine_config(kv_channels=12)) == "sdpa"
    assert select_backend("auto", CUDA, engine_config(kv_channels=264)) == "sdpa"


def test_auto_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "have_transformer_engine", lambda: False)
    for have, expected in ((True, "varlen"), (False, "sdpa")):
        monkeypatch.setattr(compat, "have_varlen_attention", lambda have=have: have)
        assert select_backend("auto", CUDA, engine_config()) == expected
    for backend, reason in (("te", "TransformerEngine does not import"), ("varlen", "this torch or this GPU has none")):
        with pytest.raises(ConfigError, match=f"attention_backend is {backend}, but {reason}; use auto or sdpa"):
            select_backend(backend, CUDA, engine_config())


@pytest.mark.usefixtures("with_both")
@pytest.mark.parametrize(
    ("backend", "device", "settings", "reason"),
    [
        ("te", CPU, {}, "it needs a GPU"),
        ("varlen", CUDA, {"precision": "fp32"}, "no fp32"),
        ("te", CUDA, {"kv_channels": 12}, "heads have 12 channels"),
        ("te", CUDA, {"context": 2}, r"parallel\.context above 1"),
        ("varlen", CUDA, {"attention_dropout": 0.1}, "has no dropout"),
    ],
)
def test_a_backend_that_cannot_is_refused(
    backend: str, device: torch.device, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        select_backend(backend, device, engine_config(**settings))


class Waits(TorchDispatchMode):
    """Operations whose result the host has to wait for: a number, or a shape that depends on numbers."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype is torch.bool for index in args[1])
        if by_mask or name.startswith(self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a GPU would be waited for in the block."""

    def tolist(values: torch.Tensor) -> Any:
        mode.seen.append("tolist")
        return original(values)

    original = torch.Tensor.tolist
    with monkeypatch.context() as patch, Waits() as mode:
        patch.setattr(torch.Tensor, "tolist", tolist)
        yield mode.seen


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_no_forward_pass_waits_for_the_device(
    context: ParallelContext, monkeypatch: pytest.MonkeyPatch, kind: RowKind
) -> None:
    """A wait costs the lead that the host has over a GPU. SDPA is used here, which needs the most of the host."""
    output = Output.EMBEDDINGS if kind is RowKind.EMBEDDING else Output.TOKEN_LOSSES
    model = build_model(tiny_config(), VOCAB, context)
    on_host = make_row(kind, [9, 14, 5], 32)
    row = on_host.to(context.device)
    with waits(monkeypatch) as seen:
        values = model(row, output)
        values.sum().backward()
    assert seen == []
    # The control: a row that was not moved by to() is read from where it is.
    with waits(monkeypatch) as seen:
        again = model(on_host, output)
    assert seen.count("tolist") == 1 and seen.count("nonzero") == (kind is RowKind.GENERATIVE)
    assert torch.equal(values, again)
