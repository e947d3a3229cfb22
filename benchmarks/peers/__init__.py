"""The originals that ours stand in for, each from its own package, and ours beside them.

A package that isn't there is left out by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers.side import Match, Side
from ema_fused.bench.contenders import FLOAT32, OURS, Contender, Group, random_tensors
from ema_fused.bench.measuring import Case, limit_bytes
from ema_fused.bench.shapes import Shapes
from ema_fused.bench.timing import Clock

ORIGINAL = "original"

# Which module of this package has the matches of a peer.
_MODULES = {
    "mmengine": "openmmlab",
    "mmdet": "openmmlab",
    "mmdet_2": "openmmlab",
    "mmpretrain": "openmmlab",
    "mmcv": "openmmlab",
    "mmselfsup": "openmmlab",
    "swa_utils": "wrappers",
    "timm": "wrappers",
    "diffusers": "wrappers",
    "ema_pytorch": "wrappers",
    "torch_ema": "wrappers",
}
NAMES = tuple(_MODULES)
_UPDATES_TO_CHECK = 2
# The values, a model and its average twice, and what an original allocates on its way.
_COPIES = 7


def matches(peer: str) -> list[Match]:
    """What of a peer is measured.

    Raises:
        ImportError, OSError: where the package, or a file of it, isn't there.
    """
    module = importlib.import_module(f"benchmarks.peers.{_MODULES[peer]}")
    found: list[Match] = module.MATCHES[peer]()
    return found


def peer_cases(peer: str, models: Sequence[Shapes], clock: Clock) -> Iterator[Case]:
    """All matches of a peer on networks of these shapes, float32."""
    found = matches(peer)
    for shapes in models:
        for match in found:
            needed = shapes.elements * 4 * _COPIES + limit_bytes(
                shapes.elements * match.bytes_moved
            )
            make = partial(_made, match, shapes, clock.device)
            yield Case("peer", peer, match.title, shapes, FLOAT32, needed, make)


def _made(match: Match, shapes: Shapes, device: torch.device) -> Group:
    values = random_tensors(shapes.shapes, torch.float32, device, seed=0)
    ours, original = (side(values) for side in (match.ours, match.original))
    return Group(
        [_contender(OURS, ours), _contender(ORIGINAL, original)],
        shapes.elements * match.bytes_moved,
        partial(check, match, ours, original),
    )


def _contender(name: str, side: Side) -> Contender:
    if len(side.calls) == 1:
        return Contender(name, [side.calls[0]])
    return Contender(name, [partial(_one_after_another, side.calls)])


def _one_after_another(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


# ---- The check -----------------------------------------------------------------------------------


def check(match: Match, ours: Side, original: Side) -> None:
    """Raise unless both sides hold the same after each call of some updates of new weights.

    Raises:
        AssertionError: naming the match and the tensor.
    """
    for update in range(1, _UPDATES_TO_CHECK + 1):
        for side in (ours, original):
            _train(side, update)
        for our_call, their_call in zip(ours.calls, original.calls, strict=True):
            our_call()
            their_call()
            _compare(match, ours.state(), original.state(), update)


def _train(side: Side, update: int) -> None:
    side.next_step()
    for tensor in side.trained:
        tensor.detach().mul_(-0.75).add_(0.125 * update)


def _compare(
    match: Match, found: dict[str, Tensor], wanted: dict[str, Tensor], update: int
) -> None:
    if found.keys() != wanted.keys():
        raise AssertionError(
            f"{match.title}: not the same names: {sorted(found.keys() ^ wanted.keys())[:6]}"
        )
    for name, tensor in wanted.items():
        ours = found[name]
        same = ours.dtype == tensor.dtype and (
            torch.equal(_bits(ours), _bits(tensor))
            if match.exact
            else torch.allclose(ours, tensor, rtol=1e-6, atol=1e-6)
        )
        if not same:
            raise AssertionError(
                f"{match.title}: {name!r} of shape {tuple(tensor.shape)} differs from the "
                f"original's after update {update}"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
