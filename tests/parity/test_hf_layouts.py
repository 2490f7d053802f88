"""Every family at every kind of layout: losses are transformers', and what is exported is the source, bit for bit.

A converted checkpoint is loaded at a layout, saved from there, and exported from what was saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import ParallelConfig, RunConfig, TrainingConfig
from megatron_grit.data.indexed.roles import RowKind
from tests.harness.ranks import run_on_ranks
from tests.parity.test_hf_import import TOLERANCE, make_model, make_row, segments, write_tokenizer

pytest.importorskip("transformers", reason="the reference is transformers")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# One model a family; four layers for four stages' worth of layouts.
NAMES = [
    "mistral",
    "mixtral",
    "llama_biases",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gpt_neox",
    "gptj",
    "gpt_neo",
]
TP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_pp2": (4, TP2 | {"pipeline": 2}),
}
# A vocabulary of 400 pads to 448 rows on one rank and to 512 on two.
VOCAB = 400


def fits(name: str, layout: str) -> bool:
    return layout != "ep2" or "moe" in name or name == "mixtral"


def run_layouts(directory: str, num_processes: int) -> dict[str, list[float]]:
    """Token losses of each model at each layout of so many processes; the weights are written from there."""
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights, read_config, save_weights

    losses = {}
    for layout, (size, parallel) in LAYOUTS.items():
        for name in NAMES:
            if size != num_processes or not fits(name, layout):
                continue
            checkpoint = Path(json.loads((Path(directory) / "checkpoints.json").read_text())[name])
            config = read_config(checkpoint)
            config.parallel = ParallelConfig(device="cpu", **parallel)
            with parallel_job(config.parallel, seed=3) as context, torch.no_grad():
                model = build_model(config, VOCAB, context)
                load_weights(checkpoint, model, context)
                output = through_all_stages(model.eval(), context, config.model.hidden_size)
                if context.is_last_stage:
                    losses[f"{name}-{layout}"] = output.tolist()
                save_weights(model, context, Path(directory) / f"{name}-{layout}")
    return losses


def through_all_stages(model: Any, context: Any, width: int) -> torch.Tensor:
    """Token losses of the row on the last stage."""
    from megatron_grit.models.decoder import Output

    row = make_row(RowKind.GENERATIVE)
    stages = torch.distributed.get_process_group_ranks(context.pipeline_group)
    place = stages.index(context.rank)
    if place > 0:
        states = torch.empty(row.tokens_1T.shape[1] // context.tensor_size, 1, width)
        torch.distributed.recv(states, src=stages[place - 1])
        model.set_input_tensor(states)
    output: torch.Tensor = model(row, Output.TOKEN_LOSSES)
    if place < len(stages) - 1:
        torch.distributed.send(output.contiguous(), dst=stages[place + 1])
    return output


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, list[float]]]:
    """(directory, transformers' losses, ours at every layout)."""
    from megatron_grit.convert.hf_in.convert import convert_checkpoint

    directory = tmp_path_factory.mktemp("layouts")
    expected, checkpoints = {}, {}
    row = make_row(RowKind.GENERATIVE)
    assert row.labels_1T is not None and row.loss_mask_1T is not None
    tokenizer = write_tokenizer(directory)
    for name in NAMES:
        torch.manual_seed(7)
        theirs = make_model(name, VOCAB, num_layers=4)
        theirs.save_pretrained(directory / "hf" / name)
        checkpoints[name] = str(convert_checkpoint(directory / "hf" / name, directory / "ours" / name, tokenizer))
        with torch.no_grad():
            logits = torch.cat([theirs(input_ids=ids[None]).logits[0] for ids in segments(row.tokens_1T[0])])
        nll = torch.nn.functional.cross_entropy(logits, row.labels_1T[0], reduction="none")
        expected[name] = nll * row.loss_mask_1T[0]
    (directory / "checkpoints.json").write_text(json.dumps(checkpoints))
    losses: dict[str, list[float]] = {}
    for size in sorted({size for size, _ in LAYOUTS.values()}):
        for rank in run_on_ranks(run_layouts, size, tmp_path_factory.mktemp(f"ranks{size}"), str(directory), size):
            losses |= rank
    return directory, expected, losses


CASES = [f"{name}-{layout}" for name in NAMES for layout in LAYOUTS if fits(name, layout)]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_transformers(converted: Any, case: str) -> None:
    _, expected, losses = converted
    torch.testing.assert_close(
        torch.tensor(losses[case]), expected[case.partition("-")[0]], rtol=TOLERANCE, atol=TOLERANCE * 5
    )


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_source(converted: Any, case: str) -> None:
    from megatron_grit.convert.families.registry import family_of_model, load_hf_config
    from megatron_grit.convert.hf_in.reader import SafetensorsFolder
    from megatron_grit.models.decoder import build_model
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.checkpoint import load_weights

    directory, _, _ = converted
    source = directory / "hf" / case.partition("-")[0]
    shape = load_hf_config(source)
    config = RunConfig(model=shape, training=TrainingConfig(precision="fp32"))
    with parallel_job(ParallelConfig(device="cpu"), seed=4) as context:
        model = build_model(config, VOCAB, context)
        load_weights(directory / case, model, context)
    weights = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    exported = dict(family_of_model(shape).to_hf(weights, shape))
    with SafetensorsFolder(source) as expected:
        assert exported.keys() == set(expected)
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
