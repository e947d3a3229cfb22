"""torchtitan's ``EMA`` with our update."""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ema_fused.adapters.optimizer_states import KEY, StateAverages, Tracked
from ema_fused.engine.dtensors import is_sharded, local
from ema_fused.engine.graphs import outside_graphs
from ema_fused.frameworks import missing
from ema_fused.modules.sharding import converted, drop_gathered
from ema_fused.modules.stepping import before_steps_of
from ema_fused.modules.waiting import reads_beside

try:
    from torchtitan.components.checkpointer.utils import canonical_fqn
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import Configurable
except ImportError as error:
    raise missing("torchtitan", "torchtitan", error) from error

__all__ = ["EMA"]

logger = logging.getLogger(__name__)

_HALF_LIFE_FRACTION = 0.05
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class _EMAParamOptimizer(Optimizer):
    """Holds the averages of one part's parameters or buffers; it is never stepped.

    An optimizer, because torchtitan saves and loads the states of optimizers by name.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], *, pinned: bool) -> None:
        tensors = [tensor for _, tensor in named]
        super().__init__([{"params": tensors, "param_names": [name for name, _ in named]}], {})
        with torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                self.state[tensor][KEY] = converted(tensor, None, None, pinned=pinned)

    def step(self, closure: object = None) -> NoReturn:
        raise RuntimeError(
            "_EMAParamOptimizer must not be step()-ed, it holds averages and trains nothing; call "
            "EMA.step(current_step) instead."
        )


class EMA(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's ``EMA``: all of ``step`` is one launch per device, on the shards of this rank.

    ``config.ema = EMA.Config(...)`` with this class in the trainer's configuration, or
    ``EMA.Config(...).build(model_parts=...)``. Constructor, configuration, decay, the time of each
    update, the keys of the ``state_dict`` and the resulting bits are the original's, which is in
    torchtitan since the versions after 0.3.0; this class needs 0.3.0. There is no communication.

    Better than the original: an error leaves all averages as they were, those of other model parts
    too; a model part without tracked tensors can be saved; DTensors and plain tensors may be mixed,
    as under tensor parallelism; after an evaluation without a backward pass FSDP2's gathered
    parameters are dropped, where the original finds unknown tensors and raises; a model converted
    to another dtype in place goes on; a checkpoint without some of the averages, or of another
    placement, raises as it is loaded, not at the next step or never.

    ``offload_to_cpu`` is done by :class:`~ema_fused.offloading.offloaded_plan.OffloadedPlan`: a
    thread updates the averages in host memory while the model trains, through two buffers of 64
    MiB on the device. Steps of the model's optimizers, and loading into the model, wait until its
    weights have been read; other code that writes them calls :meth:`wait_until_read` first. It
    works on a CPU too. The averages are DTensors whose shards are in host memory, so checkpoints
    are written from there and read into it.

    Raises:
        ValueError: a buffer to average is of integers; no parameter requires a gradient.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):  # type: ignore[misc]
        """What torchtitan's ``EMA.Config`` has.

        Attributes:
            decay: the weight of the average in each update; None: by ``half_life_fraction``.
            half_life_fraction: without ``decay``, the n-th update has the decay
                ``2 ** (-1 / (half_life_fraction * n))``: that part of all updates so far is the
                half-life.
            start_step: the last step of the trainer before averaging begins.
            step_bias: is added to n, in updates.
            update_every_n_steps: steps from one update to the next.
            offload_to_cpu: keep the averages in host memory.
            buffer_patterns: regular expressions, searched for in the names of
                ``named_buffers()``; the buffers found are averaged too.
        """

        decay: float | None = None
        half_life_fraction: float = _HALF_LIFE_FRACTION
        start_step: int = 0
        step_bias: int = 0
        update_every_n_steps: int = 1
        offload_to_cpu: bool = False
        buffer_patterns: list[str] = field(default_factory=list)

        def __post_init__(self) -> None:
            every, fraction, decay = self.update_every_n_steps, self.half_life_fraction, self.decay
            if every < 1:
                raise ValueError(
                    f"ema.update_every_n_steps must be greater than 0. {every} was found; 1 "
                    f"updates at every step"
                )
            if not math.isfinite(fraction):
                raise ValueError(f"ema.half_life_fraction must be finite. {fraction} was found")
            if fraction <= 0:
                raise ValueError(
                    f"ema.half_life_fraction must be greater than 0. {fraction} was found"
                )
            if self.step_bias < 0:
                raise ValueError(
                    f"ema.step_bias must not be negative. {self.step_bias} was found; it is added "
                    f"to the count of updates, and a count of 0 or less has no decay"
                )
            if decay is not None and not (math.isfinite(decay) and 0 <= decay < 1):
                raise ValueError(
                    f"ema.decay must be finite and in [0, 1). {decay} was found; with 1 the "
                    f"average would never move"
                )
            if decay is not None and fraction != _HALF_LIFE_FRACTION:
                logger.warning(
                    f"ema.half_life_fraction={fraction} is ignored because ema.decay={decay} is "
                    f"set: the decay is the same at every update then. Leave decay out to use "
                    f"half_life_fraction"
                )

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.decay = config.decay
        self.half_life_fraction = config.half_life_fraction
        self.start_step = config.start_step
        self.step_bias = config.step_bias
        self.update_every_n_steps = config.update_every_n_steps
        self.offload_to_cpu = config.offload_to_cpu
        self.model_parts = model_parts
        self._buffer_patterns = [re.compile(pattern) for pattern in config.buffer_patterns]
        for part in model_parts:
            drop_gathered(part)
        parameters = [_trained(part) for part in model_parts]
        buffers = [self._matched(part) for part in model_parts]
        self._validate_params([tensor for named in parameters for _, tensor in named])
        _check_buffers(config.buffer_patterns, [one for named in buffers for one in named])
        self._param_optimizers = [self._optimizer_of(named) for named in parameters]
        self._buffer_optimizers = [self._optimizer_of(named) for named in buffers]
        every = [*self._param_optimizers, *self._buffer_optimizers]
        # The base class saves, loads and lists these.
        self.optimizers = [optimizer for optimizer in every if optimizer is not None]
        _warn_of_16_bits(self._averages())
        self._post_init([tensor for named in parameters for _, tensor in named])
        self._updates = StateAverages(model_parts, offload=self.offload_to_cpu)
        if self.offload_to_cpu:
            self._let_writers_wait()

    def _optimizer_of(self, named: list[tuple[str, Tensor]]) -> _EMAParamOptimizer | None:
        return _EMAParamOptimizer(named, pinned=self.offload_to_cpu) if named else None

    def _matched(self, part: nn.Module) -> list[tuple[str, Tensor]]:
        """The buffers of a part that are averaged."""
        if not self._buffer_patterns:
            return []
        return [
            (canonical_fqn(name), buffer)
            for name, buffer in part.named_buffers()
            if any(pattern.search(name) for pattern in self._buffer_patterns)
        ]

    def _find(self) -> list[Tracked]:
        """What is to be averaged of the model as it is now."""
        parts = self.model_parts
        found = [*map(_trained, parts), *map(self._matched, parts)]
        optimizers = [*self._param_optimizers, *self._buffer_optimizers]
        return [Tracked(*pair) for pair in zip(optimizers, found, strict=True)]

    def _averages(self) -> Iterable[tuple[str, Tensor]]:
        """Each average, by the key that it has in checkpoints."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name, tensor in zip(group["param_names"], group["params"], strict=True):
                    yield f"state.{name}.{KEY}", optimizer.state[tensor][KEY]

    def zero_grad(self, *_: object, **__: object) -> None:
        """Does nothing: there are no gradients here."""

    @outside_graphs
    def step(self, current_step: int) -> None:
        """Updates the averages with the current weights, if an update is due.

        Args:
            current_step: of the trainer, counted from 1.

        Raises:
            RuntimeError: a tensor to average was replaced or unfrozen since the averages were made;
                or an earlier offloaded update failed.

        If an error is raised, the averages are unchanged.
        """
        elapsed = current_step - self.start_step
        if elapsed <= 0 or elapsed % self.update_every_n_steps != 0:
            return
        num_updates = elapsed // self.update_every_n_steps + self.step_bias
        self._updates.average_(1.0 - self._decay_at(num_updates), self._find)

    def _decay_at(self, num_updates: int) -> float:
        if self.decay is not None:
            return self.decay
        return float(2.0 ** (-1.0 / (self.half_life_fraction * num_updates)))

    # ---- Offloaded updates -----------------------------------------------------------------------

    def wait_until_read(self) -> None:
        """Waits until no update reads the model, so that it may be written."""
        self._updates.wait_until_read()

    def flush(self) -> None:
        """Waits until all updates are in the averages."""
        self._updates.flush()

    def _let_writers_wait(self) -> None:
        """Optimizers, loading and swapping wait until an update has read the model."""
        owner = weakref.ref(self)

        def wait(*_: object) -> None:
            living = owner()
            if living is not None:
                living.wait_until_read()

        for part in self.model_parts:
            weakref.finalize(self, before_steps_of(part, wait).remove)
            weakref.finalize(self, part.register_load_state_dict_pre_hook(wait).remove)
        reads_beside(self)

    # ---- Checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The averages as ``state.<name>.ema_params``, DTensors if the model is sharded; no counts.

        They are the averages themselves, not copies; an offloaded update is waited for.
        """
        self.flush()
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies averages from what :meth:`state_dict`, ours or torchtitan's, has returned.

        An empty dict (of a checkpoint without averages) sets them to the model's weights. Keys of
        tensors that aren't averaged here are ignored.

        Raises:
            KeyError: an average is missing.
            TypeError: only one of average and value is a DTensor, or a value is no tensor.
            ValueError: a shape or the placement differs.

        If an error is raised, the averages are unchanged.
        """
        self.flush()
        if not state_dict:
            self._start_from_weights()
            return
        averages = dict(self._averages())
        absent = [key for key in averages if key not in state_dict]
        if absent:
            more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            raise KeyError(
                f"{', '.join(absent[:3])}{more}: missing from the state that is loaded, which has "
                f"{len(state_dict)} keys; state.<name>.ema_params is expected for every averaged "
                f"tensor. Load the checkpoint of an EMA of this model with these buffer_patterns, "
                f"or an empty dict to start from the model's weights"
            )
        for key, average in averages.items():
            _check_fits(key, average, state_dict[key])
        with torch.no_grad():
            for key, average in averages.items():
                local(average).copy_(local(state_dict[key]))

    def _start_from_weights(self) -> None:
        self._updates.copy_(self._find)
        self.flush()
        logger.warning(
            "EMA state was not restored; cold-starting it from the loaded model weights, without "
            "what was averaged before. That is as it should be if the checkpoint is of a run "
            'without EMA; otherwise remove "ema" from checkpoint.exclude_from_loading, or each '
            "resumed run starts its average anew"
        )


