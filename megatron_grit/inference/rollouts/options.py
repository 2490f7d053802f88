"""Options of ``megatron-grit rollouts``."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_grit.config.knob import Checked, knob
from megatron_grit.errors import ConfigError


@dataclass(kw_only=True)
class EndpointOptions(Checked):
    """Whom to ask, and how patiently."""

    endpoint: str | None = None
    """Base of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1: vLLM's, or of megatron-grit serve. An API
    key, where it needs one, is taken from OPENAI_API_KEY."""
    model: str | None = None
    """Name of its model. null: the first that it lists."""
    timeout: float = knob(600.0, above=0)
    """Seconds to wait for an answer."""
    retries: int = knob(5, at_least=0)
    """Times to ask again where a connection breaks or the endpoint is overloaded, after 1, 2, 4 ... seconds."""
    concurrency: int = knob(16, at_least=1)
    """Prompts that are asked at once."""


@dataclass(kw_only=True)
class RolloutSampling(Checked):
    """How completions are drawn."""

    n: int = knob(8, at_least=1)
    """Completions of each prompt: its group."""
    max_tokens: int = knob(512, at_least=1)
    """Longest completion in tokens."""
    temperature: float = knob(1.0, above=0)
    """Divides the logits. The model is trained at 1, and log-probabilities are of 1, so leave it there: no figure of
    training shows another one. Lines keep it, and build-rollouts says so."""
    top_p: float = knob(1.0, above=0, at_most=1)
    """Sample from the smallest set of tokens that holds this probability; leave it at 1 for the same reason."""
    seed: int = knob(0, at_least=0)
    """The seed of prompt i is seed + i; another one for each round of sampling."""
    token_ids: bool = True
    """Ask for the ids and log-probabilities of tokens (return_token_ids, logprobs), so that training need not tokenise
    again. --no-token-ids for an endpoint that refuses them."""


@dataclass(kw_only=True)
class RewardOptions(Checked):
    """How completions are rewarded."""

    reward: list[str] = knob([], verbatim=True, repeat=True)
    """[WEIGHT*]NAME[:ARGUMENT]; the flag may be given again, and rewards are added up by weight."""
    answer_key: str = "answer"
    """Key of a prompt's line with what is right: a text, or a list of texts of which one is."""
    answer_tag: str | None = None
    """Compare only what stands in the last <TAG>...</TAG> of a completion with what is right. null: all of it."""


@dataclass(kw_only=True)
class RolloutOptions(RewardOptions, RolloutSampling, EndpointOptions):
    """A file of prompts or completions to a file of rewarded completions."""

    prompts: str | None = knob(None, path=True)
    """JSONL of prompts, plain, .gz or .zst: {"messages": [...]} or {"prompt": "text"}, with what is right."""
    completions: str | None = knob(None, path=True)
    """JSONL of prompts that have completions already; they are rewarded (again), and no endpoint is asked."""
    output: str = knob(path=True)
    """JSONL file to write, a line for each prompt; compressed where it ends in .gz."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompts is None) == (self.completions is None):
            raise ConfigError("give --prompts, to be answered by --endpoint, or --completions, which are there already")
        if (self.prompts is None) != (self.endpoint is None):
            raise ConfigError("--prompts and --endpoint go together; give both, or --completions")
        if not self.reward:
            raise ConfigError("--reward must be given; --help lists what there is")
