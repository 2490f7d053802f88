"""What the goldens record. Each part is a function of the commands; later parts use files of earlier ones."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.golden.commands import (
    Commands,
    array_digest,
    checkpoint_tensors,
    metrics,
    safetensors_tensors,
)
from tests.golden.inputs import write_inputs

VERBS = ("convert", "encode", "evaluate", "generate", "plan", "serve", "train")
TOOLS = (
    *(f"preprocess/{name}.py" for name in ("build_grit", "build_sft", "convert_allnli")),
    *(f"preprocess/{name}.py" for name in ("convert_msmarco", "inspect_indexed", "merge_indexed", "mine_negatives")),
    *(f"preprocess/{name}.py" for name in ("preprocess_data", "train_tokenizer")),
    *("report.py", "retro/build_db.py", "retro/inspect_db.py", "weight_diff.py"),
)
LAUNCHERS = {
    "train_gritlm_7b.sh": {"EMBEDDING_DATA": "a b", "GENERATIVE_DATA": "c", "TOKENIZER": "t", "CHECKPOINT": "base"},
    "train_gritlm_8x7b.sh": {"EMBEDDING_DATA": "a b", "GENERATIVE_DATA": "c", "TOKENIZER": "t", "CHECKPOINT": "base"},
    "train_sgpt_nli.sh": {"EMBEDDING_DATA": "a b", "MODEL": "gpt-j"},
    "train_sgpt_msmarco.sh": {"EMBEDDING_DATA": "a b", "MODEL": "gpt-j"},
    "build_retro_db.sh": {"DATA": "a_text_document b_text_document", "TOKENIZER": "t", "EMBEDDER": "e"},
    "quickstart.sh": {},
}
DATABASE = {
    "tokenizer": "tokenizer.model",
    "embedder": "encoder",
    "chunk_length": "8",
    "duplicates": "near",
    "minhash_permutations": "32",
    "doc_block_size": "20",
    "block_size": "128",
    "valid_fraction": "0.1",
    "num_neighbors_query": "20",
    "num_neighbors_save": "4",
}
_TINY = ["--model", "tiny_mistral"]
RUNS: dict[str, list[str]] = {
    "unified": _TINY,
    "embedding": [
        *_TINY,
        "--training.objective=embedding",
        "--embedding.pooling=weightedmean",
        "--loss.temperature=0.05",
    ],
    "generative": [
        *_TINY,
        "--training.objective=generative",
        "--data.packing=window",
        "--training.generative_rows=4",
        "--data.generative=[documents_text_document]",
    ],
    "experts": ["--model", "tiny_mixtral", "--loss.loss_gen_type=mixed"],
    "lora": ["--adapter.kind=lora", "--adapter.rank=4", "--model.pretrained=mistral"],
}


def inputs(commands: Commands) -> dict[str, str]:
    """The inputs themselves, and the tokenizer that all others use."""
    write_inputs(commands.folder)
    names = ["documents.jsonl", "pairs.jsonl", "chats.jsonl"]
    commands.tool(
        "preprocess/train_tokenizer.py", "--input", *names[1:], "--output-prefix", "tokenizer", "--vocab-size", "512"
    )
    for model in ("mistral", "mistral_tuned"):
        (commands.folder / model / "tokenizer.model").write_bytes((commands.folder / "tokenizer.model").read_bytes())
    commands.settle()
    return commands.digests("*.jsonl", "*.tsv", "*.model", "mistral", "mistral_tuned", "encoder")


def indexed(commands: Commands) -> dict[str, str]:
    """Indexed files of every builder."""
    documents = ["--input", "documents.jsonl", "--tokenizer-model", "tokenizer.model", "--append-eod"]
    builds: dict[str, list[str]] = {
        "documents": ["--json-keys", "text", "title"],
        "sentences": ["--split-sentences"],
        "parallel": ["--workers", "2", "--partitions", "3"],
    }
    for name, options in builds.items():
        commands.tool("preprocess/preprocess_data.py", *documents, "--output-prefix", name, *options)
    more = ["--input", "more.jsonl", "--output-prefix", "more", "--tokenizer-model", "tokenizer.model", "--append-eod"]
    commands.tool("preprocess/preprocess_data.py", *more)
    merged = ["--input", "documents_text_document", "more_text_document", "--output-prefix", "merged_text_document"]
    commands.tool("preprocess/merge_indexed.py", *merged)
    records = ["--tokenizer", "tokenizer.model", "--workers", "1"]
    limits = ["--query-max-len", "48", "--passage-max-len", "64", "--deduplicate", "--decontaminate", "more.jsonl"]
    commands.tool("preprocess/build_grit.py", *records, "--input", "pairs.jsonl", "--output-prefix", "pairs", *limits)
    commands.tool("preprocess/build_grit.py", *records, "--input", "chats.jsonl", "--output-prefix", "chats")
    split = ["--template", "chatml", "--generative-max-len", "40", "--over-long", "split", "--no-checksum"]
    commands.tool("preprocess/build_sft.py", *records, "--input", "chats.jsonl", "--output-prefix", "sft", *split)
    commands.settle()
    prefixes = [*builds, "more", "merged", "pairs", "chats", "sft"]
    extensions = ("bin", "idx", "json", "jsonl")
    return commands.digests(*(f"{prefix}*.{extension}" for prefix in prefixes for extension in extensions))


def converted(commands: Commands) -> dict[str, str]:
    """What the converters of data sets write."""
    commands.tool("preprocess/convert_allnli.py", "--input", "nli.tsv", "--output", "out_nli.jsonl")
    tables = ["--queries", "queries.tsv", "--corpus", "corpus.tsv", "--negatives", "negatives.jsonl"]
    commands.tool("preprocess/convert_msmarco.py", *tables, "--output", "out_msmarco.jsonl", "--per-system", "2")
    return commands.digests("out_*.jsonl")


def inspected(commands: Commands) -> dict[str, str]:
    """What inspect_indexed.py prints."""
    prefixes = ("pairs", "chats", "sft", "sentences_text_sentence")
    show = ["--tokenizer", "tokenizer.model", "--show", "4", "--colour", "never"]
    return {name: commands.tool("preprocess/inspect_indexed.py", "--prefix", name, *show) for name in prefixes}


def database(commands: Commands) -> dict[str, dict[str, str]]:
    """Every file of two retrieval databases: of one as it was built, after an addition and after a removal; of another
    with lists, shards and stored embeddings."""
    options = [f"--{name}={value}" for name, value in DATABASE.items()]
    flat = ["--project-dir", "flat"]
    first = ["--data_paths=[documents_text_document]", "--index=Flat", *options]
    commands.tool("retro/build_db.py", *flat, "--tasks", "build", *first)
    found = {"flat": commands.digests("flat")}
    both = "--data_paths=[documents_text_document, more_text_document]"
    commands.tool("retro/build_db.py", *flat, "--tasks", "add,query-neighbors", both)
    found["flat after add"] = commands.digests("flat")
    removed = ["--tasks", "tombstone,query-neighbors", "--tombstone", "documents_text_document:17"]
    commands.tool("retro/build_db.py", *flat, *removed)
    found["flat after tombstone"] = commands.digests("flat")
    lists = [both, "--index=IVF4,PQ4x4", "--num_shards=2", "--chunk_length=16", "--keep_embeddings=true"]
    tasks = ["--tasks", "db-build,embed,index-build,query-neighbors"]
    commands.tool("retro/build_db.py", "--project-dir", "ivf", *tasks, *options, *lists)
    found["ivf"] = commands.digests("ivf")
    return found


def searched(commands: Commands) -> dict[str, Any]:
    """What inspect_db.py prints, and negatives mined from texts and from a database."""
    look = ["--project-dir", "flat", "--chunk", "12", "--document", "documents_text_document:3"]
    mine = ["--input", "pairs.jsonl", "--num-negatives", "3", "--ranks", "2-10", "--sampling", "top"]
    commands.tool("preprocess/mine_negatives.py", *mine, "--output", "mined.jsonl", "--embedder", "encoder")
    commands.tool("preprocess/mine_negatives.py", *mine, "--output", "mined_db.jsonl", "--project-dir", "flat")
    shown = {"inspect_db": commands.tool("retro/inspect_db.py", *look)}
    return shown | {"files": commands.digests("mined*.jsonl", "mined*.json")}


def imported(commands: Commands) -> dict[str, Any]:
    """A Hugging Face model as a checkpoint."""
    commands.verb("convert", "--from", "mistral", "--to", "base")
    return checkpoint(commands, "base/checkpoints/step_00000000")


def checkpoint(commands: Commands, name: str) -> dict[str, Any]:
    """Names, types, shapes and digests of a checkpoint's tensors, and its small files."""
    folder = commands.folder / name
    kept: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    for part in ("weights", "optimizer"):
        if (folder / part).is_dir():
            kept[part] = checkpoint_tensors(folder / part)
    for path in sorted(folder.glob("random/*.safetensors")):
        kept[f"random/{path.name}"] = safetensors_tensors(path)
    kept["config.yaml"] = commands.plain((folder / "config.yaml").read_text()).splitlines()
    kept["state.json"] = yaml.safe_load(commands.plain((folder / "state.json").read_text()))
    for name in ("versions", "command"):
        kept["state.json"].pop(name, None)
    return kept


