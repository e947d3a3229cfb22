"""The tables and pictures of README and docs/benchmarks.md are those of the written run."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from benchmarks import marked, pages, pictures, records

AGAIN = "python -m benchmarks.pages writes it anew"


def test_tables_are_those_of_the_run() -> None:
    report = records.read(pages.MEASURED)
    for page, part in ((pages.README, pages.readme_part), (pages.PAGE, pages.docs_part)):
        text = page.read_text(encoding="utf-8")
        assert text == marked.between_markers(text, pages.PROGRAM, part(report)), AGAIN
        assert f"`{report['environment']['command']}`" in text
        assert report["environment"]["device"] in text


def test_pictures_are_those_of_the_run(tmp_path: Path) -> None:
    drawn = pictures.draw(records.read(pages.MEASURED), tmp_path)
    assert len(drawn) == 6
    for path in drawn:
        assert filecmp.cmp(path, pages.IMAGES / path.name, shallow=False), AGAIN


def test_the_run_is_a_whole_one() -> None:
    report = records.read(pages.MEASURED)
    assert not report["smoke"]
    assert report["failed"] == report["left_out"] == []
    assert "-dirty" not in report["environment"]["commit"]


def test_what_a_page_wants_and_the_run_lacks_is_an_error() -> None:
    report = records.read(pages.MEASURED)
    report["cases"] = [case for case in report["cases"] if case["title"] != "timm ModelEmaV2"]
    with pytest.raises(ValueError, match=r"cpu\.json has no peer 'timm ModelEmaV2' of resnet50"):
        pages.readme_part(report)
