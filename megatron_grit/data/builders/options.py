"""Options of the tools that build indexed files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from megatron_grit.config.knob import Checked, knob
from megatron_grit.errors import ConfigError


@dataclass(kw_only=True)
class BuildOptions(Checked):
    """How any build runs."""

    workers: int | None = knob(None, at_least=1)
    """Processes that tokenise. null: one for each core."""
    partitions: int = knob(1, at_least=1)
    """Parts of the input, each of which is built once."""
    partition: int | None = knob(None, at_least=0)
    """Build only this part, counted from 0; the command without it joins them."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a line that is not a record."""
    overwrite: bool = False
    """Replace the files of an earlier build."""
    checksum: bool = True
    """Write checksums into the .json."""

    def engine(self) -> dict[str, Any]:
        """Arguments of :func:`~megatron_grit.data.builders.block_build.build_blocks`."""
        names = ("partitions", "partition", "on_error", "overwrite", "checksum")
        workers = self.workers or len(os.sched_getaffinity(0))
        return {name: getattr(self, name) for name in names} | {"workers": workers, "progress": True}


@dataclass(kw_only=True)
class ConversationOptions(BuildOptions):
    """Records with conversations to one indexed file."""

    input: list[str] = knob(path=True)
    """JSONL files or patterns, plain, .gz or .zst, read in this order."""
    output_prefix: str = knob(path=True)
    """PREFIX.bin, .idx, .json, .report.json and .report.png are written."""
    tokenizer: str = knob(path=True)
    """SentencePiece .model, tokenizer.json, their folder, or a model's name on the Hugging Face hub."""
    template: str = knob("tulu", path=True)
    """Of conversations: chatml, gritlm, llama2, tulu, zephyr, tokenizer for the tokenizer's own, or a .yaml file."""
    generative_max_len: int = knob(2048, at_least=2)
    """Longest text or conversation in tokens."""
    min_len: int = knob(0, at_least=0)
    """Drop records with a text of fewer tokens, template included."""
    max_len: int | None = knob(None, at_least=1)
    """Drop records with a text of more tokens before any cut."""
    deduplicate: bool = False
    """Keep the first of records that say the same but for white space."""
    decontaminate: list[str] = knob([], path=True)
    """Drop records that share an n-gram with these files."""
    ngram: int = knob(13, at_least=1)
    """Words of an n-gram."""
    on_filtered: Literal["drop", "stop"] = "drop"
    """What to do at an empty text, an instruction too long and the like."""


@dataclass(kw_only=True)
class RecordOptions(ConversationOptions):
    """Texts and conversations to one indexed file."""

    over_long: Literal["drop", "truncate", "terminate", "split"] = "truncate"
    """What to do with a longer one; terminate: cut it, and end an answer that is cut with its end token all the same;
    split: into several, conversations between turns."""
    turns: Literal["each", "last"] = "each"
    """Of a template that drops something of an answer once another turn follows, as Qwen3's does with <think> parts:
    train each answer, in a record of its own that ends with it, or the last one alone."""


@dataclass(kw_only=True)
class PreferenceOptions(ConversationOptions):
    """Preferred and rejected answers, or rated ones, to one indexed file."""

    over_long: Literal["drop", "truncate", "terminate"] = "truncate"
    """What to do with a longer one. drop: leave its record out. truncate: cut off the end of its answer. terminate: and
    end what is left of the answer with its end token."""


@dataclass(kw_only=True)
class GritOptions(RecordOptions):
    """Embedding or generative records to one indexed file."""

    template: str = knob("gritlm", path=True)
    query_max_len: int = knob(256, at_least=2)
    """Longest query in tokens, template included."""
    passage_max_len: int = knob(2048, at_least=2)
    """Longest passage in tokens, template included."""


@dataclass(kw_only=True)
class DocumentFileOptions(BuildOptions):
    """Documents to indexed files of Megatron."""

    input: list[str] = knob(path=True)
    """JSONL files or glob patterns: plain, .gz or .zst."""
    json_keys: list[str] = knob(["text"])
    """Keys to take, each into a file of its own."""
    output_prefix: str = knob(path=True)
    """Path of the output without _KEY_document.bin."""
    tokenizer_type: Literal["auto", "SentencePieceTokenizer", "HuggingFaceTokenizer"] = "auto"
    """Kind of tokenizer. auto: found from the file."""
    tokenizer_model: str = knob(path=True)
    """SentencePiece .model, tokenizer.json, their folder, or a model's name on the Hugging Face hub."""
    append_eod: bool = False
    """Put the end of sequence behind each document."""
    split_sentences: bool = False
    """Make each sentence a sequence of its own (NLTK's Punkt)."""
    keep_newlines: bool = False
    """Keep white space after a sentence with it."""
    punkt_model: str | None = knob(None, path=True)
    """JSON of an earlier run, or a punkt_tab folder. null: trained on the corpus."""
    lang: str | None = None
    """Take NLTK's own Punkt parameters of this language, from NLTK_DATA."""
    log_interval: int = knob(100_000, at_least=1)
    """Documents between lines, where there is no terminal."""


