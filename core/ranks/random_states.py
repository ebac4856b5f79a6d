"""The states of this process's random generators, taken and given back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RandomStates:
    """torch's generators, Python's and numpy's at one moment; what was not taken (None) stays as it is."""

    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None = None
    python: tuple[Any, ...] | None = None
    numpy: Any = None

    @classmethod
    def take(cls, every: bool = True) -> RandomStates:
        """Take the states; without `every` torch's alone, in a fortieth of the time: numpy's cost 90 us."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        if not every:
            return cls(torch.get_rng_state(), cuda)
        numpy: Any = np.random.get_state(legacy=False)
        # Another bit generator that a script put in there cannot be given back (numpy: legacy MT19937 only).
        is_usual = numpy["bit_generator"] == "MT19937"
        return cls(torch.get_rng_state(), cuda, random.getstate(), numpy if is_usual else None)

    def give_back(self) -> None:
        """Let the generators go on from here."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.torch_cuda)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            np.random.set_state(self.numpy)

    def filled(self, other: RandomStates) -> RandomStates:
        """Return these states, with those of `other` for what was not taken."""
        return RandomStates(
            self.torch_cpu,
            self.torch_cuda if self.torch_cuda is not None else other.torch_cuda,
            self.python if self.python is not None else other.python,
            self.numpy if self.numpy is not None else other.numpy,
        )

    def same_as(self, other: RandomStates) -> bool:
        """Return whether nothing was drawn between the two (on the host)."""
        return (
            torch.equal(self.torch_cpu, other.torch_cpu)
            and self.python == other.python
            and _words(self.numpy) == _words(other.numpy)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the states as tensors, arrays and plain values."""
        found: dict[str, Any] = {"torch": self.torch_cpu}
        if self.torch_cuda is not None:
            found["cuda"] = self.torch_cuda
        if self.python is not None:
            version, internal, gauss = self.python
            found["python"] = [version, torch.tensor(internal, dtype=torch.int64), gauss]
        if self.numpy is not None:
            found["numpy"] = self.numpy
        return found

    @classmethod
    def of(cls, state: dict[str, Any]) -> RandomStates:
        """Return what `state_dict` was made of, also in the form of checkpoints before format 2."""
        python, numpy = state.get("python"), state.get("numpy")
        if python is not None:
            version, internal, gauss = python
            python = (version, tuple(internal.tolist() if isinstance(internal, torch.Tensor) else internal), gauss)
        if isinstance(numpy, list):
            keys, position, has_gauss, cached = numpy
            numpy = ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached)
        return cls(state["torch"], state.get("cuda"), python, numpy)


def _words(numpy: Any) -> Any:
    return None if numpy is None else (numpy["state"]["key"].tobytes(), numpy["state"]["pos"], numpy["has_gauss"])
