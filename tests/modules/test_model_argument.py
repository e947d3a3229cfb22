"""Something else where a model is expected: the message says what it was and what to pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ema_fused import AveragedWeights, ExponentialMovingAverage, PowerFunctionEMA


def not_models(model: nn.Module) -> dict[str, Any]:
    return {
        r"a dict; a torch\.nn\.Module.*not its state_dict": dict(model.state_dict()),
        r"a OrderedDict; .*not its state_dict\(\)": model.state_dict(),
        r"a generator; .*not its parameters\(\)": model.parameters(),
        r"a list; .*not its parameters\(\)": list(model.parameters()),
        r"a SGD; .*not its optimizer": torch.optim.SGD(model.parameters()),
        r"a NoneType; .*: pass the model itself$": None,
    }


@pytest.mark.parametrize("kind", [ExponentialMovingAverage, AveragedWeights, PowerFunctionEMA])
def test_other_things_than_models_are_refused_by_name(kind: Any) -> None:
    model = nn.Linear(3, 2)
    averaged = kind(model)
    averaged.update_parameters(model)
    steps = int(averaged.steps)
    calls = ["update_parameters", "copy_to", "swapped"]
    if kind is not PowerFunctionEMA:
        calls += ["copy_from", "exchange_with"]
    for what, given in not_models(model).items():
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\(\) was given {what}"):
            kind(given)
        for call in calls:
            if not hasattr(averaged, call):
                continue
            with pytest.raises(TypeError, match=rf"\(\) was given {what}"):
                getattr(averaged, call)(given)
    assert averaged.steps == steps
    averaged.update_parameters(model)
