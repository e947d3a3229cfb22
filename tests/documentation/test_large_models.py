"""What an average costs large models, on paper: formulas, tables, the page that quotes them."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import marked
from tests import ROOT, processes

PAGE = ROOT / "docs" / "large_models.md"


@pytest.fixture
def large_models() -> Any:
    """The program, as a module."""
    return importlib.import_module("benchmarks.large_models")


@pytest.fixture
def cost_of(large_models: Any) -> Any:
    """The cost of an option, found by its row's text and layout, with other assumptions."""

    def found(layout: str, text: str, parameters: float, gpus: int, **assumptions: float) -> Any:
        options = [o for o in large_models.OPTIONS if (o.layout, o.text) == (layout, text)]
        assert len(options) == 1
        a = large_models.Assumptions(**assumptions)
        return large_models.cost(options[0], parameters, gpus, a, large_models.read_measured())

    return found


MIXED, OFFLOAD = "float32 of bfloat16", '`offload="cpu"`'
OVERLAPPED = '`offload="cpu"`, attached'

# ---- Formulas, beside what was computed by hand --------------------------------------------------


@pytest.mark.parametrize(
    ("averaged", "source", "update", "swapped"), [(4, 4, 12, 32), (4, 2, 10, 26), (2, 2, 6, 16)]
)
def test_bytes_an_element(
    large_models: Any, averaged: int, source: int, update: int, swapped: int
) -> None:
    assert large_models.moved_bytes(averaged, source) == update
    assert large_models.swapped_bytes(averaged, source) == swapped


def test_sharded_average_of_7b_on_8_gpus(cost_of: Any) -> None:
    found = cost_of("FSDP2", MIXED, 7e9, 8)
    assert found.model_bytes == 14e9  # 16 x 7e9 / 8
    assert found.average_bytes == 3.5e9
    assert found.host_bytes == 0
    assert found.traffic == {"gpu": 8.75e9}
    assert found.seconds == found.exposed == pytest.approx(8.75 / 3840)
    assert found.step == pytest.approx(6 * 7e9 * 16_384 / 395.6e12)
    assert found.share == pytest.approx(0.00131, rel=1e-3)
    assert found.fits == ""


@pytest.mark.parametrize(("text", "gigabytes", "moved"), [
    ("float32 of float32", 28, 84), (MIXED, 28, 70), ("bfloat16, stochastic", 14, 42),
])  # fmt: skip
def test_replicated_average_is_whole_on_any_number_of_gpus(
    cost_of: Any, text: str, gigabytes: int, moved: int
) -> None:
    for gpus in (8, 64, 1024):
        found = cost_of("DDP", text, 7e9, gpus)
        assert found.model_bytes == 112e9
        assert found.average_bytes == gigabytes * 1e9
        assert found.traffic == {"gpu": moved * 1e9}
        assert found.seconds == pytest.approx(moved / 3840)
    assert cost_of("ZeRO-2", MIXED, 7e9, 8).average_bytes == 28e9
    assert cost_of("ZeRO-2", MIXED, 7e9, 8).model_bytes == 14e9 + 98e9 / 8


def test_offload_costs_host_memory_and_the_slower_of_link_and_host(
    cost_of: Any, large_models: Any
) -> None:
    found = cost_of("FSDP2", OFFLOAD, 7e9, 8)
    assert found.average_bytes == 134_217_728
    assert found.host_bytes == 28e9  # eight GPUs with 4 x 7e9 / 8 each
    assert found.traffic == {"link": 1.75e9, "host": 10.5e9}
    assert found.seconds == pytest.approx(10.5 / (921.6 * 0.8 / 8))
    slow_link = cost_of("FSDP2", OFFLOAD, 7e9, 8, bandwidth_link=1)
    assert slow_link.seconds == pytest.approx(1.75 / 0.8)
    # Each process of DDP keeps the whole; fewer GPUs than a server has share its memory.
    assert cost_of("DDP", OFFLOAD, 7e9, 64).host_bytes == 8 * 28e9
    assert cost_of("DDP", OFFLOAD, 7e9, 4).host_bytes == 4 * 28e9
    assert cost_of("DDP", OFFLOAD, 7e9, 4).seconds == pytest.approx(84 / (921.6 * 0.8 / 4))
    measured = cost_of("FSDP2", '`offload="cpu"`, measured CPU rate', 7e9, 8)
    assert measured.seconds == pytest.approx(10.5 / large_models.read_measured().mixed)


def test_every_divides_traffic_and_not_memory(cost_of: Any) -> None:
    each = cost_of("FSDP2", MIXED, 7e9, 8)
    fourth = cost_of("FSDP2", "`every={every}`", 7e9, 8, every=4)
    assert fourth.average_bytes == each.average_bytes
    assert fourth.traffic["gpu"] == each.traffic["gpu"] / 4
    assert fourth.share == pytest.approx(each.share / 4)


