"""Options that several commands share, each declared once; functions take their defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import Checked, knob
from megatron_grit.errors import ConfigError


@dataclass(kw_only=True)
class ModelOptions:
    """A trained model and where it runs."""

    checkpoint: str = knob(path=True)
    """Checkpoint directory, or a run's output directory for its newest one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: a GPU if there is one."""


@dataclass(kw_only=True)
class TextLength(Checked):
    """How much of a text is read."""

    max_length: int = knob(512, at_least=1)
    """Longest text in tokens, template included; the rest is cut, and what is beyond the model's positions."""


@dataclass(kw_only=True)
class BatchSize(Checked):
    """How much a forward pass takes."""

    batch_tokens: int = knob(8192, at_least=1)
    """Tokens of a forward pass, padding included."""


@dataclass(kw_only=True)
class MeshSizes(Checked):
    """The mesh of a trained model over the processes of a launcher's job; what is left over is data parallel."""

    tensor: int = knob(1, at_least=1)
    """Processes that each layer is split over."""
    pipeline: int = knob(1, at_least=1)
    """Stages that layers are shared out to."""
    context: int = knob(1, at_least=1)
    """Processes that the tokens of a row are shared out to."""
    expert: int = knob(1, at_least=1)
    """Processes that experts are shared out to."""


@dataclass(kw_only=True)
class RewardEvaluation(BatchSize, ModelOptions):
    """Which reward model, and the pairs."""

    data: str = knob(path=True)
    """JSONL of pairs: what build-preference reads, plain, .gz or .zst."""
    output: str | None = knob(None, path=True)
    """JSON file for the figures and their 95% intervals. null: they are printed only."""


@dataclass(kw_only=True)
class HarnessModel(MeshSizes, BatchSize, ModelOptions):
    """A model that lm-eval asks."""

    precision: Literal["fp32", "bf16"] | None = None
    """Of the weights. null: that of the training run, but fp32 on a CPU."""
    base: str | None = knob(None, path=True)
    """For a run with adapters, where their base is now. null: where the run read it."""
    max_length: int | None = knob(None, at_least=2)
    """Tokens that the model reads, prompt and answer together; more are cut off in front. null: all its positions."""
    add_bos_token: bool | None = None
    """Whether BOS stands before each prompt that does not begin with it. null: as the tokenizer does."""
    chat_template: str | None = knob(None, path=True)
    """In which prompts are written with --apply-chat-template: tulu, gritlm, zephyr, llama2, chatml, tokenizer or your
    own .yaml file. null: the checkpoint's."""
    chat_date: str | None = None
    """What a template that asks for the date is told: YYYY-MM-DD, or data for the training data's. null: today's."""
    at_once: int = knob(16, at_least=1)
    """Prompts that are continued together."""


@dataclass(kw_only=True)
class HarnessTasks(Checked):
    """What lm-eval asks a model."""

    tasks: list[str]
    """Suites, tasks, groups, YAML files, with commas between them."""
    output_dir: str = knob(path=True)
    """Folder for results and answers."""
    include_path: list[str] = knob([], path=True)
    """Folders with YAML files of tasks of your own, which count before lm-eval's."""
    num_fewshot: int | None = knob(None, at_least=0)
    """Examples in each prompt. null: as each task says."""
    limit: float | None = knob(None, above=0)
    """Only so many documents of each task, or below 1 this share of them. null: all."""
    apply_chat_template: bool = False
    """Write prompts as conversations, in the checkpoint's chat template."""
    system: str | None = knob(None, text=True)
    """System message before each prompt."""
    fewshot_as_multiturn: bool = True
    """Write examples as turns of the conversation, rather than into one."""
    gen_kwargs: str | None = None
    """Options of generation in place of the tasks': do_sample=true,temperature=0.8,max_gen_toks=512."""
    log_samples: bool = False
    """Also write each document with its requests and answers."""
    bootstrap_iters: int = knob(100000, at_least=0)
    """Resamplings for the standard errors of metrics that have no formula; 0: none."""
    allow_downloads: bool = False
    """Let lm-eval fetch data sets and metrics that are not on this machine."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run what the model writes as programs (HumanEval, MBPP). Use a sandbox."""


@dataclass(kw_only=True)
class TeacherLogits(Checked):
    """What is kept of a teacher."""

    top_k: int = knob(64, at_least=1)
    """Most probable tokens that are kept for each token; all others are kept as one. 8 top_k + 4 bytes a token."""
    temperature: float = knob(1.0, above=0)
    """Divides the logits: loss.teacher.temperature of the runs to come."""


@dataclass(kw_only=True)
class EmbeddingOptions(BatchSize, TextLength):
    """How texts are embedded."""

    instruction: str | None = knob("", text=True)
    """Attended before each text, not pooled. "": the template without instruction. null: the bare text."""
    side: Literal["query", "passage"] | None = None
    """What the texts are, for a model that tells queries from passages."""
    dimensions: int | None = knob(None, at_least=1)
    """Keep this many of an embedding's first numbers and normalise them again (Matryoshka). null: all."""


