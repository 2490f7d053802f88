"""Embedders: held to sentence-transformers and to plain implementations, whatever the batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.errors import ConfigError, DataError, NumericsError
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions, finite
from megatron_grit.retrieval.work import Worker

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

WORDS = [f"{a}{b}" for a in ("wing", "flow", "heat", "shock") for b in ("", "s", "less", "ing", "er")]
TEXTS = [" ".join(WORDS[(3 * number + step) % len(WORDS)] for step in range(1 + number % 13)) for number in range(40)]


def save_bert(folder: Path, *, max_positions: int = 64, dtype: str = "float32") -> Path:
    """A tiny BERT with random weights and a vocabulary of words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "query", "passage", ":", "no"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_positions,
        initializer_range=0.3,
    )
    BertModel(config).to(getattr(torch, dtype)).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def plain_states(folder: Path, texts: list[str], max_length: int = 64):
    """Token states of each text alone, without padding, [tokens, channels] each."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder)).eval()
    states = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            states.append(model(**ids).last_hidden_state[0].numpy())
    return states


@pytest.mark.parametrize("pooling", ["auto", "mean_text", "mean", "cls"])
def test_pooling_is_that_of_a_plain_implementation(bert, pooling):
    rule = {"mean": lambda states: states.mean(0), "cls": lambda states: states[0]}
    expected = [rule.get(pooling, lambda states: states[1:-1].mean(0))(states) for states in plain_states(bert, TEXTS)]
    found = load_embedder(str(bert), EmbedderOptions(pooling=pooling)).embed(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)


def test_a_text_without_words_is_embedded_by_its_cls(bert):
    np.testing.assert_allclose(load_embedder(str(bert)).embed([""])[0], plain_states(bert, [""])[0][0], atol=1e-5)


def test_vectors_depend_neither_on_batches_nor_on_order(bert, monkeypatch):
    def unit(vectors):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def same(vectors):
        np.testing.assert_allclose(unit(vectors), reference, atol=1e-6, rtol=0)

    embedder = load_embedder(str(bert))
    reference = unit(embedder.embed(TEXTS))
    for batch_tokens in (1, 17, 64, 100_000):
        embedder.batch_tokens = batch_tokens
        same(embedder.embed(TEXTS))
        same(embedder.embed(TEXTS[::-1])[::-1])
    monkeypatch.setattr("megatron_grit.inference.encoders.hugging_face._WINDOW", 7)  # 40 texts are six windows
    same(embedder.embed(TEXTS))
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_threads_change_nothing_but_the_last_bits(bert):
    embedder, before = load_embedder(str(bert)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(embedder.embed(TEXTS))
    finally:
        torch.set_num_threads(before)
    for vectors in found[1:]:
        np.testing.assert_allclose(vectors, found[0], atol=2e-6, rtol=1e-5)


def drop_tokenizer(folder):
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)


def replace_vocabulary(folder, words):
    from transformers import BertTokenizer

    drop_tokenizer(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(str(folder))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_tokenizer, "its tokenizer knows no word; copy tokenizer.json|has no tokenizer that transformers reads"),
        (lambda folder: replace_vocabulary(folder, []), "its tokenizer knows no word"),
        (
            lambda folder: replace_vocabulary(folder, WORDS[:8]),
            "its tokenizer has 13 tokens, numbered up to 12.*a table of 29",
        ),
        (
            lambda folder: replace_vocabulary(folder, [f"w{n}" for n in range(25)]),
            "its tokenizer has 30 tokens, numbered up to 29",
        ),
    ],
    ids=["none", "special tokens only", "of fewer words", "of more words"],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path, damage, words):
    folder = save_bert(tmp_path / "bert")
    damage(folder)
    with pytest.raises(DataError, match=f"{folder}: ({words})"):
        load_embedder(str(folder))


def test_a_tokenizer_with_a_few_words_less_than_rows_is_the_models(tmp_path):
    """Tables are often padded to a round number of rows."""
    folder = save_bert(tmp_path / "bert")
    replace_vocabulary(folder, WORDS)
    load_embedder(str(folder)).embed(TEXTS[:2])


def test_long_texts_are_cut_to_the_shortest_limit(bert):
    text = " ".join(WORDS * 10)
    assert load_embedder(str(bert)).max_length == 64  # the position table's
    for max_length in (64, 9):
        expected = plain_states(bert, [text], max_length)[0][1:-1].mean(0)
        np.testing.assert_allclose(
            load_embedder(str(bert), EmbedderOptions(max_length=max_length)).embed([text])[0], expected, atol=2e-6
        )
    with pytest.raises(ConfigError, match="embedder_max_length 2 leaves no room beside 2 special tokens"):
        load_embedder(str(bert), EmbedderOptions(max_length=2))


def test_positions_that_begin_after_the_padding_id_are_not_passed(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    save_bert(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=40, max_position_embeddings=34, pad_token_id=0, **sizes)).save_pretrained(
        str(tmp_path)
    )
    embedder = load_embedder(str(tmp_path))
    assert embedder.max_length == 33
    embedder.embed([" ".join(WORDS * 10)])


def test_half_precision_files_are_computed_in_fp32(tmp_path):
    folder = save_bert(tmp_path, dtype="float16")
    embedder = load_embedder(str(folder))
    assert {parameter.dtype for parameter in embedder._model.parameters()} == {torch.float32}


def test_bf16_is_near_fp32_and_another_embedder(bert):
    exact, rough = load_embedder(str(bert)), load_embedder(str(bert), EmbedderOptions(precision="bf16"))
    first, second = exact.embed(TEXTS), rough.embed(TEXTS)
    assert 0 < abs(first - second).max() < 0.1
    assert exact.fingerprint != rough.fingerprint


def test_bf16_without_instructions_for_it_is_said(bert, monkeypatch, caplog):
    for there, said in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        caplog.clear()
        with caplog.at_level("INFO", "megatron_grit"):
            load_embedder(str(bert), EmbedderOptions(precision="bf16"))
            load_embedder(str(bert))
        assert caplog.text.count("no instructions for bf16; a precision of fp32") == said


def test_onednn_is_used_where_torch_has_it_and_changes_nothing(bert, monkeypatch):
    from megatron_grit.inference.encoders import hugging_face as encoder

    fast = load_embedder(str(bert))
    kinds = {type(module) for module in fast._model.modules()}
    if torch.backends.mkldnn.is_available():
        assert encoder.OneDnnLinear in kinds
    monkeypatch.setattr(encoder, "use_onednn", lambda model: False)
    np.testing.assert_allclose(load_embedder(str(bert)).embed(TEXTS), fast.embed(TEXTS), atol=1e-5)


def test_without_onednn_the_model_is_left_as_it_is(monkeypatch):
    from megatron_grit.inference.encoders import hugging_face as encoder

    def forward(self, inputs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(encoder.OneDnnLinear, "forward", forward)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert not encoder.use_onednn(model)
    assert type(model[0]) is torch.nn.Linear


# Directories of sentence-transformers.


def st_modules(bert: Path, names: str) -> list:
    """Modules by short names: a pooling mode, "prompt" of it, dense, states, norm, unit."""
    from sentence_transformers import models

    chain = [models.Transformer(str(bert))]
    for name in names.split():
        torch.manual_seed(1)
        if name == "dense":
            chain.append(models.Dense(32, 12, activation_function=torch.nn.Tanh()))
        elif name == "states":
            settings = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
            chain.append(models.Dense(32, 32, activation_function=torch.nn.GELU(), **settings))
        elif name == "norm":
            layer = models.LayerNorm(32)
            torch.nn.init.normal_(layer.norm.weight)
            chain.append(layer)
        elif name == "unit":
            chain.append(models.Normalize())
        else:
            modes = tuple(name.removesuffix("-prompt").split("+"))
            chain.append(models.Pooling(32, modes, include_prompt=not name.endswith("-prompt")))
    return chain


CHAINS = [
    "mean unit",
    "mean-prompt",
    "cls unit",
    "cls-prompt",
    "max",
    "max-prompt",
    "lasttoken",
    "weightedmean",
    "weightedmean-prompt",
    "mean_sqrt_len_tokens",
    "cls+mean",
    "mean dense unit",
    "states mean norm",
]


@pytest.mark.parametrize("chain", CHAINS)
def test_modules_and_prompts_are_those_of_sentence_transformers(bert, tmp_path, chain):
    package = pytest.importorskip("sentence_transformers")
    prompts = {"query": "query : ", "document": "passage : no "}
    peer = package.SentenceTransformer(modules=st_modules(bert, chain), prompts=prompts, device="cpu")
    peer.save_pretrained(str(tmp_path))
    peer = package.SentenceTransformer(str(tmp_path), device="cpu")
    embedder = load_embedder(str(tmp_path))
    assert not embedder.sides_alike
    query, passage = embedder.embed(TEXTS, "query"), embedder.embed(TEXTS)
    np.testing.assert_allclose(query, peer.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(passage, peer.encode_document(TEXTS), atol=1e-5)
    assert abs(query - passage).max() > 1e-3
    assert embedder.dim == passage.shape[1]


@pytest.mark.parametrize(
    ("prompts", "of_queries", "of_passages"),
    [
        ({"document": "no ", "passage": "query : ", "query": None}, "", "no "),
        ({"document": "", "corpus": "no ", "other": "query : "}, "", "no "),
        ({"query": "query : ", "passage": "no "}, "query : ", "no "),
    ],
)
def test_names_of_prompts(bert, tmp_path, prompts, of_queries, of_passages):
    """That of default_prompt_name is none of either side, as in encode_query and encode_document."""
    package = pytest.importorskip("sentence_transformers")
    package.SentenceTransformer(modules=st_modules(bert, "mean"), device="cpu").save_pretrained(str(tmp_path))
    path = tmp_path / "config_sentence_transformers.json"
    saved = json.loads(path.read_text()) | {"prompts": prompts, "default_prompt_name": "other"}
    path.write_text(json.dumps(saved))
    assert load_embedder(str(tmp_path)).prompts == {"query": of_queries, "passage": of_passages}


def test_a_directory_of_the_older_layout_with_its_length_and_case(bert, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    shutil.copytree(bert, tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    )
    settings = {"max_seq_length": 8, "do_lower_case": True, "tokenizer_args": {"do_lower_case": False}}
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(settings))
    names = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    entries = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(names)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    texts = [text.upper() for text in TEXTS]
    embedder = load_embedder(str(tmp_path))
    assert embedder.max_length == 8
    assert embedder.dim == 64
    peer = package.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(embedder.embed(texts), peer.encode(texts), atol=1e-5)
    np.testing.assert_allclose(embedder.embed(texts), embedder.embed(TEXTS), atol=1e-5)


def test_a_decoder_attends_as_its_sentence_transformers_settings_say(bert, tmp_path):
    """The layout of our own exports: config.json of the causal decoder, and is_causal in sentence_bert_config.json."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    package = pytest.importorskip("sentence_transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    LlamaModel(LlamaConfig(vocab_size=40, pad_token_id=0, **sizes)).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_causal": True}))
    AutoTokenizer.from_pretrained(str(bert)).save_pretrained(str(tmp_path))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "include_prompt": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "2_Normalize").mkdir()
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    entries = [{"idx": place, "name": str(place), **entry} for place, entry in enumerate(entries)]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    found = {}
    for is_causal in (True, False):
        settings = {"max_seq_length": 48, "config_args": {"is_causal": is_causal}}
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
        embedder = load_embedder(str(tmp_path))
        found[is_causal] = embedder.embed(TEXTS)
        peer = package.SentenceTransformer(str(tmp_path), device="cpu")
        np.testing.assert_allclose(found[is_causal], peer.encode(TEXTS), atol=1e-5)
    assert abs(found[True] - found[False]).max() > 1e-3


