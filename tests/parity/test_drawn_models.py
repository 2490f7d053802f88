"""Some of the models that benchmarks/model_options.py draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.schema import ParallelConfig

pytest.importorskip("transformers", reason="the reference is transformers")
pytest.importorskip("peft", reason="the reference of adapters is PEFT")

CASES = (3, 5, 17, 40, 54, 60, 72, 1199)
"""Eight families between them, tied or not, with and without adapters; 72 and 1199 were once wrong."""


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    from megatron_grit.parallel.launch import parallel_job

    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        yield context


@pytest.mark.parametrize("case", CASES)
def test_a_drawn_model(case: int, context: Any, tmp_path: Path) -> None:
    from tests.parity.drawn_models import run_case

    assert "refused" not in run_case(case, tmp_path, context)


def test_a_wrong_gradient_shows(context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a tensor that the table leaves as it was drawn."""
    from megatron_grit.convert import param_map
    from tests.parity.drawn_models import run_case

    monkeypatch.setattr(param_map.GatedFC1, "megatron_to_hf", lambda self, tensor, model: list(tensor.chunk(2))[::-1])
    with pytest.raises(AssertionError, match="apart"):
        run_case(CASES[0], tmp_path, context)


OWN_CASES = (2, 27, 33, 114)
"""Of our own options: a shape that no family has, and one that Qwen3 has (114); 27 once ended in the engine."""


@pytest.mark.parametrize("case", OWN_CASES)
def test_a_drawn_decoder_of_our_own(case: int, context: Any, tmp_path: Path) -> None:
    from tests.parity.drawn_options import run_own_case

    found = run_own_case(case, tmp_path, context)
    assert ("refused" in found) == (case == 27) and ("is a Qwen3ForCausalLM" in found) == (case == 114)