@dataclass(kw_only=True)
class SftConversion(Checked):
    """A published data set to JSONL of messages."""

    source: str
    """Its name in the table, such as dolly, sharegpt, oasst1 or flan_v2; a wrong one lists them."""
    input: str = knob(path=True)
    """Folder with its raw files, under their published names."""
    output: str = knob(path=True)
    """JSONL file to write."""
    files: list[str] = knob([], path=True)
    """Take these files of the folder, all records of them, in place of the table's."""
    most: int | None = knob(None, at_least=0)
    """Draw so many records of each file. null: as many as the table says. 0: all."""
    wrap: Literal["plain", "alpaca", "drawn"] = "plain"
    """How an instruction and its input become a turn. drawn: in one of 14 phrasings, with the published weights."""
    top_k_replies: int | None = knob(None, at_least=1)
    """In trees of replies follow this many of the best at each message. null: all."""
    max_tokens: int | None = knob(None, at_least=1)
    """Split longer conversations between pairs of turns; needs the tokenizer."""
    tokenizer: str | None = knob(None, path=True)
    """Counts the tokens of max_tokens."""
    seed: int = knob(42, at_least=0)
    """Seed of all that is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.max_tokens is None) != (self.tokenizer is None):
            raise ConfigError("max_tokens and tokenizer go together; give both or neither")


@dataclass(kw_only=True)
class SftMixture(Checked):
    """A mixture of JSONL files."""

    mixture: list[str] = knob(path=True)
    """tulu-v1, tulu-v2, flan-v1 or flan-v2; a .yaml file; a .txt file with a name and an amount a line; or names and
    amounts in turn: 500 records, 0.5 or 2.0 epochs."""
    input: str = knob(path=True)
    """Folder with NAME.jsonl of each source, as convert-sft writes them."""
    output: str = knob(path=True)
    """JSONL file to write."""
    without: list[str] = knob([])
    """Sources to leave out."""
    total: int | None = knob(None, at_least=1)
    """Records of a mixture whose sources have shares, as flan-v1 and flan-v2."""
    seed: int = knob(42, at_least=0)
    """Seed of what is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mixture:
            raise ConfigError("mixture is empty; give a name, a file, or names with amounts")


@dataclass(kw_only=True)
class SftStatistics(Checked):
    """What instruction data is like."""

    input: list[str] = knob(path=True)
    """JSONL files or patterns, of messages, conversations, prompts with completions or texts."""
    tokenizer: str | None = knob(None, path=True)
    """Counts tokens: .model, tokenizer.json, their folder, or a model's name on the hub. null: words are counted."""
    lengths: list[int] = knob([512, 1024, 2048, 4096], at_least=1)
    """The share of the records above each of these is told."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a line that is not a record."""
    output: str | None = knob(None, path=True)
    """JSON file to write as well."""
    plot: str | None = knob(None, path=True)
    """PNG file with histograms of the lengths, where matplotlib is installed."""


@dataclass(kw_only=True)
class SftSelection(Checked):
    """Which records of instruction data are taken, in this order."""

    input: list[str] = knob(path=True)
    """JSONL files or patterns."""
    output: str = knob(path=True)
    """JSONL file to write: the lines as they are, in their order."""
    deduplicate: bool = False
    """Leave out records that say the same as an earlier one, white space aside."""
    ratio: float | None = knob(None, at_least=0)
    """Take the num_records whose instruction over answer is nearest to it."""
    num_records: int | None = knob(None, at_least=1)
    """Records that ratio takes."""
    tokenizer: str | None = knob(None, path=True)
    """Counts tokens for the ratio. null: words are counted."""
    fraction: float | None = knob(None, above=0, at_most=1)
    """Draw so much of each data set, told by the key dataset; of all together exactly."""
    seed: int = knob(42, at_least=0)
    """Seed of fraction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) != (self.num_records is None):
            raise ConfigError("ratio and num_records go together; give both or neither")
        if not self.deduplicate and self.ratio is None and self.fraction is None:
            raise ConfigError("nothing is selected; give deduplicate, ratio with num_records, or fraction")
