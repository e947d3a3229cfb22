"""The averaged copy of a model: updates, saving, swapping. Subclasses define how to average."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ema_fused.averages.kept_kind import keep_kind, warn_of_another_kind
from ema_fused.averages.known_integer import KnownInteger
from ema_fused.averages.loading import fit_state
from ema_fused.averages.momenta import NamedWeights
from ema_fused.averages.momentum import (
    checked_momentum,
    momentum_of_calls,
    momentum_on_device,
)
from ema_fused.averages.options import Options, check_options, refuse_one_by_one
from ema_fused.averages.telemetry import Distance, DistanceSamples
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.keywords import arguments_of, unexpected_keyword
from ema_fused.engine.plan import Plan
from ema_fused.modules.choosing import Buffers, checked_buffers
from ema_fused.modules.copying import FrozenShares, averaged_copy
from ema_fused.modules.finite import nonfinite_flag
from ema_fused.modules.leaving_out import Parameters, Selection, copied_without
from ema_fused.modules.model_argument import check_model
from ema_fused.modules.module_pairs import names_of_buffers
from ema_fused.modules.naming import plain_names, without_wrappers
from ema_fused.modules.paired_module import PairedModule
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.sharding import Device
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.modules.waiting import reads_beside

if TYPE_CHECKING:
    from ema_fused.averages.foreign_states import LoadedState


class BaseAveragedModel(PairedModule):
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
        **unknown: Any,
    ) -> None:
        if unknown:
            accepted = arguments_of(type(self), BaseAveragedModel)
            raise unexpected_keyword(type(self), unknown, accepted, decays=self._momentum_is_decay)
        check_model(f"{type(self).__name__}()", model)
        options: Options = {
            "interval": interval,
            "device": device,
            "update_buffers": update_buffers,
            "averaged_dtype": averaged_dtype,
            "share_frozen": share_frozen,
            "begin_step": begin_step,
            "backend": backend,
            "rounding": rounding,
            "seed": seed,
            "every": every,
            "offload": offload,
            "overlap": overlap,
            "capturable": capturable,
            "distance_every": distance_every,
            "version_counters": version_counters,
            "skip_nonfinite": skip_nonfinite,
            "include": include,
            "exclude": exclude,
        }
        check_options(options)
        update_buffers = checked_buffers(update_buffers, functools.partial(names_of_buffers, model))
        one_by_one = averages_one_by_one(type(self))
        if one_by_one:
            refuse_one_by_one(type(self).__name__, options)
        if offload is not None:
            device = offload
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
            super().__init__(
                module,
                FrozenShares(shared, device, averaged_dtype, pinned=pinned, left_out=left_out),
                copied,
                update_buffers=update_buffers,
                backend=backend,
                rounding=rounding,
                offload=offload,
                overlap=overlap,
                version_counters=version_counters,
            )
            where = _device_for_counts(module if capturable else None, device)
            waiting = max(0, options["begin_step"] - 1)
            self.register_buffer("steps", torch.tensor(-waiting, dtype=torch.long, device=where))
            if rounding == "stochastic":
                self.register_buffer("rounding_seed", torch.tensor(options["seed"], device=where))
        self.first_values.note(module, shared)
        self.register_load_state_dict_post_hook(_accept_loaded)  # type: ignore[no-untyped-call]
        self._has_loaded_steps = False
        self.interval = options["interval"]
        self.every = options["every"]
        self.capturable = capturable
        self._one_by_one = one_by_one
        self._step_count = KnownInteger()
        self._seed = KnownInteger()
        self._skips_nonfinite = skip_nonfinite
        self._distances = DistanceSamples(options["distance_every"])
        self._is_ordinary = rounding == "nearest" and distance_every is None
        self._is_plain = (
            self._is_ordinary
            and not (one_by_one or capturable or skip_nonfinite)
            and not self.runs_beside
        )

    @property
    def distance(self) -> Distance | None:
        """The last distance that has arrived on the host; doesn't wait for newer ones.

        Buffers that hold infinity or NaN don't count. For sharded models it covers the elements of
        this process: add up the squares over all processes.
        """
        return self._distances.last

    def momentum_at(self, steps: Any) -> Any:
        """The weight of the model's values in the average made after ``steps`` updates.

        Args:
            steps: an int; for a ``capturable`` average a 0-dim float64 tensor on its device.

        Returns:
            A number in [0, 1]; if ``steps`` is a tensor, a 0-dim tensor.

        Raises:
            NotImplementedError: the class has no momentum, but its own ``avg_func``.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no momentum_at")

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Tensor) -> None:
        """Averages one tensor in place.

        Args:
            averaged_param: floating-point.
            source_param: of the same shape, dtype and device.
            steps: the buffer :attr:`steps`.
        """
        plan = Plan(
            [averaged_param], [source_param], arithmetic=self.arithmetic, backend=self.backend
        )
        plan.lerp_(checked_momentum(self, int(steps)))

    @outside_graphs
    def update_parameters(
        self, model: nn.Module, *, found_inf: Tensor | None = None, asynchronous: bool = False
    ) -> None:
        """Updates the average with the current weights of ``model``.

        Doesn't synchronise with the device. Call it after each ``optimizer.step()``, or let
        :func:`ema_fused.attach` do it.

        Args:
            model: the model that was averaged from the start, or another of the same structure;
                wrapped or not.
            found_inf: a tensor of one number, as ``torch.amp.GradScaler`` passes it to a fused
                optimizer. Unless it is 0, the step was skipped, and this call does nothing and
                isn't counted. On a CUDA device the kernel reads it; the host waits for it only if
                this call copies (the first call, calls between intervals) or uses a class's own
                ``avg_func``.
            asynchronous: the caller promises to call :meth:`wait_until_read` before it changes
                ``model``. If not, this call itself waits for an offloaded or overlapping update.

        Raises:
            KeyError: names of parameters or buffers don't match those of the average.
            ValueError: a shape differs, or the momentum is outside [0, 1].
            TypeError: one side of a pair is floating-point and the other isn't.
            RuntimeError: inside a :meth:`swapped` block; or an earlier offloaded update failed.

        If an error is raised, the averages are unchanged.
        """
        refuse_while_swapped("update_parameters() was called", self, model)
        weight = None
        known = self._pairing
        if known is not None and found_inf is None and self._is_plain:
            buffer = self._buffers["steps"]
            assert buffer is not None
            steps = self._step_count.presumed(buffer)
            try:
                weight = self._weight_at(steps)
            except Exception:
                weight = None  # raised again below, if these are the steps
            if weight is not None and known.average_at_once(
                self._modules["module"],  # type: ignore[arg-type]
                model,
                self.update_buffers,
                weight,
                self._step_count.counter,
                steps,
            ):
                self._step_count.count_after(buffer)
                self._advice.in_vain = 0
                return
            if self._step_count.read(buffer) != steps:
                weight = None
        pairing = self._paired_with(model)
        if self._skips_nonfinite:
            found_inf = nonfinite_flag(pairing.parameters(), found_inf)
        if self.capturable:
            self._update_on_device(pairing, found_inf)
        else:
            self._update(pairing, found_inf, weight)
        if self.runs_beside:
            reads_beside(self)
            if not asynchronous:
                pairing.flush()
            self._advice.of_waiting(pairing, overlap=self.overlap, asynchronous=asynchronous)

    def _paired_with(self, model: nn.Module) -> Pairing:
        try:
            return super()._paired_with(model)
        except KeyError:
            if isinstance(model, BaseAveragedModel):
                raise KeyError(
                    "the model is an averaged model itself, and this isn't an average of it; pass "
                    "the model that is trained, or model.module"
                ) from None
            if any(part is self for part in model.modules()):
                raise KeyError(
                    "the model has this average as one of its parts, so its names aren't those "
                    "that were averaged; average and pass the part that is trained: self.average = "
                    "ExponentialMovingAverage(self.network), update_parameters(self.network)"
                ) from None
            raise

    def _weight_at(self, steps: int) -> float | None:
        """The weight of the average that this call makes; None if it makes none."""
        if steps <= 0 or steps % self.every or steps % self.interval:
            return None
        if self.every == 1:
            return checked_momentum(self, steps)
        return momentum_of_calls(self, steps, self.every)

    def _weights_at(self, steps: int) -> float | NamedWeights:
        """The weight of the average of a call that makes one, or that of each tensor."""
        weight = self._weight_at(steps)
        assert weight is not None
        return weight

    def _update(
        self, pairing: Pairing, found_inf: Tensor | None, weight: float | None = None
    ) -> None:
        buffer = self._buffers["steps"]
        assert buffer is not None
        steps = self._started(buffer, self._step_count.read(buffer))
        if steps > 0 and steps % self.every:
            return self._step_count.count(buffer, unless=found_inf)
        averages = steps > 0 and steps % self.interval == 0
        if found_inf is not None and (self._one_by_one or not averages):
            if bool(found_inf):
                return
            found_inf = None
        if steps <= 0:
            pairing.copy_()
        elif not averages:
            pairing.follow_()
        elif self._one_by_one:
            for pair in pairing.averaging_pairs():
                source = pair.source.data.to(device=pair.averaged.device, dtype=pair.averaged.dtype)
                self.avg_func(pair.averaged.data, source, buffer)
            pairing.mend_()
            pairing.follow_()
        else:
            weights = self._weights_at(steps) if weight is None else weight
            least = weights.least if isinstance(weights, NamedWeights) else weights
            if least < pairing.lossy_below:
                self._advice.of_losses(least)
            if self._is_ordinary:
                pairing.average_(weights, found_inf=found_inf)
            else:
                self._average(pairing, weights, steps, found_inf)
        self._step_count.count(buffer, unless=found_inf)
        if steps <= 0:
            self._watch_on(steps)

    def _has_begun(self) -> bool:
        steps = self._buffers["steps"]
        assert steps is not None
        return super()._has_begun() or self._has_loaded_steps or int(steps) > 0

    def _started(self, buffer: Tensor, steps: int) -> int:
        """``steps``; 1 if the average hasn't begun and was loaded: it isn't to be copied over."""
        if steps > 0:
            self.first_values.forget()
        elif self.first_values.look(self._modules["module"]):  # type: ignore[arg-type]
            if buffer.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the averages were loaded without a number of steps, and this graph would set "
                    "it at every replay; write it before the capture: averaged.steps.fill_(1)"
                )
            is_number = not self._one_by_one and not self.capturable
            self._advice.of_loading(steps, checked_momentum(self, 1) if is_number else None)
            self._step_count.write(buffer, 1)
            self.first_values.forget()
            return 1
        return steps

    def _watch_on(self, steps: int) -> None:
        """After an update that copied when ``steps`` was this: the next one may copy again."""
        if steps < 0:
            self.first_values.renew(self._modules["module"])  # type: ignore[arg-type]
        else:
            self.first_values.forget()

    def _average(
        self,
        pairing: Pairing,
        weight: float | NamedWeights,
        steps: int,
        found_inf: Tensor | None,
    ) -> None:
        """Averages with stochastic rounding, or with a measured distance."""
        seed = self._buffers.get("rounding_seed")
        distance = self._distances.place_for(steps, pairing.device)
        pairing.average_(
            weight,
            seed=self._seed.read(seed) if seed is not None else 0,
            step=steps,
            found_inf=found_inf,
            squared_distance=distance,
        )
        if distance is not None:
            with pairing.where_it_runs():
                self._distances.fetch(steps, distance, pairing.is_idle)

    def _update_on_device(self, pairing: Pairing, found_inf: Tensor | None) -> None:
        """The same update with all numbers on the device; only the first, copying calls wait."""
        buffer = self._buffers["steps"]
        assert buffer is not None
        steps = self._started(buffer, self._step_count.read_once(buffer))
        if steps <= 0:
            if found_inf is None or not bool(found_inf):
                pairing.copy_()
                self._step_count.count_there(buffer, unless=None)
                if buffer.device != pairing.device:  # made while the averages were on meta
                    self._buffers["steps"] = buffer.to(pairing.device)
                self._watch_on(steps)
            return
        weight = momentum_on_device(self, buffer)
        skipped = found_inf
        if self.interval > 1:
            skipped = (buffer % self.interval != 0).float()
            if found_inf is not None:
                skipped += found_inf.reshape(()).to(buffer.device)
        seed = self._buffers.get("rounding_seed")
        pairing.average_(
            weight,
            seed=self._seed.read(seed) if seed is not None else 0,
            step=buffer,
            found_inf=skipped,
        )
        if self.interval > 1:
            pairing.follow_(found_inf=found_inf)
        self._step_count.count_there(buffer, unless=found_inf)

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
        (:mod:`ema_fused.converting`). The momentum stays that of this average.

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

    def settle(self) -> None:
        """Waits for unfinished updates; corrects ``steps`` if the device skipped the last one."""
        super().settle()
        buffer = self._buffers["steps"]
        assert buffer is not None
        self._step_count.settle(buffer)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "_step_count": KnownInteger(),
            "_seed": KnownInteger(),
            "_distances": self._distances.anew(),
        }

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


def _device_for_counts(module: nn.Module | None, device: Device) -> torch.device:
    """The device of ``steps``: that of the averages in ``module``, if given; never meta."""
    of_module = (parameter.device for parameter in module.parameters()) if module else iter(())
    where = next(of_module, torch.empty(0, device=device).device)
    return torch.device("cpu") if where.type == "meta" else where


def averages_one_by_one(cls: type) -> bool:
    """Whether ``cls`` averages by ``avg_func`` rather than by ``momentum_at``."""
    for base in cls.__mro__[: cls.__mro__.index(BaseAveragedModel)]:
        if "momentum_at" in vars(base):
            return False
        if "avg_func" in vars(base):
            return True
    raise TypeError(
        f"{cls.__name__} doesn't say how to average: define momentum_at(self, steps), the weight "
        f"of the new value, or avg_func(self, averaged_param, source_param, steps)"
    )
