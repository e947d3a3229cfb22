"""What an averaged module does with one model: prepared once, run at every update."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ema_fused.engine.dtensors import local
from ema_fused.engine.plan import Plan
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.known_model import KnownModel
from ema_fused.modules.materialising import materialise
from ema_fused.modules.module_pairs import Kind, Pair, lists_of, pair_up, plan_of
from ema_fused.modules.watch import ModuleWatch
from ema_fused.offloading.offloaded_plan import OffloadedPlan


class Pairing:
    """What an averaged module does with one model: prepared once, run at every update.

    Follows the tensors: :meth:`holds` tells when slots hold other objects; tensors that got another
    dtype in place (``module.double()``) are paired anew when a plan refuses them.

    The plans hold the tensors of both: whoever holds a pairing lets it go when a module is gone.

    Args:
        averaged: the module with the averages; not kept alive.
        model: the module they are averages of; not kept alive.
        when_one_is_gone: called once no one else holds ``averaged`` or ``model``.
        leave: kinds of tensors that are neither averaged nor copied.
        caches_are_buffers: treat non-persistent buffers as the others.
        update_buffers: whether persistent floating-point buffers are averaged too.
        arithmetic: of the averages, as in :class:`~ema_fused.Plan`; ``rounding`` too.
        backend: as in :class:`~ema_fused.Plan`.
        shares: the parameters that share memory with ``model``.
        offload: the averages are updated on the host, in a thread.
        overlap: averages on a CUDA device are updated on a stream of its own.

    Attributes:
        device: of the averages (of the first, if they are on several); ``devices`` names all.
        stream: what updates overlap on; None where they are in order with everything else.

    Raises:
        KeyError, TypeError: as :func:`pair_up` and the plan, from every method too.
        ValueError: also where a trainable parameter is the average's own memory.
    """

    def __init__(
        self,
        averaged: nn.Module,
        model: nn.Module,
        *,
        update_buffers: bool,
        arithmetic: str,
        rounding: str = "nearest",
        backend: str | None = None,
        shares: FrozenShares | None = None,
        when_one_is_gone: Callable[[object], object] | None = None,
        leave: Collection[Kind] = (),
        caches_are_buffers: bool = False,
        offload: bool = False,
        overlap: bool = False,
    ) -> None:
        self.update_buffers = update_buffers
        self._offload = offload
        self._overlap = overlap
        self.stream: torch.cuda.Stream | None = None
        gone = when_one_is_gone or _nothing
        self._averaged = weakref.ref(averaged, gone)
        self._model = KnownModel(model, gone)
        self._arithmetic = arithmetic
        self._rounding = rounding
        self._backend = backend
        self._shares = FrozenShares() if shares is None else shares
        self._leave = leave
        self._caches_are_buffers = caches_are_buffers
        self._prepare()

    def _prepare(self) -> None:
        averaged, model = self._averaged(), self._model.present()
        assert averaged is not None, "it is at hand wherever it is used"
        materialise(averaged, model, self._shares)
        inside = [part for part in model.modules() if part is not model]
        slots_changed = ModuleWatch(averaged, alone=inside).changed
        pairs, shared = pair_up(
            averaged,
            model,
            update_buffers=self.update_buffers,
            shares=self._shares,
            leave=self._leave,
            caches_are_buffers=self._caches_are_buffers,
        )
        devices = list(dict.fromkeys(pair.averaged.device for pair in pairs))
        self.devices = ", ".join(map(str, devices)) or "cpu"
        self.device = devices[0] if devices else torch.device("cpu")
        one_of_cuda = len(devices) == 1 and self.device.type == "cuda"
        if not (self._overlap and one_of_cuda):
            self.stream = None
        elif self.stream is None or self.stream.device != self.device:
            self.stream = torch.cuda.Stream(self.device)
        runs_beside = self._offload or self.stream is not None
        snapshot, planned = _with_snapshots(pairs, self._backend) if runs_beside else (None, pairs)
        kind = OffloadedPlan if self._offload else Plan
        everything = kind(
            **lists_of(planned),
            arithmetic=self._arithmetic,
            rounding=self._rounding,
            backend=self._backend,
        )
        # Of a plan that isn't offloaded both are an order on the device.
        waits = (
            (everything.flush, everything.wait_until_read)
            if isinstance(everything, OffloadedPlan)
            else (everything.wait, everything.wait)
        )
        for pair in pairs:
            _check_own_memory(pair)
        # Nothing above is kept if any of it has raised.
        self._slots_changed = slots_changed
        self._pairs = pairs
        self._shared = [(pair.averaged, pair.source) for pair in shared]
        self._everything: Plan | OffloadedPlan = everything
        self._flush, self._wait_until_read = waits
        self._snapshot = snapshot
        self._is_plain = not runs_beside and self._rounding == "nearest"
        self._followers: Plan | None = None
        rounded = pairs if self._rounding == "nearest" else []
        halves = {pair.averaged.dtype for pair in rounded if _is_half(pair)}
        # With a smaller weight, half a unit in the last place is more than a whole new value moves.
        self.lossy_below = max((torch.finfo(dtype).eps / 2 for dtype in halves), default=0.0)

    def _take_snapshot(self, snapshot: Plan) -> None:
        # The one before may still be being read.
        self.wait_until_read()
        snapshot.copy_()

    def holds(self, averaged: nn.Module, model: nn.Module, update_buffers: bool) -> bool:
        """Whether the pairs are still those of these modules: some nanoseconds a slot."""
        if averaged is not self._averaged() or not self._model.is_now(model):
            return False
        if update_buffers != self.update_buffers:
            return False
        if self._slots_changed():
            return False
        for alias, source in self._shared:
            if source.requires_grad or local(alias).data_ptr() != local(source).data_ptr():
                return False
        return True

    def difference(self, other: Pairing) -> str:
        """What distinguishes this pairing from ``other``, an earlier one."""
        model = self._model.present()
        if model is not other._model.last() and not other._model.has_the_parts_of(model):
            return "another model object is passed in turn"
        known = {pair.name: pair for pair in other._pairs}
        for pair in self._pairs:
            before = known.get(pair.name)
            if before is None or pair.averaged is not before.averaged:
                return f"{pair.name!r} of the average is replaced"
            if pair.source is not before.source:
                return f"{pair.name!r} of the model is replaced by a new tensor"
        return "modules or frozen parameters are replaced"

    def copy_(self) -> None:
        """Copies every source into its average."""
        try:
            return self._copy()
        except ValueError:
            pass
        self._prepare_again()
        self._copy()

    def _copy(self) -> None:
        if self._snapshot is not None:
            self._take_snapshot(self._snapshot)
        self._everything.copy_()
        # What fails is told now: an average of nothing isn't gone on with.
        self._flush()

    def average_(
        self,
        weight: float | Tensor,
        *,
        seed: int = 0,
        step: int | Tensor = 0,
        found_inf: Tensor | None = None,
        squared_distance: Tensor | None = None,
    ) -> None:
        """Averages what has an average and copies the rest, in one launch a device.

        ``seed`` and ``step`` are those of stochastic rounding; where ``found_inf`` is set, nothing
        is done; ``squared_distance`` is as of :meth:`~ema_fused.Plan.lerp_`.
        """
        try:
            return self._average(weight, seed, step, found_inf, squared_distance)
        except ValueError:
            pass
        self._prepare_again()
        self._average(weight, seed, step, found_inf, squared_distance)

    def _average(
        self,
        weight: float | Tensor,
        seed: int,
        step: int | Tensor,
        found_inf: Tensor | None,
        squared_distance: Tensor | None,
    ) -> None:
        plan = self._everything
        if self._is_plain and found_inf is None and squared_distance is None:
            plan.lerp_(weight)  # type: ignore[arg-type]  # the shortest way to the launch
            return
        if self._snapshot is not None:
            self._take_snapshot(self._snapshot)
        if isinstance(plan, OffloadedPlan):
            assert not isinstance(weight, Tensor) and not isinstance(step, Tensor)
            plan.lerp_(
                weight,
                found_inf=found_inf,
                seed=seed,
                step=step,
                squared_distance=squared_distance,
            )
            return
        is_random = self._rounding == "stochastic"
        if is_random:
            plan.seed = seed
        plan.lerp_(
            weight,
            found_inf=found_inf,
            step=step if is_random else None,
            stream=self.stream,
            squared_distance=squared_distance,
        )

    def _prepare_again(self) -> None:
        self.flush()
        self._prepare()

    def flush(self) -> None:
        """Waits until all updates are in the averages; the host only for offloaded ones."""
        self._flush()

    def is_idle(self) -> bool:
        """Whether no update is known to be under way."""
        return self._everything.is_idle()

    def wait_until_read(self) -> None:
        """Waits until all updates have read the model."""
        self._wait_until_read()

    def where_it_runs(self) -> AbstractContextManager[object]:
        """A context in which the stream of the updates is the current one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow_(self, *, found_inf: Tensor | None = None) -> None:
        """Copies only what isn't averaged; where ``found_inf`` is set, nothing is done."""
        if self._followers is not None:
            try:
                return _copy_unless(found_inf, self._followers)
            except ValueError:
                self._prepare_again()
        followers = [pair for pair in self._pairs if not pair.averages]
        self._followers = plan_of(followers, backend=self._backend)
        _copy_unless(found_inf, self._followers)

    def averaging_pairs(self) -> list[Pair]:
        """The pairs to average, their shapes known to be equal."""
        pairs = [pair for pair in self._pairs if pair.averages]
        if all(pair.averaged.shape == pair.source.shape for pair in pairs):
            return pairs
        self._prepare_again()
        return [pair for pair in self._pairs if pair.averages]