def test_a_query_instruction_stands_in_for_the_prompt_and_leaves_passages_alone(bert):
    plain = load_embedder(str(bert))
    instructed = load_embedder(str(bert), EmbedderOptions(query_instruction="query : "))
    assert plain.sides_alike and not instructed.sides_alike
    assert plain.fingerprint == instructed.fingerprint
    np.testing.assert_array_equal(plain.embed(TEXTS), instructed.embed(TEXTS))
    np.testing.assert_allclose(
        instructed.embed(TEXTS, "query"), plain.embed([f"query : {text}" for text in TEXTS]), atol=1e-6
    )


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"],
)
def test_the_fingerprint_knows_every_file_that_a_vector_follows_from(bert, tmp_path, name):
    package = pytest.importorskip("sentence_transformers")
    package.SentenceTransformer(modules=st_modules(bert, "mean"), device="cpu").save_pretrained(str(tmp_path))
    before = load_embedder(str(tmp_path)).fingerprint
    assert load_embedder(str(tmp_path), EmbedderOptions(batch_tokens=5)).fingerprint == before
    (tmp_path / "README.md").write_text("changed")
    assert load_embedder(str(tmp_path)).fingerprint == before
    path = tmp_path / name
    if name == "model.safetensors":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_text(path.read_text() + "\n")
    assert load_embedder(str(tmp_path)).fingerprint != before


