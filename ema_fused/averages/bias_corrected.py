"""An average that a read-out corrects for its lag behind the model: BEMA."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ema_fused.averages import schedules
from ema_fused.averages.averaged_weights import AveragedWeights
from ema_fused.averages.options import Options
from ema_fused.engine.checks import check_integer, check_not_negative
from ema_fused.engine.dtensors import local
from ema_fused.engine.rounding import HALVES
from ema_fused.modules.adopting import Adopted, Resize
from ema_fused.modules.beside import averaged_in, put
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.exchanging import exchange_of_everything
from ema_fused.modules.model_argument import check_model
from ema_fused.modules.module_pairs import Pair, pair_up, refuse_own, slots_of
from ema_fused.modules.pairing import Pairing
from ema_fused.modules.skeleton import skeleton_of
from ema_fused.modules.sources import Given
from ema_fused.modules.swapping import Swapped, refuse_while_swapped

# What is read out takes temporary memory, for so many elements at a time; on a CPU, what its caches
# hold.
_AT_ONCE, _AT_ONCE_ON_CPU = 2**24, 2**17


class BiasCorrectedEMA(AveragedWeights):
    """BEMA: an average that also remembers where the training began, and leads by what it lags.

    Block and Zhang 2025, arXiv 2508.00180. With t, the number of updates since the initial copy::

        averaged = (1 - b) * averaged + b * source    b = max((lag + multiplier * t) ** -ema_power,
                                                              min_momentum)
        corrected = averaged + a * (source - initial)     a = (lag + multiplier * t) ** -bias_power

    The average, and what it started from, are its state; updates are one launch, as of any average.
    What is wanted of it is read out: :meth:`corrected`, :meth:`write_corrected`,
    :meth:`swapped_corrected`. (``swapped``, ``weights`` and checkpoints for inference are of the
    average alone.) Call ``update_parameters`` once before the training, and its initial values are
    those that the paper starts from; or later (or with ``begin_step``), and it begins there.

    It holds tensors alone, two for each parameter that is averaged: ``state_dict()`` has
    ``initial.*`` beside ``module.*``. Rounds as TRL's ``BEMACallback`` does.

    Args:
        model: the model to average, wrapped or not.
        ema_power: of the momentum, 0 or more.
        bias_power: of the correction, 0 or more; a large one turns it off.
        lag: what t starts from, 0 or more: the larger, the less the first values count.
        multiplier: of t, 0 or more.
        min_momentum: the momentum doesn't fall below it.
        steps_before: is added to t: the steps that were made before the initial copy.
        source: average these tensors in place of the model's own, as :class:`AveragedWeights`;
            the initial values are theirs too.

    The others as :class:`BaseAveragedModel`. Buffers aren't corrected.

    Raises:
        ValueError: also if FSDP1 flattens the model's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: float = 10,
        multiplier: float = 1.0,
        min_momentum: float = 0.0,
        steps_before: int = 0,
        *shared: Any,
        source: Given | None = None,
        **options: Unpack[Options],
    ) -> None:
        falling = functools.partial(
            schedules.inverse_power,
            lag=lag,
            multiplier=multiplier,
            before=check_integer("steps_before", steps_before, least=0),
        )
        self._scale = functools.partial(falling, power=check_not_negative("bias_power", bias_power))
        momentum = functools.partial(
            falling, power=check_not_negative("ema_power", ema_power), least=min_momentum
        )
        momentum(1), self._scale(1)  # a value of another kind or range raises now
        super().__init__(model, momentum, *shared, arithmetic="axpby", source=source, **options)
        if self._is_flattened:
            raise ValueError(
                "BiasCorrectedEMA of a model sharded by FSDP1, whose pieces mean nothing without "
                "the parameters that they were cut from; shard the model by fully_shard (FSDP2)"
            )
        self._is_questioned = True  # a momentum that doesn't fall is what ema_power=0 asks for
        self._completed_for: Pairing | None = None
        self._modules["initial"] = nn.Module()
        self._complete()

    @torch.no_grad()
    def corrected(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages with their correction, by the names of the plain model.

        The model's weights are those of now: call it right after an update. Before the average has
        begun they are the model's. Parameters that aren't averaged are the model's own tensors,
        buffers the average's. Takes the memory of one more average, for what it returns.

        Args:
            model: the one that is averaged.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: as :meth:`update_parameters`.
        """
        return dict(self._corrected_tree("corrected()", model).state_dict())

    @torch.no_grad()
    def write_corrected(self, target: nn.Module, model: nn.Module) -> None:
        """Writes the averages with their correction into ``target``, another copy of the model.

        Only what is averaged is written. Takes little memory.

        Args:
            target: has the model's names; dtypes and devices may be others.
            model: the one that is averaged, right after an update.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: as :meth:`update_parameters`.
        """
        what = "write_corrected()"
        check_model(what, target)
        refuse_while_swapped(f"{what} was called", self, model, target)
        # Without the shares, which are with the model and not with this copy of it.
        updated = pair_up(
            self._averages(), target, update_buffers=False, shares=FrozenShares()
        ).updated
        goals = {pair.name: pair for pair in updated}
        for pairs, values in self._read_out(what, model):
            into = [goals[pair.name].source.detach() for pair in pairs]
            torch._foreach_copy_(into, values)

    def swapped_corrected(self, model: nn.Module) -> Swapped:
        """``with averaged.swapped_corrected(model):`` runs ``model`` with the corrected averages.

        As :meth:`swapped`, but what the block writes into the model is lost, and it takes the
        memory of one more average meanwhile.

        Args:
            model: the one that is averaged, right after an update.

        Raises:
            ValueError: when the block begins: the model has an adapter of the averages themselves.
        """
        check_model("swapped_corrected()", model)

        def find_exchange() -> Any:
            refuse_own(self._averages(), model, "which has no corrected values")
            tree = self._corrected_tree("swapped_corrected()", model)
            return exchange_of_everything(tree, model, shares=self._shares, backend=self.backend)

        return Swapped(self, model, find_exchange)

    @torch.no_grad()
    def _corrected_tree(self, what: str, model: nn.Module) -> nn.Module:
        refuse_while_swapped(f"{what} was called", self, model)
        read: dict[str, Tensor] = {}
        for pairs, values in self._read_out(what, model):
            read.update({pair.name: value for pair, value in zip(pairs, values, strict=True)})
        slots = slots_of(self._averages())
        by_id = {id(slots[name].tensor): value for name, value in read.items()}

        def corrected(_: str, tensor: Tensor) -> Tensor:
            value = by_id.get(id(tensor))
            if value is None:
                return tensor
            whole = tensor.detach().clone() if local(tensor) is not tensor else value
            if whole is not value:
                local(whole).copy_(value)
            return nn.Parameter(whole, requires_grad=False)

        return skeleton_of(self._averages(), corrected)

    def _read_out(self, what: str, model: nn.Module) -> Iterator[tuple[list[Pair], list[Tensor]]]:
        """Pairs and their corrected averages, as new tensors, some at a time."""
        check_model(what, model)
        self.settle()
        pairs = self._paired_with(model).averaging_pairs()
        initial = slots_of(self._initial)
        pairs = [pair for pair in pairs if pair.name in initial]
        steps = int(self._buffers["steps"])  # type: ignore[arg-type]
        # Before the initial copy, the average is the model, and there is nothing to correct.
        scale = float(self._scale(steps - 1)) if steps > 0 else 0.0
        for some in _pieces(pairs):
            ours = [pair.averaged.detach() for pair in some]
            now = [pair.source.detach().to(pair.averaged) for pair in some]
            begun = [local(initial[pair.name].tensor).detach() for pair in some]
            if steps <= 0:
                yield some, [tensor.clone() for tensor in now]
                continue
            moved = list(torch._foreach_sub(now, begun))
            if ours[0].dtype in HALVES:
                moved = [scale * each for each in moved]  # foreach rounds another way on the CPU
            else:
                torch._foreach_mul_(moved, scale)
            torch._foreach_add_(moved, ours)
            yield some, moved

    @property
    def _initial(self) -> nn.Module:
        initial = self._modules["initial"]
        assert initial is not None
        return initial

    def _complete(self) -> None:
        """Gives each averaged parameter without initial values those that it has now."""
        present = slots_of(self._initial)
        made = {id(slot.tensor): slot for slot in present.values()}
        with torch.inference_mode(False), torch.no_grad():
            for name, slot in averaged_in(self._averages(), self.shared_names).items():
                if name in present:
                    made[id(slot.tensor)] = present[name]
            for name, slot in averaged_in(self._averages(), self.shared_names).items():
                if name in present:
                    continue
                tied = made.get(id(slot.tensor))
                value = slot.tensor.detach().clone() if tied is None else tied.tensor
                put(self._initial, name, value)
                made[id(slot.tensor)] = slots_of(self._initial)[name]

    def _paired_with(self, model: nn.Module) -> Pairing:
        pairing = super()._paired_with(model)
        if pairing is not self._completed_for:
            self._completed_for = pairing
            self._complete()  # one that was frozen may train now
        return pairing

    def _begin(self) -> None:
        """Takes the averages, which have just been copied, for the initial values."""
        self._modules["initial"] = nn.Module()
        self._complete()

    def _watch_on(self, steps: int) -> None:
        super()._watch_on(steps)
        if steps == 0:
            self._begin()

    def copy_from(self, model: nn.Module) -> None:
        """As :meth:`BaseAveragedModel.copy_from`; the initial values become those of ``model`` too.

        Args:
            model: of the structure of the averages; wrapped or not.
        """
        super().copy_from(model)
        self._begin()

    def adopt(self, model: nn.Module, *, resize: Resize | None = None) -> Adopted:
        """As :meth:`BaseAveragedModel.adopt`; what is kept keeps its initial values.

        Args:
            model: the model to average from now on; wrapped or not.
            resize: makes the average of a tensor whose shape has changed.
        """
        before = slots_of(self._initial)
        adopted = super().adopt(model, resize=resize)
        self._modules["initial"] = nn.Module()
        for name, slot in averaged_in(self._averages(), self.shared_names).items():
            if name in before and before[name].tensor.shape == slot.tensor.shape:
                put(self._initial, name, before[name].tensor)
        self._complete()
        return adopted

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_completed_for": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        self._complete()  # what the checkpoint has trained and this model shared


def _pieces(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """The pairs, some of one device and dtype at a time."""
    ends = itertools.accumulate(pair.averaged.numel() for pair in pairs)
    keys = [
        (
            end // (_AT_ONCE_ON_CPU if pair.averaged.is_cpu else _AT_ONCE),
            pair.averaged.device,
            pair.averaged.dtype,
        )
        for end, pair in zip(ends, pairs, strict=True)
    ]
    for _, group in itertools.groupby(zip(keys, pairs, strict=True), key=lambda item: item[0]):
        yield [pair for _, pair in group]
