"""Power-function averages (EDM2): several at once, with snapshots to make others later."""

from __future__ import annotations

import functools
import os
import uuid
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ema_fused.engine.checks import check_integer, plain
from ema_fused.engine.graphs import outside_graphs
from ema_fused.engine.keywords import NoOthers, arguments_of, unexpected_keyword
from ema_fused.engine.pairs import MAX_AVERAGES
from ema_fused.engine.plan import Plan
from ema_fused.modules import exchanging, swapping
from ema_fused.modules.adopting import Adopted, Resize, carry_over
from ema_fused.modules.advice import of_first_copy
from ema_fused.modules.choosing import Buffers, checked_buffers
from ema_fused.modules.copying import FrozenShares
from ema_fused.modules.leaving_out import Parameters, Selection, told
from ema_fused.modules.model_argument import check_model
from ema_fused.modules.module_pairs import names_of_buffers
from ema_fused.modules.partitions import partitioned_parameters
from ema_fused.modules.swapping import refuse_while_swapped
from ema_fused.posthoc.averaged_tensors import AveragedTensors, averaged_tensors
from ema_fused.posthoc.paired_plan import PairedPlan
from ema_fused.posthoc.power_profiles import gamma_of, momentum_between
from ema_fused.posthoc.snapshots import write_snapshot


