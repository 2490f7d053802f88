"""What RetroModel of megatron-core 0.15.3, the last line that had one, computes: recorded for models/retro.

Recording needs that version in a folder of its own, because it goes with no other:

    pip install --no-deps --target CORE megatron-core==0.15.3
    python -m tests.golden.retro_core CORE

Weights are drawn by name, so only logits are kept.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "retro_core.safetensors"
VOCAB = 64
WIDTH, HEADS, INNER, LAYERS = 32, 4, 48, 9


@dataclass(frozen=True)
class Case:
    """One model and input."""

    length: int
    chunk_length: int = 8
    num_neighbors: int = 2
    retrieved_chunks: int = 2
    encoder_layers: int = 2
    modern: bool = False
    """RoPE, RMSNorm and SwiGLU without biases and with an output layer of its own; else learned positions, LayerNorm
    and GELU with biases, tied."""

    @property
    def num_chunks(self) -> int:
        """Chunks of the sequence, the first one short where it does not divide."""
        return -(-self.length // self.chunk_length)

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [length] and [chunks, k, tokens of a neighbor]."""
        random = np.random.default_rng(self.length)
        shape = (self.num_chunks, self.num_neighbors, self.retrieved_chunks * self.chunk_length)
        return random.integers(0, VOCAB, self.length), random.integers(0, VOCAB, shape)


CASES = {
    "classic_32": Case(32),
    "classic_29": Case(29),
    "classic_8": Case(8),
    "modern_40": Case(40, modern=True),
    "modern_43_k3": Case(43, num_neighbors=3, retrieved_chunks=1, encoder_layers=3, modern=True),
    "modern_5": Case(5, modern=True),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a name, fp32. Norms are around 1, biases are no zeros."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    is_norm = "norm" in name and name.endswith("weight")
    return (1 + 0.1 * noise if is_norm else 0.15 * noise).astype(np.float32)


def our_name(name: str) -> str:
    """Of a parameter of RetroModel."""
    name = name.replace(".cross_attention.encoder.", ".encoder.").replace(".cross_attention.attn.", ".cross_attention.")
    return name.replace(".pre_mlp_layernorm.norm.", ".pre_mlp_layernorm.")


def _model(case: Case) -> Any:
    import torch
    import torch.nn.functional as F
    from megatron.core.models.retro import config as module
    from megatron.core.models.retro.config import RetroConfig
    from megatron.core.models.retro.decoder_spec import get_retro_decoder_block_spec
    from megatron.core.models.retro.model import RetroModel

    module.is_te_min_version = lambda version: False  # it compares with the version of what is not there
    config = RetroConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        ffn_hidden_size=INNER,
        add_bias_linear=not case.modern,
        normalization="RMSNorm" if case.modern else "LayerNorm",
        gated_linear_unit=case.modern,
        activation_func=F.silu if case.modern else F.gelu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=True,
        retro_chunk_length=case.chunk_length,
        retro_encoder_num_layers=case.encoder_layers,
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        retro_num_neighbors=case.num_neighbors,
        retro_num_retrieved_chunks=case.retrieved_chunks,
        retro_split_preprocessing="98,2,0",
    )
    model = RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCAB,
        max_sequence_length=64,
        position_embedding_type="rope" if case.modern else "learned_absolute",
        share_embeddings_and_output_weights=not case.modern,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(our_name(name), tuple(parameter.shape))))
    return model


def _logits(case: Case) -> np.ndarray:
    import torch

    tokens, neighbors = case.tokens()
    tokens = torch.from_numpy(tokens)[None]
    texts = torch.from_numpy(neighbors.reshape(-1, neighbors.shape[-1]))
    later = torch.ones(case.length, case.length).triu(1).bool()[None, None]
    with torch.no_grad():
        logits = _model(case)(
            tokens,
            torch.arange(case.length)[None],
            later,
            context_input_ids=texts,
            context_position_ids=torch.arange(texts.shape[1])[None].expand_as(texts),
        )
    return np.ascontiguousarray(logits[0].numpy())


def main(argv: list[str]) -> None:
    """Record."""
    sys.path.insert(0, argv[0])
    import torch
    import torch.distributed as dist
    from megatron.core import __version__, parallel_state, tensor_parallel
    from megatron.core.tensor_parallel import random
    from safetensors.numpy import save_file

    assert __version__.startswith("0.15."), f"{argv[0]} has megatron-core {__version__}"
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    random.get_cuda_rng_tracker = lambda *_: SimpleNamespace(fork=contextlib.nullcontext)
    tensor_parallel.get_cuda_rng_tracker = random.get_cuda_rng_tracker
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    save_file({name: _logits(case) for name, case in CASES.items()}, RECORDED)
    print(f"{RECORDED}: {len(CASES)} cases of megatron-core {__version__}")


if __name__ == "__main__":
    main(sys.argv[1:])
