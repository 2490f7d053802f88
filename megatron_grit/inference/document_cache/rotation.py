"""Keys moved to other positions: rotations of RoPE add up, so a key that was rotated for one position is rotated by the
difference to another.

Shape suffix legend: T = tokens, G = key-value heads, H = channels of a head, C = rotated ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_grit.models.rope import RotaryAngles


def moved(angles: RotaryAngles, key_TGH: Tensor, start: int | None, target: int | None) -> Tensor:
    """Keys of consecutive tokens, rotated for other positions.

    The difference is taken between the angles that the engine would use at both, which are rounded to fp32: so the
    result is what the engine computes at the new position, at long distances too.

    Args:
        angles: the model's; those of stretched RoPE are stretched here as well.
        key_TGH: keys.
        start: position of the first one as it is rotated now. None: they are not rotated.
        target: position of the first one afterwards. None: not rotated.

    Returns:
        [T, G, H] of the type of ``key_TGH``; the same tensor where nothing changes.
    """
    if start == target:
        return key_TGH
    offsets = torch.arange(len(key_TGH), device=key_TGH.device)
    turned = torch.zeros((), dtype=torch.float64, device=key_TGH.device)
    for first, sign in ((target, 1.0), (start, -1.0)):
        if first is not None:
            turned = turned + sign * angles(offsets + first).double()
    turned_T1C = turned.squeeze(1)
    num_rotated = turned_T1C.shape[-1]
    rotated, kept = key_TGH[..., :num_rotated].float(), key_TGH[..., num_rotated:]
    if angles.is_interleaved:
        beside = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).flatten(-2)
    else:
        first_half, second_half = rotated.chunk(2, -1)
        beside = torch.cat((-second_half, first_half), -1)
    rotated = rotated * turned_T1C.cos().float() + beside * turned_T1C.sin().float()
    return torch.cat((rotated.to(key_TGH.dtype), kept), -1)
