"""The package lm-eval, imported late, and without the network unless that is allowed."""

from __future__ import annotations

import logging
import os
from types import ModuleType

from megatron_grit.errors import ConfigError

MISSING = "lm-eval is not installed: pip install 'megatron-grit[eval]'"
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
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError(MISSING) from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    return lm_eval
