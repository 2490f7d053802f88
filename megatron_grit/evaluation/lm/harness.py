"""The package lm-eval, imported late, and without the network unless that is allowed."""

from __future__ import annotations

import logging
import os
from types import ModuleType

from megatron_grit.compat import needed

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def import_lm_eval(allow_downloads: bool = False) -> ModuleType:
    """The package.

    Args:
        allow_downloads: whether data sets may be fetched. Where not, its packages are told before they are imported.

    Raises:
        ConfigError: it is not installed.
    """
    if not allow_downloads:
        for name in _OFFLINE:
            os.environ.setdefault(name, "1")
    with needed("evaluate lm needs", "lm-eval", "eval"):
        import lm_eval
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return lm_eval
