"""The target network of BYOL and MoCo v3: an average of the online network, in one launch.

Only in this module ``momentum`` is the weight of the *target*, as in MMSelfSup: 0.996, not 0.004.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

from ema_fused.engine.backends import SlowPathWarning
from ema_fused.engine.checks import WrongModelError, as_integer, check_fraction
from ema_fused.engine.notices import warn
from ema_fused.modules.module_pairs import Kind
from ema_fused.modules.pairing import Pairing

_pairings: dict[tuple[int, int], Pairing] = {}


def momentum_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """``target = target * momentum + online * (1 - momentum)``, in place, for all parameters.

    Rounds as MMSelfSup's algorithms do (below 1/2 ``momentum`` itself is rounded). The plan for two
    networks is made once. A tensor whose storage is replaced (``parameter.data = ...``) is updated
    in its new storage. Buffers are left alone.

    Args:
        target: the network that is averaged.
        online: the network that is trained, of the same structure.
        momentum: the weight of ``target``, in [0, 1].

    Raises:
        KeyError: names of parameters don't match.
        ValueError: ``momentum`` is out of its range, a shape differs, or a trainable parameter
            shares memory with the target's.
        TypeError: one side of a pair is floating-point and the other isn't.

    If an error is raised, nothing has been updated.
    """
    momentum = check_fraction("momentum", momentum)
    key = (id(target), id(online))
    pairing = _pairings.get(key)
    if pairing is None or not pairing.holds(target, online, update_buffers=False):
        pairing = Pairing(
            target,
            online,
            update_buffers=False,
            arithmetic="products",
            leave=(Kind.BUFFER, Kind.CACHE),
            when_one_is_gone=lambda _: _pairings.pop(key, None),
        )
        _pairings[key] = pairing
    # 1.0 - momentum is exact for momentum >= 1/2, and the kernel's 1 - (1 - momentum) is the
    # momentum again.
    pairing.average_(1.0 - momentum)


class Networks(NamedTuple):
    """The names of an algorithm's two networks."""

    target: str
    online: str


# The networks that momentum_update() of MMSelfSup 0.11's algorithms averages.
_ALGORITHMS = {
    "mmselfsup.models.algorithms.byol.BYOL.momentum_update": Networks("target_net", "online_net"),
    "mmselfsup.models.algorithms.mocov3.MoCoV3.momentum_update": Networks(
        "momentum_encoder", "base_encoder"
    ),
    "mmselfsup.models.algorithms.cae.CAE.momentum_update": Networks("teacher", "backbone"),
}


class MomentumUpdate:
    """The part of ``MomentumUpdateHook`` that is the same for all runners.

    MMSelfSup's own algorithms (BYOL, MoCo v3; CAE if it is given a ``base_momentum``) are updated
    in one launch instead of by their ``momentum_update()``. For other algorithms that method is
    called, unless ``networks`` names the networks to average.

    Args:
        end_momentum: the weight of the target network at the end of training, in [0, 1].
        update_interval: iterations from one update to the next; with 0 or less there is none, as
            mmcv's hooks have it.
        networks: names of the model's attributes (target, online) to average.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.
    """

    def __init__(
        self,
        end_momentum: float = 1.0,
        update_interval: int = 1,
        networks: tuple[str, str] | None = None,
        **ignored: object,
    ) -> None:
        if networks is not None and len(networks) != 2:
            raise ValueError(
                f"networks is {networks!r}; two names are expected: of the target network and of "
                f"the online network"
            )
        if ignored:
            warn(f"MomentumUpdateHook ignores {', '.join(ignored)}, as the original does")
        self.end_momentum = check_fraction("end_momentum", end_momentum)
        self.update_interval = as_integer(update_interval, "update_interval")
        self.networks = None if networks is None else Networks(*networks)
        self._warned = False

    def _is_due(self, iteration: int) -> bool:
        return self.update_interval > 0 and (iteration + 1) % self.update_interval == 0

    def _set_momentum(self, model: nn.Module, iteration: int, max_iters: int) -> None:
        """``end - (end - base) * (cos(pi * iteration / max_iters) + 1) / 2`` (arXiv 2006.07733)."""
        base = _attribute(model, "base_momentum")
        _attribute(model, "momentum")
        phase = math.pi * iteration / float(max_iters)
        weight = self.end_momentum - (self.end_momentum - base) * (math.cos(phase) + 1) / 2
        model.momentum = weight

    def _update(self, model: nn.Module) -> None:
        networks = self.networks or self._known_networks(model)
        if networks is not None:
            target, online = (_attribute(model, name) for name in networks)
            momentum_update(target, online, _attribute(model, "momentum"))
            return
        update = _attribute(model, "momentum_update")
        if not self._warned:
            self._warned = True
            warn(
                f"{type(model).__name__} is updated by its own momentum_update(). Call "
                f"ema_fused.hooks.momentum_update.momentum_update in it, or name its networks: "
                f"networks=('target_net', 'online_net')",
                SlowPathWarning,
            )
        update()

    @staticmethod
    def _known_networks(model: nn.Module) -> Networks | None:
        method = getattr(type(model), "momentum_update", None)
        qualified = f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', '')}"
        return _ALGORITHMS.get(qualified)


def _attribute(model: nn.Module, name: str) -> Any:
    try:
        return getattr(model, name)
    except AttributeError:
        raise WrongModelError(
            f"{type(model).__name__} has no attribute {name!r}, which MomentumUpdateHook needs: "
            f"algorithms of the BYOL kind have base_momentum, momentum, and momentum_update() or "
            f"two networks"
        ) from None
