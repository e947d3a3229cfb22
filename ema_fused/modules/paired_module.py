"""The module that holds the averages of a model: pairs them, waits for updates, swaps them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.engine.graphs import outside_graphs
from ema_fused.modules import exchanging, naming, swapping
from ema_fused.modules.adopting import Adopted, Resize, carry_over
from ema_fused.modules.advice import Advice, of_first_copy
from ema_fused.modules.choosing import Buffers
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.exchanging import Exchange
from ema_fused.modules.extra_state import ExtraState
from ema_fused.modules.first_values import FirstValues
from ema_fused.modules.leaving_out import Copied, told
from ema_fused.modules.model_argument import check_model
from ema_fused.modules.module_pairs import is_averaged, refuse_own, slots_of
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.sharding import drop_gathered
from ema_fused.modules.skeleton import wrapped_by
from ema_fused.modules.sources import Sources
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.modules.waiting import WaitingModule


class PairedModule(WaitingModule):
    """Holds the averages of a model, ``module``, and their pairing with it.

    It doesn't know steps and weights: a subclass decides when to average and with what weight.

    Args:
        module: the averages.
        shares: the parameters of ``module`` that share memory with the model's.
        update_buffers: which persistent floating-point buffers are averaged too.
        copied: makes such a module of a model, with the names of such parameters.
        update_buffers: whether persistent floating-point buffers are averaged too.
        backend: as in :class:`~ema_fused.Plan`; likewise ``rounding``.
        offload: ``"cpu"``: the averages are in host memory and updated there, in a thread.
        overlap: averages on a CUDA device are updated on a separate stream.
        version_counters: whether updates count up the version counters of the averages; None: once
            their tensors have been handed out.

    Attributes:
        module: the averages.
        arithmetic: how an average is written (see :class:`~ema_fused.Plan`).
        runs_beside: whether an update may still be reading the model when the call that started it
            returns. If so, the caller must use :meth:`wait_until_read`.
        first_values: whether other code has written averages of which no update was made yet.
    """

    arithmetic: str = "lerp"
    # Whether the averages are a module that can be called, so that they can get into a graph.
    _is_callable = True
    _sources: Sources | None = None  # what is averaged in place of the model's own tensors

    def __init__(
        self,
        module: nn.Module,
        shares: FrozenShares,
        copied: Callable[[nn.Module], Copied],
        *,
        update_buffers: Buffers,
        backend: str | None,
        rounding: str,
        offload: str | None,
        overlap: bool,
        version_counters: bool | None,
    ) -> None:
        super().__init__()
        self._modules["module"] = module
        self.update_buffers = update_buffers
        self.backend = backend
        self.rounding = rounding
        self.offload = offload
        self.overlap = overlap
        self.version_counters = version_counters
        self.runs_beside = overlap or offload is not None
        self._shares = shares
        self._make = copied
        self._awaits_shapes = _is_lazy(module)
        self.first_values = FirstValues(self._buffers)
        self._pairing: Pairing | None = None
        self._unfinished: list[Pairing] = []  # of deleted models, with unfinished updates
        self._advice = Advice()

    @property
    def shared_names(self) -> set[str]:
        """Names of the averaged parameters that share the model's memory: of frozen ones with
        ``share_frozen``, and of those that ``include`` and ``exclude`` leave out.
        """
        return self._shares.names

    @property
    def left_out_names(self) -> list[str]:
        """Names of the parameters that ``include`` and ``exclude`` leave out of the average."""
        return list(self._shares.left_out)

    def extra_repr(self) -> str:
        """Names what is left out."""
        averaged = self._modules["module"]
        assert averaged is not None
        return told(self._shares.left_out, averaged, self.update_buffers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the averaged copy."""
        refuse_while_swapped("the averaged model was called", self)
        return self.module(*args, **kwargs)

    def _counts_versions(self) -> bool:
        if self.version_counters is not None:
            return self.version_counters
        return self._is_callable and self._given_away

    def _give_away(self) -> None:
        super()._give_away()
        if self._pairing is not None:
            self._pairing.counts_versions = self._counts_versions()

    def _averages(self) -> nn.Module:
        """:attr:`module`, for uses that end before the next update."""
        self.flush()
        averaged = self._modules["module"]
        assert averaged is not None
        return averaged

    @outside_graphs
    def flush(self) -> None:
        """Waits until every update so far is in the averages.

        On CUDA the current stream waits, not the host, unless the average is offloaded. Reading the
        averages through this object calls it automatically.

        Raises:
            RuntimeError: an offloaded update failed.
        """
        while self._unfinished:
            self._unfinished.pop().flush()
        if self._pairing is not None:
            self._pairing.flush()
            if self._pairing.extra_state is not None:
                self._pairing.extra_state.take_over_if_old()

    @outside_graphs
    def wait_until_read(self) -> None:
        """Waits until every update so far has read the model, which may then be changed.

        Call it before the next optimizer step if updates are ``asynchronous``.

        Raises:
            RuntimeError: an offloaded update failed.
        """
        # The model object may be deleted while its parameters are still trained.
        for pairing in self._unfinished:
            pairing.wait_until_read()
        if self._pairing is not None:
            self._pairing.wait_until_read()

    @outside_graphs
    def copy_from(self, model: nn.Module) -> None:
        """Sets the average to the current weights and buffers of ``model``; ``steps`` is unchanged.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: as :meth:`update_parameters`.
        """
        check_model("copy_from()", model)
        refuse_while_swapped("copy_from() was called", self, model)
        pairing = self._paired_with(model)
        pairing.copy_()
        pairing.wait_until_read()
        self.first_values.start_again(self._averages(), self.shared_names)

    @outside_graphs
    def copy_to(self, model: nn.Module) -> None:
        """Writes the averaged weights and buffers into ``model``, in the model's dtypes.

        A copy of the module also gives the model its extra state (``get_extra_state``).

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: as :meth:`update_parameters`; nothing is
                written then.
        """
        check_model("copy_to()", model)
        refuse_while_swapped("copy_to() was called", self, model)
        averaged = self._averages()
        exchanging.copy_to(
            averaged, model, shares=self._shares, backend=self.backend, sources=self._sources
        )
        extra_state = ExtraState.between(model, averaged)
        if extra_state is not None:
            extra_state.take_over()

    @outside_graphs
    def adopt(self, model: nn.Module, *, resize: Resize | None = None) -> Adopted:
        """Takes over the present structure of ``model``; what is unchanged keeps its average.

        For a model that has changed since: an embedding that has grown, layers or parameters added
        or removed, weights that are no longer tied, a parametrization put on or taken off. Tensors
        with the name, shape and kind of before keep their averages. Of a weight whose
        parametrization came or went, the average is converted (by a copy of the module, not by
        ``AveragedWeights``). The rest starts with the model's values; what the model has lost is
        dropped. :attr:`steps` goes on.

        :attr:`module` is a new object afterwards, a copy of ``model`` as it is now; its averaged
        tensors are the old ones where they were kept. What refers to the old module must take the
        new one: exchanges made by :meth:`exchange_with`, captured CUDA graphs, hooks registered on
        it. ``attach`` goes on. For the time of the call it takes the memory of one more average.

        Args:
            model: the model to average from now on; wrapped or not.
            resize: makes the average of a parameter whose shape has changed (with
                ``update_buffers`` of a buffer too), in place of the model's value:
                ``resize(name, old_average, new_value)`` returns a tensor of the shape of
                ``new_value``, the model's value. Both arguments are copies.

        Returns:
            What was kept (a number), started, resized, dropped and converted (names).

        Raises:
            TypeError: the model can't be averaged; or ``resize`` returned no tensor of the kind of
                the old one, or the tensor is sharded.
            ValueError: ``resize`` returned a tensor of another shape; or the model has an adapter
                of the averaged tensors themselves.
            RuntimeError: inside a :meth:`swapped` block; or an earlier offloaded update failed.

        If an error is raised, the averages are unchanged.
        """
        check_model("adopt()", model)
        refuse_while_swapped("adopt() was called", self, model)
        self.settle()
        old = self._averages()
        refuse_own(old, model)
        drop_gathered(model)
        # Wrappers that the average was made without aren't copied into it.
        while type(old) is not type(model) and (inside := wrapped_by(model)) is not None:
            model = inside
        was_written = self.first_values.look(old)
        with torch.inference_mode(False), torch.no_grad():
            module, shared, left_out = self._make(model)
            adopted = carry_over(
                module,
                shared,
                old,
                self.shared_names,
                left_out=left_out,
                resize=resize,
                update_buffers=self.update_buffers,
                pinned=self.offload is not None,
            )
        module.train(old.training)
        self._modules["module"] = module
        self._shares.take(shared, left_out)
        self._pairing = None
        if not was_written:
            self.first_values.start_again(module, shared)
        return adopted

    def swapped(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """``with averaged.swapped(model):`` runs ``model`` with the averaged weights and buffers.

        They are swapped out again at the end of the block, even if it raises, and whenever Ctrl-C
        or another signal arrives: its handler waits while weights are on their way. Tensors are
        swapped in place, so it takes no memory, and optimizers, hooks and compiled graphs keep
        their parameters. If ``averaged_dtype`` differs from the model's dtype, a swap would lose
        bits. Then copies of the model's tensors are kept during the block; they take as much memory
        as the model's tensors, on the average's device.

        What the block writes into the model's tensors goes to the average, with equal and with
        different dtypes: after ``torch.optim.swa_utils.update_bn(loader, model)`` the average has
        the statistics. Elements that weren't written keep every bit of the average.

        Inside the block the model holds the averages and the average holds the model's weights, so
        saving, loading, updating, calling the average, swapping again and steps of the model's
        optimizers (of other threads too) are refused. Call ``model.eval()`` yourself: batch norm in
        training mode would update the averaged statistics.

        Warns if the averages have no update yet and the model has changed since they were made.

        Returns:
            A context manager that yields ``model``.

        Raises:
            KeyError, ValueError, TypeError: as :meth:`update_parameters`; nothing is swapped then.
            RuntimeError: a refused action; or, at the end of the block, the model's weights can't
                be put back because their dtypes, shapes or names were changed inside it.
        """
        check_model("swapped()", model)
        return swapping.swapped(
            self,
            self._averages(),
            model,
            shares=self._shares,
            backend=self.backend,
            first_values=self.first_values,
            on_entry=functools.partial(self._before_swapped, model),
        )

    def _before_swapped(self, model: nn.Module) -> None:
        if not self._has_begun() and not self.first_values.look(self._averages()):
            of_first_copy(self._averages(), model)

    def _has_begun(self) -> bool:
        """Whether the averages have been updated, or set to a model."""
        return self._pairing is not None

    def exchange_with(self, model: nn.Module, *, averages_alone: bool = False) -> Exchange:
        """An object that swaps the averages into ``model`` and out again, any number of times.

        For frameworks with separate callbacks before and after an evaluation. In your own loop use
        :meth:`swapped`, which also refuses actions that must not happen in between.

        Args:
            model: as for :meth:`swapped`.
            averages_alone: swap only averaged tensors; those that are copied (buffers, integers)
                stay as they are in both.

        Raises:
            KeyError, ValueError, TypeError: as :meth:`update_parameters`.
        """
        check_model("exchange_with()", model)
        if averages_alone:
            return exchanging.exchange_of_averages(
                self._averages(),
                model,
                update_buffers=self.update_buffers,
                shares=self._shares,
                backend=self.backend,
                first_values=self.first_values,
            )
        return exchanging.exchange_of_everything(
            self._averages(),
            model,
            shares=self._shares,
            backend=self.backend,
            first_values=self.first_values,
        )

    @property
    def avg_parameters(self) -> dict[str, Tensor]:
        """The averaged tensors by name, as in mmengine; with the buffers of ``update_buffers``.

        Without the parameters that ``include`` and ``exclude`` leave out.
        """
        choice = self.update_buffers
        tensors: dict[str, Tensor] = (
            self.module.state_dict() if choice else dict(self.module.named_parameters())
        )
        left_out = naming.plain_names(self._shares.left_out)
        for name in [one for one in tensors if naming.without_wrappers(one) in left_out]:
            del tensors[name]
        if isinstance(choice, int):
            return tensors
        slots = slots_of(self.module)
        averaged = {name for name, slot in slots.items() if is_averaged(name, slot, choice)}
        return {name: tensor for name, tensor in tensors.items() if name in averaged}

    def _paired_with(self, model: nn.Module) -> Pairing:
        pairing = self._pairing_with(model)
        if pairing.extra_state is not None:
            pairing.extra_state.is_old = True
        return pairing

    def _pairing_with(self, model: nn.Module) -> Pairing:
        averaged = self._modules["module"]
        assert averaged is not None
        known = self._pairing
        if known is not None:
            if known.holds(averaged, model, self.update_buffers):
                self._advice.in_vain = 0
                return known
            known.flush()
        check_model("update_parameters()", model)
        drop_gathered(model)
        if self._awaits_shapes and not _is_lazy(model):
            if _is_lazy(averaged):
                self.adopt(model)
            self._awaits_shapes = False
            averaged = self._averages()
        if known is not None and known.holds(averaged, model, self.update_buffers):
            return known
        pairing = Pairing(
            averaged,
            model,
            update_buffers=self.update_buffers,
            # The arithmetics differ only in their roundings, which stochastic rounding replaces.
            arithmetic=self.arithmetic if self.rounding == "nearest" else "lerp",
            rounding=self.rounding,
            backend=self.backend,
            shares=self._shares,
            buffers_follow=True,
            offload=self.offload is not None,
            overlap=self.overlap,
            counts_versions=self._counts_versions(),
            mends_buffers=True,
            follows_extra_state=True,
            sources=self._sources,
            when_one_is_gone=functools.partial(_forget_pairing, weakref.ref(self)),
        )
        self._pairing = pairing
        self._advice.count_in_vain(pairing, known)
        return pairing

    def settle(self) -> None:
        """Waits for unfinished updates, so that everything in ``state_dict()`` is up to date."""
        self.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled is everything but the plans, which refer to the model itself."""
        refuse_while_swapped("the averaged model was copied or pickled", self)
        self.settle()
        written = self.first_values.look(self._averages())
        return self.__dict__ | {"_pairing": None, "_unfinished": [], "first_values": written}

    def __setstate__(self, state: dict[str, Any]) -> None:
        written = state["first_values"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.first_values = FirstValues(self._buffers, written=written)
        if not written:
            self.first_values.note(self._averages(), self.shared_names)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*arguments)


def _is_lazy(module: nn.Module) -> bool:
    """Whether any tensor of it is without elements before the first forward pass."""
    return any(is_lazy(slot.tensor) for slot in slots_of(module).values())


def _forget_pairing(owner: weakref.ref[PairedModule], _: object) -> None:
    """Drops the pairing of a deleted model, which would keep the model's tensors alive."""
    averaged = owner()
    if averaged is None or averaged._pairing is None:
        return
    pairing = averaged._pairing
    # Not by nn.Module's __setattr__, which may be gone when the interpreter ends.
    averaged.__dict__["_pairing"] = None
    # This may run in the thread of an update, during garbage collection: it must not wait.
    if not pairing.is_idle():
        averaged._unfinished.append(pairing)
