"""A model that is sharded over several processes embeds, scores and builds databases as in one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.retro_kill_campaign import digests
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.text.markers import Side
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.training.trainer import train
from tests.corpus import sentences, tiny_run
from tests.harness.ranks import run_on_ranks
from tests.unit.retrieval.databases import make_texts, write_documents

TEXTS = [f"{answer} {question}" if i % 3 else answer for i, (question, answer) in enumerate(sentences(15))]
CALLS: dict[str, tuple[list[str], str, Side]] = {
    "instructed": (TEXTS, "Find the sentence that answers", "query"),
    "plain": (TEXTS, "", "passage"),
    "two": (TEXTS[3:5], "", "query"),
    "one": (TEXTS[:1], "", "passage"),
}
BATCH_TOKENS = 96
"""Of some three texts, so that there are more batches than stages and replicas."""
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dense, 2 processes": {
        "tp2": {"tensor": 2},
        "pp2": {"pipeline": 2},
        "cp2": {"context": 2},
        "sp2": {"tensor": 2, "sequence_parallel": True},
        "causal": {"tensor": 2},
    },
    "dense, 4 processes": {"tp2_twice": {"tensor": 2}, "tp2_pp2": {"tensor": 2, "pipeline": 2}},
    "mixture, 2 processes": {"ep2": {"expert": 2}, "tp2": {"tensor": 2}, "cp2_ep2": {"context": 2, "expert": 2}},
    "mixture, 4 processes": {
        "ep2_twice": {"expert": 2},
        "ep2_pp2": {"expert": 2, "pipeline": 2},
        "tp2_ep2": {"tensor": 2, "expert": 2},
        "cp2_ep4": {"context": 2, "expert": 4},
    },
}
PROMPTS = ["what does the parser do when it opens?", "what does the queue do?"]
GROUPS = {"tp2_twice": 2, "ep2_twice": 2}
"""Of a layout; one where it is not named."""
REPLICAS = {"ep2": 2, "ep2_twice": 2, "ep2_pp2": 2, "tp2_ep2": 2, "cp2_ep4": 2}


def embed(run: str, heldout: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Place in the group, vectors of each call, and losses of texts, by layout. A second group makes fewer calls than
    the first."""
    from megatron_grit.inference.model import GritModel

    results: dict[str, Any] = {}
    for name, layout in layouts.items():
        model = GritModel.load(run, device="cpu", parallel=ParallelConfig(**layout))
        model.model.embedding_config.causal = name == "causal"
        group = model.model_group
        vectors = {
            call: model.encode(texts, instruction, side=side, batch_tokens=BATCH_TOKENS).tolist()
            for call, (texts, instruction, side) in CALLS.items()
            if group.number == 0 or call == "two"
        }
        place = {
            key: getattr(group, key) for key in ("number", "num_groups", "size", "leads", "replica", "num_replicas")
        }
        losses = [values.tolist() for values in model.token_losses(heldout, batch_tokens=BATCH_TOKENS)]
        answers = model.generate(PROMPTS, max_new_tokens=5)
        results[name] = {"group": place, "vectors": vectors, "losses": losses, "answers": answers}
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """A trained step of a dense model, whose sides have linear layers of their own, and of a mixture of experts."""
    configs = {}
    for name, experts in (("dense", None), ("mixture", 4)):
        configs[name] = config = tiny_run(tmp_path_factory.mktemp(name), experts=experts)
        config.training.steps = 1
        if name == "dense":
            config.embedding.projection_dim, config.embedding.asymmetric = 24, "heads"
        train(config)
    return configs


@cache
def in_one_process(run: str) -> dict[str, np.ndarray]:
    from megatron_grit.inference.model import GritModel

    model = GritModel.load(run, device="cpu")
    assert (model.model_group.size, model.model_group.num_groups, model.model_group.leads) == (1, 1, True)
    return {
        call: model.encode(texts, instruction, side=side, batch_tokens=BATCH_TOKENS)
        for call, (texts, instruction, side) in CALLS.items()
    }


