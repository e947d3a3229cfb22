"""The averaged copy of a model: its options, saving and loading."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch import nn

from ema_fused.averages.kept_kind import keep_kind, warn_of_another_kind
from ema_fused.averages.loading import fit_state
from ema_fused.averages.options import Options, check_options, refuse_one_by_one
from ema_fused.averages.updating import UpdatedModule, averages_one_by_one
from ema_fused.engine.keywords import NoOthers, arguments_of, unexpected_keyword
from ema_fused.modules.choosing import Buffers, checked_buffers
from ema_fused.modules.copying import FrozenShares, averaged_copy
from ema_fused.modules.leaving_out import Parameters, Selection, copied_without
from ema_fused.modules.model_argument import check_model
from ema_fused.modules.module_pairs import names_of_buffers
from ema_fused.modules.naming import plain_names, without_wrappers
from ema_fused.modules.sharding import Device

if TYPE_CHECKING:
    from ema_fused.averages.foreign_states import LoadedState


class BaseAveragedModel(UpdatedModule):
    """A copy of ``model`` whose weights are a running average of the model's.

    The first :meth:`update_parameters` copies everything, unless averages were loaded before it:
    then ``steps`` becomes 1, and it averages. Later ones average when ``steps % interval == 0``.
    Tensors that aren't averaged are copied from the model at every call: integer tensors always,
    buffers unless ``update_buffers``. Extra state (``get_extra_state``) is taken over from the
    model when the copy is called, looked at or saved. Other attributes of its modules, plain
    tensors too, stay as they were when the copy was made. A model that has gained or lost
    parameters is taken over by :meth:`adopt`.

    A subclass defines how to average in one of two ways; the first in its method resolution order
    is used:

    * :meth:`momentum_at` gives the weight of the new value; everything is updated in one launch per
      device, by the class's ``arithmetic`` (see :class:`~ema_fused.Plan`);
    * :meth:`avg_func` averages one tensor in place, as mmengine's subclasses do.

    ``state_dict()`` has the keys of mmengine's: ``steps`` and ``module.*``; with stochastic
    rounding also ``rounding_seed``.

    Every kind of average takes these arguments after its own. In signatures, ``shared`` stands for
    ``interval``, ``device`` and ``update_buffers``, in this order or by name, and ``options`` for
    the keyword-only arguments.

    Args:
        model: the model to average; deep-copied. Wrappers around it or its parts
            (DistributedDataParallel, ``torch.compile``, activation checkpointing) may be added or
            removed later.
        interval: calls from one average to the next.
        device: of the averaged copy; None keeps the model's.
        update_buffers: average persistent floating-point buffers as well: True all of them; a
            regular expression or a list of them those in whose names (without wrappers' components)
            one is found; a function those for which ``function(name, buffer)`` is true. Elements
            that are infinite or NaN at the first update take the model's value. The other buffers
            are copied.
        averaged_dtype: dtype of the floating-point tensors of the copy, say ``torch.float32`` for a
            bfloat16 model; None keeps the model's.
        share_frozen: parameters that need no gradient take no memory in the copy: they are views of
            the model's, in the model's dtype and on its device, also after the model is moved. So
            loading a checkpoint into the copy writes the model's too. One that becomes trainable
            gets its own memory at the next update, starts with its value at that time, and is
            averaged from then on.
        begin_step: the call, counted from 1, that makes the initial copy, like ``begin_iter`` of
            mmengine's ``EMAHook``; 0 is the same as 1. Calls before it copy everything too. Until
            then ``steps`` is negative, minus the number of calls left, so a resumed run waits for
            the rest of them.
        backend: ``"cuda"``, ``"cpu"`` or ``"foreach"`` uses that backend for all tensors; None
            takes the fastest for each.
        rounding: of averages kept in 16 bits: ``"nearest"``, or ``"stochastic"``, with which small
            changes are not lost in the long run (see :class:`~ema_fused.Plan`). The state then
            holds the seed as well, and a run resumes bit for bit.
        seed: of stochastic rounding, in [0, 2**63).
        every: average only at every ``every``-th call, with the combined momentum of the calls
            since the last average: ``1 - (1 - m_1) * ... * (1 - m_n)``. The calls in between do
            nothing.
        offload: ``"cpu"`` keeps the average in host memory and updates it there, in a thread while
            the model trains (:mod:`ema_fused.offloading.offloaded_plan`).
        overlap: update on a separate CUDA stream, in parallel with the next forward and backward
            pass.
        capturable: updates can be captured into a CUDA graph: ``steps`` is counted on the device
            and passed to :meth:`momentum_at` as a tensor. The first call copies, and can't be
            captured.
        distance_every: measure the :attr:`distance` at every ``distance_every``-th step, if that
            step averages.
        version_counters: whether updates count up the version counters of the averages, by which
            autograd refuses a backward pass through averages that were updated after the forward
            pass. It takes some 40 nanoseconds per tensor. None: as soon as the average has been
            called or its tensors have been read; before, they can be in no graph.
        skip_nonfinite: leave out a call where a parameter of the model is infinite or NaN, as a
            ``found_inf`` that is set does: nothing changes and the call isn't counted. It is found
            out on the device, in another read of the parameters, which takes about as long as an
            update and some microseconds a tensor; the host waits for it where it would wait for
            ``found_inf``. Buffers aren't looked at, nor parameters in the model's memory. Each
            process decides by its own parameters; those that share DTensors decide together.
        include: average only parameters in whose plain names (without wrappers' components) this
            regular expression, or one of a list of them, is found; or for which this function of
            name and tensor is true. None: all.
        exclude: of these, average no parameters that this names, in the same ways. What is left out
            is in the memory of the model's own and always has its present values; no update reads
            or writes it. A copy of the module that is on another device or in another dtype
            has copies of it, made at each update. Buffers have ``update_buffers``.

    With ``offload`` and ``overlap`` the next optimizer step must wait until the model has been
    read: :func:`ema_fused.attach` updates and waits. Swapping and :meth:`copy_to` wait by
    themselves; other code must call :meth:`wait_until_read` before it writes the model's
    parameters.

    Attributes:
        module: the averaged copy. None of its parameters requires a gradient.
        steps: int64 scalar buffer, the number of calls counted so far; may be written.
        arithmetic: how an average is written (see :class:`~ema_fused.Plan`).
        runs_beside: whether an update may still be reading the model when the call that started it
            returns. If so, the caller must use :meth:`wait_until_read`.

    Raises:
        TypeError: neither ``momentum_at`` nor ``avg_func`` is defined, an argument is of a wrong
            type, or there is none of this name; ``decay=`` and the like are told as a momentum.
        ValueError: an argument is out of its range.
        RuntimeError: the backend asked for can't be used here.
    """

    _copied = staticmethod(averaged_copy)  # makes :attr:`module`
    _momentum_is_decay = False  # True: its argument ``momentum`` is the weight of the average

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: Device = None,
        update_buffers: Buffers = False,
        *,
        averaged_dtype: torch.dtype | None = None,
        share_frozen: bool = False,
        begin_step: int = 0,
        backend: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        every: int = 1,
        offload: str | None = None,
        overlap: bool = False,
        capturable: bool = False,
        distance_every: int | None = None,
        version_counters: bool | None = None,
        skip_nonfinite: bool = False,
        include: Parameters | None = None,
        exclude: Parameters | None = None,
        **unknown: Unpack[NoOthers],
    ) -> None:
        given = locals()  # the arguments by name
        options = cast(Options, {name: given[name] for name in Options.__annotations__})
        if unknown:
            accepted = arguments_of(type(self), BaseAveragedModel)
            raise unexpected_keyword(type(self), unknown, accepted, decays=self._momentum_is_decay)
        check_model(f"{type(self).__name__}()", model)
        check_options(options)
        options["update_buffers"] = checked_buffers(
            update_buffers, functools.partial(names_of_buffers, model)
        )
        if averages_one_by_one(type(self)):
            refuse_one_by_one(type(self).__name__, options)
        if offload is not None:
            options["device"] = device = offload
        pinned = offload is not None
        # Inference tensors could never be updated outside inference mode.
        with torch.inference_mode(False):
            copied = functools.partial(
                copied_without,
                copied=functools.partial(
                    self._copied,
                    device=device,
                    dtype=averaged_dtype,
                    share_frozen=share_frozen,
                    pinned=pinned,
                ),
                selection=Selection(include, exclude),
            )
            module, shared, left_out = copied(model)
            shares = FrozenShares(shared, device, averaged_dtype, pinned=pinned, left_out=left_out)
            super().__init__(module, shares, copied, options)
        self.first_values.note(module, shared)
        self.register_load_state_dict_post_hook(_accept_loaded)  # type: ignore[no-untyped-call]

    def load_state_from(
        self,
        state: Mapping[Any, Any] | str | os.PathLike[str],
        *,
        steps: int | None = None,
        key: str | None = None,
        source: str | None = None,
        averages_in: str | None = None,
    ) -> LoadedState:
        """Goes on from the average of another package, or of another kind of checkpoint.

        Whose state it is, is found by its content: torch's ``AveragedModel``, mmengine, mmcv 1.x,
        timm, diffusers, ema-pytorch, torch-ema, Lightning, torchtitan, ours
        (:mod:`ema_fused.converting`). The momentum stays that of this average. A state of the same
        class is taken over whole, with a window of checkpoints, initial weights, or a seed.

        Args:
            state: what was loaded of a checkpoint, or its path. Nothing of it is changed.
            steps: the number of updates so far, for formats that don't keep it.
            key: where the average is in nested dictionaries; None: found.
            source: the name of the format; None: found. ``"weights"``: plain averaged weights.
            averages_in: of mmcv 1.x, whose checkpoints don't tell: ``"parameters"`` or
                ``"buffers"``.

        Returns:
            What was found, and what couldn't be taken over.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: there is no average in it, or several; or a shape differs.
            KeyError: names don't match.
            TypeError: a tensor is floating-point on one side alone.

        If an error is raised, the average is unchanged.
        """
        from ema_fused.averages.foreign_states import load_foreign  # reads checkpoints: rarely used

        return load_foreign(
            self,
            state,
            calls_per_average=self.every * self.interval,
            steps=steps,
            key=key,
            source=source,
            averages_in=averages_in,
        )

    def _kind(self) -> str | None:
        """What the weight of the next average goes by (:mod:`.kept_kind`); None: not known."""
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        keep_kind(destination, prefix, self._kind())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Warns of the state of another kind of average."""
        seed = self._buffers.get("rounding_seed")
        fit_state(state_dict, prefix, seed=seed, calls_per_average=self.every * self.interval)
        self._has_loaded_steps = f"{prefix}steps" in state_dict
        # Averages of tensors alone don't save them.
        not_saved = plain_names(self.shared_names.union(self.left_out_names))
        if not_saved:
            for own, tensor in self._averages().state_dict(keep_vars=True).items():
                if without_wrappers(own) in not_saved:
                    state_dict.setdefault(f"{prefix}module.{own}", tensor)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        steps = self._buffers["steps"]
        assert steps is not None
        name, kind = type(self).__name__, self._kind()
        warn_of_another_kind(name, kind, local_metadata, steps, self.interval)


def _accept_loaded(averaged: nn.Module, _: object) -> None:
    """The hook after loading: values that came with their number of steps are no surprise."""
    assert isinstance(averaged, BaseAveragedModel)
    if averaged._has_loaded_steps:
        averaged.first_values.start_again(averaged._averages(), averaged.shared_names)
