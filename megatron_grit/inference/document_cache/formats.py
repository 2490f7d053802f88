"""What is cached and what is written behind it: the four forms of GritLM (arXiv 2402.09906, section 5), as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from megatron_grit.config.options import CacheForm
from megatron_grit.data.text.special import SpecialTokens
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError


@dataclass(frozen=True)
class CacheFormat:
    """A prompt of which the beginning is cached."""

    caches: str
    """What the caches are of, as messages say it."""
    least: int
    """Fewest caches."""
    most: int | None
    """Most caches. None: any number."""
    before: str
    """What follows the caches, up to the text of the request."""
    after: str
    """What follows that text; the answer comes next."""
    takes_text: bool = True


_ASK = "\n<|user|>\n"
_ANSWER = "\n<|assistant|>\n"
FORMATS: dict[str, CacheFormat] = {
    "doc": CacheFormat(
        "documents",
        1,
        None,
        _ASK,
        f"\n\nAnswer the prior query while optionally using the context prior to it{_ANSWER}",
    ),
    "query": CacheFormat(
        "a query",
        1,
        1,
        _ASK,
        f"\n\nOptionally using the prior context answer the query prior to it{_ANSWER}",
    ),
    "query-doc": CacheFormat(
        "a query and then documents",
        2,
        None,
        f"{_ASK}Optionally using the prior context answer the query prior to it{_ANSWER}",
        "",
        takes_text=False,
    ),
    "doc-query": CacheFormat(
        "documents and then a query",
        2,
        None,
        f"{_ASK}Answer the prior query while optionally using the context prior to it{_ANSWER}",
        "",
        takes_text=False,
    ),
}
assert tuple(FORMATS) == get_args(CacheForm)


def prompt_behind(tokenizer: Tokenizer, name: str, num_caches: int, text: str | None) -> list[int]:
    """Ids that follow the caches, up to where the answer begins.

    Args:
        tokenizer: the model's.
        name: of one of :data:`FORMATS`.
        num_caches: that are given.
        text: of the request: the query behind documents, a document behind a query, nothing behind both.

    Raises:
        DataError: there are too many or too few caches, or a text too much or too little.
    """
    form = FORMATS[name]
    if not form.least <= num_caches <= (form.most or num_caches):
        raise DataError(f"cache format {name} takes {form.caches}, and {num_caches} caches are given")
    if (text is not None) != form.takes_text:
        what = "takes a text behind the caches; give it" if form.takes_text else "takes no text behind them; give None"
        raise DataError(f"cache format {name} has caches of {form.caches} and {what}")
    special = SpecialTokens(tokenizer)
    # What the request says is text, hence it is put in after the format is split.
    parts: list[str | int] = [*special.split(form.before), text or "", *special.split(form.after)]
    ids: list[int] = []
    run = ""
    for part in [*parts, None]:
        if isinstance(part, str):
            run += part
            continue
        if run:
            ids += tokenizer.after_special.encode(run)
        if part is not None:
            ids.append(part)
        run = ""
    return ids


def check_one_attention(attentions: Sequence[str]) -> None:
    """
    Raises:
        DataError: caches of causal and of bidirectional passes are mixed.
    """
    if len(set(attentions)) > 1:
        raise DataError("some caches were made by causal and some by bidirectional passes; give caches of one kind")
