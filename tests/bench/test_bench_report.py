"""What is made of a benchmark's report: targets, the fit, pictures. No test looks at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, pictures, targets
from ema_fused.bench.tables import markdown, tables

TIMING = {"lower_quartile": 0.0, "upper_quartile": 0.0, "rounds": 5, "calls_per_round": 1}


def contender(name: str, ratio: float, fraction: float | None = 1.0) -> dict[str, Any]:
    timing = {**TIMING, "median": ratio * 12e-6}
    return {"name": name, "ratio": ratio, "limit_fraction": fraction, "timing": timing}


def case(model: str, elements: int, foreach: float, fraction: float, **more: Any) -> dict[str, Any]:
    contenders = [
        contender("ema_fused Plan.lerp_", 1.0, fraction),
        contender("torch._foreach_lerp_", foreach),
    ]
    return {
        "kind": "lists",
        "peer": "torch",
        "model": model,
        "model_title": model,
        "title": "prepared lists",
        "dtypes": "float32",
        "tensors": 3,
        "elements": elements,
        "bytes_moved": 12 * elements,
        "launches": [1, 1],
        "limit": None,
        "contenders": contenders,
        **more,
    }


def test_targets_are_judged_by_the_worst_case() -> None:
    host = {"kind": "host", "launches": [1]}
    report: dict[str, Any] = {
        "smoke": False,
        "cases": [
            case("16x16777216", 2**28, 1.2, 0.96),
            case("128x16777216", 2**31, 1.0, 0.97),
            case("sdxl_unet", 160_000_000, 3.5, 0.5),
            *({**case("n", 16, 2.0, 1.0), "tensors": n, **host} for n in (161, 1000)),
        ],
    }
    judged = targets.targets(report)
    assert [target.met for target in judged] == [
        True,  # 0.96: the 0.5 of tensors under 1 GB doesn't count
        True,
        False,  # 12 us, where 161 tensors may take 11.0
        True,
        False,  # 1.0 on 8 GiB
        True,
        None,  # nothing mixed was measured
        None,
    ]
    report["cases"][0]["launches"] = [1, 2]
    assert targets.targets(report)[1].met is False
    assert all(target.met is None for target in targets.targets({**report, "smoke": True}))
    (table,) = targets.table(report)
    assert [row[3] for row in table.rows].count("NOT MET") == 3


def growing(call: float, tensor: float, byte: float) -> dict[str, Any]:
    """A report of lists that take just what three constants say."""
    cases = []
    for total in growth.ELEMENTS:
        for count in growth.TENSORS:
            a_byte = byte if 8 * total > 32 * 2**20 else byte / 3
            seconds = call + tensor * count + a_byte * 12 * total
            found = [
                {"name": name, "timing": _exactly((1 + place) * seconds)}
                for place, name in enumerate(growth.CONTENDERS)
            ]
            about = {"tensors": count, "elements": total, "bytes_moved": 12 * total}
            cases.append({"kind": "growth", **about, "contenders": found})
    environment = {"device": "some CPU", "threads": 2, "date": "2026-01-01"}
    return {"environment": environment, "cases": cases}


def _exactly(seconds: float) -> dict[str, float]:
    return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), seconds)


def test_the_fit_finds_the_constants_that_were_planted() -> None:
    report = growing(2e-6, 14e-9, 2e-11)
    for place, name in enumerate(growth.CONTENDERS):
        found = growth.fitted(report, name)
        constants = (found.a_call, found.a_tensor, found.a_byte, 3 * found.a_cached_byte)
        planted = [k * (1 + place) for k in (2e-6, 14e-9, 2e-11, 2e-11)]
        assert constants == pytest.approx(planted, rel=1e-3)
        assert found.error < 1e-3 and found.points == 35


def test_too_few_points_are_no_fit() -> None:
    report = growing(2e-6, 14e-9, 2e-11)
    report["cases"] = report["cases"][:3]
    with pytest.raises(ValueError, match="3 points of growth are too few"):
        growth.fitted(report, growth.CONTENDERS[0])


def test_pictures_depend_on_the_report_alone(tmp_path: Path) -> None:
    report = growing(2e-6, 14e-9, 2e-11)
    first = pictures.draw(report, tmp_path / "a")
    again = pictures.draw(report, tmp_path / "b")
    assert [path.name for path in first] == ["growth-light.svg", "growth-dark.svg"]
    other = pictures.draw(growing(2e-6, 15e-9, 2e-11), tmp_path / "c")
    for one, same, changed in zip(first, again, other, strict=True):
        assert one.read_bytes() == same.read_bytes() != changed.read_bytes()


def test_tables_have_a_cell_for_each_case() -> None:
    report = {
        "cases": [case("a", 10, 1.25, 0.5), case("b", 20, 2.5, 0.75)],
        "failed": [{"case": "c", "reason": "why"}],
        "left_out": [],
    }
    text = "\n".join(markdown(table) for table in tables(report))
    assert "| torch._foreach_lerp_ | 1.25 (15 us ±0%) | 2.50 (30 us ±0%) |" in text
    assert "| b | 3 | 2e-05 | 0.75 |" in text
    assert "| c | why |" in text