def exported(commands: Commands) -> dict[str, Any]:
    """The checkpoint as a Hugging Face directory."""
    commands.verb("convert", "--from", "base", "--to", "export")
    return directory(commands, "export")


def exported_adapters(commands: Commands) -> dict[str, Any]:
    """A run's adapters as PEFT's files, and in one model with their base."""
    commands.verb("convert", "--from", "run_lora", "--to", "export_adapter", "--adapter-only")
    commands.verb("convert", "--from", "run_lora", "--to", "export_merged", "--merge")
    return directory(commands, "export_adapter") | directory(commands, "export_merged")


def directory(commands: Commands, name: str) -> dict[str, Any]:
    """Digests of the files of a Hugging Face directory, and its tensors."""
    found: dict[str, Any] = dict(commands.digests(name))
    for path in sorted((commands.folder / name).glob("*.safetensors")):
        found[f"{name}/{path.name}"] = safetensors_tensors(path)
    return found


def weight_diff(commands: Commands) -> dict[str, Any]:
    """A weight diff, and what is recovered from it."""
    given = ["--base", "mistral", "--diff", "diff"]
    commands.tool("weight_diff.py", "make", *given, "--tuned", "mistral_tuned")
    commands.tool("weight_diff.py", "recover", *given, "--tuned", "recovered")
    tensors = {
        path.name: safetensors_tensors(path) for path in sorted((commands.folder / "diff").glob("*.safetensors"))
    }
    recovered = safetensors_tensors(commands.folder / "recovered" / "model.safetensors")
    return {"files": sorted(commands.digests("diff", "recovered")), "diff": tensors, "recovered": recovered}


