"""SGPT's options against plain torch, sentence-transformers' modules and loss, and a tokenizer that knows the brackets.

Shape suffix legend: B = texts, M = tokens of the longest, D = width, Q = queries, G = passages of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.losses.contrastive import ContrastiveOptions, contrastive_loss
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.models.pooling import pool
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.rows import VOCAB, make_row, tiny_config
from tests.unit.data.json_tokenizers import chat_json

pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers")

LENGTHS, WIDTH = [7, 1, 12, 4], 6


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context


def padded_states() -> tuple[Tensor, Tensor]:
    """[B, M, D] and its attention mask, padded on the right with states that no pooling may see."""
    states_BMD = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(0))
    mask_BM = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask_BM[..., None], states_BMD, 1e3), mask_BM.long()


def pool_packed(states_BMD: Tensor, mask_BM: Tensor, method: str, prompt_length: int = 0) -> Tensor:
    """The same texts in one packed row."""
    states_TD = states_BMD[mask_BM > 0]
    segment_ids_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), mask_BM.sum(1))
    positions_T = torch.cat([torch.arange(int(length)) for length in mask_BM.sum(1)])
    return pool(states_TD, (positions_T >= prompt_length).float(), segment_ids_T, len(LENGTHS), method)


@pytest.mark.parametrize("method", ["weightedmean", "weightedmean_sgpt"])
def test_weighted_mean_is_sgpts(method: str) -> None:
    """SGPT's own lines: weights from 1 along the padded row, times the mask, and a sum that is at least 1e-9."""
    states_BMD, mask_BM = padded_states()
    weights_BM = torch.arange(1.0, states_BMD.shape[1] + 1) * mask_BM
    sums = (states_BMD * weights_BM[..., None]).sum(1)
    expected = sums / weights_BM.sum(1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(pool_packed(states_BMD, mask_BM, method), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "mode", "prompt_length"),
    [
        ("weightedmean", "weightedmean", 0),
        ("weightedmean_sgpt", "weightedmean", 0),
        ("weightedmean_sgpt", "weightedmean", 3),
        ("mean", "mean", 0),
        ("mean", "mean", 3),
        ("max", "max", 0),
        ("max", "max", 3),
        ("lasttoken", "lasttoken", 0),
        ("cls", "cls", 0),
    ],
)
def test_pooling_is_that_of_sentence_transformers(method: str, mode: str, prompt_length: int) -> None:
    from sentence_transformers.models import Pooling

    states_BMD, mask_BM = padded_states()
    if prompt_length:
        mask_BM[1, : prompt_length + 1] = 1  # every text is longer than the prompt
    module = Pooling(WIDTH, pooling_mode=mode, include_prompt=prompt_length == 0)
    features: dict[str, Any] = {"token_embeddings": states_BMD, "attention_mask": mask_BM.clone()}
    if prompt_length:
        features["prompt_length"] = prompt_length
    expected = module(features)["sentence_embedding"]
    torch.testing.assert_close(pool_packed(states_BMD, mask_BM, method, prompt_length), expected, rtol=1e-5, atol=1e-5)


def test_grits_numbering_is_none_of_sentence_transformers() -> None:
    """With a prompt that is left out, weightedmean counts from the text's first token, and they from the prompt's."""
    states_BMD, mask_BM = padded_states()
    mask_BM[1, :4] = 1
    ours, theirs = (pool_packed(states_BMD, mask_BM, method, 3) for method in ("weightedmean", "weightedmean_sgpt"))
    assert (ours - theirs)[0].abs().max() > 1e-2


