"""Caches of documents against reading them again, and what must not be read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_grit.config.options import CacheUse, SamplingOptions
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.continuations import text_row
from megatron_grit.inference.document_cache import store as store_module
from megatron_grit.inference.document_cache.document_cache import DocumentCache
from megatron_grit.inference.document_cache.formats import FORMATS, prompt_behind
from megatron_grit.inference.document_cache.join import JoinedCaches
from megatron_grit.inference.document_cache.rotation import moved
from megatron_grit.inference.document_cache.store import CacheStore, load_cache, save_cache
from megatron_grit.inference.generation.generate import Generation
from megatron_grit.inference.generation.kv_cache import SequenceCache
from megatron_grit.inference.generation.sampling import TokenSampler
from megatron_grit.inference.model import GritModel
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.launch import parallel_job
from tests.rows import tiny_config

DOCUMENTS = [
    "The parser opens a file and reads the first line of it.",
    "A queue keeps tasks.",
    "The cache is a folder.",
]
QUERY = "what does the parser do when it opens?"
NEW = 8
SHAPES: dict[str, dict[str, Any]] = {
    "rope": {},
    "llama3": {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_length": 32},
    "yarn": {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_length": 32},
    "interleaved": {"rotary_interleaved": True, "rotary_percent": 0.5},
    "window": {"sliding_window": 40},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest, trained_run: RunConfig) -> Iterator[GritModel]:
    yield from made(trained_run, SHAPES[request.param])


@pytest.fixture(scope="module")
def plain(trained_run: RunConfig) -> Iterator[GritModel]:
    yield from made(trained_run, {})


def made(run: RunConfig, shape: dict[str, Any], seed: int = 3) -> Iterator[GritModel]:
    tokenizer = load_tokenizer(str(run.data.tokenizer))
    config = tiny_config(init_std=0.12, vocab_size=tokenizer.vocab_size, **shape)
    with parallel_job(ParallelConfig(device="cpu"), seed=seed) as context:
        yield GritModel(config, build_model(config, tokenizer.vocab_size, context).eval(), tokenizer)


def noted(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What is answered, and the logits that its tokens were drawn from: [tokens, V]."""
    seen, choose = [], TokenSampler.choose

    def noting(sampler: TokenSampler, logits_V: Tensor) -> int:
        seen.append(logits_V)
        return choose(sampler, logits_V)

    with monkeypatch.context() as patch:
        patch.setattr(TokenSampler, "choose", noting)
        return answer(), torch.stack(seen)


def without_caches(model: GritModel, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Tensor]:
    options = SamplingOptions(max_new_tokens=NEW)
    return noted(monkeypatch, lambda: model.continue_prompts([prompt], options)[0].text)


def keys_at(model: GritDecoder, tokens: list[int], start: int, *, embeds: bool = False) -> list[Tensor]:
    """Keys and values of each layer, [2, T, G, H], of a text that is read alone with its first token at a position."""
    row, cache = text_row([tokens]), SequenceCache(1)
    row.embeds, row.positions_1T = embeds, row.positions_1T + start
    row.max_seqlen += start
    with torch.no_grad():
        model(row, Output.HIDDEN, cache)
    return [cache.layer(0, number) for number in range(1, model.config.num_layers + 1)]


