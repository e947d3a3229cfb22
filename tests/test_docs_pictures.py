"""The pictures of docs/ and the numbers beside them: run, compared with formulas, drawn again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import drawing, past_weights, records
from ema_fused.power_profiles import gamma_of

IMAGES = Path(__file__).parent.parent / "docs" / "images"
T = past_weights.STEPS
STEP = np.arange(T)


def by_momenta(momenta: Any) -> Any:
    """Weights where the average of step s takes ``momenta[s]``; the first call copies."""
    momenta = np.array(momenta, dtype=np.float64)
    momenta[0] = 1.0
    kept = np.append(np.cumprod((1 - momenta)[::-1])[::-1][1:], 1.0)
    return momenta * kept


def geometric(momentum: float) -> Any:
    weights = momentum * (1 - momentum) ** (T - 1 - STEP)
    weights[0] = (1 - momentum) ** (T - 1)
    return weights


def sparse(momentum: float) -> Any:
    return by_momenta(np.where(STEP % 20 == 0, momentum, 0.0))


# The formulas of the docstrings, written out; of power functions the integral of the profile.
FORMULAS = {
    "EMA(momentum=0.02)": geometric(0.02),
    "EMA(momentum=0.01)": geometric(0.01),
    "EMA(momentum=0.004)": geometric(0.004),
    "SWA()": np.full(T, 1 / T),
    "SWA(begin_step=201)": np.where(STEP < 200, 0.0, 1 / (T - 200)),
    "Annealing(momentum=0.004, gamma=3)": by_momenta(np.maximum(0.004, 3 / (3 + STEP))),
    "ExpMomentum(momentum=0.004, gamma=40)": by_momenta(
        (1 - 0.004) * np.exp(-(1 + STEP) / 40) + 0.004
    ),
    "Cosine(momentum=0.02)": by_momenta(0.02 * (np.cos(np.pi * STEP / T) + 1) / 2),
    "EMA(momentum=0.01, every=20)": sparse(1 - (1 - 0.01) ** 20),
    "EMA(momentum=0.01, interval=20)": sparse(0.01),
} | {
    f"Power(sigma_rel={width})": np.diff((np.arange(T + 1) / T) ** (gamma_of(width) + 1))
    for width in past_weights.WIDTHS
}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    return past_weights.measure()


def test_every_kind_has_a_formula(measured: dict[str, list[float]]) -> None:
    assert set(measured) == set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_averages_weigh_the_past_by_their_formulas(
    measured: dict[str, list[float]], name: str
) -> None:
    assert sum(measured[name]) == pytest.approx(1.0, abs=1e-12)
    # CosineEMA computes its phase in float32, as its original does.
    close = 1e-4 if name.startswith("Cosine") else 1e-11
    np.testing.assert_allclose(measured[name], FORMULAS[name], rtol=close, atol=1e-15)


def test_the_file_holds_what_a_run_gives(measured: dict[str, list[float]]) -> None:
    report = records.read(records.RESULTS / past_weights.NAME)
    assert report["steps"] == T
    assert set(report["weights"]) == set(measured)
    for name, weights in report["weights"].items():
        np.testing.assert_allclose(weights, measured[name], rtol=1e-4, atol=1e-15)
    assert report["environment"]["command"].startswith("python -m benchmarks.past_weights --json")


def test_the_picture_of_past_weights_is_that_of_the_file(tmp_path: Path) -> None:
    weights = records.read(records.RESULTS / past_weights.NAME)["weights"]
    for path in drawing.save(tmp_path / "past_weights", partial(past_weights.draw, weights)):
        assert path.read_text(encoding="utf-8") == (IMAGES / path.name).read_text(
            encoding="utf-8"
        ), "python -m benchmarks.past_weights --draw docs/images/past_weights draws it anew"