@pytest.mark.parametrize("place", ["before_pooling", "after_pooling"])
@pytest.mark.parametrize("activation", ["none", "gelu", "tanh"])
def test_linear_layers_are_dense_modules(activation: str, place: str, context: ParallelContext) -> None:
    """The whole of what follows the decoder as modules: Pooling, with two Dense before or after it, and Normalize."""
    from sentence_transformers.models import Dense, Normalize, Pooling

    config = tiny_config(num_layers=1)
    embedding = config.embedding
    embedding.pooling, embedding.num_linear_layers, embedding.projection_dim = "weightedmean_sgpt", 2, 10
    embedding.linear_place, embedding.linear_activation = place, activation  # type: ignore[assignment]
    model, row = build_model(config, VOCAB, context).eval(), make_row(RowKind.EMBEDDING, [5, 9], 14)
    assert isinstance(model.embedding_head, torch.nn.Sequential)
    function = {"none": torch.nn.Identity(), "gelu": torch.nn.GELU(), "tanh": torch.nn.Tanh()}[activation]
    modules: list[torch.nn.Module] = []
    for layer in model.embedding_head:
        torch.nn.init.normal_(layer.weight, std=0.2)
        torch.nn.init.normal_(layer.bias, std=0.2)
        dense = Dense(
            layer.in_features,
            layer.out_features,
            activation_function=function,
            module_input_name="sentence_embedding" if place == "after_pooling" else "token_embeddings",
        )
        dense.linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        modules.append(dense)
    if place == "after_pooling":
        modules.insert(0, Pooling(64, pooling_mode="weightedmean"))
    else:
        modules.append(Pooling(10, pooling_mode="weightedmean"))
    hidden = model(row, Output.HIDDEN)[:, 0]
    states_BMD = torch.zeros(2, 9, 64)
    states_BMD[0, :5], states_BMD[1] = hidden[:5], hidden[5:14]
    features: dict[str, Any] = {
        "token_embeddings": states_BMD,
        "attention_mask": (torch.arange(9) < torch.tensor([[5], [9]])).long(),
    }
    for module in [*modules, Normalize()]:
        features = module(features)
    torch.testing.assert_close(model(row, Output.EMBEDDINGS), features["sentence_embedding"], rtol=1e-5, atol=1e-6)


def mnrl(queries_QD: Tensor, passages_PD: Tensor, group_size: int) -> Tensor:
    """MultipleNegativesRankingLoss(scale=20): positives of all queries, then a column for each negative."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model=None, scale=20.0)  # type: ignore[arg-type]
    columns = [passages_PD[column::group_size] for column in range(group_size)]
    return loss.compute_loss_from_embeddings([queries_QD, *columns], torch.empty(0))


def leaves(num_queries: int, group_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 10 + group_size)
    shapes = ((num_queries, 16), (num_queries * group_size, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_contrastive_loss_is_mnrl(group_size: int, ranks: int) -> None:
    """temperature is 1 / scale. Queries are shared out unevenly, and the shares of all ranks add up to the loss."""
    num_queries, results = 7, []
    options = ContrastiveOptions(temperature=1 / 20, group_size=group_size)
    for ours in (True, False):
        queries_QD, passages_PD = leaves(num_queries, group_size)
        if ours:
            unit = F.normalize(queries_QD, dim=1), F.normalize(passages_PD, dim=1)
            edges = [num_queries * rank // ranks for rank in range(ranks + 1)]
            shares = [slice(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True)]
            loss = torch.stack([contrastive_loss(*unit, options, anchors=share) for share in shares]).sum()
        else:
            loss = mnrl(queries_QD, passages_PD, group_size)  # normalises by itself
        loss.backward()
        results.append((loss.detach(), queries_QD.grad, passages_PD.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_another_temperature_is_not() -> None:
    queries_QD, passages_PD = leaves(7, 2)
    unit = F.normalize(queries_QD, dim=1), F.normalize(passages_PD, dim=1)
    loss = contrastive_loss(*unit, ContrastiveOptions(temperature=0.02, group_size=2))
    assert abs(float(loss - mnrl(queries_QD, passages_PD, 2))) > 0.1


def test_specb_is_what_sgpts_tokenizer_gives(tmp_path: Path) -> None:
    """SGPT adds [SOS] and {SOS} to the tokenizer, which cut the text off, and replaces their ids by the brackets'."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    from megatron_grit.config.schema import EmbeddingConfig
    from megatron_grit.data.text.markers import load_markers
    from megatron_grit.data.text.templates import encode_embedding
    from megatron_grit.data.text.tokenizer import load_tokenizer

    texts = ["[a] bracket at once", "][", "{x: [1, 2]}", " leading space", "plain text that goes on"]
    path = chat_json(tmp_path, texts * 50, vocab_size=320)
    tokenizer = load_tokenizer(path)
    markers = load_markers(EmbeddingConfig(brackets="specb"), None, tokenizer)
    backend, max_length = Backend.from_file(str(path)), 8
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("[SOS]", "{SOS}")])
    merged = 0
    for begin, end, side in (("[", "]", markers.query), ("{", "}", markers.passage)):
        opening, closing = (backend.encode(bracket).ids[0] for bracket in (begin, end))
        marker = backend.token_to_id(f"{begin}SOS{'}' if begin == '{' else ']'}")
        for text in texts:
            ids = backend.encode(backend.id_to_token(marker) + text).ids
            assert ids[0] == marker
            expected = [opening, *ids[1:][: max_length - 2], closing]
            head, tail = encode_embedding(tokenizer, text, None, max_length, side)
            assert head + tail == expected
            merged += backend.encode(begin + text + end).ids[:max_length] != expected
    assert merged, "brackets in the string never merge with this text: the test shows nothing"
