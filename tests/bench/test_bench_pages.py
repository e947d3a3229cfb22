"""The tables and pictures of README and docs/benchmarks.md are those of the written run."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, marked, pages, pictures, records

AGAIN = "python -m benchmarks.pages writes it anew"


def test_tables_are_those_of_the_run() -> None:
    report = records.read(pages.MEASURED)
    grown = records.read(pages.GROWN)
    parts = {
        pages.README: pages.readme_part(report),
        pages.PAGE: pages.docs_part(report, grown),
    }
    for page, part in parts.items():
        text = page.read_text(encoding="utf-8")
        assert text == marked.between_markers(text, pages.PROGRAM, part), AGAIN
        assert f"`{report['environment']['command']}`" in text
        assert report["environment"]["device"] in text
    assert f"`{grown['environment']['command']}`" in pages.PAGE.read_text(encoding="utf-8")


def test_pictures_are_those_of_the_run(tmp_path: Path) -> None:
    drawn = pages.draw(records.read(pages.MEASURED), records.read(pages.GROWN), tmp_path)
    assert len(drawn) == 6
    for path in drawn:
        assert filecmp.cmp(path, pages.IMAGES / path.name, shallow=False), AGAIN


def test_the_runs_are_whole_ones() -> None:
    measured, grown = records.read(pages.MEASURED), records.read(pages.GROWN)
    for report in (measured, grown):
        assert not report["smoke"]
        assert report["failed"] == []
        assert "-dirty" not in report["environment"]["commit"]
    # What a small machine has no room for, after so much else, is in the other file; and long lists
    # aren't compiled.
    for entry in measured["left_out"]:
        assert "elements in" in entry["case"] or "too long to compile" in entry["reason"]
    assert grown["left_out"] == []
    counts = [(case["tensors"], case["elements"]) for case in grown["cases"]]
    assert counts == [(n, e) for e in growth.ELEMENTS for n in growth.TENSORS if n <= e]


def _of_cold_caches() -> dict[str, Any]:
    """The written run, as if all but the growth had taken twice as long with cold caches."""
    report = records.read(pages.MEASURED)
    report["touched"] = {"bytes": 256 * 2**20, "objects": 100_000}
    for case in report["cases"]:
        if case["kind"] in ("growth", "busy", "step"):
            continue
        case["condition"] = "cold"
        for found in case["contenders"]:
            found["hot_ratio"], found["ratio"] = found["ratio"], 2 * found["ratio"]
            found["hot_timing"] = found["timing"]
    return report


def test_pages_show_cold_caches_first(tmp_path: Path) -> None:
    report, grown = _of_cold_caches(), records.read(pages.GROWN)
    found = pages.readme_part(report)
    assert found.startswith("How many times as long as ours others take for one update, with cold")
    foreach = pictures.find(report, "lists", "float32", "resnet50", "torch._foreach_lerp_")
    assert foreach is not None
    assert f"| `torch._foreach_lerp_`, float32 lists | {foreach['ratio']:.1f} |" in found
    page = pages.docs_part(report, grown)
    title = "### Times as long as `Plan.lerp_` takes: prepared lists, float32, {} caches\n"
    assert 0 < page.index(title.format("cold")) < page.index(title.format("warm"))
    assert "256 MiB of memory and 100,000 small Python objects are touched" in page
    drawn = pages.draw(report, grown, tmp_path)
    assert len(drawn) == 6
    for path in drawn:
        assert ("cold caches" in path.read_text(encoding="utf-8")) == ("growth" not in path.name)


def test_what_a_page_wants_and_the_run_lacks_is_an_error() -> None:
    report = records.read(pages.MEASURED)
    report["cases"] = [case for case in report["cases"] if case["title"] != "timm ModelEmaV2"]
    with pytest.raises(ValueError, match=r"cpu\.json has no peer 'timm ModelEmaV2' of resnet50"):
        pages.readme_part(report)
