"""Brackets and side tokens: which ids they are, and where the loader puts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_grit.config.schema import DataConfig, EmbeddingConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, split_segments
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.markers import NO_MARKERS, SideMarkers, TextMarkers, load_markers
from megatron_grit.data.text.templates import encode_embedding
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.json_tokenizers import chat_json

TEXTS = ["plain words, [brackets] and {braces}", "more of them [ ] { }"] * 20


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(chat_json(tmp_path_factory.mktemp("json"), TEXTS, vocab_size=300))


def config_of(prefixes: dict[str, str], vocab_size: int | None, **embedding: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=vocab_size),
        embedding=EmbeddingConfig(**embedding),  # type: ignore[arg-type]
        data=DataConfig(embedding=[prefixes["emb_a"]], tokens_per_row=256, train_group_size=2),
        training=TrainingConfig(embedding_batch_size=12, objective="embedding", seed=7),
    )


def test_brackets_of_the_vocabulary(json_tokenizer: Tokenizer) -> None:
    markers = load_markers(EmbeddingConfig(brackets="specb"), None, json_tokenizer)
    names = [json_tokenizer.decode([*side.opening, *side.closing]) for side in (markers.query, markers.passage)]
    assert names == ["[]", "{}"]


def test_brackets_of_a_tokenizer_that_begins_texts_with_a_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_sentencepiece(TEXTS, tmp_path / "sp", 290))
    markers = load_markers(EmbeddingConfig(brackets="specb"), None, tokenizer)
    for side, pair in ((markers.query, "[]"), (markers.passage, "{}")):
        assert [len(side.opening), len(side.closing)] == [1, 1]
        assert tokenizer.decode([*side.opening, *side.closing]).replace(" ", "") == pair


def test_brackets_spelled_in_bytes(tokenizer: Tokenizer) -> None:
    """The tokenizer of these tests has never seen a bracket: the byte is a piece of the vocabulary too."""
    assert tokenizer.id_to_token(tokenizer.encode("[")[-1]) == "<0x5B>"
    assert load_markers(EmbeddingConfig(brackets="specb"), None, tokenizer).query.num_tokens == 2


def test_new_tokens_follow_the_vocabulary(json_tokenizer: Tokenizer) -> None:
    first = json_tokenizer.vocab_size
    speca = load_markers(EmbeddingConfig(brackets="speca"), first + 4, json_tokenizer)
    assert speca == SideMarkers(TextMarkers((first,), (first + 1,)), TextMarkers((first + 2,), (first + 3,)))
    sides = load_markers(EmbeddingConfig(side_tokens=True), first + 2, json_tokenizer)
    assert sides == SideMarkers(TextMarkers((first,)), TextMarkers((first + 1,)))
    both = load_markers(EmbeddingConfig(brackets="speca", side_tokens=True), first + 64, json_tokenizer)
    assert both.query == TextMarkers((first + 4, first), (first + 1,))
    assert both.passage == TextMarkers((first + 5, first + 2), (first + 3,))


def test_new_tokens_that_the_tokenizer_has(tmp_path: Path) -> None:
    names = ("<s>", "</s>", "{EOS}", "[SOS]", "[EOS]", "{SOS}")
    tokenizer = load_tokenizer(chat_json(tmp_path, TEXTS, vocab_size=300, special_tokens=names))
    markers = load_markers(EmbeddingConfig(brackets="speca"), None, tokenizer)
    assert markers == SideMarkers(TextMarkers((3,), (4,)), TextMarkers((5,), (2,)))


@pytest.mark.parametrize(("key", "names"), [("brackets", "[SOS] [EOS] {SOS} {EOS}"), ("side_tokens", "[QRY] [DOC]")])
def test_a_vocabulary_without_room_is_refused(key: str, names: str, json_tokenizer: Tokenizer) -> None:
    embedding = EmbeddingConfig(**{key: "speca" if key == "brackets" else True})  # type: ignore[arg-type]
    first, count = json_tokenizer.vocab_size, len(names.split())
    for size in (None, first + count - 1):
        with pytest.raises(ConfigError) as caught:
            load_markers(embedding, size, json_tokenizer)
        assert f"embedding.{key}" in str(caught.value) and names in str(caught.value)
        assert str(caught.value).endswith(f"set model.vocab_size to {first + count} or more")


def test_a_tokenizer_without_brackets_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="specb: the tokenizer .* has no token for '\\['; .* to speca"):
        load_markers(EmbeddingConfig(brackets="specb"), None, load_tokenizer(tmp_path))


@pytest.mark.parametrize("instruction", [None, "", "Find it"])
@pytest.mark.parametrize("max_length", [None, 30, 9])
def test_a_text_is_cut_to_leave_room(instruction: str | None, max_length: int | None, tokenizer: Tokenizer) -> None:
    markers = TextMarkers((7, 8), (9,))
    plain_head, plain = encode_embedding(tokenizer, "some words to embed, and more", instruction)
    head, tail = encode_embedding(tokenizer, "some words to embed, and more", instruction, max_length, markers)
    if max_length is not None and len(plain_head) + 3 >= max_length:
        assert tail == []
        return
    assert head == plain_head
    assert tail[:2] == [7, 8] and tail[-1] == 9
    kept = len(tail) - 3
    assert tail[2:-1] == plain[:kept]
    assert kept == (len(plain) if max_length is None else min(len(plain), max_length - len(head) - 3))


@pytest.mark.parametrize("brackets", ["none", "specb", "speca"])
@pytest.mark.parametrize("side_tokens", [False, True])
def test_rows_hold_the_records_in_their_markers(
    brackets: str, side_tokens: bool, indexed_prefixes: dict[str, str], tokenizer: Tokenizer
) -> None:
    config = config_of(indexed_prefixes, tokenizer.vocab_size + 6, brackets=brackets, side_tokens=side_tokens)
    markers = load_markers(config.embedding, config.model.vocab_size, tokenizer)
    batch, source = GritDataLoader(config, tokenizer).batch(3), IndexedRecords(indexed_prefixes["emb_a"])
    seen = 0
    for row in batch.rows_of("embedding"):
        assert row.slots_S is not None and row.pool_mask_T is not None and row.is_query_S is not None
        num_queries = batch.counts_of("embedding").num_queries
        assert row.is_query_S.tolist() == [slot < num_queries for slot in row.slots_S.tolist()]
        bounds = row.cu_seqlens.tolist()
        for segment, name in enumerate(row.record_ids):
            is_query = bool(row.is_query_S[segment])
            side = markers.query if is_query else markers.passage
            tokens = row.tokens_1T[0, bounds[segment] : bounds[segment + 1]].tolist()
            pooled = row.pool_mask_T[bounds[segment] : bounds[segment + 1]].bool()
            spans = source.get(int(name.rpartition("#")[2]))
            possible = []
            for first, last in split_segments([int(role) for role, _ in spans]):
                if (spans[last - 1][0] is Role.QUERY) == is_query:
                    head = [int(token) for _, ids in spans[first : last - 1] for token in ids]
                    text = [int(token) for token in spans[last - 1][1]]
                    possible.append((head, [*side.opening, *text, *side.closing]))
            head_length = int((~pooled).sum())
            assert (tokens[:head_length], tokens[head_length:]) in possible
            assert pooled[head_length:].all()
            seen += 1
    assert seen == 12 * 3


def test_markers_are_no_part_of_a_texts_identity(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    """A query that equals a passage is found by loss.mask_equal_texts whatever stands around the two."""
    ids = []
    for brackets in ("none", "specb"):
        config = config_of(indexed_prefixes, None, brackets=brackets)
        found: dict[int, int] = {}
        for row in GritDataLoader(config, tokenizer).batch(0).rows_of("embedding"):
            assert row.slots_S is not None
            found |= dict(zip(row.slots_S.tolist(), row.text_ids().tolist(), strict=True))
        ids.append(found)
    assert ids[0] == ids[1]


def test_markers_count_towards_the_longest_segment(indexed_prefixes: dict[str, str], tokenizer: Tokenizer) -> None:
    longest = IndexedRecords(indexed_prefixes["emb_a"]).meta.longest_segment_tokens
    config = config_of(indexed_prefixes, None, brackets="specb")
    config.data.tokens_per_row = longest + 1
    with pytest.raises(DataError, match=f"a segment of {longest + 2} tokens, 2 of them from embedding.brackets"):
        GritDataLoader(config, tokenizer)
    config.data.tokens_per_row = longest + 2
    GritDataLoader(config, tokenizer).batch(0)
    config.data.tokens_per_row, config.data.over_long_texts = longest - 1, "truncate"
    markers = load_markers(config.embedding, None, tokenizer)
    loader, lengths = GritDataLoader(config, tokenizer), []
    for step in range(6):
        for row in loader.batch(step).rows_of("embedding"):
            ends = np.array(row.cu_seqlens[1 : len(row.record_ids) + 1])
            assert row.is_query_S is not None
            sides = [markers.query if is_query else markers.passage for is_query in row.is_query_S.tolist()]
            assert row.tokens_1T[0, ends - 1].tolist() == [side.closing[0] for side in sides], "a bracket was cut off"
            lengths += np.diff(ends, prepend=0).tolist()
    assert max(lengths) == longest - 1


def test_without_options_there_are_none(tokenizer: Tokenizer) -> None:
    assert load_markers(EmbeddingConfig(), None, tokenizer) == SideMarkers(NO_MARKERS, NO_MARKERS)


def test_no_markers_need_no_room(json_tokenizer: Tokenizer) -> None:
    """A vocabulary that was cut below the tokenizer's trains on texts that do without the rest."""
    assert load_markers(EmbeddingConfig(), json_tokenizer.vocab_size - 1, json_tokenizer) == SideMarkers()
