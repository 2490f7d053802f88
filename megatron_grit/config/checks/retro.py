"""Checks of what a model reads from a retrieval database."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.kinds import kind_options, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import neighbor_tokens, reading_layers, reads_neighbors


def retro_problems(config: RunConfig) -> Iterator[Problem]:
    """What in ``model.retro`` contradicts itself or the rest of the run."""
    model, retro, parallel = config.model, config.model.retro, config.parallel
    if config.data.retro_version is not None and config.data.retro_project is None:
        yield Problem(
            "data.retro_version",
            f"data.retro_version is {config.data.retro_version}, but data.retro_project is not set; give the "
            "--project-dir of tools/retro/build_db.py, or leave it out",
        )
    if config.data.retro_shuffle and not retro.num_neighbors:
        yield Problem(
            "data.retro_shuffle",
            "data.retro_shuffle has no effect: no neighbors are read; set model.retro.num_neighbors, or leave it out",
        )
    if not retro.num_neighbors:
        return
    outside = [layer for layer in retro.layers or () if not 0 <= layer < model.num_layers]
    if outside:
        yield Problem(
            "model.retro.layers",
            f"model.retro.layers has layer {outside[0]}, but layers are 0 to {model.num_layers - 1}",
        )
    elif retro.layers is not None and len(set(retro.layers)) != len(retro.layers):
        yield Problem("model.retro.layers", "model.retro.layers names a layer twice")
    elif not reading_layers(model):
        yield Problem(
            "model.retro.layers",
            f"model.retro.num_neighbors {retro.num_neighbors}, but no layer reads: by default the 6th does, and "
            f"model.num_layers is {model.num_layers}; set model.retro.layers",
        )
    if model.parallel_residual != "none":
        yield Problem(
            "model.parallel_residual",
            "model.parallel_residual does not go with model.retro: cross-attention stands between attention and "
            "feed-forward layer; set it to none",
        )
    if model.position_embedding == "learned_absolute" and neighbor_tokens(model) > model.max_position_embeddings:
        yield Problem(
            "model.retro.retrieved_chunks",
            f"a neighbor has {neighbor_tokens(model)} tokens (model.retro.retrieved_chunks x chunk_length), more than "
            f"model.max_position_embeddings {model.max_position_embeddings}",
        )
    if retro.parity == "core" and (parallel.pipeline > 1 or parallel.context > 1 or parallel.sequence_parallel):
        yield Problem(
            "model.retro.parity",
            "model.retro.parity core is for comparisons, with parallel.pipeline and parallel.context 1 and without "
            "parallel.sequence_parallel",
        )
    if config.data.neighbors == "contexts":
        for key, is_set in (
            ("retro_project", config.data.retro_project is not None),
            ("retro_shuffle", config.data.retro_shuffle),
        ):
            if is_set:
                yield Problem(
                    "data.neighbors",
                    f"data.neighbors contexts reads those beside the files, and data.{key} is set; leave one out",
                )
    wanted = config.data.neighbors == "database" and reads_neighbors(model) and config.data.retro_project is None
    if wanted and not all(kind_options(kind).EMBEDS for kind in trained_kinds(config)):
        yield Problem(
            "data.retro_project",
            f"model.retro.num_neighbors is {retro.num_neighbors}, but data.retro_project is not set; give the "
            "--project-dir of tools/retro/build_db.py",
        )