@cache
def losses_in_one_process(run: str, heldout: str) -> tuple[np.ndarray, np.ndarray]:
    from megatron_grit.inference.model import GritModel

    return GritModel.load(run, device="cpu").token_losses(heldout, batch_tokens=BATCH_TOKENS)


@cache
def answers_in_one_process(run: str) -> list[str]:
    from megatron_grit.inference.model import GritModel

    answers = GritModel.load(run, device="cpu").generate(PROMPTS, max_new_tokens=5)
    assert isinstance(answers, list) and any(answers)
    return answers


def furthest(found: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """Largest distance of a vector from what it is to be; vectors have length 1."""
    return max(np.linalg.norm(np.array(vectors) - expected[call], axis=1).max() for call, vectors in found.items())


@pytest.mark.parametrize("case", LAYOUTS)
def test_vectors_are_those_of_one_process(runs: dict[str, RunConfig], tmp_path: Path, case: str) -> None:
    config, world_size = runs[case.split(",")[0]], int(case.split()[1])
    expected = in_one_process(config.output_dir)
    (heldout,) = config.data.generative
    losses = losses_in_one_process(config.output_dir, heldout)
    results = run_on_ranks(embed, world_size, tmp_path, str(config.output_dir), heldout, LAYOUTS[case])
    answers = answers_in_one_process(config.output_dir)
    for name in LAYOUTS[case]:
        assert [result[name]["answers"] for result in results] == [answers] * world_size, name
        groups = [result[name]["group"] for result in results]
        num_groups = GROUPS.get(name, 1)
        assert {(t["num_groups"], t["size"], t["num_replicas"]) for t in groups} == {
            (num_groups, world_size // num_groups, REPLICAS.get(name, 1))
        }
        assert [t["number"] for t in groups if t["leads"]] == list(range(num_groups))
        for result in results:
            apart = furthest(result[name]["vectors"], expected)
            assert apart > 1e-3 if name == "causal" else apart < 1e-5, (name, apart)
            sums, counts = map(np.array, result[name]["losses"])
            assert (counts == losses[1]).all() and counts.sum() > 1000
            np.testing.assert_allclose(sums, losses[0], atol=2e-5 * counts.max())


def build(project: str, settings: dict[str, Any]) -> None:
    from megatron_grit.retrieval.stages.preparation import Preparation
    from megatron_grit.retrieval.stages.run import run_tasks

    tasks = "db-build,index-build,query-neighbors"
    run_tasks(Preparation(Path(project), tasks, settings))
    run_tasks(Preparation(Path(project), tasks, {}, validate=1.0))


@pytest.mark.parametrize(("kind", "mesh"), [("dense", "tensor"), ("mixture", "expert")])
def test_teams_build_the_same_database(
    runs: dict[str, RunConfig], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, mesh: str
) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("h5py")
    tokenizer = load_tokenizer(str(runs[kind].data.tokenizer))
    settings = {
        "data_paths": [write_documents(tmp_path / "corpus", make_texts(10, longest=6), tokenizer)],
        "tokenizer": runs[kind].data.tokenizer,
        "embedder": runs[kind].output_dir,
        f"embedder_{mesh}": 2,
        "query_instruction": "Find what follows",
        "batch_tokens": 128,
        "chunk_length": 16,
        "block_size": 8,
        "index": "IVF4,Flat",
        "num_neighbors_query": 10,
        "num_neighbors_save": 3,
        "keep_embeddings": True,
    }
    for world_size in (2, 4):
        ranks = tmp_path_factory.mktemp("ranks")
        run_on_ranks(build, world_size, ranks, str(tmp_path / f"of_{world_size}"), settings)
    found = digests(tmp_path / "of_2")
    for stage in ("train_emb", "add_codes", "query/"):
        assert sum(stage in name for name in found) > 2, f"{stage} has no block for each group"
    assert found == digests(tmp_path / "of_4")