def _with_snapshots(pairs: list[Pair], backend: str | None) -> tuple[Plan | None, list[Pair]]:
    """What copies the model's buffers, and the pairs with the copies in their place.

    For updates beside the training: the next forward pass writes the buffers, and nobody waits
    before that.
    """
    with torch.inference_mode(False):
        held = {
            id(pair.source): torch.empty_like(pair.source, requires_grad=False)
            for pair in pairs
            if pair.kind is not Kind.PARAMETER
        }
    if not held:
        return None, pairs
    copied = [
        pair._replace(averaged=held[id(pair.source)], averages=False)
        for pair in pairs
        if id(pair.source) in held
    ]
    from_copies = [pair._replace(source=held.get(id(pair.source), pair.source)) for pair in pairs]
    return plan_of(copied, backend=backend), from_copies


def _copy_unless(found_inf: Tensor | None, followers: Plan) -> None:
    if found_inf is None:
        followers.copy_()
    else:  # of pairs that are only copied an average is a copy, and it can be told of the flag
        followers.lerp_(1.0, found_inf=found_inf)


def _nothing(_: object) -> None:
    pass


def _is_half(pair: Pair) -> bool:
    return pair.averages and pair.averaged.is_floating_point() and pair.averaged.itemsize <= 2


def _check_own_memory(pair: Pair) -> None:
    """An average in its model's own memory would look right and never average anything."""
    name, averaged, source, averages, _, trains, _ = pair
    if not averages or not trains or averaged.device != source.device:
        return
    if averaged.numel() and averaged.data_ptr() == source.data_ptr():
        raise ValueError(
            f"{name!r} of the average is the model's own memory, so it can't differ from it; give "
            f"the average tensors of its own (load_state_dict(..., assign=True) takes over the "
            f"tensors that it is given: pass it a deep copy)"
        )
