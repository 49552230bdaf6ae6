"""The page as a browser gets it: figures in it, nothing from elsewhere, no text that becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_dist.evaluation.report_html import write_report
from rlhf_dist.evaluation.reward_report import JudgedPair, reward_report

NASTY = "</script><script>alert(1)</script>"


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [JudgedPair(n % 7 / 3.0, n % 5 / 3.0, n % 11 + 1, n % 13 + 1, ("a", NASTY)[n % 2], n % 4 / 2.0, n) for n in range(200)]
    report = reward_report(pairs, pairs[:50], {"dropped: longer than data.max_tokens": 31})
    made = tmp_path_factory.mktemp("run") / "report"
    assert write_report(report, made, f"Model {NASTY}") == made / "report.html"
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    linked = [value for _, attributes in tags.tags for key, value in attributes.items() if key in ("src", "href", "action", "srcset")]
    assert linked == ["data:,"]  # the icon, which a browser would otherwise ask the server for
    assert not re.search(r"@import|url\(", page[: page.index("</style>")])
    assert "Plotly.react" in page and page.count("plotly.js v") >= 1


def test_every_figure_has_its_place_and_its_data(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    figures = json.loads(re.search(r"^const FIGURES = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    places = [attributes["id"] for tag, attributes in tags.tags if tag == "div" and "id" in attributes]
    assert places == list(figures) == [
        "accuracy", "calibration", "scores", "by_source", "by_margin", "by_length", "by_length_difference", "lengths",
    ]  # fmt: skip
    assert all(figure["data"] for figure in figures.values())


def test_the_counts_of_lost_rows_stand_beside_the_accuracy(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    top = tags.text[: tags.text.index("Accuracy beside trivial rules")]
    assert "Accuracy, held out" in top and "31 dropped: longer than data.max_tokens" in top
    assert "no row dropped or cut" in top  # of the training rows
    assert tags.text.count("Good: ") == 8  # a line of plain words under every picture


def test_no_text_becomes_markup(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.tags].count("script") == 2
    assert "alert(1)" in tags.text  # it is shown


def test_the_json_is_the_report(folder: Path) -> None:
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert figures["title"] == f"Model {NASTY}"
    assert figures["held_out"]["pairs"] == 200 and figures["by_source"][0]["label"] in ("a", NASTY)


def test_data_without_margins_have_no_such_picture(tmp_path: Path) -> None:
    write_report(reward_report([JudgedPair(1.0, 0.0, 2, 1, "a", None, 0)]), tmp_path, "one pair")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="by_margin"' not in text and 'id="by_source"' in text
