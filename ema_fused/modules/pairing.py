"""The updates of an averaged module by one model: prepared once, run at every step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.engine.dtensors import local
from ema_fused.engine.memory import memory_of, starts_in_one_place
from ema_fused.engine.plan import Plan
from ema_fused.engine.versions import VersionCounters
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.extra_state import ExtraState
from ema_fused.modules.following import following_buffers
from ema_fused.modules.kept_elsewhere import have_moved
from ema_fused.modules.known_model import KnownModel
from ema_fused.modules.materialising import materialise
from ema_fused.modules.merged_adapters import merged_in
from ema_fused.modules.module_pairs import Kind, Pair, pair_up, plan_of, refuse_untied
from ema_fused.modules.planned_pairs import PlannedPairs
from ema_fused.modules.shared_pairs import SharedPairs
from ema_fused.modules.sources import Sources
from ema_fused.modules.watch import ModuleWatch


class Pairing:
    """The updates of an averaged module by one model: prepared once, run at every step.

    Tensors may be replaced: :meth:`holds` is False when parameters or buffers are other objects;
    after a change of dtype in place (``module.double()``) the plan refuses the tensors, and they
    are paired again.

    The plans keep the tensors of both modules alive: the owner of a pairing must drop it when one
    of the modules has been deleted (``when_one_is_gone``).

    Args:
        averaged: the module with the averages; not kept alive.
        model: the module they are averages of; not kept alive.
        when_one_is_gone: called when ``averaged`` or ``model`` is garbage-collected.
        leave: kinds of tensors that are neither averaged nor copied.
        caches_are_buffers: treat non-persistent buffers like persistent ones.
        update_buffers: which persistent floating-point buffers are averaged too.
        arithmetic: of the averages, as in :class:`~ema_fused.Plan`; likewise ``rounding``.
        backend: as in :class:`~ema_fused.Plan`.
        shares: the parameters that share memory with ``model``.
        buffers_follow: buffers that are copies take the model's shapes over, and new ones are
            added to ``averaged``.
        offload: the averages are updated on the host, in a thread.
        overlap: averages on a CUDA device are updated on a separate stream.
        counts_versions: count up the version counters of the averages (see :class:`VersionCounters`
            of :mod:`ema_fused.engine.versions`) at each call that writes them.
        mends_buffers: averaged buffers that hold infinity or NaN don't become NaN: such elements
            take the model's value (:mod:`.planned_pairs`).
        follows_extra_state: find the modules whose extra state the averaged ones take over.
        sources: what is averaged in place of the model's own tensors.

    Attributes:
        counts_versions: as given; may be set.
        extra_state: theirs, for its owner to take over; None if there are no such modules.
        device: of the averages (of the first, if they are on several); ``devices`` names all.
        stream: the separate stream that updates run on; None if they run on the current stream.

    Raises:
        KeyError, TypeError: as :func:`pair_up` and the plan, from every method too.
        ValueError: also if the average of a trainable parameter shares its memory.
    """

    def __init__(
        self,
        averaged: nn.Module,
        model: nn.Module,
        *,
        update_buffers: Buffers,
        arithmetic: str,
        rounding: str = "nearest",
        backend: str | None = None,
        shares: FrozenShares | None = None,
        when_one_is_gone: Callable[[object], object] | None = None,
        leave: Collection[Kind] = (),
        caches_are_buffers: bool = False,
        buffers_follow: bool = False,
        offload: bool = False,
        overlap: bool = False,
        counts_versions: bool = True,
        mends_buffers: bool = False,
        follows_extra_state: bool = False,
        sources: Sources | None = None,
    ) -> None:
        self._buffers_follow = buffers_follow
        self.update_buffers = update_buffers
        self.counts_versions = counts_versions
        self._follows_extra_state = follows_extra_state
        self._overlap = overlap
        self.stream: torch.cuda.Stream | None = None
        gone = when_one_is_gone or _nothing
        self._averaged = weakref.ref(averaged, gone)
        self._model = KnownModel(model, gone)
        self._rounding = rounding
        self._backend = backend
        self._plan = functools.partial(
            PlannedPairs,
            arithmetic=arithmetic,
            rounding=rounding,
            backend=backend,
            offload=offload,
            mends_buffers=mends_buffers,
        )
        self._shares = FrozenShares() if shares is None else shares
        self._leave = leave
        self._caches_are_buffers = caches_are_buffers
        self._sources = sources
        self._prepare()

    def _prepare(self) -> None:
        averaged, model = self._averaged(), self._model.present()
        assert averaged is not None, "it is at hand wherever it is used"
        try:
            return self._pair(averaged, model)
        except (KeyError, ValueError):
            if not self._buffers_follow:
                raise
            with following_buffers(
                averaged, model, update_buffers=self.update_buffers, shares=self._shares
            ) as changed:
                if not changed:
                    raise
                self._pair(averaged, model)

    def _pair(self, averaged: nn.Module, model: nn.Module) -> None:
        materialise(averaged, model, self._shares)
        inside = [part for part in model.modules() if part is not model]
        watch = ModuleWatch(averaged, alone=inside)
        pairs, shared, elsewhere = pair_up(
            averaged,
            model,
            update_buffers=self.update_buffers,
            shares=self._shares,
            leave=self._leave,
            caches_are_buffers=self._caches_are_buffers,
            sources=self._sources,
        )
        refuse_untied(pairs)
        devices = list(dict.fromkeys(pair.averaged.device for pair in pairs))
        self.devices = ", ".join(map(str, devices)) or "cpu"
        self.device = devices[0] if devices else torch.device("cpu")
        one_of_cuda = len(devices) == 1 and self.device.type == "cuda"
        if not (self._overlap and one_of_cuda):
            self.stream = None
        elif self.stream is None or self.stream.device != self.device:
            self.stream = torch.cuda.Stream(self.device)
        planned = self._plan(pairs, stream=self.stream)
        for pair in pairs:
            _check_own_memory(pair)
        # Assigned only now, so that an error above leaves the pairing as it was.
        self._merged = merged_in(model)
        self._slots = watch.slots
        self._slots_changed = watch.changed
        if elsewhere:  # no slot of the model has them
            self._slots = None
            self._slots_changed = lambda: watch.changed() or have_moved(elsewhere)
        self._pairs = pairs
        self._shared = SharedPairs(shared, self._shares) if shared else None
        self._planned = planned
        follows = self._follows_extra_state
        self.extra_state = ExtraState.between(averaged, model) if follows else None
        self._followers: Plan | None = None
        self._versions = VersionCounters(pair.held[0] for pair in pairs)
        self._parameters: list[nn.Parameter] | None = None
        rounded = pairs if self._rounding == "nearest" else []
        halves = {pair.averaged.dtype for pair in rounded if _is_half(pair)}
        # With a smaller weight even a change as large as the average is rounded away: it is below
        # half a unit in the last place.
        self.lossy_below = max((torch.finfo(dtype).eps / 2 for dtype in halves), default=0.0)

    def holds(self, averaged: nn.Module, model: nn.Module, update_buffers: Buffers) -> bool:
        """Whether the pairs are still those of these modules; takes some nanoseconds per tensor."""
        if averaged is not self._averaged() or not self._model.is_now(model):
            return False
        if update_buffers != self.update_buffers or self._merged:
            return False
        if self._slots_changed():
            return False
        return self._shared is None or self._shared.hold()

    def average_at_once(
        self,
        averaged: nn.Module,
        model: nn.Module,
        update_buffers: Buffers,
        weight: float,
        counter: Any,
        steps: int,
    ) -> bool:
        """:meth:`holds` and :meth:`average_` in one call of the extension; it counts if it can.

        Args:
            averaged, model, update_buffers: as :meth:`holds`.
            weight: of the model's values.
            counter: the extension's Counter, which is at ``steps``; None: the caller counts.

        Returns:
            False, with nothing done, where the update takes another way: :meth:`holds` says no, or
            it isn't a plain one by one native kernel, or its changes are rounded away.
        """
        compiled = self._planned.compiled
        slots = self._model.slots
        if (
            compiled is None
            or self.extra_state is not None
            or slots is None
            or self._slots is None
            or averaged is not self._averaged()
            or model is not self._model.last()
            or update_buffers != self.update_buffers
            or self._merged
            or (self._shared is not None and not self._shared.hold())
            or weight < self.lossy_below  # its caller warns of that
        ):
            return False
        try:
            done: bool = compiled.update_model(weight, self._slots, slots, counter, steps)
        except ValueError:
            return False  # raised again on the other way, with the names of the pairs
        if done and self.counts_versions:
            self._versions.increment()
        return done

    def difference(self, other: Pairing) -> str:
        """Says what has changed since ``other``, an earlier pairing; for a warning."""
        model = self._model.present()
        if model is not other._model.last() and not other._model.has_the_parts_of(model):
            return "another model object is passed in turn"
        known = {pair.name: pair for pair in other._pairs}
        for pair in self._pairs:
            before = known.get(pair.name)
            if before is None or pair.averaged is not before.averaged:
                return f"{pair.name!r} of the average is replaced"
            if pair.source is not before.source:
                if self._sources is not None and isinstance(pair.source, nn.Parameter):
                    if memory_of(local(pair.source)) == memory_of(local(before.source)):
                        continue  # only the object around it is new
                    return (
                        f"source= gives {pair.name!r} in other memory each time; let it give the "
                        f"tensors that the optimizer keeps"
                    )
                return f"{pair.name!r} of the model is replaced by a new tensor"
        return "modules or frozen parameters are replaced"

    def copy_(self) -> None:
        """Copies every source into its average."""
        try:
            if self._planned.copy_():
                return self._count()
        except ValueError:
            pass
        self._prepare_again()
        self._planned.copy_()
        self._count()

    def _count(self) -> None:
        if self.counts_versions:
            self._versions.increment()

    def average_(
        self,
        weight: float | Tensor | Callable[[str], float],
        *,
        seed: int = 0,
        step: int | Tensor = 0,
        found_inf: Tensor | None = None,
        squared_distance: Tensor | None = None,
    ) -> None:
        """Averages the tensors that can be averaged and copies the rest, in one launch per device.

        ``weight`` may be a function that returns the weight for each name of the average.
        ``seed`` and ``step`` are those of stochastic rounding; if ``found_inf`` is set, nothing is
        done; ``squared_distance`` is as in :meth:`~ema_fused.Plan.lerp_`, without the buffers that
        hold infinity or NaN.
        """
        try:
            if self._planned.average_(weight, seed, step, found_inf, squared_distance):
                return self._count()
        except ValueError:
            pass
        self._prepare_again()
        self._planned.average_(weight, seed, step, found_inf, squared_distance)
        self._count()

    def _prepare_again(self) -> None:
        self.flush()
        self._prepare()

    def flush(self) -> None:
        """Waits until all updates are in the averages; the host waits for offloaded ones only."""
        self._planned.flush()

    def is_idle(self) -> bool:
        """Whether no update is unfinished, as far as the host knows."""
        return self._planned.plan.is_idle()

    def wait_until_read(self) -> None:
        """Waits until all updates have read the model."""
        self._planned.wait_until_read()

    def where_it_runs(self) -> AbstractContextManager[object]:
        """A context in which the stream of the updates is the current stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow_(self, *, found_inf: Tensor | None = None) -> None:
        """Copies the tensors that aren't averaged; if ``found_inf`` is set, does nothing."""
        if self._followers is not None:
            try:
                _copy_unless(found_inf, self._followers)
                return self._count()
            except ValueError:
                self._prepare_again()
        followers = [pair for pair in self._pairs if not pair.averages]
        self._followers = plan_of(followers, backend=self._backend)
        _copy_unless(found_inf, self._followers)
        self._count()

    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters, without those that share memory with the average."""
        if self._parameters is None:
            shared = set() if self._shared is None else self._shared.sources
            every = self._model.present().parameters()
            self._parameters = [each for each in every if id(each) not in shared]
        return self._parameters

    def averaging_pairs(self) -> list[Pair]:
        """The pairs to average, after a check that their shapes are equal.

        Whoever averages them calls :meth:`mend_` afterwards.
        """
        if not self._planned.look_at_buffers():
            self._prepare_again()
            self._planned.look_at_buffers()
        pairs = [pair for pair in self._pairs if pair.averages]
        if all(pair.averaged.shape == pair.source.shape for pair in pairs):
            return pairs
        self._prepare_again()
        return [pair for pair in self._pairs if pair.averages]

    def mend_(self) -> None:
        """Gives elements of averaged buffers that aren't finite the model's value."""
        self._planned.mend_()


def _copy_unless(found_inf: Tensor | None, followers: Plan) -> None:
    if found_inf is None:
        followers.copy_()
    else:  # lerp_ copies such pairs, and unlike copy_ it takes the flag
        followers.lerp_(1.0, found_inf=found_inf)


def _nothing(_: object) -> None:
    pass


def _is_half(pair: Pair) -> bool:
    return pair.averages and pair.averaged.is_floating_point() and pair.averaged.itemsize <= 2


def _check_own_memory(pair: Pair) -> None:
    """Refuses an average that shares the model's memory: it would always equal the model."""
    name, averaged, source, averages, _, trains, *_ = pair
    if not averages or not trains or averaged.device != source.device:
        return
    if averaged.numel() and starts_in_one_place(averaged, source):
        raise ValueError(
            f"{name!r} of the average is the model's own memory, so it can't differ from it; give "
            f"the average tensors of its own (load_state_dict(..., assign=True) takes over the "
            f"tensors that it is given: pass it a deep copy)"
        )
