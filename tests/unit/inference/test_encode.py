"""Texts to rows and batches of replicas, and what a checkpoint's settings become on another mesh."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.errors import ConfigError, MeshError
from megatron_grit.inference.encode import first_layers, pooled_row
from megatron_grit.inference.loading import fit_mesh
from megatron_grit.inference.mesh_rows import share_out
from tests.rows import tiny_config

TEXTS = [([5, 6], [7, 8, 9]), ([], [1]), ([2], [3, 4])]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    budget=st.integers(30, 200),
    num_replicas=st.integers(1, 5),
)
def test_replicas_have_equal_shares_where_texts_are_enough(lengths: list[int], budget: int, num_replicas: int) -> None:
    batches = share_out(np.array(lengths), budget, num_replicas)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget for batch in batches)
    if len(lengths) >= num_replicas * len(batches):
        assert len(batches) % num_replicas == 0


@pytest.mark.parametrize("row_length", [None, 9, 16])
def test_padding_is_a_segment_that_is_not_pooled(row_length: int | None) -> None:
    row = pooled_row(TEXTS, is_query=True, row_length=row_length)
    padding = 0 if row_length is None else row_length - 9
    assert row.tokens_1T.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4] + [0] * padding]
    assert row.positions_1T.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2] + [0] * padding]
    assert row.cu_seqlens.tolist() == [0, 5, 6, 9] + [9 + padding] * (padding > 0)
    assert row.max_seqlen == max(5, padding)
    assert row.padding_mask_1T.tolist() == [[False] * 9 + [True] * padding]
    assert row.segment_ids_T is not None and row.pool_mask_T is not None and row.is_query_S is not None
    assert row.segment_ids_T.tolist() == [0] * 5 + [1] + [2] * 3 + [3] * padding
    assert row.pool_mask_T.tolist() == [0, 0, 1, 1, 1, 1, 0, 1, 1] + [0] * padding
    assert row.is_query_S.tolist() == [True] * 3


def test_settings_that_a_mesh_needs_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    mixture = tiny_config(experts=4)
    mixture.parallel = ParallelConfig(tensor=2, expert=2)
    fit_mesh(mixture)
    assert mixture.parallel.sequence_parallel
    dense = tiny_config()
    dense.model.attention_backend, dense.parallel = "te", ParallelConfig(context=2)
    fit_mesh(dense)
    assert dense.model.attention_backend == "auto" and not dense.parallel.sequence_parallel
    for parallel, message in (
        (ParallelConfig(context=3), "the number of processes, 4, is no multiple of .* context 3"),
        (ParallelConfig(expert=8), "parallel.expert 8 does not divide model.num_experts 4"),
        (ParallelConfig(pipeline=4, expert=2), "does not divide the 1 processes of a pipeline stage"),
    ):
        mixture.parallel = parallel
        with pytest.raises(MeshError, match=message):
            fit_mesh(mixture)


def test_a_layer_that_a_model_does_not_have_is_refused() -> None:
    block = SimpleNamespace(layers=["first", "second", "third"], final_layernorm="norm")
    model: Any = SimpleNamespace(decoder=block)
    for layer, norm in ((0, None), (2, None), (3, "norm"), (None, "norm")):
        with first_layers(model, layer):
            assert (len(block.layers), block.final_layernorm) == (3 if layer is None else layer, norm)
    for layer in (-1, 4, 99):
        refused = pytest.raises(ConfigError, match=f"^layer must be 0 to 3, the model's last, or None, not {layer}$")
        with refused, first_layers(model, layer):
            pass
    assert len(block.layers) == 3
