"""What commands import once they run: loaded before they are forked, it is paid for once."""

import contextlib

import torch.distributed.run  # noqa: F401

import megatron_grit.config.parse  # noqa: F401
import megatron_grit.inference.model  # noqa: F401

with contextlib.suppress(ImportError):
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401