class PowerFunctionEMA(nn.Module):
    """Averages of a model with power-function profiles, all updated in one pass.

    Karras et al. 2023, arXiv 2312.02696. At time t, with dt since the previous update::

        averaged = beta * averaged + (1 - beta) * model,  beta = (1 - dt / t) ** (gamma + 1)

    The width of a profile is a fraction of the run so far, ``sigma_rel``; the first update copies.
    Which width is best is known only after training. So save snapshots during training, and make
    the average of any width from them by :func:`ema_fused.posthoc.reconstruction.reconstruct`::

        ema = PowerFunctionEMA(model)
        for step in range(steps):
            ...
            optimizer.step()
            ema.update_parameters(model)
            if (step + 1) % (steps // 32) == 0:
                ema.save_snapshot("run")

    It keeps the averaged tensors only, no copy of the model: parameters in at least float32;
    buffers are copied. ``state_dict()`` holds everything that a run needs to resume bit for bit.

    Args:
        model: the model to average, wrapped or not; tensors have the names of the plain model.
        sigma_rel: the widths, in (0, 0.2887); up to eight. Two are enough to reconstruct others.
        backend: as in :class:`~ema_fused.Plan`.
        update_buffers: average these buffers as well, as :class:`BaseAveragedModel`; in at least
            float32 too, and finite from the first update on.
        include: average only these parameters, as :class:`BaseAveragedModel`.
        exclude: of these, average no parameters that this names. What is left out is in the
            model's memory, and in no snapshot or ``state_dict()``; :meth:`average` has it.

    Attributes:
        sigma_rel: the widths, a tuple.
        averages: for each width, a bare module with the averaged tensors.
        time: the length of the run so far, in steps or in samples.
        steps: number of updates so far.
        run: a random name that identifies the snapshots of this run; a resumed run keeps it.

    Raises:
        ValueError: a width is out of range or given twice, or there are none or too many; a pattern
            names nothing, or nothing would be averaged.
        TypeError: there is no argument of this name, or one is of a wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rel: float | Sequence[float] = (0.05, 0.10),
        *,
        backend: str | None = None,
        update_buffers: Buffers = False,
        include: Parameters | None = None,
        exclude: Parameters | None = None,
        **unknown: Unpack[NoOthers],
    ) -> None:
        super().__init__()
        if unknown:
            accepted = arguments_of(type(self), PowerFunctionEMA)
            raise unexpected_keyword(type(self), unknown, accepted)
        check_model(f"{type(self).__name__}()", model)
        if partitioned_parameters(model):
            raise TypeError(
                "DeepSpeed ZeRO-3 has partitioned the model, and snapshots are of whole tensors; "
                "average it by ema_fused.AveragedWeights"
            )
        one = plain(sigma_rel)
        given: Any = sigma_rel if one is None else [one]
        self.sigma_rel = tuple(float(one) for one in given)
        if not 1 <= len(self.sigma_rel) <= MAX_AVERAGES:
            raise ValueError(
                f"sigma_rel has {len(self.sigma_rel)} widths; 1 to {MAX_AVERAGES} are expected"
            )
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel is {self.sigma_rel}; different widths are expected")
        self._gammas = [gamma_of(one) for one in self.sigma_rel]
        refuse_while_swapped("a PowerFunctionEMA was made", model)
        self.update_buffers = checked_buffers(
            update_buffers, functools.partial(names_of_buffers, model)
        )
        self._selection = Selection(include, exclude)
        self.averages, left_out = self._make(model)
        self._shares = FrozenShares(left_out, left_out=left_out)
        self.time = 0
        self.steps = 0
        self.run = uuid.uuid4().hex
        self.backend = backend
        self._paired: PairedPlan | None = None
        self.register_state_dict_post_hook(_drop_what_is_left_out)  # type: ignore[no-untyped-call]

    def _make(self, model: nn.Module) -> AveragedTensors:
        # Inference tensors could never be updated outside inference mode.
        with torch.inference_mode(False):
            return averaged_tensors(
                model,
                len(self.sigma_rel),
                selection=self._selection,
                update_buffers=self.update_buffers,
            )

    @property
    def left_out_names(self) -> list[str]:
        """Names of the parameters that ``include`` and ``exclude`` leave out of the averages."""
        return list(self._shares.left_out)

    def extra_repr(self) -> str:
        """Names what is left out."""
        return told(self._shares.left_out, self.averages[0], self.update_buffers)

    @outside_graphs
    def update_parameters(self, model: nn.Module, *, samples: int = 1) -> None:
        """Updates every average with the current weights of ``model``, in one pass over them.

        Doesn't wait for the device. Call it after each ``optimizer.step()``.

        Args:
            model: the model that was averaged from the start, or another of the same structure;
                wrapped or not.
            samples: how much :attr:`time` increases: 1 to count steps, the batch size to count
                samples. It makes a difference only if the batch size changes.

        Raises:
            KeyError: names of parameters or buffers don't match those of the averages.
            ValueError: a shape differs, or ``samples`` is below 1.
            TypeError: one side of a pair is floating-point and the other isn't, or ``samples`` is
                no integer.
            RuntimeError: the model holds swapped-in averages.

        If an error is raised, the averages are unchanged.
        """
        refuse_while_swapped("update_parameters() was called", self, model)
        samples = check_integer("samples", samples, least=1)
        time = self.time + samples
        weights = [momentum_between(gamma, self.time, time) for gamma in self._gammas]
        plan = self._planned_with(model)
        try:
            self._average(plan, weights)
        except ValueError:
            # A dtype has changed in place: plan again, or raise with the name of the tensor.
            self._paired = None
            self._average(self._planned_with(model), weights)
        self.time = time
        self.steps += 1

    def _average(self, plan: Plan, weights: list[float]) -> None:
        if self.time == 0:
            plan.copy_()
        else:
            plan.lerp_(weights if len(weights) > 1 else weights[0])

    def _planned_with(self, model: nn.Module) -> Plan:
        known = self._paired
        if known is None or not known.holds(model):
            check_model("update_parameters()", model)
            # The plan keeps the model's tensors alive: drop it when the model is garbage-collected.
            known = self._paired = PairedPlan(
                self.averages,
                model,
                update_buffers=self.update_buffers,
                shares=self._shares,
                backend=self.backend,
                when_model_is_gone=functools.partial(_drop_plan, weakref.ref(self)),
            )
        return known.plan

    @outside_graphs
    @torch.no_grad()
    def adopt(self, model: nn.Module, *, resize: Resize | None = None) -> Adopted:
        """Takes over the present structure of ``model``; what is unchanged keeps its averages.

        As :meth:`BaseAveragedModel.adopt`, for every width. Snapshots of different structures can't
        be combined.

        Args:
            model: the model to average from now on; wrapped or not.
            resize: ``resize(name, old_average, new_value)`` makes the average of a parameter whose
                shape has changed; called for each width in turn.

        Raises:
            TypeError, ValueError: as :meth:`BaseAveragedModel.adopt`.
            RuntimeError: the model holds swapped-in averages.

        If an error is raised, the averages are unchanged.
        """
        refuse_while_swapped("adopt() was called", model)
        modules, left_out = self._make(model)
        with torch.inference_mode(False):
            adopted = [
                carry_over(
                    new,
                    set(left_out),
                    old,
                    self._shares.names,
                    resize=resize,
                    update_buffers=self.update_buffers,
                    left_out=left_out,
                )
                for new, old in zip(modules, self.averages, strict=True)
            ]
        self.averages = modules
        self._shares.take(left_out, left_out)
        self._paired = None
        return adopted[0]

    def average(self, sigma_rel: float | None = None) -> dict[str, Tensor]:
        """The tensors of one average by name, like the model's ``state_dict()``; not copies.

        A model that renames its tensors when it is saved, or saves more than tensors, loads
        ``ema_fused.export.model_state_dict(model, ema.average(sigma_rel))``. What is left out is
        included.

        Args:
            sigma_rel: one of the widths kept; may be omitted if there is only one.

        Raises:
            ValueError: no average of this width is kept.
        """
        return dict(self._average_of(sigma_rel).state_dict())

    @outside_graphs
    def copy_to(self, model: nn.Module, *, sigma_rel: float | None = None) -> None:
        """Writes one average and its buffers into ``model``, in the model's dtypes.

        Args:
            sigma_rel: as :meth:`average`.

        Raises:
            KeyError, TypeError, RuntimeError: as :meth:`update_parameters`; nothing is written.
            ValueError: also if no average of this width is kept.
        """
        check_model("copy_to()", model)
        refuse_while_swapped("copy_to() was called", self, model)
        average = self._average_of(sigma_rel)
        exchanging.copy_to(average, model, shares=self._shares, backend=self.backend)

    @outside_graphs
    def copy_from(self, model: nn.Module) -> None:
        """Sets every average to the current weights of ``model``; ``time`` is unchanged.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: as :meth:`update_parameters`.
        """
        check_model("copy_from()", model)
        refuse_while_swapped("copy_from() was called", self, model)
        self._paired = None  # its plan may be of other dtypes
        self._planned_with(model).copy_()

    def swapped(
        self, model: nn.Module, *, sigma_rel: float | None = None
    ) -> AbstractContextManager[nn.Module]:
        """``with ema.swapped(model):`` runs ``model`` with the weights and buffers of one average.

        They are swapped out again at the end of the block, even if it raises. Where the dtypes
        differ, copies of the model's tensors are kept during the block. Inside it, saving, loading
        and updating both is refused, and so is swapping again.

        Args:
            model: as for :meth:`update_parameters`.
            sigma_rel: as :meth:`average`.

        Returns:
            A context manager that yields ``model``.

        Raises:
            KeyError, TypeError: as :meth:`update_parameters`; nothing is swapped then.
            ValueError: also if no average of this width is kept.
            RuntimeError: a refused action; or, at the end of the block, the model's weights can't
                be put back because their dtypes, shapes or names were changed inside it.
        """
        check_model("swapped()", model)
        average = self._average_of(sigma_rel)
        return swapping.swapped(
            self,
            average,
            model,
            shares=self._shares,
            backend=self.backend,
            on_entry=functools.partial(self._before_swapped, average, model),
        )

    def _before_swapped(self, average: nn.Module, model: nn.Module) -> None:
        if self.time == 0 and self._paired is None:
            of_first_copy(average, model)

    def _average_of(self, sigma_rel: float | None) -> nn.Module:
        if sigma_rel is None and len(self.sigma_rel) == 1:
            return self.averages[0]
        if sigma_rel not in self.sigma_rel:
            kept = ", ".join(map(str, self.sigma_rel))
            raise ValueError(
                f"sigma_rel is {sigma_rel}, and averages of {kept} are kept; others are made from "
                f"snapshots, ema_fused.reconstruction.reconstruct(run_dir, sigma_rel)"
            )
        return self.averages[self.sigma_rel.index(sigma_rel)]

    def save_snapshot(self, run_dir: str | os.PathLike[str]) -> list[Path]:
        """Saves every average as it is now: one safetensors file each in ``run_dir``.

        Each file is written atomically: under another name, then renamed. A file of this width and
        step that exists already is replaced. Only one process may save.

        Returns:
            The paths of the files.

        Raises:
            RuntimeError: nothing has been averaged yet.
            ImportError: safetensors is not installed.
        """
        if self.steps == 0:
            raise RuntimeError("no snapshot before the first update_parameters()")
        return [
            write_snapshot(
                Path(run_dir),
                average,
                run=self.run,
                sigma_rel=sigma_rel,
                time=self.time,
                steps=self.steps,
                update_buffers=self.update_buffers,
                left_out=self.left_out_names,
            )
            for sigma_rel, average in zip(self.sigma_rel, self.averages, strict=True)
        ]

    def get_extra_state(self) -> dict[str, Any]:
        """The part of ``state_dict()`` that isn't tensors."""
        return {
            "sigma_rel": list(self.sigma_rel),
            "time": self.time,
            "steps": self.steps,
            "run": self.run,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Loads a ``state`` that :meth:`get_extra_state` returned.

        Raises:
            ValueError: it is of averages of other widths; nothing has been loaded then.
        """
        if tuple(state["sigma_rel"]) != self.sigma_rel:
            raise ValueError(
                f"the state holds averages of sigma_rel {tuple(state['sigma_rel'])}, and this "
                f"object keeps {self.sigma_rel}; make it with the same widths in the same order"
            )
        self.time, self.steps, self.run = state["time"], state["steps"], state["run"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for number, average in enumerate(self.averages):
            tensors = average.state_dict(keep_vars=True)
            for name in self._shares.left_out:  # whatever the state has of it
                state_dict[f"{prefix}averages.{number}.{name}"] = tensors[name]

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled is everything but the plan, which refers to the model itself."""
        refuse_while_swapped("the averaged model was copied or pickled", self)
        return self.__dict__ | {"_paired": None}


def _drop_what_is_left_out(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any
) -> None:
    assert isinstance(module, PowerFunctionEMA)
    for number in range(len(module.averages)):
        for name in module.left_out_names:
            state_dict.pop(f"{prefix}averages.{number}.{name}", None)


def _drop_plan(owner: weakref.ref[PowerFunctionEMA], _: object) -> None:
    """Drops the plan of ``owner``: it would keep the tensors of a deleted model alive."""
    ema = owner()
    if ema is not None:
        # Not by nn.Module's __setattr__, which may be gone when the interpreter ends.
        ema.__dict__["_paired"] = None
