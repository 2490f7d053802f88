"""Options of reranking; imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import Checked, knob
from megatron_grit.errors import ConfigError

PROMPTS = {
    "yes_no": "Passage: {passage}\n\nQuery: {query}\n\nIs the passage relevant to the query? Answer yes or no.",
    "query_likelihood": "Passage: {passage}\nQuery that this passage answers:{query}",
}
"""What a model is asked, by method."""


@dataclass(kw_only=True)
class RerankingOptions(Checked):
    """How documents are reranked."""

    method: Literal["yes_no", "query_likelihood"] = "yes_no"
    """yes_no: the logit of yes less that of no, as the first token of the answer of a chat. query_likelihood: the
    log-probability of the query behind the passage, without a chat (SGPT-CE)."""
    ranking: str = knob("bm25", path=True)
    """What is reranked: bm25, embeddings (of the model), or a file, of TREC's runs or of an earlier reranking."""
    top_k: int = knob(100, at_least=1)
    """Documents of each query that are reranked; the others are not counted as found."""
    prompt: str | None = knob(None, text=True)
    """What is asked, with {passage} and {query}. null: a text of the method's."""
    passage_chars: int | None = knob(None, at_least=1)
    """Characters of a passage that are read; max_length cuts what is still too long. null: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("{passage}", "{query}"):
            if self.asked.count(name) != 1:
                raise ConfigError(f"prompt must hold {name} once")
        if self.method == "query_likelihood" and self.asked.index("{query}") < self.asked.index("{passage}"):
            raise ConfigError("prompt must hold {query} behind {passage}, for its probability given the passage")

    @property
    def asked(self) -> str:
        """The prompt."""
        return PROMPTS[self.method] if self.prompt is None else self.prompt
