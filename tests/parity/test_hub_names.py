"""A model's name on the hub and a directory that holds its whole repository give the same run, bit for bit.

The hub is a folder of repositories. What is fetched of one is what huggingface_hub's own filter leaves of its files
with the patterns that are asked for, and it lies in a cache as huggingface_hub lays it out: links to blobs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_grit.cli import train
from megatron_grit.config.parse import dump_config, load_config
from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families import llama, mistral
from megatron_grit.convert.hf_in import reader
from megatron_grit.convert.hf_in.convert import convert_checkpoint
from megatron_grit.convert.hf_out.convert import export_checkpoint
from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_grit.errors import DataError
from megatron_grit.store import hub as hub_of_ours
from megatron_grit.training.checkpoint import list_checkpoints
from tests.corpus import sentences, write_jsonl
from tests.rows import tiny_config
from tests.unit.convert.hf_in.test_reader import write_shards
from tests.unit.convert.test_param_map import random_hf
from tests.unit.data.json_tokenizers import CHATML, chat_json

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("jinja2")

PAIRS = sentences(32)
TEXTS = [text for pair in PAIRS for text in pair]
SPECIAL = ["</s>", "<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    max_position_embeddings=512,
)
NOT_WANTED = (
    "README.md",
    ".gitattributes",
    "pytorch_model.bin",
    "training_args.bin",
    "rust_model.ot",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/config.json",
    "onnx/model.safetensors",
)
"""Files of real repositories that no run reads; here with contents that break whatever does."""
NAMING = ("config.yaml", "state.json", "manifest.json", ".metadata")
"""Files of a checkpoint that hold paths, times or an id of each save; what they say of the run is compared apart."""
PROBES = ["what does the parser do?", "<|im_end|>", "\n a  b", "<tool> é"]


@dataclasses.dataclass
class Hub:
    """Folders of a hub and of its cache, and what was fetched."""

    repositories: Path
    cache: Path
    commit: str = hashlib.sha1(b"main").hexdigest()

    def snapshot_download(
        self, name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        source, model = self.repositories / name, self.cache / f"models--{name.replace('/', '--')}"
        files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        wanted = hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in wanted:
            content = (source / file).read_bytes()
            blob = model / "blobs" / hashlib.sha256(content).hexdigest()
            link = model / "snapshots" / self.commit / file
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.unlink(missing_ok=True)
            link.symlink_to(Path("../" * (2 + file.count("/"))) / "blobs" / blob.name)
        return str(model / "snapshots" / self.commit)

    def fetched(self) -> set[str]:
        """Names of all files in the cache."""
        roots = self.cache.glob("*/snapshots/*")
        return {path.relative_to(root).as_posix() for root in roots for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def fake_hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    root = request.getfixturevalue("repository")[0] if "repository" in request.fixturenames else tmp_path
    fake = Hub(root / "hub", tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda *_, **__: pytest.fail("the whole of a model is asked for at once")
    )
    return fake


def write_repository(folder: Path, kind: str) -> Path:
    """A model as its repository holds it: "json" in shards with a tokenizer.json, "sentencepiece" in one file,
    "modules" as sentence-transformers writes an embedder."""
    folder.mkdir(parents=True)
    if kind != "sentencepiece":
        write_json_tokenizer(folder)
        family = llama.FAMILY
    else:
        train_sentencepiece(TEXTS, folder / "tokenizer", 400)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"})
        )
        family = mistral.FAMILY
    shape = dataclasses.replace(
        SHAPE, architecture=family.architecture, vocab_size=load_tokenizer(folder).vocab_size, sliding_window=None
    )
    tensors = random_hf(family, shape)
    if kind == "modules":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    write_shards(folder, tensors)
    if kind == "sentencepiece":
        from safetensors.torch import save_file

        with reader.open_weights(folder) as weights:
            tensors = dict(weights)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors")
    settings = family.hf_config(shape)
    if kind == "modules":
        settings["architectures"] = [family.base_architecture]
        write_modules(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    for name in NOT_WANTED:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    return folder


def write_modules(folder: Path) -> None:
    """Of an embedder that pools the last token and attends to both sides."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SHAPE.hidden_size, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"pooling_mode_mean_tokens": False}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "ask: "}}))


def write_json_tokenizer(folder: Path) -> None:
    """Files as transformers 4 writes them; its own names of begin, end and padding are not the first in common use."""
    from tokenizers import Tokenizer as Backend

    chat_json(folder, TEXTS, special_tokens=SPECIAL)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    state = json.loads(backend.to_str())
    (folder / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    (folder / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in state["model"]["merges"]))
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    tool = backend.get_vocab_size()
    added = {str(n): {"content": name, "special": True} for n, name in enumerate(SPECIAL)}
    added[str(tool)] = {"content": "<tool>", "special": False, "normalized": False}
    settings = names | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # Not looked at beside added_tokens_decoder.
    (folder / "special_tokens_map.json").write_text(json.dumps(names | {"eos_token": "<|endoftext|>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": tool}))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2], "bos_token_id": 2}))


def write_run(source: str, output: Path, data: Path) -> Path:
    """The configuration of two steps of unified training from a model."""
    config = tiny_config()
    config.data.embedding, config.data.generative = [str(data / "emb")], [str(data / "gen")]
    config.data.tokens_per_row, config.data.num_rows_multiple = 512, 2
    config.training.embedding_batch_size = config.training.generative_batch_size = 8
    config.training.steps, config.logging.progress, config.output_dir = 2, False, str(output)
    output.mkdir(parents=True)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config) | {"model": {"pretrained": source}}))
    return file


