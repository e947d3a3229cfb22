"""Exchanges the averages and the weights of a model, or copies the averages into it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ema_fused.engine.memory import elements_of
from ema_fused.engine.notices import warn
from ema_fused.engine.plan import Plan
from ema_fused.engine.undisturbed import certainly, undisturbed
from ema_fused.engine.versions import VersionCounters
from ema_fused.modules.changes import take_over_changes
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.first_values import FirstValues
from ema_fused.modules.float32_fragments import has_fragments, write_fragments
from ema_fused.modules.kept_elsewhere import Kept, have_moved
from ema_fused.modules.module_pairs import Pair, Pairs, pair_up, plan_of, refuse_untied
from ema_fused.modules.sharding import Gathered
from ema_fused.modules.sources import Sources, SourcesOf
from ema_fused.modules.waiting import wait_until_all_have_read
from ema_fused.modules.watch import ModuleWatch


def _each_source_once(pairs: Iterable[Pair]) -> list[Pair]:
    """Each source once: one with several averages, being tied more often, keeps the first.

    Tied are two of the same memory too (``decoder.weight.data = encoder.weight.data``), also if one
    is the transpose of the other; updates from one memory have kept their averages equal.
    """
    distinct: dict[object, Pair] = {}
    for pair in pairs:
        distinct.setdefault(elements_of(pair.source), pair)
    return list(distinct.values())


def _pairs(
    averaged: nn.Module,
    model: nn.Module,
    shares: FrozenShares,
    *,
    for_passes: bool = True,
    sources: Sources | None = None,
) -> Pairs:
    """The pairs of all tensors that the average holds."""
    found = pair_up(
        averaged,
        model,
        update_buffers=False,
        shares=shares,
        for_passes=for_passes,
        into_model=True,
        sources=sources,
    )
    return found._replace(updated=_each_source_once(found.updated))


def copy_to(
    averaged: nn.Module,
    model: nn.Module,
    *,
    shares: FrozenShares,
    backend: str | None,
    sources: Sources | None = None,
) -> None:
    """Copies every averaged tensor into ``model``, converting dtypes.

    Where the optimizer steps on other tensors than the passes read, it is copied into both. Of
    ``sources`` that a function computes anew at each call this can't be, and is warned of.
    """
    wait_until_all_have_read()
    Gathered(model).drop()
    found = _pairs(averaged, model, shares)
    pairs = found.updated
    if found.elsewhere or sources is not None:
        masters = _pairs(averaged, model, shares, for_passes=False, sources=sources)
        pairs = _each_source_once([*pairs, *masters.updated])
        if sources is not None and not has_fragments(model.parameters()):
            _warn_unless_kept(masters.elsewhere)
    Plan(
        [pair.source for pair in pairs],
        [pair.averaged for pair in pairs],
        only_copy=[not pair.averages for pair in pairs],
        backend=backend,
        names=[pair.name for pair in pairs],
    ).copy_()
    tell_of_writes(VersionCounters(pair.held[1] for pair in pairs))
    for pair in found.updated:
        write_fragments(pair.held[1], pair.averaged)


def _warn_unless_kept(elsewhere: list[Kept]) -> None:
    """Warns if the sources that are to be written are gone as soon as they are."""
    if any(one.has_moved() for one in elsewhere if isinstance(one, SourcesOf)):
        warn(
            "source= gives tensors in other memory at each call, so copy_to() writes the averages "
            "into the weights alone, and not into what the optimizer keeps, from which its next "
            "step may make the weights anew. Let source= give the tensors that the optimizer "
            "keeps, or write the averages into them yourself"
        )


def tell_of_writes(written: VersionCounters) -> None:
    """Tells torch that weights of a model were written: autograd, and autocast.

    Autocast keeps the weights that it has cast until its region ends, and would go on with those of
    the values before.
    """
    written.increment()
    torch.clear_autocast_cache()


class Exchange:
    """Swaps averages into a model and out again; planned once, used any number of times.

    Pairs of one dtype are swapped in place. Where the dtypes differ, a swap would lose bits: the
    model's tensor is saved on the average's device and then overwritten. So it is where the average
    shares a parameter that is left out with another model. What is written into the
    model meanwhile (recomputed statistics) is in the average afterwards, in both cases.

    Each exchange is done or not done, even if Ctrl-C or another signal arrives meanwhile: its
    handler is called afterwards.

    Args:
        averaged: the module with the averages.
        model: the module to put them into.
        find_pairs: returns the pairs to exchange, each source once. Called again after tensors were
            replaced.
        backend: as in :class:`~ema_fused.Plan`.
        first_values: what tells whether other code has written ``averaged``: swaps don't count.

    Attributes:
        is_in: whether the model holds the averages at the moment.
    """

    def __init__(
        self,
        averaged: nn.Module,
        model: nn.Module,
        find_pairs: Callable[[], Pairs],
        *,
        backend: str | None,
        first_values: FirstValues | None = None,
    ) -> None:
        self._modules = (averaged, model)
        self._model = model
        self._find_pairs = find_pairs
        self._backend = backend
        self._first_values = FirstValues({}) if first_values is None else first_values
        self._kept: dict[str, Tensor] = {}
        self.is_in = False
        self._prepare()

    @property
    def overwrites(self) -> list[str]:
        """Names of the tensors that are saved and overwritten, as their dtypes differ."""
        return [pair.name for pair in self._overwrites if not pair.of_another]

    def _prepare(self) -> None:
        self._gathered = Gathered(self._model)
        self._gathered.drop()
        slots_changed, pairs = self._found()
        refuse_untied(pairs)
        self._swaps = [pair for pair in pairs if _can_swap(pair)]
        self._overwrites = [pair for pair in pairs if not _can_swap(pair)]
        self._swap = plan_of(self._swaps, backend=self._backend)
        self._overwrite = self._plan_overwriting([pair.averaged for pair in self._overwrites])
        self._written = _written(self._swaps, self._overwrites)
        self._slots_changed = slots_changed

    def _found(self) -> tuple[Callable[[], bool], list[Pair]]:
        """The pairs, and what tells whether their tensors have been replaced since."""
        changed = ModuleWatch(*self._modules).changed
        pairs, _, elsewhere = self._find_pairs()
        if not elsewhere:
            return changed, pairs
        return (lambda: changed() or have_moved(elsewhere)), pairs

    def _plan_overwriting(self, values: list[Tensor]) -> Plan:
        return Plan(
            [pair.source for pair in self._overwrites],
            values,
            only_copy=[not pair.averages for pair in self._overwrites],
            backend=self._backend,
            names=[pair.name for pair in self._overwrites],
        )

    def put_in(self) -> None:
        """Swaps the averages into the model; does nothing if they are in it.

        Raises:
            KeyError, TypeError, ValueError: as ``pair_up``.
            If an error is raised, of whatever kind, nothing has been exchanged.
        """
        if self.is_in:
            return
        wait_until_all_have_read()
        # If FSDP has come to the model since, its parameters are other objects.
        self._gathered.drop()
        if self._slots_changed() or not self._is_as_planned():
            self._prepare()
        kept = {
            pair.name: pair.source.detach().to(pair.averaged.device, copy=True)
            for pair in self._overwrites
        }
        self._first_values.look(self._modules[0])
        undisturbed(functools.partial(self._put, kept), self._put_back_unchanged)

    def _put(self, kept: dict[str, Tensor]) -> None:
        self._swap.swap_()
        self._kept = kept
        self.is_in = True
        if self._overwrites:
            try:
                self._overwrite.copy_()
            except BaseException:
                self._put_back_unchanged()
                raise
        tell_of_writes(self._written)

    def _is_as_planned(self) -> bool:
        """Whether dtypes and shapes are still those planned; ``module.double()`` changes them."""
        return self._swap.is_as_planned() and self._overwrite.is_as_planned()

    def take_out(self) -> None:
        """Swaps the averages out of the model again; does nothing if they aren't in it.

        Raises:
            RuntimeError: dtypes, shapes or names have changed since; or an offloaded update failed,
                in which case the weights are swapped back nevertheless.
        """
        try:
            wait_until_all_have_read()
        finally:
            certainly(self._put_back)

    def _put_back(self, *, is_unchanged: bool = False) -> None:
        if not self.is_in:
            return
        self._gathered.drop()
        try:
            if self._slots_changed():
                self._gathered = Gathered(self._model)
                self._gathered.drop()
                self._find_again()
            own = [self._kept[pair.name] for pair in self._overwrites]
            restore = self._plan_overwriting(own) if own else None
            self._swap.swap_()
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"the model's own weights can't be put back, because the model was changed while "
                f"averaged weights were in it: {error}. They are in averaged.module now; leave "
                f"names, dtypes and shapes as they are in between"
            ) from error
        try:
            if own and not is_unchanged:
                kept = [
                    (pair, tensor)
                    for pair, tensor in zip(self._overwrites, own, strict=True)
                    if not pair.of_another
                ]
                take_over_changes([pair for pair, _ in kept], [tensor for _, tensor in kept])
        finally:
            if restore is not None:
                restore.copy_()
            self._kept = {}
            self.is_in = False
            tell_of_writes(self._written)
            self._first_values.renew(self._modules[0])

    def _put_back_unchanged(self) -> None:
        self._put_back(is_unchanged=True)

    def _find_again(self) -> None:
        """Finds the same pairs again, by name, after tensors in the modules were replaced."""
        self._slots_changed, pairs = self._found()
        found = {pair.name: pair for pair in pairs}
        self._swaps = [found[pair.name] for pair in self._swaps]
        self._overwrites = [found[pair.name] for pair in self._overwrites]
        self._swap = plan_of(self._swaps, backend=self._backend)
        self._overwrite = self._plan_overwriting([pair.averaged for pair in self._overwrites])
        self._written = _written(self._swaps, self._overwrites)


def _can_swap(pair: Pair) -> bool:
    """Not between dtypes, and not with the weights of a third model, which trains with them."""
    return pair.averaged.dtype == pair.source.dtype and not pair.of_another


def _written(swaps: list[Pair], overwrites: list[Pair]) -> VersionCounters:
    """The counters of the tensors that an exchange writes."""
    both_sides = [tensor for pair in swaps for tensor in pair.held]
    return VersionCounters(both_sides + [pair.held[1] for pair in overwrites])


def exchange_of_everything(
    averaged: nn.Module,
    model: nn.Module,
    *,
    shares: FrozenShares,
    backend: str | None,
    first_values: FirstValues | None = None,
) -> Exchange:
    """An :class:`Exchange` of all tensors that the average holds."""
    find_pairs = functools.partial(_pairs, averaged, model, shares)
    return Exchange(averaged, model, find_pairs, backend=backend, first_values=first_values)


def exchange_of_averages(
    averaged: nn.Module,
    model: nn.Module,
    *,
    update_buffers: Buffers,
    shares: FrozenShares,
    backend: str | None,
    first_values: FirstValues | None = None,
) -> Exchange:
    """An :class:`Exchange` of averaged tensors only, buffers as ``update_buffers`` says."""

    def find_pairs() -> Pairs:
        found = pair_up(
            averaged,
            model,
            update_buffers=update_buffers,
            shares=shares,
            for_passes=True,
            into_model=True,
        )
        averages = [pair for pair in found.updated if pair.averages]
        return found._replace(updated=_each_source_once(averages))

    return Exchange(averaged, model, find_pairs, backend=backend, first_values=first_values)
