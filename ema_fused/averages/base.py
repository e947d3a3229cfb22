"""An averaged copy of a model: updated, saved, swapped in. Subclasses say how it averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.averages.known_integer import KnownInteger
from ema_fused.averages.momentum import (
    checked_momentum,
    momentum_of_calls,
    momentum_on_device,
)
from ema_fused.averages.options import Options, check_options, refuse_one_by_one
from ema_fused.averages.telemetry import Distance, DistanceSamples
from ema_fused.engine.plan import Plan
from ema_fused.modules.copying import FrozenShares, averaged_copy
from ema_fused.modules.paired_module import PairedModule
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.sharding import Device
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.modules.waiting import reads_beside


class BaseAveragedModel(PairedModule):
    """A copy of ``model`` whose weights are a running average of the model's.

    The first :meth:`update_parameters` copies everything; later ones average when
    ``steps % interval == 0``. Whatever isn't averaged follows the model by copy at every call:
    integer tensors always, buffers unless ``update_buffers``.

    A subclass says how to average in one of two ways; the one defined nearer to it counts:

    * :meth:`momentum_at` gives the weight of the new value, and everything is updated in one launch
      a device, by the class's ``arithmetic`` (see :class:`~ema_fused.Plan`);
    * :meth:`avg_func` averages one tensor in place, as mmengine's subclasses do.

    ``state_dict()`` holds what mmengine's holds: ``steps`` and ``module.*``; with stochastic
    rounding ``rounding_seed`` too.

    Every kind of average takes these arguments behind its own: ``shared`` stands for ``interval``,
    ``device`` and ``update_buffers``, in this order or by name, ``options`` for those that are
    given by name alone.

    Args:
        model: the model to average; deep-copied. Wrappers around it or its parts
            (DistributedDataParallel, ``torch.compile``, activation checkpointing) may come and go
            later.
        interval: calls from one average to the next.
        device: of the averaged copy; None keeps the model's.
        update_buffers: average persistent floating-point buffers as well. Otherwise they follow by
            copy.
        averaged_dtype: of the floating-point tensors of the copy, say ``torch.float32`` for a
            bfloat16 model; None keeps the model's.
        share_frozen: parameters that need no gradient take no memory in the copy: they are views of
            the model's, in its dtype and on its device, and follow it when it is moved. Loading a
            checkpoint into the copy writes them in the model too. One that becomes trainable gets
            memory of its own at the next update, from its value then, and is averaged.
        begin_step: the call that makes the first copy count, as ``begin_iter`` of mmengine's
            ``EMAHook``: calls before it copy everything and average nothing. ``steps`` is negative
            until then (minus the calls still to wait), so a checkpoint resumes the wait as well.
        backend: ``"cuda"``, ``"cpu"`` or ``"foreach"`` pins one; None takes the best there is.
        rounding: of averages kept in 16 bits: ``"nearest"``, or ``"stochastic"``, which loses no
            small change in the long run (see :class:`~ema_fused.Plan`). The state then holds the
            seed as well, and a resumed run goes on to the bit.
        seed: of stochastic rounding, in [0, 2**63).
        every: the average is made at every such call only, by the momentum of all the calls since
            the one before: ``1 - (1 - m_1) * ... * (1 - m_n)``. The calls between do nothing.
        offload: ``"cpu"`` keeps the average in host memory and updates it there, in a thread beside
            the training (:mod:`ema_fused.offloading.offloaded_plan`).
        overlap: update on a CUDA stream of its own, beside the next forward and backward pass.
        capturable: an update can be captured into a CUDA graph: ``steps`` counts on the device, and
            :meth:`momentum_at` is given it as a tensor. The first call copies, and isn't captured.
        distance_every: measure the :attr:`distance` at such steps, of those that average.

    With ``offload`` and ``overlap`` the next optimizer step must wait until the model has been
    read: let :func:`ema_fused.attach` do both. Swapping and writing averages into the model wait by
    themselves; whoever else writes its parameters calls :meth:`wait_until_read` first.

    Attributes:
        module: the averaged copy. No parameter of it requires a gradient.
        steps: int64 scalar buffer, the calls counted so far; may be written.
        arithmetic: how an average is written (see :class:`~ema_fused.Plan`).
        runs_beside: whether an update may still be reading the model when the call that started it
            returns: the caller is to use :meth:`wait_until_read`.

    Raises:
        TypeError: neither ``momentum_at`` nor ``avg_func`` is defined, or an argument is of a wrong
            type.
        ValueError: an argument is out of its range.
        RuntimeError: the backend asked for can't be used here.
    """

    _copied = staticmethod(averaged_copy)  # what :attr:`module` is made by

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
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
    ) -> None:
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
        }
        check_options(options)
        one_by_one = _averages_one_by_one(type(self))
        if one_by_one:
            refuse_one_by_one(type(self).__name__, options)
        if offload is not None:
            device = offload
        pinned = offload is not None
        # Tensors made in inference mode could never be updated outside it.
        with torch.inference_mode(False):
            module, shared = self._copied(
                model, device, averaged_dtype, share_frozen=share_frozen, pinned=pinned
            )
            super().__init__(
                module,
                FrozenShares(shared, device, averaged_dtype, pinned=pinned),
                update_buffers=update_buffers,
                backend=backend,
                rounding=rounding,
                offload=offload,
                overlap=overlap,
            )
            where = _device_for_counts(module if capturable else None, device)
            waiting = max(0, begin_step - 1)
            self.register_buffer("steps", torch.tensor(-waiting, dtype=torch.long, device=where))
            if rounding == "stochastic":
                self.register_buffer("rounding_seed", torch.tensor(seed, device=where))
        self.interval = interval
        self.every = every
        self.capturable = capturable
        self._one_by_one = one_by_one
        self._step_count = KnownInteger()
        self._seed = KnownInteger()
        self._distances = DistanceSamples(distance_every)
        self._is_ordinary = rounding == "nearest" and distance_every is None

    @property
    def distance(self) -> Distance | None:
        """The last distance that has arrived; waits for nothing.

        Of sharded models it counts the elements of this process: add up the squares of all
        processes.
        """
        return self._distances.last

    def momentum_at(self, steps: Any) -> Any:
        """The weight of the model's values in the average made after ``steps`` updates.

        Args:
            steps: an int; of a ``capturable`` average a 0-dim float64 tensor on its device.

        Returns:
            A number in [0, 1]; of a tensor a 0-dim tensor.

        Raises:
            NotImplementedError: the class has no momentum; it averages by its own ``avg_func``.
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

    def update_parameters(
        self, model: nn.Module, *, found_inf: Tensor | None = None, asynchronous: bool = False
    ) -> None:
        """Takes the present weights of ``model`` into the average.

        Doesn't wait for the device. Call it after each ``optimizer.step()``, or let
        :func:`ema_fused.attach` do it.

        Args:
            model: the model that was averaged from the start, or another of the same structure;
                wrapped or not.
            found_inf: a tensor of one number, as ``torch.amp.GradScaler`` gives it to a fused
                optimizer: anything but 0 says that the step was skipped, and this call doesn't
                count. On a CUDA device it is read there, and waited for only where a copy is due
                (the first call, calls between intervals) or an ``avg_func`` of a class's own.
            asynchronous: the caller changes ``model`` only after :meth:`wait_until_read`. Otherwise
                an offloaded or overlapping update is waited for here until it has read the model.

        Raises:
            KeyError: names of parameters or buffers don't match those of the average.
            ValueError: a shape differs, or the momentum is outside [0, 1].
            TypeError: one side of a pair is floating-point and the other isn't.
            RuntimeError: inside a :meth:`swapped` block; or an earlier offloaded update failed.

        The averages are unchanged then.
        """
        refuse_while_swapped("update_parameters() was called", self, model)
        pairing = self._paired_with(model)
        if self.capturable:
            self._update_on_device(pairing, found_inf)
        else:
            self._update(pairing, found_inf)
        if self.runs_beside:
            reads_beside(self)
            if not asynchronous:
                pairing.flush()
            self._advice.of_waiting(pairing, overlap=self.overlap, asynchronous=asynchronous)

    def _update(self, pairing: Pairing, found_inf: Tensor | None) -> None:
        buffer = self._buffers["steps"]
        assert buffer is not None
        steps = self._step_count.read(buffer)
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
            pairing.follow_()
        else:
            weight = (
                checked_momentum(self, steps)
                if self.every == 1
                else momentum_of_calls(self, steps, self.every)
            )
            if weight < pairing.lossy_below:
                self._advice.of_losses(weight)
            if self._is_ordinary:
                pairing.average_(weight, found_inf=found_inf)
            else:
                self._average(pairing, weight, steps, found_inf)
        self._step_count.count(buffer, unless=found_inf)

    def _average(
        self, pairing: Pairing, weight: float, steps: int, found_inf: Tensor | None
    ) -> None:
        """An average with a seed, or one that is measured."""
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
        """The same without a number from the host, but for calls that copy and don't average."""
        buffer = self._buffers["steps"]
        assert buffer is not None
        if self._step_count.read_once(buffer) <= 0:
            if found_inf is None or not bool(found_inf):
                pairing.copy_()
                self._step_count.count_there(buffer, unless=None)
                if buffer.device != pairing.device:  # made before the averages had their memory
                    self._buffers["steps"] = buffer.to(pairing.device)
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

    def settle(self) -> None:
        """Waits for updates under way, and corrects ``steps`` where the device skipped the last."""
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Stochastic rounding may be switched on and off between runs.

        Checkpoints written without it have no seed: ours stays. Without it a seed means nothing.
        """
        seed = self._buffers.get("rounding_seed")
        if seed is not None:
            state_dict.setdefault(f"{prefix}rounding_seed", seed)
        else:
            state_dict.pop(f"{prefix}rounding_seed", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _device_for_counts(module: nn.Module | None, device: Device) -> torch.device:
    """Where ``steps`` is kept: beside the averages of ``module``, if given; never on meta."""
    of_module = (parameter.device for parameter in module.parameters()) if module else iter(())
    where = next(of_module, torch.empty(0, device=device).device)
    return torch.device("cpu") if where.type == "meta" else where


def _averages_one_by_one(cls: type) -> bool:
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
