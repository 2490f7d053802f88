"""Our own models as embedders: what they are asked, what they are known by, and which processes hold them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_grit.config.database.schema import RetroDbConfig, config_problems
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, MeshError
from megatron_grit.inference.encoders.grit import GritEmbedder
from megatron_grit.inference.encoders.load import MESH, load_embedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.retrieval.work import Worker
from megatron_grit.training.checkpoint import load_weights, resolve_checkpoint
from megatron_grit.training.checkpoint_save import save_checkpoint
from tests.corpus import sentences


@pytest.fixture
def grit(monkeypatch, tmp_path) -> SimpleNamespace:
    """A stand-in for a model that keeps what it is asked."""
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr("megatron_grit.inference.encoders.grit.resolve_checkpoint", lambda folder: tmp_path)
    calls = []

    def encode(texts, instruction, **options):
        calls.append((len(texts), instruction, options["side"], options["max_length"]))
        return np.array([[len(text), len(instruction)] for text in texts], dtype=np.float32)

    config = RunConfig()
    config.training.precision = "fp32"
    group = ModelGroup(number=1, num_groups=3, size=4, leads=False, replica=0, num_replicas=1, replica_group=None)
    return SimpleNamespace(encode=encode, config=config, calls=calls, folder=tmp_path, model_group=group)


def embedder_of(model: SimpleNamespace, max_length: int, instruction: str = "") -> GritEmbedder:
    options = EmbedderOptions(max_length=max_length, batch_tokens=128, query_instruction=instruction)
    return GritEmbedder(model, model.folder, options)


def test_our_models_get_the_instruction_with_queries_alone(grit, monkeypatch):
    monkeypatch.setattr("megatron_grit.inference.encoders.grit._WINDOW", 2)
    embedder = embedder_of(grit, 99, "find")
    assert embedder.dim == 2 and not embedder.sides_alike
    assert embedder.embed(["a", "bb", "ccc"]).tolist() == [[1, 0], [2, 0], [3, 0]]
    assert embedder.embed(["a"], "query").tolist() == [[1, 4]]
    assert grit.calls[1:] == [(2, "", "passage", 99), (1, "", "passage", 99), (1, "find", "query", 99)]
    assert embedder.embed([]).shape == (0, 2)


def test_our_models_that_tell_sides_apart_have_no_vectors_in_common(grit):
    assert embedder_of(grit, 99).sides_alike
    grit.config.embedding.brackets = "specb"
    assert not embedder_of(grit, 99).sides_alike


def test_the_fingerprint_of_our_models_is_of_the_checkpoint_and_of_what_passages_follow_from(grit):
    def fingerprint(max_length=64, instruction=""):
        return embedder_of(grit, max_length, instruction).fingerprint

    before = fingerprint()
    assert fingerprint(instruction="find") == before
    assert fingerprint(max_length=65) != before
    (grit.folder / "manifest.json").write_text("{} ")
    assert fingerprint() != before


def test_a_team_is_one_worker_of_which_one_process_writes(grit):
    alone = Worker(rank=7, world_size=12, group=7, num_groups=12)
    assert alone.in_group_of(embedder_of(grit, 64)) == Worker(rank=7, world_size=12, group=1, num_groups=3, leads=False)


def test_a_checkpoint_of_ours_embeds_as_the_model_itself(trained_run):
    config = trained_run
    texts = [answer for _, answer in sentences(12)]
    embedder = load_embedder(
        str(config.output_dir), EmbedderOptions(query_instruction="Answer the question", device="cpu")
    )
    model = GritModel.load(config.output_dir, device="cpu")
    assert embedder.dim == 64
    np.testing.assert_allclose(embedder.embed(texts), model.encode(texts), atol=1e-6)
    np.testing.assert_allclose(embedder.embed(texts, "query"), model.encode(texts, "Answer the question"), atol=1e-6)
    with pytest.raises(ConfigError, match="ours are pooled as trained"):
        load_embedder(str(config.output_dir), EmbedderOptions(pooling="mean"))
    assert Worker(rank=1, world_size=2, group=1, num_groups=2).in_group_of(embedder) == Worker(rank=1, world_size=2)
    for sizes, message in (
        ({"tensor": 2}, "the number of processes, 1, is no multiple of tensor 2 x pipeline 1 x context 1; start a"),
        ({"tensor": 3}, "parallel.tensor 3 does not divide model.num_attention_heads 4|no multiple of tensor 3"),
        ({"expert": 2}, "parallel.expert 2 needs a mixture of experts"),
        ({"pipeline": 2, "virtual_pipeline": 2}, "parallel.virtual_pipeline is of training"),
    ):
        named = "".join(rf".*embedder_{name} {sizes.get(name, 1)}" for name in MESH)
        with pytest.raises(MeshError, match=f"embedder .*run with{named}: .*({message})"):
            load_embedder(str(config.output_dir), EmbedderOptions(device="cpu"), parallel=ParallelConfig(**sizes))


def test_a_model_that_reads_neighbors_embeds_as_its_decoder_does(trained_run, tmp_path):
    """Its bidirectional pass has none, so one checkpoint is both retriever and reader."""
    reads = copy.deepcopy(trained_run)
    reads.output_dir, reads.model.retro = str(tmp_path), RetroConfig(num_neighbors=2, chunk_length=8, layers=[0, 1])
    tokenizer = load_tokenizer(reads.data.tokenizer)
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        model = build_model(reads, tokenizer.vocab_size, context)
        load_weights(resolve_checkpoint(trained_run.output_dir), [model], context)
        save_checkpoint(reads, context, [model], None, tokenizer, 1)
    decoder, reader = (
        load_embedder(str(run.output_dir), EmbedderOptions(device="cpu")) for run in (trained_run, reads)
    )
    texts = [answer for _, answer in sentences(12)]
    assert reader.dim == 64 and reader.fingerprint != decoder.fingerprint
    np.testing.assert_array_equal(reader.embed(texts), decoder.embed(texts))


def test_sizes_of_the_mesh_are_checked():
    for name in MESH:
        assert next(config_problems(RetroDbConfig(**{f"embedder_{name}": 0}))) == (
            f"embedder_{name} must be at least 1, not 0"
        )