def _trained(part: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (canonical_fqn(name), parameter)
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    ]


def _check_buffers(patterns: list[str], matched: list[tuple[str, Tensor]]) -> None:
    """Raises ValueError for integers; warns if there are patterns and nothing matches."""
    for name, buffer in matched:
        if not (buffer.is_floating_point() or buffer.is_complex()):
            raise ValueError(
                f"EMA.Config.buffer_patterns matched buffer {name!r} of dtype {buffer.dtype}. Only "
                f"floating-point and complex buffers can be averaged: integers would have to be "
                f"rounded at every update. Make the patterns narrower"
            )
    if patterns and not matched:
        logger.warning(
            f"EMA.Config.buffer_patterns={patterns} matched no buffers across any model part, so "
            f"none is averaged; compare the patterns with the names of named_buffers()"
        )


def _warn_of_16_bits(averages: Iterable[tuple[str, Tensor]]) -> None:
    dtypes = sorted({str(average.dtype) for _, average in averages if average.dtype not in _WIDE})
    if dtypes:
        logger.warning(
            f"EMA is tracking {', '.join(dtypes)} tensors. Changes that are small beside the "
            f"average are rounded away in that precision, and the average stays where it is. Keep "
            f"what is averaged in float32; with FSDP2's mixed_precision_param the shards are"
        )


def _check_fits(key: str, average: Tensor, value: Any) -> None:
    """Raises unless ``value`` can be copied into ``average`` shard by shard."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} is a {type(value).__name__}; a tensor is expected")
    if is_sharded(value) != is_sharded(average):
        which = "isn't" if is_sharded(average) else "is"
        raise TypeError(
            f"{key} {which} a DTensor in the state that is loaded, unlike the model's tensor; the "
            f"same is expected. Let torch.distributed.checkpoint load into what state_dict() "
            f"returns"
        )
    if value.shape != average.shape:
        raise ValueError(
            f"{key} has the shape {tuple(value.shape)}; {tuple(average.shape)} is expected, that "
            f"of the model's tensor"
        )
    if is_sharded(value) and _placement(value) != _placement(average):
        raise ValueError(
            f"{key} is placed as {_placement(value)}; {_placement(average)} is expected, as the "
            f"model's tensor is. Let torch.distributed.checkpoint load into what state_dict() "
            f"returns"
        )


def _placement(tensor: Any) -> tuple[Any, tuple[Any, ...]]:
    return tensor.device_mesh, tuple(tensor.placements)