@pytest.mark.parametrize("form", ["doc", "query"])
def test_a_causal_cache_changes_no_answer(model: GritModel, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and logits are those of the same prompt without a cache."""
    cached, behind = (DOCUMENTS[0], QUERY) if form == "doc" else (QUERY, DOCUMENTS[0])
    caches = model.cache(cached, attention="causal")
    use = CacheUse(format=form)  # type: ignore[arg-type]
    ours, logits = noted(monkeypatch, lambda: model.generate(behind, max_new_tokens=NEW, caches=caches, cache_use=use))
    prompt, _ = model.prompt_behind(caches, behind, use)
    assert prompt[: caches[0].num_tokens] == list(caches[0].tokens)
    expected, plainly = without_caches(model, prompt, monkeypatch)
    assert ours == expected
    torch.testing.assert_close(logits, plainly, atol=1e-5, rtol=0)
    options = SamplingOptions(max_new_tokens=NEW)
    assert "".join(model.stream(behind, options, caches=caches, cache_use=use)) == ours


@pytest.mark.parametrize("form", ["doc", "query-doc", "doc-query"])
def test_several_caches(model: GritModel, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All computed anew, they are the prompt; none, they are texts that were read by themselves at these places."""
    texts = {"doc": DOCUMENTS, "query-doc": [QUERY, DOCUMENTS[0]], "doc-query": [DOCUMENTS[0], QUERY]}[form]
    behind = QUERY if form == "doc" else None
    caches = model.cache(texts, attention="causal")

    def cached(repair: str) -> tuple[str, Tensor]:
        use = CacheUse(format=form, repair=repair)  # type: ignore[arg-type]
        return noted(monkeypatch, lambda: model.generate(behind, max_new_tokens=NEW, caches=caches, cache_use=use))

    prompt, past = model.prompt_behind(caches, behind, CacheUse(format=form, repair="none"))  # type: ignore[arg-type]
    expected, whole = without_caches(model, prompt, monkeypatch)
    anew, logits = cached("all")
    assert anew == expected
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)
    # Read by themselves, but at their places: the keys of one pass for each.
    start = 0
    for cache in caches:
        at_place = keys_at(model.model, list(cache.tokens), start)
        for number, key_value in enumerate(at_place, 1):
            keys, values = (part[start : start + cache.num_tokens] for part in past.layer(number, torch.device("cpu")))
            torch.testing.assert_close(torch.stack((keys, values)), key_value, atol=1e-5, rtol=0)
        start += cache.num_tokens
    unrepaired = cached("none")[1]
    assert (unrepaired[0] - whole[0]).abs().max() > 1e-3, "caches that knew of each other"
    errors = {name: float((cached(name)[1][0] - whole[0]).norm()) for name in ("none", "first", "deviating", "auto")}
    assert errors["auto"] == errors["first"]
    assert errors["first"] != errors["none"] != errors["deviating"]


