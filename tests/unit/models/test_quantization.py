"""NF4 against bitsandbytes and against the formulas, and linear layers of the engine that hold their weight in it."""

from __future__ import annotations

import functools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.models.adapters import quantization
from megatron_grit.models.adapters.quantization import (
    NF4_VALUES,
    QuantizedProjection,
    Statistics,
    dynamic_codebook,
    magnitudes_of,
    nf4_codebook,
    pack,
    quantize_linear_,
    quantize_nf4,
    round_trip,
)
from tests.harness.ranks import run_on_ranks

CPU = torch.device("cpu")
SHAPES = [(64, 64), (5, 100), (1, 1), (3, 7), (128, 192), (33, 65), (512, 512), (1, 63), (300, 257), (700, 640)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def reference() -> Any:
    pytest.importorskip("bitsandbytes", reason="the reference is bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale
    if shape[0] > 3:
        values[2] = 0  # a block that cannot be divided by its largest magnitude
    return values.to(dtype)


def test_codebooks_are_bitsandbytes() -> None:
    assert torch.equal(nf4_codebook(CPU), reference().get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_codebook(CPU), reference().create_dynamic_map())


def test_the_16_values_are_quantiles() -> None:
    """Equations of the paper's appendix: 8 quantiles below zero, 9 above, zero in both, divided by the largest."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(NF4_VALUES, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-5])
def test_codes_and_values_are_bitsandbytes(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    values = weight(shape, dtype, scale)
    packed, state = reference().quantize_4bit(values, quant_type="nf4", compress_statistics=False)
    codes, statistics = quantize_nf4(values, double=False)
    assert torch.equal(pack(codes), packed.view(-1)) and torch.equal(statistics.codes_K, state.absmax)
    assert torch.equal(round_trip(values, double=False), reference().dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantisation_is_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against its arithmetic in torch bit for bit, and against its CPU library, whose search for the nearest of 256
    values is not exact."""
    values = weight(shape, dtype)
    packed, state = reference().quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    codes, statistics = quantize_nf4(values)
    assert torch.equal(pack(codes), packed.view(-1))
    assert torch.equal(statistics.mean, state.offset) and torch.equal(statistics.scales, state.state2.absmax)
    magnitudes = quantize_nf4(values, double=False)[1].codes_K - statistics.mean
    book = dynamic_codebook(CPU)
    if magnitudes.any():
        # For float64 its CPU backend computes in torch, as its own tests do.
        exact, _ = torch.ops.bitsandbytes.quantize_blockwise(magnitudes.double(), book, 256)
        assert torch.equal(statistics.codes_K, exact)
        number = torch.arange(len(magnitudes)) // 256
        normed = magnitudes / statistics.scales[number]
        differs = (statistics.codes_K != state.absmax).nonzero().flatten()
        ours, theirs = (book[codes_K[differs].int()] for codes_K in (statistics.codes_K, state.absmax))
        assert ((normed[differs] - (ours + theirs) / 2).abs() < 2e-5).all()
        assert len(differs) <= 1 + 0.01 * len(magnitudes)
    # With the library's statistics in place of ours: its values, bit for bit.
    theirs_K = Statistics(state.absmax, statistics.scales, statistics.mean)
    projection = QuantizedProjection(codes, theirs_K, values.shape, (0, 0), dtype)
    assert torch.equal(projection.dequantize(), reference().dequantize_4bit(packed, state))


def test_zeros_stay_zero() -> None:
    assert torch.equal(round_trip(torch.zeros(128, 64)), torch.zeros(128, 64))


def test_the_kernel_for_gpus_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that a GPU would make, through bitsandbytes' implementation for CPUs."""
    reference()
    projection = QuantizedProjection.of_whole(weight((96, 192), torch.bfloat16))
    expected = projection.dequantize()
    calls = []
    kernel = quantization.bitsandbytes_kernel()
    assert kernel is not None
    monkeypatch.setattr(
        quantization, "bitsandbytes_kernel", lambda: lambda *args: (calls.append(args), kernel(*args))[1]
    )
    monkeypatch.setattr(quantization, "_is_on_gpu", lambda tensor: True)
    assert torch.equal(projection.dequantize(), expected) and len(calls) == 1


def test_size_is_4_127_bits() -> None:
    projection = QuantizedProjection.of_whole(weight((1024, 2048), torch.bfloat16))
    assert 8 * projection.num_bytes / 2**21 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert not projection.state_dict() and not list(projection.parameters())
    single = QuantizedProjection.of_whole(weight((1024, 2048), torch.bfloat16), double=False)
    assert 8 * single.num_bytes / 2**21 == pytest.approx(4.5, abs=1e-4)


def test_a_cast_of_the_model_leaves_statistics_alone() -> None:
    projection = QuantizedProjection.of_whole(weight((128, 128)))
    before = projection.dequantize()
    torch.nn.Sequential(projection).bfloat16()
    assert projection.scales.dtype is torch.float32 and torch.equal(projection.dequantize(), before)


@pytest.mark.parametrize("columns", [256, 128, 80])
def test_a_rank_holds_its_part_of_the_whole(columns: int) -> None:
    """Columns whose blocks lie within rows, and others."""
    whole = weight((24, columns))
    expected = round_trip(whole)
    codes, statistics = quantize_nf4(whole)
    for rows in (slice(0, 12), slice(12, 24)):
        share = QuantizedProjection(codes[rows], statistics, whole.shape, (rows.start, 0), whole.dtype)
        assert torch.equal(share.dequantize(), expected[rows])
    half = columns // 2
    for part in (slice(0, half), slice(half, columns)):
        share = QuantizedProjection(codes[:, part], statistics, whole.shape, (0, part.start), whole.dtype)
        assert torch.equal(share.dequantize(), expected[:, part])


def test_magnitudes_without_double_quantisation() -> None:
    stored = torch.tensor([1.0, 2.0])
    assert magnitudes_of(Statistics(stored, stored[:0], stored[0]), torch.arange(2), stored) is stored


SIZES = {"column": (192, 96), "row": (128, 64)}


LAYOUTS = [(kind, sequence) for kind in SIZES for sequence in (False, True)]


def build_linear(kind: str, context: Any) -> tuple[Any, Tensor]:
    """An engine layer with whole weights that do not depend on the layout, frozen, and a layout of its projections."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_grit.models.adapters import PartLayout

    size, rank = context.tensor_size, context.tensor_rank
    engine_config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=size,
        sequence_parallel=context.sequence_parallel,
        gradient_accumulation_fusion=False,
    )
    inputs, outputs = SIZES[kind]
    options = {"config": engine_config, "init_method": torch.nn.init.ones_, "bias": True, "skip_bias_add": False}
    whole = weight((outputs, inputs), scale=0.3)
    if kind == "column":
        linear = ColumnParallelLinear(inputs, outputs, gather_output=False, **options)
        parts = [part.chunk(size)[rank] for part in halves(whole, 0)]
        own, layout = torch.cat(parts), PartLayout(("gate_proj", "up_proj"), tuple(map(len, parts)))
    else:
        linear = RowParallelLinear(inputs, outputs, input_is_parallel=True, is_expert=False, **options)
        own, layout = whole.chunk(size, 1)[rank], PartLayout(("o_proj",), (outputs,))
    linear.weight.data.copy_(own)
    linear.weight.requires_grad_(False)
    split = SimpleNamespace(is_column=kind == "column", group=linear.tp_group)
    linear.adapter = SimpleNamespace(layout=layout, split=split)
    torch.nn.init.ones_(linear.bias)
    return linear, whole


def halves(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two projections of the column parallel layer."""
    gate, up = tensor.chunk(2, dim)
    return gate, up


def run_layer(kind: str, sequence_parallel: bool) -> dict[str, Any]:
    """Of the quantised layer, this rank's output, gradients and weight."""
    import torch.distributed as dist

    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.parallel.launch import parallel_job

    size = dist.get_world_size()
    parallel = ParallelConfig(device="cpu", tensor=size, sequence_parallel=sequence_parallel and size > 1)
    with parallel_job(parallel, seed=1) as context:
        rank = context.tensor_rank
        linear, _ = build_linear(kind, context)
        quantize_linear_(linear)
        states, gradient = inputs_of(kind)
        own = states.chunk(size, -1)[rank] if kind == "row" else states
        if context.sequence_parallel and kind == "column":
            own = states.chunk(size)[rank]
        own = own.clone().requires_grad_()
        output, _ = linear(own)
        if kind == "column":
            gradient = torch.cat([part.chunk(size, -1)[rank] for part in halves(gradient, -1)], -1)
        elif context.sequence_parallel:
            gradient = gradient.chunk(size)[rank]
        output.backward(gradient)
        tensors = {"output": output, "gradient": own.grad, "bias": linear.bias.grad}
        return {name: tensor.tolist() for name, tensor in tensors.items()} | {
            "weight": linear.weight.dequantize().tolist()
        }


def inputs_of(kind: str) -> tuple[Tensor, Tensor]:
    """The layer's input and the gradient of its output, whole."""
    generator = torch.Generator().manual_seed(2)
    inputs, outputs = SIZES[kind]
    return torch.randn(6, 1, inputs, generator=generator), torch.randn(6, 1, outputs, generator=generator)


def run_layers() -> list[dict[str, Any]]:
    return [run_layer(*layout) for layout in LAYOUTS]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def layers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """For each rank what :func:`run_layers` gave."""
    return run_on_ranks(run_layers, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[f"{kind} sequence={s}" for kind, s in LAYOUTS])
def test_a_quantised_layer_computes_with_the_whole_weights_blocks(
    layers: list[list[dict[str, Any]]], number: int
) -> None:
    """Output and gradients of a plain product with the weight that the whole projections have after quantisation."""
    kind, sequence = LAYOUTS[number]
    sequence = sequence and len(layers) > 1
    ranks = [{name: torch.tensor(values) for name, values in rank[number].items()} for rank in layers]
    inputs, outputs = SIZES[kind]
    whole = weight((outputs, inputs), scale=0.3)
    expected = round_trip(whole) if kind == "row" else torch.cat([round_trip(part) for part in halves(whole, 0)])
    assert (expected - whole).abs().max() > 0.01

    def joined(name: str, dim: int) -> Tensor:
        """Rows or channels of all ranks, the two projections of the column parallel layer each together."""
        if kind == "row":
            return torch.cat([rank[name] for rank in ranks], dim)
        parts = zip(*[halves(rank[name], dim) for rank in ranks], strict=True)
        return torch.cat([torch.cat(part, dim) for part in parts], dim)

    assert torch.equal(joined("weight", 1 if kind == "row" else 0), expected)
    states, gradient = (tensor.requires_grad_() for tensor in inputs_of(kind))
    output = torch.nn.functional.linear(states, expected) + 1
    (output * gradient.detach()).sum().backward()
    if kind == "column":
        found, bias = joined("output", -1), joined("bias", 0)
        grad = torch.cat([rank["gradient"] for rank in ranks]) if sequence else ranks[-1]["gradient"]
    else:
        found = torch.cat([rank["output"] for rank in ranks]) if sequence else ranks[-1]["output"]
        grad = torch.cat([rank["gradient"] for rank in ranks], -1)
        bias = sum(rank["bias"] for rank in ranks) if sequence else ranks[-1]["bias"]
    assert torch.allclose(found, output, atol=1e-5)
    assert torch.allclose(grad, states.grad, atol=1e-5)
    assert torch.allclose(bias, gradient.sum((0, 1)), atol=1e-5)


def test_no_dequantised_weight_is_kept(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward nothing of the weight's own size lives: the backward makes it again."""
    linear, _ = build_linear("column", context)
    quantize_linear_(linear)
    made = []
    dequantize = quantization.QuantizedWeight.dequantize

    def counted(self: Any) -> Tensor:
        result = dequantize(self)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(quantization.QuantizedWeight, "dequantize", counted)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda t: t):
        output, _ = linear(torch.randn(6, 1, SIZES["column"][0], requires_grad=True))
    assert len(made) == 1 and made[0]() is None
    assert not saved
    output.sum().backward()
    assert len(made) == 2


def test_a_weight_that_is_trained_is_not_quantised(context: Any) -> None:
    linear, _ = build_linear("row", context)
    linear.weight.requires_grad_()
    with pytest.raises(AssertionError, match="frozen"):
        quantize_linear_(linear)