def test_the_fingerprint_knows_settings(bert):
    settings = [{}, {"pooling": "mean"}, {"max_length": 10}, {"precision": "bf16"}]
    found = {load_embedder(str(bert), EmbedderOptions(**setting)).fingerprint for setting in settings}
    assert len(found) == len(settings)


# What is refused.


def with_modules(bert: Path, folder: Path, *kinds: str) -> Path:
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    entries = [{"idx": place, "name": str(place), "path": "", "type": kind} for place, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


TRANSFORMER = "sentence_transformers.models.Transformer"


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([TRANSFORMER, "sentence_transformers.models.CNN"], "models.CNN is not known here; known: Pooling, Dense"),
        (["custom_st.Transformer"], "custom_st.Transformer is not known"),
        ([TRANSFORMER], "not one Transformer and then a Pooling, but Transformer"),
        ([], "but nothing"),
    ],
)
def test_unknown_modules_are_refused(bert, tmp_path, kinds, message):
    with pytest.raises(ConfigError, match=message):
        load_embedder(str(with_modules(bert, tmp_path, *kinds)))


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '[{"path": ""}]', "[3]"])
def test_a_damaged_modules_file_is_named(bert, tmp_path, content):
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(DataError, match="modules.json"):
        load_embedder(str(tmp_path))


