"""Whether a passage is a positive over again: a part of it, a near copy, or one with something around it.

Runs of three words are compared, as a database does for near duplicates, but exactly, and by containment: where two
texts have a Jaccard similarity of s, at least s of the runs of the shorter one stand in the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

RUN = 3
"""Words of a run."""
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, where each letter counts as a word."""
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")
_KEPT = 1 << 13


def normalized(text: str) -> str:
    """A text whose white space and case do not count."""
    return " ".join(text.lower().split())


def repeats(passage: str, texts: Sequence[str], max_overlap: float) -> bool:
    """Whether a passage is a part of one of some texts, or of the passage and one of them more than a share of the
    different runs of the one with fewer stands in the other.

    Args:
        passage: of :func:`normalized`.
        texts: of :func:`normalized`.
        max_overlap: that share, from 0 to 1. Texts of fewer than three words have no runs.
    """
    if any(passage in text for text in texts):
        return True
    own = _runs(passage)
    return bool(own) and any(_share(own, _runs(text)) > max_overlap for text in texts)


def _share(first: frozenset[int], other: frozenset[int]) -> float:
    fewer = min(len(first), len(other))
    return len(first & other) / fewer if fewer else 0.0


@lru_cache(maxsize=_KEPT)
def _runs(text: str) -> frozenset[int]:
    words = _WORD.findall(text)
    return frozenset(map(hash, zip(*(words[place:] for place in range(RUN)), strict=False)))
