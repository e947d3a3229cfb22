"""torchtitan's package, and its average as its formula says, for tests beside ours.

``EMA`` itself is in no release yet (0.3.0 is the newest). What it is made of is: the container of
optimizers that it derives from, which saves and loads its state. So :class:`Restated` is that
container with averages by ``torch._foreach_lerp_``, as torchtitan's documentation of ``EMA`` says.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.frameworks import originals

# The package, and what it imports where it is asked for optimizers and checkpoints alone.
PINS = ("torchtitan==0.3.0", "tyro==1.0.17", "docstring_parser==0.18.0", "spmd_types==0.2.3")


def import_torchtitan() -> None:
    """Imports torchtitan and our adapter for it.

    Raises:
        FileNotFoundError: it isn't unpacked.
    """
    if "ema_fused.adapters.torchtitan" in sys.modules:
        return
    folders = [originals.folder_of(pin) for pin in PINS]
    known = list(sys.path)
    sys.path[:0] = map(str, folders)
    try:
        import torchtitan.components.checkpointer  # noqa: F401

        import ema_fused.adapters.torchtitan  # noqa: F401
    finally:
        sys.path[:] = known


def restated(
    parts: list[nn.Module], *, patterns: tuple[str, ...] = (), fraction: float = 0.05
) -> Any:
    """torchtitan's average, on its own container: ``step(current_step)``, ``state_dict()``, ..."""
    import_torchtitan()
    from torchtitan.components.optimizer import OptimizersContainer

    class Averages(torch.optim.Optimizer):
        def __init__(self, named: dict[str, Tensor]) -> None:
            group = {"params": [*named.values()], "param_names": [*named]}
            super().__init__([group], {})
            for tensor in named.values():
                self.state[tensor]["ema_params"] = tensor.detach().clone()

    class Restated(OptimizersContainer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.optimizers = [Averages(dict(part.named_parameters())) for part in parts]
            for part in parts if patterns else []:
                named = {
                    name: buffer
                    for name, buffer in part.named_buffers()
                    if any(re.search(pattern, name) for pattern in patterns)
                }
                self.optimizers.append(Averages(named))

        @torch.no_grad()
        def step(self, current_step: int) -> None:
            decay = 2.0 ** (-1.0 / (fraction * current_step))
            for optimizer in self.optimizers:
                for sharded in (True, False):  # torch takes no list of both kinds
                    tensors = [
                        tensor
                        for tensor in optimizer.param_groups[0]["params"]
                        if isinstance(tensor, DTensor) == sharded
                    ]
                    averages = [optimizer.state[tensor]["ema_params"] for tensor in tensors]
                    if tensors:
                        torch._foreach_lerp_(averages, tensors, 1.0 - decay)

    return Restated()