def write_data(folder: Path, tokenizer: str | Path) -> Path:
    folder.mkdir()
    write_jsonl(
        folder / "emb.jsonl",
        [{"query": ["", q], "pos": [["", a]], "neg": [["", PAIRS[n - 5][1]]]} for n, (q, a) in enumerate(PAIRS)],
    )
    write_jsonl(folder / "gen.jsonl", [{"text": list(pair)} for pair in PAIRS])
    for name in ("emb", "gen"):
        build_grit([folder / f"{name}.jsonl"], folder / name, tokenizer)
    return folder


def facts_of(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ["fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id", "special_tokens"]
    return {name: getattr(tokenizer, name) for name in names} | {"ids": [tokenizer.encode(text) for text in PROBES]}


def digests(folder: Path, *left_out: str) -> dict[str, str]:
    """SHA-256 of each file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def card_without_name(export: Path) -> list[str]:
    lines = (export / "README.md").read_text().splitlines()
    return [line for line in lines if not line.startswith(("base_model: ", "| started from |"))]


def outcome(source: str, work: Path, data: Path) -> dict[str, Any]:
    """All that a run from a model, and an import of it, leave behind, without how the model was named."""
    run = work / "run"
    assert train.main(["--config", str(write_run(source, run, data))]) == 0
    (checkpoint,) = list_checkpoints(run)
    settings = load_config(checkpoint / "config.yaml")
    settings.model.pretrained = settings.data.tokenizer = None
    settings.output_dir = "run"
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    imported = convert_checkpoint(source, work / "imported")
    return {
        "config": dump_config(settings),
        "tokenizer": facts_of(load_tokenizer(checkpoint)),
        "chat": (checkpoint / "chat.json").read_text(),
        "losses": [{key: value for key, value in line.items() if "loss" in key} for line in losses],
        "checkpoint": digests(checkpoint, *NAMING),
        "export": digests(export_checkpoint(run, work / "export"), "README.md"),
        "card": card_without_name(work / "export"),
        "imported": digests(imported, *NAMING),
        "exported import": digests(export_checkpoint(work / "imported", work / "export_of_import")),
    }


@pytest.fixture(scope="module", params=["json", "sentencepiece", "modules"])
def repository(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A repository on the hub, and what comes of it as a directory."""
    root = tmp_path_factory.mktemp(request.param)
    folder = write_repository(root / "hub" / "org" / "model", request.param)
    write_data(root / "data", folder)
    return root, outcome(str(folder), root / "directory", root / "data")


def test_a_name_and_a_directory_give_the_same_run(
    repository: tuple[Path, dict[str, Any]], tmp_path: Path, fake_hub: Hub
) -> None:
    root, by_directory = repository
    by_name = outcome("org/model", tmp_path / "name", root / "data")
    for what, expected in by_directory.items():
        assert by_name[what] == expected, what
    assert len(by_directory["losses"]) == 2 and by_directory["losses"][0] != by_directory["losses"][1]
    folder = root / "hub" / "org" / "model"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert fake_hub.fetched() == there - set(NOT_WANTED)


@pytest.mark.parametrize(
    "missing", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "modules.json"]
)
def test_a_file_that_is_not_fetched_would_be_seen(
    tmp_path: Path, fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Each of the small files says something of the model: without one, an import by name is another one."""
    folder = write_repository(fake_hub.repositories / "org" / "model", "modules")
    expected = import_of(str(folder), tmp_path / "directory")
    assert import_of("org/model", tmp_path / "name") == expected
    shutil.rmtree(fake_hub.cache)
    for names in ("_SMALL_FILES", "_MODULE_FILES"):
        monkeypatch.setattr(hub_of_ours, names, [name for name in getattr(hub_of_ours, names) if name != missing])
    assert import_of("org/model", tmp_path / "without") != expected


def import_of(source: str, target: Path) -> dict[str, Any]:
    checkpoint = convert_checkpoint(source, target)
    return facts_of(load_tokenizer(checkpoint)) | {
        "chat": (checkpoint / "chat.json").read_text(),
        "embedding": load_config(checkpoint / "config.yaml").embedding,
    }


def test_a_tokenizer_by_name(tmp_path: Path, fake_hub: Hub) -> None:
    """Data are made with the tokenizer of a model on the hub, at a revision too, as with its directory."""
    folder = write_repository(fake_hub.repositories / "org" / "model", "json")
    assert facts_of(load_tokenizer("org/model")) == facts_of(load_tokenizer(folder))
    assert "model.safetensors.index.json" not in fake_hub.fetched()
    made = [write_data(tmp_path / "name", "org/model@main"), write_data(tmp_path / "directory", folder)]
    contents = [{path.name: path.read_bytes() for path in data.iterdir() if path.suffix != ".png"} for data in made]
    for name in ("emb.bin", "emb.idx", "gen.bin", "gen.idx", "gen.json"):
        assert contents[0][name] == contents[1][name], name
    with pytest.raises(DataError, match="typo.model: no such tokenizer"):
        load_tokenizer("folder/typo.model")  # a file's name, which the hub is not asked for