def test_overlap_exposes_what_a_third_of_the_step_does_not_hide(cost_of: Any) -> None:
    hidden = cost_of("FSDP2", "`overlap=True`", 7e9, 8)
    assert hidden.exposed == hidden.share == 0
    assert hidden.traffic == cost_of("FSDP2", MIXED, 7e9, 8).traffic
    assert hidden.seconds == cost_of("FSDP2", MIXED, 7e9, 8).seconds
    long = cost_of("DDP", OVERLAPPED, 7e9, 8)
    assert long.seconds == pytest.approx(84 / 92.16)
    assert long.exposed == pytest.approx(84 / 92.16 - long.step / 3)
    assert 0 < long.share < long.seconds / long.step


def test_share_frozen_multiplies_by_the_trained_fraction(cost_of: Any) -> None:
    whole = cost_of("FSDP2", MIXED, 70e9, 64)
    lora = cost_of("FSDP2", "LoRA, `share_frozen=True`", 70e9, 64, trained_fraction=0.05)
    assert lora.average_bytes == pytest.approx(0.05 * whole.average_bytes)
    assert lora.traffic["gpu"] == pytest.approx(0.05 * whole.traffic["gpu"])
    assert lora.model_bytes == pytest.approx((2 + 0.05 * 14) * 70e9 / 64)
    assert lora.step == pytest.approx(whole.step * 4.1 / 6)


def test_evaluation_keeps_the_models_own_weights_aside(cost_of: Any) -> None:
    found = cost_of("FSDP2", "evaluation in `swapped()`", 7e9, 8)
    assert found.average_bytes == (4 + 2) * 7e9 / 8
    assert found.traffic == {"gpu": 26 * 7e9 / 8}


def test_share_of_a_sharded_average_does_not_depend_on_the_models_size(cost_of: Any) -> None:
    shares = [cost_of("FSDP2", MIXED, p, 64).share for p in (7e9, 70e9, 405e9)]
    assert shares[1:] == pytest.approx(shares[:1] * 2)
    assert shares[0] == pytest.approx(10 * 395.6e12 / (6 * 64 * 16_384 * 3.84e12))
    fewer = cost_of("FSDP2", MIXED, 7e9, 64, tokens_per_gpu=1024)
    assert fewer.share == pytest.approx(16 * shares[0])


@pytest.mark.parametrize(
    ("layout", "parameters", "gpus", "assumptions", "verdict"),
    [
        ("FSDP2", 405e9, 8, {}, "model doesn't fit"),  # 810 GB a GPU
        ("FSDP2", 405e9, 64, {}, ""),  # 101.25 + 25.3 + 10 of 141
        ("FSDP2", 405e9, 64, {"reserve": 20.0}, "average doesn't fit"),
        ("FSDP2", 405e9, 64, {"reserve": 40.0}, "model doesn't fit"),
        ("FSDP2", 405e9, 8, {"memory": 1000.0}, "average doesn't fit"),
        ("FSDP2", 405e9, 8, {"memory": 1100.0}, ""),
        ("FSDP2", 405e9, 8, {"state_bytes": 2.0, "memory": 320.0}, ""),
        ("FSDP2", 70e9, 8, {}, "model doesn't fit"),  # 140 + 10
        ("FSDP2", 70e9, 8, {"reserve": 0.5}, "average doesn't fit"),
        ("DDP", 7e9, 1024, {}, "average doesn't fit"),  # 112 + 28 + 10
        ("DDP", 7e9, 8, {"reserve": 0.5}, ""),
        ("ZeRO-2", 70e9, 1024, {}, "model doesn't fit"),  # 2 x 70 at the least
    ],
)
def test_what_fits(
    cost_of: Any,
    layout: str,
    parameters: float,
    gpus: int,
    assumptions: dict[str, float],
    verdict: str,
) -> None:
    assert cost_of(layout, MIXED, parameters, gpus, **assumptions).fits == verdict


def test_measured_rates_are_those_of_the_report(large_models: Any, tmp_path: Path) -> None:
    def case(model: str, dtypes: str, moved: int, median: float, limit: float) -> dict[str, Any]:
        ours = {"timing": {"median": median}, "limit_fraction": limit / median}
        return {
            "kind": "lists",
            "model": model,
            "dtypes": dtypes,
            "bytes_moved": moved,
            "limit": {"median": limit},
            "contenders": [ours, {"timing": {"median": 1.0}, "limit_fraction": 1.0}],
        }

    cases = [
        case("resnet50", "float32", 12_000_000, 0.004, 0.003),
        case("resnet50", "bfloat16 into float32", 10_000_000, 0.002, 0.001),
        case("1000x16", "float32", 1, 1.0, 1.0),
    ]
    about = {"device": "some CPU", "threads": 2, "torch": "2.13.0", "date": "today"}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"environment": about, "cases": cases}), encoding="utf-8")
    found = large_models.read_measured(report)
    assert found.about == "some CPU, 2 threads, torch 2.13.0, today"
    assert found.update == pytest.approx(3.0)
    assert found.mixed == pytest.approx(5.0)
    assert found.flat == pytest.approx(4.0)
    assert found.limit_fraction == pytest.approx(0.75)


# ---- The report, the page, the command line ------------------------------------------------------