def test_weights_that_are_missing_are_not_drawn_at_random(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=f"do not fit its config.json: {name}"):
        load_embedder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="holds no encoder that transformers reads"):
        load_embedder(str(tmp_path))


def test_other_directories_are_refused(bert, tmp_path):
    with pytest.raises(ConfigError, match="neither config.json"):
        load_embedder(str(tmp_path))
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_embedder(str(tmp_path))


def test_mean_text_needs_special_tokens_around_a_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_bert(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="mean_text would leave out words"):
        load_embedder(str(tmp_path))
    embedder = load_embedder(str(tmp_path), EmbedderOptions(pooling="mean"))
    with pytest.raises(DataError, match="has no token"):
        embedder.embed(["wing", ""])


def test_a_prompt_that_fills_the_length_is_refused(bert):
    with pytest.raises(ConfigError, match="the query prompt fills the 8 tokens"):
        load_embedder(str(bert), EmbedderOptions(max_length=8, query_instruction="query : no no no no no no no"))


def test_vectors_that_are_not_finite_are_refused(bert):
    embedder = load_embedder(str(bert))
    with torch.no_grad():
        embedder._model.embeddings.word_embeddings.weight[5 + WORDS.index("shock")] = float("nan")
    assert np.isfinite(embedder.embed(["wing"])).all()
    with pytest.raises(NumericsError, match="1 vectors are not finite; the first is of the text 'shock heat'"):
        embedder.embed(["wing", "shock heat"])


def test_finite_gives_what_it_gets():
    vectors = np.ones((2, 3), np.float32)
    assert finite(vectors, ["a", "b"]) is vectors


def test_an_encoder_of_hugging_face_is_not_spread(bert):
    with pytest.raises(
        ConfigError, match=r"only a checkpoint of ours can be sharded over several; leave out .*expert 2"
    ):
        load_embedder(str(bert), parallel=ParallelConfig(expert=2))
    embedder = load_embedder(str(bert), parallel=ParallelConfig())
    worker = Worker(rank=1, world_size=2, group=1, num_groups=2)
    assert worker.in_group_of(embedder) == worker.in_group_of(None) == worker
