"""Reranking and the choice of a layer against transformers, on an export of a tiny model."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.compat import install_command
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.encoder import load_encoder
from megatron_grit.evaluation.ranking.first_stage import rank_by_words, read_ranking
from megatron_grit.evaluation.ranking.options import RerankingOptions
from megatron_grit.evaluation.ranking.rerank import answer_ids, score_passages
from megatron_grit.evaluation.tasks import reranking
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.inference.model import GritModel
from megatron_grit.store.rows import LineFile
from tests.corpus import sentences, write_jsonl

pytest.importorskip("transformers")
PAIRS = sentences(12, seed=5)
PASSAGES = [answer for _, answer in PAIRS]
LENGTHS = Lengths(max_length=256, batch_tokens=300)


@pytest.fixture(scope="module")
def models(trained_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[GritModel, Any]:
    """Ours, and the same weights in transformers."""
    from transformers import AutoModelForCausalLM

    from megatron_grit.convert.hf_out.convert import export_checkpoint

    out = export_checkpoint(trained_run.output_dir, tmp_path_factory.mktemp("export") / "out")
    theirs = AutoModelForCausalLM.from_pretrained(str(out), dtype="float32", attn_implementation="eager").eval()
    return GritModel.load(trained_run.output_dir, device="cpu"), theirs


def logits_of(theirs: Any, tokens: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def test_yes_no_is_the_difference_of_logits(models: tuple[GritModel, Any]) -> None:
    ours, theirs = models
    options = RerankingOptions()
    scores = score_passages(ours, PAIRS[0][0], PASSAGES, options, LENGTHS)
    yes, no = (ours.tokenizer.encode(f"x\n{word}")[len(ours.tokenizer.encode("x\n"))] for word in ("yes", "no"))
    assert answer_ids(ours) == [yes, no] and yes != no
    for passage, score in zip(PASSAGES, scores, strict=True):
        text = (
            f"<|user|>\nPassage: {passage}\n\nQuery: {PAIRS[0][0]}\n\nIs the passage relevant to the query? "
            "Answer yes or no.\n<|assistant|>\n"
        )
        logits = logits_of(theirs, [ours.tokenizer.bos_id, *ours.tokenizer.encode(text)])[-1]
        assert score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-5)
    assert np.ptp(scores) > 1e-4  # control: passages are read


def test_query_likelihood_is_the_sum_over_the_query(models: tuple[GritModel, Any]) -> None:
    ours, theirs = models
    options = RerankingOptions(method="query_likelihood", passage_chars=20)
    query = PAIRS[1][0]
    for passage, score in zip(PASSAGES, score_passages(ours, query, PASSAGES, options, LENGTHS), strict=True):
        head = f"Passage: {passage[:20]}\nQuery that this passage answers:"
        tokens = [ours.tokenizer.bos_id, *ours.tokenizer.encode(f"{head} {query}")]
        start = 1 + len(ours.tokenizer.encode(head))
        table = logits_of(theirs, tokens)
        expected = sum(float(table[place - 1, tokens[place]]) for place in range(start, len(tokens)))
        assert score == pytest.approx(expected, abs=1e-5 * abs(expected))


def test_a_long_passage_is_cut_and_a_long_query_refused(models: tuple[GritModel, Any]) -> None:
    ours, _ = models
    for method in ("yes_no", "query_likelihood"):
        options = RerankingOptions(method=method)  # type: ignore[arg-type]
        long = score_passages(ours, "why?", [" ".join(PASSAGES)], options, Lengths(max_length=120))
        assert np.isfinite(long).all()
        with pytest.raises(DataError, match="a query and the prompt alone have more than 20 tokens"):
            score_passages(ours, "why?", PASSAGES[:1], options, Lengths(max_length=20))


def test_layers_are_those_of_transformers(trained_run: Any, models: tuple[GritModel, Any]) -> None:
    import torch

    ours, theirs = models
    num_layers = ours.config.model.num_layers
    for layer in range(num_layers + 1):
        model = load_encoder(trained_run.output_dir, "cpu", layer)
        assert isinstance(model, GritModel)
        model.config.embedding.causal = True  # as transformers' decoder
        found = model.encode(PASSAGES, "Find it")
        tokens = model.embedding_tokens(PASSAGES, "Find it")
        for (head, tail), vector in zip(tokens, found, strict=True):
            with torch.no_grad():
                states = theirs(torch.tensor([head + tail]), output_hidden_states=True).hidden_states[layer][0]
            pooled = torch.nn.functional.normalize(states[len(head) :].mean(0), dim=0).numpy()
            np.testing.assert_allclose(vector, pooled, atol=1e-5)
        model.layer = None
        last = model.encode(PASSAGES, "Find it")
        assert (layer == num_layers) == bool(np.abs(last - found).max() < 1e-5)
    with pytest.raises(ConfigError, match=f"--layer must be at most {num_layers}, the model's, not 9"):
        load_encoder(trained_run.output_dir, "cpu", 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": a} for i, a in enumerate(PASSAGES)])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, (q, _) in enumerate(PAIRS)])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(6)))
    return tmp_path


def test_a_killed_reranking_resumes(
    models: tuple[GritModel, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bm25s")
    model, output = models[0], folder / "scores.jsonl"
    options = RerankingOptions(top_k=4)
    task = reranking.read(folder, options, output=output, weights="a")
    assert task.ranking is not None and all(0 < len(found) <= 4 for found in task.ranking.documents)
    figures = reranking.run(model, replace(task, output=None), LENGTHS)
    append, done = LineFile.append, []

    def killed(self: LineFile, lines: list[str]) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(lines)
        append(self, lines)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LineFile, "append", killed)
        reranking.run(model, task, LENGTHS)
    asked: list[str] = []

    def counted(model: GritModel, query: str, *arguments: Any) -> np.ndarray:
        asked.append(query)
        return score_passages(model, query, *arguments)

    monkeypatch.setattr(reranking, "score_passages", counted)
    assert reranking.run(model, task, LENGTHS) == figures
    assert asked == task.collection.queries[2:]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["query"] for line in lines] == task.collection.query_ids
    again = read_ranking(output, task.collection, 4)
    best = [max(line["scores"], key=line["scores"].__getitem__) for line in lines]
    assert [task.collection.document_ids[found[0]] for found in again.documents] == best
    assert {"ndcg_at_10", "first_ndcg_at_10"} <= set(figures.intervals)


def test_rankings_of_files(folder: Path) -> None:
    collection = reranking.read(folder, RerankingOptions(ranking="embeddings")).collection
    path = folder / "run.trec"
    path.write_text("q1 Q0 d3 1 9.5 name\nq1 Q0 d1 2 11 name\nq99 Q0 d1 1 3 name\n")
    found = read_ranking(path, collection, 5)
    assert [each.tolist() for each in found.documents[:3]] == [[], [1, 3], []]
    for content, message in [
        ("q1 Q0 d99 1 2 name\n", ":1: document d99"),
        ("q1 d3\n", ":1: must be query, Q0"),
        ("q1 Q0 d3 1 nan name\n", ":1: the score nan of d3 is no finite number"),
        ("q1 Q0 d3 1 9.5 name\nq1 Q0 d3 2 3 name\n", ":2: document d3 is ranked twice for query q1"),
        ("", "ranks nothing"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_ranking(path, collection, 5)
    words = rank_by_words(collection, 3)
    assert sum(place in found.tolist() for place, found in enumerate(words.documents)) >= 4


def test_prompts_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="prompt must hold {passage} once"):
        RerankingOptions(prompt="{query}")
    with pytest.raises(ConfigError, match="must hold {query} behind {passage}"):
        RerankingOptions(prompt="{query} {passage}", method="query_likelihood")


def test_without_bm25s_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=rf"^a ranking by words needs bm25s: {re.escape(install_command('retro'))}$"):
        reranking.read(folder)
