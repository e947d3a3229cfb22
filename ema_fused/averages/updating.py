"""The updates of an averaged model: which call copies, which averages and with what weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ema_fused.averages.known_integer import KnownInteger
from ema_fused.averages.momenta import NamedWeights
from ema_fused.averages.momentum import (
    checked_momentum,
    momentum_of_calls,
    momentum_on_device,
)
from ema_fused.averages.options import Options
from ema_fused.averages.telemetry import Distance, DistanceSamples
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.plan import Plan
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.finite import nonfinite_flag
from ema_fused.modules.leaving_out import Copied
from ema_fused.modules.paired_module import PairedModule
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.sharding import Device
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.modules.waiting import reads_beside


class UpdatedModule(PairedModule):
    """Updates the averages of a model: counts the calls, and copies or averages where it is time.

    A subclass gives the weight of the model's values (:meth:`momentum_at`), or averages each tensor
    itself (:meth:`avg_func`).

    Args:
        module: the averages.
        shares: the parameters of ``module`` that share memory with the model's.
        copied: makes such a module of a model, with the names of such parameters.
        options: checked, with the device of the averages.

    Attributes:
        steps: int64 scalar buffer, the number of calls counted so far; may be written.
    """

    _has_loaded_steps = False  # whether the state that was loaded last had a number of them

    def __init__(
        self,
        module: nn.Module,
        shares: FrozenShares,
        copied: Callable[[nn.Module], Copied],
        options: Options,
    ) -> None:
        rounding, distance_every = options["rounding"], options["distance_every"]
        super().__init__(
            module,
            shares,
            copied,
            update_buffers=options["update_buffers"],
            backend=options["backend"],
            rounding=rounding,
            offload=options["offload"],
            overlap=options["overlap"],
            version_counters=options["version_counters"],
        )
        self.interval = options["interval"]
        self.every = options["every"]
        self.capturable = options["capturable"]
        self._one_by_one = averages_one_by_one(type(self))
        self._skips_nonfinite = options["skip_nonfinite"]
        where = _device_for_counts(module if self.capturable else None, options["device"])
        waiting = max(0, options["begin_step"] - 1)
        self.register_buffer("steps", torch.tensor(-waiting, dtype=torch.long, device=where))
        if rounding == "stochastic":
            self.register_buffer("rounding_seed", torch.tensor(options["seed"], device=where))
        self._step_count = KnownInteger()
        self._seed = KnownInteger()
        self._distances = DistanceSamples(distance_every)
        self._is_ordinary = rounding == "nearest" and distance_every is None
        self._is_plain = (
            self._is_ordinary
            and not (self._one_by_one or self.capturable or self._skips_nonfinite)
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
        if self._sources is not None and self._passes_over(found_inf):
            return
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

    def _passes_over(self, found_inf: Tensor | None) -> bool:
        """Counts this call and does no more, if ``every`` leaves it out; then True.

        Where a function gives the sources it isn't asked then: it may gather them.
        """
        buffer = self._buffers["steps"]
        assert buffer is not None
        if self.every == 1 or self._skips_nonfinite:
            return False
        steps = self._step_count.read(buffer)
        if steps <= 0 or steps % self.every == 0:
            return False
        self._step_count.count(buffer, unless=found_inf)
        return True

    def _paired_with(self, model: nn.Module) -> Pairing:
        try:
            return super()._paired_with(model)
        except KeyError:
            if isinstance(model, UpdatedModule):
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


def _device_for_counts(module: nn.Module | None, device: Device) -> torch.device:
    """The device of ``steps``: that of the averages in ``module``, if given; never meta."""
    of_module = (parameter.device for parameter in module.parameters()) if module else iter(())
    where = next(of_module, torch.empty(0, device=device).device)
    return torch.device("cpu") if where.type == "meta" else where


def averages_one_by_one(cls: type) -> bool:
    """Whether ``cls`` averages by ``avg_func`` rather than by ``momentum_at``."""
    for base in cls.__mro__[: cls.__mro__.index(UpdatedModule)]:
        if "momentum_at" in vars(base):
            return False
        if "avg_func" in vars(base):
            return True
    raise TypeError(
        f"{cls.__name__} doesn't say how to average: define momentum_at(self, steps), the weight "
        f"of the new value, or avg_func(self, averaged_param, source_param, steps)"
    )
