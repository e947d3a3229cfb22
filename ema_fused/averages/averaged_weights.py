"""The average of a model without a copy of the model: just the averaged tensors, by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn, Unpack

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema_fused.averages.kinds import ExponentialMovingAverage
from ema_fused.averages.momenta import Momentum
from ema_fused.averages.options import Options
from ema_fused.engine.dtensors import local
from ema_fused.engine.plan import ARITHMETICS
from ema_fused.modules.adopting import Adopted, Resize
from ema_fused.modules.choosing import Pattern
from ema_fused.modules.copying import averaged_skeleton
from ema_fused.modules.partitions import partitioned_parameters
from ema_fused.modules.sharding import is_flattened
from ema_fused.modules.sources import Given, Sources


class AveragedWeights(ExponentialMovingAverage):
    """The averaged tensors of a model by name, for models that are large or can't be deep-copied.

    It does everything that :class:`ExponentialMovingAverage` does, but it can't be called: swap the
    averages into the model to evaluate them. Models sharded by ``fully_shard`` (FSDP2) or made of
    DTensors are averaged shard by shard, in the process of each shard; so are those of FSDP1 with
    ``use_orig_params=True``, and those that DeepSpeed's ZeRO-3 partitions, whose sources are the
    float32 pieces that its optimizer steps on. The processes don't communicate, and each launches
    one kernel::

        fully_shard(model)
        averaged = AveragedWeights(model, momentum=0.001, averaged_dtype=torch.float32)
        with attach(optimizer, model, averaged):
            train(model)
        with averaged.swapped(model):
            evaluate(model)

    ``state_dict()`` has the keys of the other averaged models (``steps``, ``module.*``), with
    DTensors where the model has them (and a ``FlatShard``, which is used as one, where ZeRO-3 has
    partitioned it), so ``torch.distributed.checkpoint`` can save it and load it on another number
    of processes. Parameters shared with the model (``share_frozen``, ``include``, ``exclude``) are
    left out of it. What ``include`` and ``exclude`` leave out isn't loaded from a state that has
    it. Weights that ``accelerate.cpu_offload`` keeps in host memory between passes are averaged and
    swapped there.

    Args:
        model: the model to average, wrapped or not; tensors have the names of the plain model.
        momentum: the weight of the model's values, in (0, 1), a function of the step, or a dict of
            regular expressions and momenta, as of :class:`ExponentialMovingAverage`.
        arithmetic: how an average is written (see :class:`~ema_fused.Plan`); ``"delta"`` with
            ``momentum=schedules.mean`` is stochastic weight averaging.
        source: average these tensors in place of the model's own: the float32 "master weights" that
            an optimizer keeps of 16-bit weights. A mapping from the plain model's names to tensors,
            or a function that is called with the model, at each update, and returns one. A tensor
            that was replaced in it is noticed. All parameters that train must be there (not
            those that ``include`` and ``exclude`` leave out), and nothing that the model lacks;
            what isn't there or is left out is the model's own, and so are frozen parameters with
            ``share_frozen``. The averages have the sources' dtype and device unless
            ``averaged_dtype`` and ``device`` say otherwise; :meth:`swapped` writes them rounded
            into the model alone, and :meth:`copy_to` into both.

    The others as :class:`BaseAveragedModel`, except ``version_counters``: None is False here, as
    there is no module to call. Set it if the averages are in a graph all the same (by
    ``torch.func.functional_call``, say).

    Raises:
        TypeError: also if ZeRO-3 keeps a parameter where it can't be averaged (on a disk).
        ValueError: also with ``skip_nonfinite`` of an FSDP1 or ZeRO-3 model; or ``source`` doesn't
            fit the model.
    """

    _copied = staticmethod(averaged_skeleton)
    _is_callable = False

    def __init__(
        self,
        model: nn.Module,
        momentum: Momentum | Mapping[Pattern, Momentum] = 0.0002,
        *shared: Any,
        arithmetic: str = "lerp",
        source: Given | None = None,
        **options: Unpack[Options],
    ) -> None:
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r} is none of {', '.join(ARITHMETICS)}")
        sources = None
        if source is not None:
            sources = Sources(source, frozen_too=not options.get("share_frozen"))
            copied = functools.partial(averaged_skeleton, sources=sources)
            # Not by nn.Module's __setattr__, whose constructor comes later; ours calls it.
            self.__dict__["_copied"] = copied
        flattened = isinstance(model, nn.Module) and is_flattened(model)
        if options.get("skip_nonfinite") and partitioned_parameters(model):
            raise ValueError(
                "skip_nonfinite=True with ZeRO-3: each process would decide by its own pieces; "
                "call update_parameters() where engine.was_step_applied(), which says the same in "
                "all processes"
            )
        if flattened and options.get("skip_nonfinite"):
            raise ValueError(
                "skip_nonfinite=True with FSDP1: each process would decide by its own pieces, and "
                "one could leave out a step that another averages; shard the model by fully_shard "
                "(FSDP2), where the processes decide together"
            )
        super().__init__(model, momentum, *shared, **options)
        self._sources = sources
        self.arithmetic = arithmetic
        self._is_flattened = flattened
        self.register_state_dict_post_hook(_leave_out_what_is_shared)  # type: ignore[no-untyped-call]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averaged tensors and persistent buffers by the names of the plain model; not copies.

        DTensors if the model is sharded, or a ``FlatShard`` of each parameter that ZeRO-3 has
        partitioned: ``to_local()`` and ``full_tensor()`` are the same. Parameters shared with the
        model are included. A model that renames its tensors when it is saved, or saves more than
        tensors, loads ``ema_fused.export.model_state_dict(model, averaged.weights)``.
        """
        return dict(self.module.state_dict())

    def adopt(self, model: nn.Module, *, resize: Resize | None = None) -> Adopted:
        """As :meth:`BaseAveragedModel.adopt`; no module is copied.

        Args:
            model: the model to average from now on; wrapped or not.
            resize: makes the average of a tensor whose shape has changed.
        """
        adopted = super().adopt(model, resize=resize)
        self._is_flattened = is_flattened(model)
        return adopted

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises: there is no module to call.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "AveragedWeights holds tensors alone and can't be called; call the model inside "
            "averaged.swapped(model), or write the averages into another one: "
            "averaged.copy_to(model)"
        )

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if self._is_flattened:
            raise RuntimeError(
                "FSDP1 flattens parameters and cuts them into pieces, which mean nothing under "
                "their names in a checkpoint; save averaged_state_dict(averaged, model) of "
                "ema_fused.checkpoints, which puts them together"
            )
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        assigns = local_metadata.get("assign_to_params_buffers", False)
        tensors = self.module.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            key = f"{prefix}module.{name}"
            if name in self.shared_names:
                in_state = state_dict.get(key, tensor)
                if in_state is not tensor and not self._shares.leave_out(name):
                    # In the checkpoint it isn't shared: it was trained in that run.
                    self._shares.end(name, tensor, tensor)
                else:
                    state_dict[key] = tensor
            elif key in state_dict and is_lazy(tensor):
                tensor.materialize(state_dict[key].shape)
            elif key in state_dict and local(tensor).is_meta and not assigns:
                raise RuntimeError(
                    f"{name!r} of the average is on the meta device and can't take a value; give "
                    f"the model its memory and call averaged.copy_from(model) before loading"
                )


def _leave_out_what_is_shared(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any
) -> None:
    assert isinstance(module, AveragedWeights)
    for name in module.shared_names:
        state_dict.pop(f"{prefix}module.{name}", None)