def test_repair_computes_what_it_says(plain: GritModel) -> None:
    caches = plain.cache(DOCUMENTS, attention="causal")
    starts = np.cumsum([0, *(cache.num_tokens for cache in caches)]).tolist()

    def recomputed(**use: Any) -> list[int]:
        return list(JoinedCaches(plain.model, caches, CacheUse(**use)).recomputed)

    assert recomputed(repair="none") == []
    assert recomputed(repair="first", repair_tokens=2) == [starts[1], starts[1] + 1, starts[2], starts[2] + 1]
    assert recomputed(repair="all") == list(range(starts[3]))
    found = recomputed(repair="deviating", repair_share=0.2)
    assert len(found) == -(-starts[3] // 5) and min(found) >= starts[1], "the first cache is what it would be"
    assert recomputed(repair="first", repair_tokens=99) == list(range(starts[1], starts[3]))
    # The tokens that deviate most do: those of the whole text read at once, against those of the caches.
    joined = JoinedCaches(plain.model, caches, CacheUse(repair="none"))
    whole = keys_at(plain.model, joined.tokens, 0)[1]
    held = torch.stack(joined.layer(2, torch.device("cpu")))
    deviations = (whole - held).square().sum((0, 2, 3))
    assert float(deviations[found].min()) >= float(np.delete(deviations.numpy(), found).max())


def test_a_repaired_token_is_the_one_of_its_place(plain: GritModel) -> None:
    """Of the first layer that depends on other tokens: what is computed anew is computed over the caches before it."""
    caches = plain.cache(DOCUMENTS[:2], attention="causal")
    prompt, past = plain.prompt_behind(caches, QUERY, CacheUse(repair="first", repair_tokens=3))
    generation = Generation(plain.model, stop_ids=(), max_positions=512)
    generation.add(prompt, SamplingOptions(max_new_tokens=2), past=past)
    generation.step()
    repaired, whole = generation._cache.layer(0, 2), keys_at(plain.model, prompt, 0)[1]
    first = caches[0].num_tokens
    torch.testing.assert_close(repaired[:, : first + 3], whole[:, : first + 3], atol=1e-5, rtol=0)
    assert (repaired[:, first + 3] - whole[:, first + 3]).abs().max() > 1e-3


def test_keys_move(model: GritModel) -> None:
    """From any position to any other they are those computed there; stretched RoPE included."""
    tokens, angles = model.tokenizer.encode(DOCUMENTS[0]), model.model.rotary_angles
    assert angles is not None
    there = {start: keys_at(model.model, tokens, start)[0][0] for start in (0, 7, 200)}
    for start, key in there.items():
        for target in there:
            torch.testing.assert_close(moved(angles, key, start, target), there[target], atol=1e-5, rtol=0)
        torch.testing.assert_close(moved(angles, moved(angles, key, start, None), None, start), key, atol=1e-5, rtol=0)
    assert (there[7] - there[0]).abs().max() > 0.01


def test_a_cache_holds_no_padding(plain: GritModel) -> None:
    """It is the same alone and in a batch of texts of other lengths, with embeddings or without."""
    for attention in ("causal", "bidirectional"):
        together = plain.cache(DOCUMENTS, attention=attention)  # type: ignore[arg-type]
        for text, cache in zip(DOCUMENTS, together, strict=True):
            (alone,) = plain.cache(text, attention=attention)  # type: ignore[arg-type]
            assert cache.tokens == alone.tokens and cache.shape == alone.shape == (4, len(alone.tokens), 2, 16)
            for name, array in alone.arrays.items():
                torch.testing.assert_close(cache.arrays[name], array, atol=1e-5, rtol=0)
    vectors, caches = plain.encode(DOCUMENTS, get_cache=True)
    np.testing.assert_allclose(vectors, plain.encode(DOCUMENTS), atol=1e-5)
    for ours, cache in zip(caches, plain.cache(DOCUMENTS), strict=True):
        assert ours.identity == cache.identity and ours.identity.attention == "bidirectional"
        torch.testing.assert_close(ours.arrays["key"], cache.arrays["key"], atol=1e-5, rtol=0)
    vector, cache = plain.encode(DOCUMENTS[0], get_cache=True)
    assert vector.shape == (64,) and cache.tokens == caches[0].tokens


def test_caches_of_the_two_passes_differ(plain: GritModel) -> None:
    causal, both = (plain.cache(DOCUMENTS[0], attention=name)[0] for name in ("causal", "bidirectional"))  # type: ignore[arg-type]
    expected = keys_at(plain.model, list(causal.tokens), 0, embeds=True)
    torch.testing.assert_close(both.arrays["key"], torch.stack([pair[0] for pair in expected]), atol=1e-5, rtol=0)
    assert (causal.arrays["key"] - both.arrays["key"]).abs().max() > 1e-3
    with pytest.raises(DataError, match="give caches of one kind"):
        plain.generate(QUERY, caches=[causal, both])


def test_caches_in_fewer_bits(plain: GritModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the first token, against those of a cache that loses nothing."""
    exact, errors, sizes = plain.cache(DOCUMENTS[0], attention="causal"), {}, {}
    reference = noted(monkeypatch, lambda: plain.generate(QUERY, max_new_tokens=1, caches=exact))[1]
    for storage in ("bf16", "int8", "int4"):
        caches = plain.cache(DOCUMENTS[0], attention="causal", storage=storage)  # type: ignore[arg-type]
        logits = noted(monkeypatch, lambda: plain.generate(QUERY, max_new_tokens=1, caches=caches))[1]  # noqa: B023
        errors[storage] = float((logits - reference).norm() / reference.norm())
        sizes[storage] = caches[0].num_bytes
    assert errors["int8"] < 0.02 < errors["int4"] < 0.3 and errors["bf16"] < 0.02, errors
    long = plain.cache(DOCUMENTS[0] * 20, attention="causal", storage="int8")[0]
    for z in range(4):
        ours = long.layer(z + 1, 0, plain.model.rotary_angles, torch.float32, torch.device("cpu"))
        theirs = keys_at(plain.model, list(long.tokens), 0)[z]
        spread = float(theirs.amax() - theirs.amin())
        torch.testing.assert_close(torch.stack(ours), theirs, atol=spread / 255, rtol=0)


def test_what_other_models_made_is_refused(plain: GritModel, trained_run: RunConfig) -> None:
    (cache,) = plain.cache(DOCUMENTS[0])
    for name in ("weights", "adapters", "settings", "tokenizer", "template"):
        foreign = replace(cache, identity=replace(cache.identity, **{name: "other"}))
        with pytest.raises(DataError, match=f"^the cache was made with other {name} than this model's; make it again"):
            plain.generate(QUERY, caches=[foreign])
    for other in made(trained_run, {"rotary_base": 500.0}):
        assert other.cache_identity("causal").settings != cache.identity.settings
    for other in made(trained_run, {}, seed=4):
        assert other.cache_identity("causal").weights != cache.identity.weights
    for model in made(trained_run, {}):
        (own,) = model.cache(DOCUMENTS[0])
        with torch.no_grad():
            next(model.model.parameters()).add_(0.1)
        model.weights_changed()
        with pytest.raises(DataError, match="^the cache was made with other weights than this model's"):
            model.generate(QUERY, caches=[own])


@pytest.mark.parametrize(
    ("form", "count", "text", "message"),
    [
        ("doc", 0, QUERY, "takes documents, and 0 caches are given"),
        ("query", 2, QUERY, "takes a query, and 2 caches are given"),
        ("query-doc", 1, None, "takes a query and then documents, and 1 caches are given"),
        ("doc", 1, None, "takes a text behind the caches; give it"),
        ("doc-query", 2, QUERY, "takes no text behind them; give None"),
        ("doc", 1, 5, "must be a string"),
    ],
)
def test_forms_that_cannot_be(plain: GritModel, form: str, count: int, text: Any, message: str) -> None:
    caches = plain.cache(DOCUMENTS[0]) * count
    with pytest.raises(DataError, match=message):
        plain.generate(text, caches=caches, cache_use=CacheUse(format=form))  # type: ignore[arg-type]


def test_forms_are_gritlms(plain: GritModel) -> None:
    """What stands behind the caches, as the reference writes it."""
    answer = "\n<|assistant|>\n"
    expected = {
        "doc": f"\n<|user|>\nX\n\nAnswer the prior query while optionally using the context prior to it{answer}",
        "query": f"\n<|user|>\nX\n\nOptionally using the prior context answer the query prior to it{answer}",
        "query-doc": f"\n<|user|>\nOptionally using the prior context answer the query prior to it{answer}",
        "doc-query": f"\n<|user|>\nAnswer the prior query while optionally using the context prior to it{answer}",
    }
    for name, form in FORMATS.items():
        ids = prompt_behind(plain.tokenizer, name, form.least, "X" if form.takes_text else None)
        assert plain.tokenizer.decode(ids) == expected[name]


def test_a_store(plain: GritModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are read once; another process, model, pass or storage finds what is its own alone."""
    passes: list[int] = []
    read: dict[str, Any] = {"attention": "causal", "before_pass": lambda: passes.append(1)}
    made = plain.cache(DOCUMENTS, store=CacheStore(tmp_path), **read)
    found = plain.cache([*DOCUMENTS, DOCUMENTS[0]], store=CacheStore(tmp_path), **read)
    assert len(passes) == 1 and len(list(tmp_path.glob("*/*.safetensors"))) == 3
    for one, other in zip([*made, made[0]], found, strict=True):
        assert (one.identity, one.tokens, one.start) == (other.identity, other.tokens, other.start)
        for name, array in one.arrays.items():
            torch.testing.assert_close(other.arrays[name], array, atol=0, rtol=0)
    for storage in ("bf16", "int8", "int4"):
        ours = plain.cache(DOCUMENTS[0], store=CacheStore(tmp_path), storage=storage, **read)[0]  # type: ignore[arg-type]
        again = plain.cache(DOCUMENTS[0], store=CacheStore(tmp_path), storage=storage, **read)[0]  # type: ignore[arg-type]
        assert all(torch.equal(again.arrays[name], array) for name, array in ours.arrays.items())
    assert len(passes) == 4
    plain.cache(DOCUMENTS[0], store=CacheStore(tmp_path), attention="bidirectional")
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 7
    memory = CacheStore(memory_bytes=made[0].num_bytes + made[2].num_bytes)
    for cache in made:
        memory.put(cache)
    held = [memory.get(cache.identity, cache.tokens, cache.storage) is not None for cache in made]
    assert held == [False, True, True], "the longest unread one goes"


def test_a_folder_holds_no_more_than_it_may(plain: GritModel, tmp_path: Path) -> None:
    made = plain.cache(DOCUMENTS)
    for number, cache in enumerate(made):
        save_cache(tmp_path / f"{number}.safetensors", cache)
    size = sum((tmp_path / f"{number}.safetensors").stat().st_size for number in range(2))
    folder = tmp_path / "caches"
    store = CacheStore(folder, disk_bytes=size)
    store.put(made[0])
    store.put(made[1])
    assert store.get(made[0].identity, made[0].tokens, "fp32") is not None  # used after the second
    os.utime(next(folder.glob("*/*.used")))
    store.put(made[2])
    held = [store.get(cache.identity, cache.tokens, "fp32") is not None for cache in made]
    assert held == [True, False, True]
    assert sum(path.stat().st_size for path in folder.glob("*/*.safetensors")) <= size


def test_damaged_caches(plain: GritModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache,), path = plain.cache(DOCUMENTS[0]), tmp_path / "cache.safetensors"
    save_cache(path, cache)
    whole = path.read_bytes()
    assert load_cache(path).tokens == cache.tokens
    for content, message in (
        (whole[:-1], "is no whole cache"),
        (whole[:100], "is no whole cache"),
        (b"", "is no whole cache"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "arrays do not match their checksum"),
        (whole.replace(b'\\"storage\\": \\"fp32\\"', b'\\"storage\\": \\"int8\\"'), "does not match its own checksum"),
        (whole.replace(b"facts", b"facta"), "is no whole cache"),
    ):
        assert content != whole
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_cache(path)
    store = CacheStore(tmp_path / "caches")
    store.put(cache)
    (file,) = (tmp_path / "caches").glob("*/*.safetensors")
    file.write_bytes(whole[:-1])
    assert store.get(cache.identity, cache.tokens, "fp32") is None and not file.exists()
    assert "it is made again" in caplog.text


def test_a_full_disk_loses_nothing(
    plain: GritModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, made = CacheStore(tmp_path), plain.cache(DOCUMENTS)
    store.put(made[0])
    (file,) = tmp_path.glob("*/*.safetensors")
    before = file.read_bytes()

    def full(path: Path, _: DocumentCache) -> None:
        with store_module.replacing_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "save_cache", full)
        answers = plain.cache(DOCUMENTS, store=store)
        assert [cache.tokens for cache in answers] == [cache.tokens for cache in made]
    assert caplog.text.count("No space left on device") == 1
    assert list(tmp_path.glob("*/*.safetensors")) == [file] and file.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))
    assert all(store.get(cache.identity, cache.tokens, "fp32") is not None for cache in made), "kept in memory"
    store.put(made[1])
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_what_does_not_go_with_caches(plain: GritModel, trained_run: RunConfig) -> None:
    caches = plain.cache(DOCUMENTS[:2])
    with pytest.raises(ConfigError, match="caches go without tools and neighbors"):
        plain.generate(QUERY, caches=caches, tools=[])
    with pytest.raises(DataError, match="and the model takes 512; shorten it"):
        plain.generate(QUERY, caches=caches * 20)
    for table in made(trained_run, {"position_embedding": "learned_absolute"}):
        own = table.cache(DOCUMENTS[:2])
        table.generate(QUERY, caches=own[:1], max_new_tokens=1)
        with pytest.raises(DataError, match="a cache cannot stand behind another one"):
            table.generate(QUERY, caches=own, max_new_tokens=1)