def report_of(large_models: Any, **assumptions: float) -> str:
    text: str = large_models.markdown(
        large_models.PARAMETERS,
        large_models.GPUS,
        large_models.Assumptions(**assumptions),
        large_models.read_measured(),
    )
    return text


def test_page_has_the_programs_output(large_models: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == marked.between_markers(page, large_models.PROGRAM, report_of(large_models)), (
        "python -m benchmarks.large_models --write docs/large_models.md writes it anew"
    )
    with pytest.raises(ValueError, match="add both"):
        marked.between_markers("no markers", large_models.PROGRAM, "report")


def test_a_layout_in_which_nothing_fits_is_one_row(large_models: Any) -> None:
    measured = large_models.read_measured()
    lines = large_models.model_table(70e9, (8, 64), large_models.Assumptions(), measured)
    rows = [line for line in lines if line.startswith("| ")][2:]
    sharded = [o for o in large_models.OPTIONS if o.layout == "FSDP2"]
    assert len(rows) == 3 + len(sharded)
    whole = "1,120 GB: model doesn't fit"
    assert rows[0] == f"| **DDP**, the training itself | {whole} | {whole} |"
    assert rows[2] == (
        "| **FSDP2**, the training itself | 140 GB: model doesn't fit | 17.5 GB, 17,395 ms |"
    )
    assert rows[4] == f"| {MIXED} | model doesn't fit | 4.38 GB, 2.85 ms, 0.0164 % |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.009, "< 0.01"),
        (0.01, "0.01"),
        (1.2345, "1.23"),
        (99.96, "100"),
        (1234, "1,234"),
    ],
)
def test_numbers_are_written_without_exponents(large_models: Any, value: float, text: str) -> None:
    assert large_models.number(value) == text


# An override of each; a link has to be this slow before it is the slower part of an offload.
OVERRIDES = {
    "bandwidth_gpu": 2400.0, "bandwidth_link": 1.0, "bandwidth_host": 400.0, "fraction": 0.5,
    "flops": 500.0, "mfu": 0.2, "tokens_per_gpu": 1024.0, "memory": 80.0, "reserve": 0.5,
    "gpus_per_server": 4, "state_bytes": 8.0, "every": 3, "trained_fraction": 0.5,
}  # fmt: skip


def test_every_assumption_has_an_option_and_a_line(large_models: Any) -> None:
    fields = {f.name for f in dataclasses.fields(large_models.Assumptions)}
    assert fields == set(large_models.ABOUT) == set(OVERRIDES)


@pytest.mark.parametrize("name", OVERRIDES)
def test_every_assumption_reaches_the_tables(large_models: Any, name: str) -> None:
    def tables(**assumptions: float) -> str:
        return report_of(large_models, **assumptions).partition("### 7B")[2]

    assert tables(**{name: OVERRIDES[name]}) != tables()


PROGRAM = ("-m", "benchmarks.large_models")


def test_program_takes_overrides_and_needs_no_torch() -> None:
    without_torch = (
        "-c",
        "import sys; sys.modules['torch'] = None; "
        "from benchmarks import large_models; large_models.main()",
    )
    arguments = ["--parameters", "7e9", "--gpus", "8", "--bandwidth-gpu", "2400", "--every", "5"]
    done = processes.run(*without_torch, *arguments)
    lines = done.stdout.splitlines()
    assert "| `--bandwidth-gpu` | 2,400 GB/s | memory of a GPU; H200, stated by NVIDIA |" in lines
    assert "| 7B on | 8 GPUs |" in lines
    assert f"| {MIXED} | 3.5 GB, 4.56 ms, 0.262 % |" in lines
    assert "| `every=5` | 3.5 GB, 0.911 ms, 0.0524 % |" in lines
    assert sum(line.endswith(" GPUs |") for line in lines) == 1


def test_program_writes_between_the_markers_of_a_page(large_models: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- large_models.py: begin -->\nold\n<!-- large_models.py: end -->\nafter\n",
        encoding="utf-8",
    )
    for _ in range(2):
        done = processes.run_fork("benchmarks", *PROGRAM, "--write", page)
        assert done.stdout == ""
    written = page.read_text(encoding="utf-8")
    assert written == (
        "before\n<!-- large_models.py: begin -->\n\n"
        f"{report_of(large_models)}\n\n<!-- large_models.py: end -->\nafter\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mfu", "1.5"], "--mfu: 1.5 found; a number above 0, at most 1 is expected"),
        (["--trained-fraction", "0"], "a number above 0, at most 1 is expected"),
        (["--gpus", "8", "2.5"], "--gpus: 2.5 found; a whole number above 0 is expected"),
        (["--gpus", "inf"], "a whole number above 0 is expected"),
        (["--parameters=-7"], "--parameters: -7 found; a number above 0 is expected"),
        (["--memory", "nan"], "--memory: nan found; a number above 0 is expected"),
        (["--every", "x"], "--every"),
    ],
)
def test_program_refuses_what_is_out_of_range(arguments: list[str], expected: str) -> None:
    done = processes.run_fork("benchmarks", *PROGRAM, *arguments, status=2)
    assert expected in done.stderr
