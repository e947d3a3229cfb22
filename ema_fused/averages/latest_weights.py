"""The mean of the latest checkpoints of a run: LAWA."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.checkpoint_window import CheckpointWindow
from ema_fused.averages.options import Options, needing_momentum
from ema_fused.engine.checks import check_integer
from ema_fused.engine.dtensors import local
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.notices import warn
from ema_fused.modules.adopting import Adopted, Resize
from ema_fused.modules.beside import averaged_in
from ema_fused.modules.module_pairs import Pair, Slot, slots_of
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.sources import Given
from ema_fused.modules.waiting import reads_beside


class LatestWeightAverage(AveragedWeights):
    """LAWA: the mean of the latest ``k`` checkpoints, taken every ``interval`` steps.

    Kaddour 2022, arXiv 2209.14981; Sanyal et al. 2023, arXiv 2306.03241. ``averaged = (w_1 + ... +
    w_n) / n``, n being ``k``, or as many as there are so far. The first checkpoint is the initial
    copy, as of :class:`StochasticWeightAverage`, which is this mean with a ``k`` without an end.

    The checkpoints are kept in host memory, in the model's dtypes, pinned where CUDA is available:
    ``k`` times the model, allocated at once. A step between them does nothing; one that takes a
    checkpoint copies the model to the host, on the current stream, without waiting for it. The mean
    is made when the averages are read (called for, swapped, saved): summed up in float64, from the
    oldest to the latest, and rounded once to the dtype of the average.

    It holds tensors alone, as :class:`AveragedWeights`. ``state_dict()`` has ``window.*`` beside
    ``module.*``: checkpoints are ``k + 1`` times the model. One with another ``k`` is loaded too:
    of more checkpoints the latest. What else sets the averages (:meth:`copy_from`, a state of
    another kind of average) counts as one checkpoint, which is all there is then.

    Args:
        model: the model to average, wrapped or not; sharded, each process keeps its own shards.
        k: the number of checkpoints, 1 or more.
        source: as of :class:`AveragedWeights`.

    The others as :class:`BaseAveragedModel`. Up to ``begin_step`` the average is the latest
    checkpoint alone. Averaged buffers (``update_buffers``) are in the checkpoints too; other
    buffers are those of the latest checkpoint.

    Raises:
        TypeError: ``k`` is no integer.
        ValueError: ``k`` is below 1; an option needs an average by a momentum (``every``,
            ``offload``, ``overlap``, ``capturable``, ``rounding``, ``distance_every``); FSDP1
            flattens the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        k: int,
        *shared: Any,
        source: Given | None = None,
        **options: Unpack[Options],
    ) -> None:
        k = check_integer("k", k, least=1)
        needed = needing_momentum(options)
        if needed:
            raise ValueError(
                f"{type(self).__name__} is a mean of checkpoints in host memory, and {needed} "
                f"needs an average by a momentum; interval= says which steps are taken, and "
                f"device='cpu' keeps the mean in host memory too"
            )
        share = functools.partial(_share_of_latest, k=k)
        super().__init__(model, share, *shared, arithmetic="lerp", source=source, **options)
        if self._is_flattened:
            raise ValueError(
                "LatestWeightAverage of a model sharded by FSDP1, whose pieces mean nothing "
                "without the parameters that they were cut from; shard the model by fully_shard "
                "(FSDP2)"
            )
        self.momentum = functools.partial(share, interval=self.interval)
        self._is_questioned = True
        self._is_plain = False
        self.window = CheckpointWindow(k)
        self.register_load_state_dict_post_hook(_count_as_one)  # type: ignore[no-untyped-call]
        self._pair_if_ready(model)

    @property
    def k(self) -> int:
        """The number of checkpoints that the mean is of, once there are so many."""
        return len(self.window._modules)

    @outside_graphs
    def flush(self) -> None:
        """As :meth:`BaseAveragedModel.flush`; makes the mean, if a checkpoint was taken since."""
        super().flush()
        window: Any = self._modules.get("window")  # there is none yet while it is constructed
        if window is None:
            return
        window.wait()
        if window.is_ahead:
            averages = self._modules["module"]
            assert averages is not None
            self.first_values.look(averages)
            window.write_mean(self._slots())
            self.first_values.renew(averages)

    def wait_until_read(self) -> None:
        """As :meth:`BaseAveragedModel.wait_until_read`; and the averages are up to date then.

        Exchanges that were made earlier wait in this way for what they put in.
        """
        super().wait_until_read()
        self.flush()

    def _slots(self) -> dict[str, Slot]:
        averages = self._modules["module"]
        assert averages is not None
        return averaged_in(averages, self.shared_names, self.update_buffers)

    def _pair_if_ready(self, model: nn.Module) -> None:
        """Allocates the window now, unless the model's first forward pass tells its shapes."""
        averages = self._modules["module"]
        assert averages is not None
        tensors = [slot.tensor for slot in slots_of(averages).values()]
        if not any(is_lazy(tensor) or local(tensor).is_meta for tensor in tensors):
            self._hold(self._paired_with(model).averaging_pairs())

    def _hold(self, pairs: Sequence[Pair]) -> None:
        averages = {pair.name: pair.held[0] for pair in pairs}
        self.window.hold(averages, {pair.name: pair.source.dtype for pair in pairs})

    def _update(
        self, pairing: Pairing, found_inf: Tensor | None, weight: float | None = None
    ) -> None:
        buffer = self._buffers["steps"]
        assert buffer is not None
        before = self._step_count.read(buffer)
        steps = self._started(buffer, before)
        if steps != before:  # other code has set the averages
            self._restart()
        if steps % self.interval:
            return self._step_count.count(buffer, unless=found_inf)
        if found_inf is not None and bool(found_inf):
            return
        pairs = pairing.averaging_pairs()  # checks them, before anything is written
        self._hold(pairs)
        pairing.follow_()
        self.window.take(pairs, alone=steps <= 0)
        reads_beside(self)
        self._step_count.count(buffer, unless=None)
        if steps <= 0:
            self._watch_on(steps)

    def _restart(self) -> None:
        self.flush()
        self.window.restart(self._slots())

    def _has_begun(self) -> bool:
        return self._has_loaded_steps or bool(self.window.filled)

    def copy_from(self, model: nn.Module) -> None:
        """As :meth:`BaseAveragedModel.copy_from`; the model is the only checkpoint then.

        Args:
            model: of the structure of the averages; wrapped or not.
        """
        self.flush()  # not later, over what is copied
        super().copy_from(model)
        self._restart()

    def adopt(self, model: nn.Module, *, resize: Resize | None = None) -> Adopted:
        """As :meth:`BaseAveragedModel.adopt`; what is kept keeps its checkpoints.

        What isn't has the same value in all of them, that of its average.

        Args:
            model: the model to average from now on; wrapped or not.
            resize: makes the average of a tensor whose shape has changed.
        """
        adopted = super().adopt(model, resize=resize)
        self.window.forget([*adopted.started, *adopted.resized, *adopted.converted])
        self._pair_if_ready(model)
        return adopted

    def load_state_from(self, *arguments: Any, **options: Any) -> Any:
        """As :meth:`BaseAveragedModel.load_state_from`; without a window it is one checkpoint."""
        loaded = super().load_state_from(*arguments, **options)
        if "window." in loaded.parts:
            return loaded
        self._restart()
        note = "the checkpoints of a window: the average counts as one"
        return dataclasses.replace(loaded, lost=tuple(dict.fromkeys((*loaded.lost, note))))

    def _kind(self) -> str | None:
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, *rest)
        # What the checkpoint has trained and this model shared has an average of its own now.
        first_names: dict[int, str] = {}  # of tied ones
        slots = self._slots()
        for name, slot in slots.items():
            first_names.setdefault(id(slot.tensor), name)
        averages = {name: slots[name].tensor for name in first_names.values()}
        self.window.hold(averages, {name: one.dtype for name, one in averages.items()})


def _share_of_latest(step: Any, *, k: int, interval: int = 1) -> float:
    """The weight of the latest checkpoint in the mean."""
    return 1 / min(int(step) // interval + 1, k)


def _count_as_one(averaged: nn.Module, _: object) -> None:
    """The hook after loading: an average without a window is taken for one checkpoint."""
    assert isinstance(averaged, LatestWeightAverage)
    if averaged.window.was_missing:
        averaged.window.was_missing = False
        averaged.window.restart(averaged._slots())
        warn(
            "the state has no window of checkpoints, as it is of another kind of average than "
            "LatestWeightAverage: its average counts as one checkpoint"
        )
