"""Documents are ranked by what encode and evaluation say of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from megatron_grit.evaluation.ranking.options import RerankingOptions
from megatron_grit.evaluation.ranking.rerank import score_passages
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.inference.model import GritModel
from megatron_grit.serving import rerank
from megatron_grit.serving.app import create_app
from megatron_grit.serving.service import Service
from tests.corpus import sentences
from tests.unit.serving.test_server import error_of

RERANK = "/v1/rerank"
QUERY = "what does the parser do when it opens?"
DOCUMENTS = [answer for _, answer in sentences(7, seed=3)]


@pytest.fixture(scope="module")
def client(model: GritModel) -> Iterator[TestClient]:
    with TestClient(create_app(Service(model, "tiny", max_length=200)), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("instruction", ["Answer the question", "", None])
def test_by_embeddings(client: TestClient, model: GritModel, instruction: str | None) -> None:
    plain = None if instruction is None else ""
    vectors = model.encode(DOCUMENTS, plain, side="passage")
    expected = vectors @ model.encode(QUERY, instruction, side="query")
    body = {"query": QUERY, "documents": DOCUMENTS, "instruction": instruction, "model": "tiny"}
    answer = client.post(RERANK, json=body).json()
    order = [one["index"] for one in answer["results"]]
    assert order == np.argsort(-expected).tolist() and order != list(range(len(DOCUMENTS)))
    found = [one["relevance_score"] for one in answer["results"]]
    np.testing.assert_allclose(found, expected[order], atol=1e-6)
    assert "document" not in answer["results"][0] and answer["model"] == "tiny"
    pairs = [*model.embedding_tokens([QUERY], instruction), *model.embedding_tokens(DOCUMENTS, plain)]
    num_tokens = sum(len(head) + len(tail) for head, tail in pairs)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


@pytest.mark.parametrize("method", ["yes_no", "query_likelihood"])
def test_by_what_the_model_generates(client: TestClient, model: GritModel, method: Any) -> None:
    options = RerankingOptions(method=method)
    expected = score_passages(model, QUERY, DOCUMENTS, options, Lengths(max_length=200))
    body = {"query": QUERY, "documents": DOCUMENTS, "method": method}
    results = client.post(RERANK, json=body).json()["results"]
    assert [one["index"] for one in results] == np.argsort(-expected).tolist()
    assert [one["relevance_score"] for one in results] == np.sort(expected)[::-1].tolist()


def test_the_best_with_their_texts(client: TestClient) -> None:
    body = {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS]}
    whole = client.post(RERANK, json=body).json()["results"]
    best = client.post(RERANK, json=body | {"top_n": 2, "return_documents": True}).json()["results"]
    assert [one["document"]["text"] for one in best] == [DOCUMENTS[one["index"]] for one in whole[:2]]
    assert [one["relevance_score"] for one in best] == [one["relevance_score"] for one in whole[:2]]
    assert len(client.post(RERANK, json=body | {"top_n": 99}).json()["results"]) == len(DOCUMENTS) == len(whole)
    asked = rerank.read_request(body, 9)
    assert [one["index"] for one in rerank.results(asked, np.ones(len(DOCUMENTS)))] == list(range(len(DOCUMENTS)))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"query": None}, "query must be a string, not null"),
        ({"query": " "}, "query is empty"),
        ({"query": "\ud800"}, "surrogate"),
        ({"documents": None}, "documents must be a list of texts, not null"),
        ({"documents": []}, "documents must be a list of texts"),
        ({"documents": ["a", 3]}, 'document 1 must be a string or {"text": a string}, not 3'),
        ({"documents": [{"text": 3}]}, "document 0 must be a string"),
        ({"documents": [{"text": "a", "title": "b"}]}, "document 0 must be a string"),
        ({"documents": ["a", ""]}, "document 1 is empty"),
        ({"documents": ["a"] * 2049}, "documents holds 2049 texts; send at most 2048"),
        ({"top_n": 0}, "top_n must be at least 1"),
        ({"return_documents": 1}, "return_documents must be true or false, not 1"),
        ({"method": "magic"}, "method must be one of similarity, yes_no, query_likelihood, not 'magic'"),
        ({"method": "yes_no", "instruction": ""}, "instruction is of the method similarity, not of yes_no"),
        ({"instruction": 3}, "instruction must be str or null, not 3"),
        ({"instruction": "long " * 199}, "fills max_length 200"),
        ({"method": "yes_no", "query": "long " * 199}, "alone have more than 200 tokens"),
        ({"max_tokens_per_doc": 3}, "unknown field max_tokens_per_doc"),
    ],
)
def test_what_cannot_be_ranked(client: TestClient, more: dict[str, Any], why: str) -> None:
    content = json.dumps({"query": "a", "documents": ["b"]} | more)
    assert why in error_of(client.post(RERANK, content=content))
