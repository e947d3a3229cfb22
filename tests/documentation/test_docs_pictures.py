"""The pictures of docs/ and the numbers beside them: run, compared with formulas, drawn again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import drawing, marked, numerics, past_weights, records
from ema_fused.posthoc.power_profiles import gamma_of
from examples import digits
from tests import ROOT

DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
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


# ---- Averages in 16 bits -------------------------------------------------------------------------

SMALL, LARGE = numerics.MOMENTA


@pytest.mark.filterwarnings("ignore:averages are kept in 16 bits")
def test_averages_are_compared_with_the_exact_one() -> None:
    torch.manual_seed(0)
    model = digits.build_network()
    kept = numerics.Kept(model)
    sources = []
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        kept.update(model)
        rows = [p.detach().bfloat16().double().flatten() for p in model.parameters()]
        sources.append(torch.cat(rows))
    exact = sources[0]
    for source in sources[1:]:
        exact = (1 - LARGE) * exact + LARGE * source
    averaged = kept.averages[LARGE, "bfloat16, nearest"]
    found = torch.cat([p.detach().double().flatten() for p in averaged.module.parameters()])
    distance, moved = kept.compare(averaged, LARGE)
    assert distance == pytest.approx(100 * float((found - exact).norm() / exact.norm()), rel=1e-9)
    assert moved == pytest.approx(100 * float((found != sources[0]).double().mean()))
    # A change of a few percent of itself, by a hundredth: nothing that isn't zero moves.
    assert moved == 0
    distance, moved = kept.compare(kept.averages[LARGE, "float32"], LARGE)
    assert distance < 1e-4
    assert moved > 90


@pytest.mark.filterwarnings("ignore:averages are kept in 16 bits")
def test_a_short_training_shows_what_the_page_says(one_thread: None) -> None:
    curves = numerics.train(seed=5, epochs=4)
    assert curves["steps"]["steps"] == [112, 224]
    last = {name: {what: y[-1] for what, y in found.items()} for name, found in curves.items()}
    still, stochastic = last[f"bfloat16, nearest {SMALL}"], last[f"bfloat16, stochastic {SMALL}"]
    assert still["moved"] < 40 < 80 < stochastic["moved"]
    assert still["distance"] > 2 * stochastic["distance"]
    assert last[f"float32 {SMALL}"]["distance"] < 1e-3
    assert last[f"bfloat16, every=64 {SMALL}"]["moved"] > 80
    assert stochastic["accuracy"] > 80


def test_the_page_has_the_numbers_of_the_file() -> None:
    report = records.read(records.RESULTS / numerics.NAME)
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    table = numerics.markdown(report)
    assert page == marked.between_markers(page, numerics.PROGRAM, table), (
        "python -m benchmarks.numerics --write docs/numerics.md writes it anew"
    )
    with pytest.raises(ValueError, match="add both"):
        marked.between_markers("no markers", numerics.PROGRAM, table)
    assert report["environment"]["command"].startswith("python -m benchmarks.numerics --json")


def test_the_table_is_what_was_found_after_the_last_step() -> None:
    report = records.read(records.RESULTS / numerics.NAME)
    rows = numerics.markdown(report).splitlines()[4:]
    names = [(momentum, kind) for momentum in numerics.MOMENTA for kind in numerics.KINDS]
    assert len(rows) == len(names)
    for row, (momentum, kind) in zip(rows, names, strict=True):
        runs = [run[f"{kind} {momentum}"] for run in report["seeds"].values()]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [str(momentum), kind]
        means = {what: np.mean([run[what][-1] for run in runs]) for what in numerics.CURVES}
        if cells[2] == "< 0.01 %":
            assert means["distance"] < 0.01
        else:
            assert float(cells[2].removesuffix(" %")) == pytest.approx(means["distance"], rel=0.05)
        assert float(cells[3].removesuffix(" %")) == pytest.approx(means["moved"], abs=0.06)
        assert float(cells[4].partition(" ")[0]) == pytest.approx(means["accuracy"], abs=0.06)


def test_the_picture_of_numerics_is_that_of_the_file(tmp_path: Path) -> None:
    report = records.read(records.RESULTS / numerics.NAME)
    for path in drawing.save(tmp_path / "numerics", partial(numerics.draw, report)):
        assert path.read_text(encoding="utf-8") == (IMAGES / path.name).read_text(
            encoding="utf-8"
        ), "python -m benchmarks.numerics --draw docs/images/numerics draws it anew"