MAX_STOPS = 4
"""Stop texts of a request, as of OpenAI's API."""


@dataclass(kw_only=True)
class SamplingOptions(Checked):
    """How an answer is drawn, and where it ends."""

    max_new_tokens: int = knob(128, at_least=1)
    """Longest answer in tokens; it ends at the model's last position at the latest."""
    temperature: float = knob(0.0, at_least=0)
    """0: the likeliest token each time. Above: sampled, the more freely the higher it is."""
    top_p: float = knob(1.0, above=0, at_most=1)
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: int | None = knob(None, at_least=1)
    """Sample from this many of the likeliest tokens, before top_p. null: from all."""
    repetition_penalty: float = knob(1.0, above=0)
    """Divides the scores of tokens that prompt or answer hold already, and multiplies negative ones. 1: none."""
    seed: int = knob(0, at_least=0)
    """Seed of the sampling. Equal prompts that are answered together draw differently."""
    stop: list[str] = knob([], verbatim=True, text=True)
    """Texts, 4 at most, before the first of which an answer ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.stop) > MAX_STOPS:
            raise ConfigError(f"stop must be at most {MAX_STOPS} texts, not {len(self.stop)}")


CacheForm = Literal["doc", "query", "query-doc", "doc-query"]
"""Forms of a prompt that begins with caches."""


@dataclass(kw_only=True)
class CacheUse(Checked):
    """How caches of documents are read."""

    format: CacheForm = "doc"
    """What the caches are of. doc: documents, and the request is a query. query: a query, and the request is a
    document. query-doc, doc-query: both in this order, and the request is empty."""
    repair: Literal["auto", "none", "first", "deviating", "all"] = "auto"
    """Tokens of the caches that are computed anew, because caches know nothing of each other. first: the first ones of
    each cache but the first. deviating: those that differ most. auto: first where there are several caches, else
    none."""
    repair_tokens: int = knob(16, at_least=1)
    """How many of each cache, for first."""
    repair_share: float = knob(0.15, above=0, at_most=1)
    """Which share of all, for deviating."""


@dataclass(kw_only=True)
class RetroOptions(Checked):
    """What a model that reads neighbors reads."""

    retro_project: str | None = knob(None, path=True)
    """Retrieval database whose chunks are read: the --project-dir of tools/retro/build_db.py. null: none are."""
    retrieve_every: int | None = knob(None, at_least=1)
    """Retrieve after so many tokens of the answer, with the last model.retro.chunk_length of prompt and answer. null:
    after each chunk_length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retrieve_every is not None and self.retro_project is None:
            raise ConfigError(
                "retrieve_every is of retro_project, which is not given; give it, or leave retrieve_every out"
            )


@dataclass(kw_only=True)
class ServingLimits(TextLength):
    """What a server allows."""

    max_new_tokens: int = knob(512, at_least=1)
    """Longest answer in tokens, and the length where a request gives none."""
    max_body_bytes: int = knob(4 << 20, at_least=1)
    """Largest body of a request."""
    max_request_tokens: int = knob(1 << 18, at_least=1)
    """Tokens that one request may have the model read: of all its texts, or of its prompts, each for each answer."""
    max_waiting: int = knob(512, at_least=0)
    """Requests of a kind, to embed or to generate, that may wait for their turn."""
    max_seconds: float = knob(300.0, above=0)
    """Time for a request, waiting included."""


@dataclass(kw_only=True)
class TokenizerTraining(Checked):
    """How a tokenizer is trained."""

    vocab_size: int = knob(at_least=270)
    """Pieces, 260 bytes and special tokens included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm."""


@dataclass(kw_only=True)
class SentencePieceTraining(TokenizerTraining):
    """What a program may choose as well."""

    character_coverage: float = knob(0.9995, above=0, at_most=1)
    """Share of the characters that get pieces of their own."""
    max_text_chars: int = knob(4096, at_least=1, at_most=1 << 24)
    """Longer texts are cut into pieces of this many characters for training."""


@dataclass(kw_only=True)
class AllNliChoice(Checked):
    """What is taken of AllNLI."""

    split: str = "train"
    """Rows of the table that are taken."""
    seed: int = knob(42, at_least=0)
    """Seed of the choice of entailments."""


@dataclass(kw_only=True)
class MsMarcoNegatives(Checked):
    """Which negatives of MS MARCO are taken."""

    margin: float | None = knob(3.0, null="off")
    """By how much a negative's score must be below that of the worst positive; off: not compared."""
    per_system: int = knob(5, at_least=1)
    """Negatives of each system."""
    systems: list[str] = knob([])
    """Whose negatives are taken. Empty: those of all."""


@dataclass(kw_only=True)
class ShownRecords(Checked):
    """Which records of an indexed file are shown."""

    show: int = knob(3, at_least=0)
    """Number of records."""
    start: int = knob(0, at_least=0)
    """First record."""