def runs(commands: Commands) -> dict[str, Any]:
    """Three steps of each objective in one process: metrics to the last bit, resolved configuration, checkpoint."""
    found: dict[str, Any] = {}
    for name, options in RUNS.items():
        config = str(commands.tree / "examples" / "configs" / "tiny.yaml")
        given = ["--config", config, "--training.steps=3", "--logging.progress=false"]
        given += ["--data.tokenizer=tokenizer.model", "--data.embedding=[pairs]", "--data.generative=[chats]"]
        given += ["--data.tokens_per_row=512", "--parallel.device=cpu", f"--output_dir=run_{name}"]
        commands.verb("train", *given, *options)
        folder = commands.folder / f"run_{name}"
        found[name] = {"metrics": metrics(folder / "metrics.jsonl")}
        found[name]["files"] = sorted(path.name for path in folder.iterdir())
        found[name] |= checkpoint(commands, f"run_{name}/checkpoints/step_00000003")
    return found


def used(commands: Commands) -> dict[str, Any]:
    """What a trained model embeds, generates and scores."""
    model = ["--checkpoint", "run_unified", "--device", "cpu"]
    (commands.folder / "texts.txt").write_text("ka to mi\nre su no la vi pe du\nzo\n")
    commands.verb("encode", *model, "--input", "texts.txt", "--output", "texts.npy", "--instruction", "Find the answer")
    answer = commands.verb("generate", *model, "--prompt", "What is ka?", "--max-new-tokens", "8")
    pairs = (commands.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (commands.folder / "heldout.jsonl").write_text("".join(pairs[:24]), encoding="utf-8")
    held_out = ["--retrieval", "heldout.jsonl", "--generative", "chats"]
    commands.verb("evaluate", *model, *held_out, "--output", "figures.json")
    figures = yaml.safe_load((commands.folder / "figures.json").read_text())
    return {"encode": array_digest(commands.folder / "texts.npy"), "generate": answer, "evaluate": figures}


def flags(commands: Commands) -> dict[str, list[str]]:
    """Names of the options of each verb and tool, spelled with underscores."""
    helps = {name: commands.verb(name, "--help") for name in VERBS}
    helps |= {name: commands.tool(name, "--help") for name in TOOLS}
    for verb in ("make", "recover", "verify"):
        helps[f"weight_diff.py {verb}"] = commands.tool("weight_diff.py", verb, "--help")
    return {name: _flags(text) for name, text in helps.items()}


def _flags(text: str) -> list[str]:
    found = re.findall(r"^  --(\[no-\])?([\w.-]+)", text, re.MULTILINE)
    names = {prefix + name for no, name in found for prefix in (("", "no-") if no else ("",))}
    return sorted(name.replace("-", "_") for name in names)


def launchers(commands: Commands) -> dict[str, list[str]]:
    """What each launcher prints with DRY_RUN=1: with its paths, with none, and in miniature."""
    found = {}
    for name, paths in LAUNCHERS.items():
        for how, environment in {"paths": paths, "bare": {}, "tiny": {"SCALE": "tiny"}}.items():
            arguments = [] if name == "quickstart.sh" else ["--seed" if "retro" in name else "--training.seed", "7"]
            text = commands.launcher(name, *arguments, DRY_RUN="1", **environment)
            found[f"{name} {how}"] = text.splitlines()
    return found


PARTS: dict[str, Callable[[Commands], Any]] = {
    function.__name__: function
    for function in (
        inputs,
        indexed,
        converted,
        inspected,
        database,
        searched,
        imported,
        exported,
        weight_diff,
        runs,
        exported_adapters,
        used,
        flags,
        launchers,
    )
}
"""In the order in which they are made."""
NEEDS = {
    "indexed": ("inputs",),
    "converted": ("inputs",),
    "inspected": ("inputs", "indexed"),
    "database": ("inputs", "indexed"),
    "searched": ("inputs", "indexed", "database"),
    "imported": ("inputs",),
    "runs": ("inputs", "indexed"),
    "exported": ("inputs", "imported"),
    "exported_adapters": ("inputs", "indexed", "runs"),
    "weight_diff": ("inputs",),
    "used": ("inputs", "indexed", "runs"),
}
FLOATS = ("database", "searched", "runs", "exported_adapters", "used")
"""Parts that depend on the versions of torch and of the engine and on the processor."""


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from importlib.metadata import version

    import torch

    names = ("torch", "megatron-core", "transformers", "sentencepiece", "faiss-cpu", "numpy")
    found = {"python": ".".join(map(str, sys.version_info[:2])), "processor": torch.backends.cpu.get_cpu_capability()}
    return found | {name: version(name) for name in names}


def arithmetic() -> str:
    """Digest of what this machine's processor makes of floating-point numbers. Processors with the same instructions
    differ in the last bits, as libraries choose among their kernels by the model."""
    import torch

    draw = torch.Generator().manual_seed(3)
    digest = hashlib.sha256()
    for rows, width in ((1, 16), (7, 16), (31, 32), (128, 64), (300, 128)):
        values, weight = (torch.randn(size, width, generator=draw) for size in (rows, 2 * width))
        states = torch.nn.functional.gelu(torch.nn.functional.linear(values, weight))
        scores = (states @ states.T / width).softmax(-1) @ torch.nn.functional.layer_norm(states, (2 * width,))
        digest.update(torch.stack([scores.tanh(), scores.exp(), scores.cos()]).numpy().tobytes())
    return digest.hexdigest()[:16]


def record(tree: Path, folder: Path, names: list[str], python: str = sys.executable) -> Iterator[tuple[str, Any]]:
    """Make the parts of these names, and those that they need, one after the other.

    Args:
        tree: checkout whose commands are run.
        folder: empty folder to work in.
        names: of :data:`PARTS`.
        python: as for :class:`Commands`.
    """
    commands = Commands(tree, folder, python)
    wanted = {other for name in names for other in (*NEEDS.get(name, ()), name)}
    for name, function in PARTS.items():
        if name in wanted:
            before = os.times()
            yield name, function(commands)
            seconds = sum(os.times()[2:4]) - sum(before[2:4])
            print(f"{name}: {seconds:.1f} processor seconds", file=sys.stderr, flush=True)
