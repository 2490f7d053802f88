"""Random states: captured and put back, so that a second forward pass draws what the first one drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Every generator that a forward pass may draw from."""

    cpu: Tensor
    device: Tensor | None
    tracker: dict[str, Tensor]

    @staticmethod
    def capture() -> RandomState:
        """The state of now."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        tracker = {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
        device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return RandomState(torch.get_rng_state(), device, tracker)

    def restore(self) -> None:
        """Go back to this state."""
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)
        get_cuda_rng_tracker().set_states({name: state.clone() for name, state in self.tracker.items()})

    def as_tensors(self) -> dict[str, Tensor]:
        """Flat form for a file; :meth:`from_tensors` reads it."""
        tensors = {"cpu": self.cpu} | {f"tracker.{name}": state for name, state in self.tracker.items()}
        return tensors if self.device is None else tensors | {"device": self.device}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> RandomState:
        """Inverse of :meth:`as_tensors`."""
        prefix = "tracker."
        tracker = {name[len(prefix) :]: state for name, state in tensors.items() if name.startswith(prefix)}
        return RandomState(tensors["cpu"], tensors.get("device"), tracker)


@contextmanager
def replay(state: RandomState | None) -> Iterator[None]:
    """Run the block from ``state`` and then go on from where the generators stood before it. None: do nothing."""
    if state is None:
        yield
        return
    present = RandomState.capture()
    state.restore()
    try:
        yield
    finally:
        present.restore()
