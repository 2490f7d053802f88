"""Keys and values in 8 or 4 bits.

Keys are rounded by channel, over tokens, because some of their channels are much larger than the others at all tokens;
values by token, over channels (KIVI, arXiv 2402.02750). Keys are rounded before they are rotated, which would mix large
channels with small ones (KVQuant, arXiv 2401.18079).

Shape suffix legend: N = elements of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
"""Elements that share a scale and a smallest value."""


def quantized(values: Tensor, dim: int, num_bits: int) -> dict[str, Tensor]:
    """Values rounded to ``2 ** num_bits`` steps between the least and the largest of each group.

    Args:
        values: of any shape.
        dim: along which :data:`GROUP` consecutive elements are a group; the last group may be smaller.
        num_bits: 8, or 4 of which two share a byte.

    Returns:
        "codes" uint8, flat, and "scale" and "least", fp32 of the shape of ``values`` with groups in place of elements.
    """
    grouped = _grouped(values.float(), dim)
    least, largest = grouped.amin(-1), grouped.amax(-1)
    scale = ((largest - least) / (2**num_bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((grouped - least[..., None]) / scale[..., None]).round().to(torch.uint8).flatten()
    if num_bits == 4:
        codes = codes[0::2] | codes[1::2] << 4  # groups are even
    return {"codes": codes, "scale": scale, "least": least}


def restored(packed: dict[str, Tensor], shape: torch.Size, dim: int) -> Tensor:
    """What :func:`quantized` rounded: fp32 of ``shape``."""
    scale, codes = packed["scale"][..., None], packed["codes"]
    if codes.numel() < scale.numel() * GROUP:
        codes = torch.stack((codes & 15, codes >> 4), -1)
    grouped = codes.view(*packed["scale"].shape, GROUP).float() * scale + packed["least"][..., None]
    return grouped.flatten(-2)[..., : shape[dim]].movedim(-1, dim)


def _grouped(values: Tensor, dim: int) -> Tensor:
    """[..., groups, N], the last element repeated where the last group is smaller."""
    last = values.movedim(dim, -1)
    missing = -last.shape[-1] % GROUP
    if missing:
        last = torch.cat((last, last[..., -1:].expand(*last.shape[:-1], missing)), -1)
    return last.unflatten(-1, (-1, GROUP))
