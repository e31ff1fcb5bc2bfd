"""The page holds every figure of the report, asks for nothing else, and runs nothing."""

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lrcompress.report import LayerRecord, Report
from lrcompress.report.formatting import number
from lrcompress.report.headline import headline
from lrcompress.report.page import write_page
from lrcompress.report.plots import COLOURS

from .conftest import complete, factorized, searched

Distinct = Callable[[Report], tuple[Report, list[float]]]
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """The words of a page outside of its figures, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "svg" not in self.open and "style" not in self.open:
            self.words += [word.strip(",+()") for word in data.split()]


def written(report: Report, folder: Path) -> str:
    write_page(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the whole report, drawn once."""
    return written(complete(), tmp_path_factory.mktemp("page"))


def test_every_figure_of_the_report_stands_in_the_page(
    whole: Report, distinct: Distinct, tmp_path: Path
) -> None:
    layers = whole.points[0].layers
    layers[0] = replace(layers[0], stood=150)
    report, numbers = distinct(whole)
    words = set(Page(written(report, tmp_path)).words)
    assert len(numbers) > 100
    missing = [one for one in numbers if number(one) not in words]
    assert not missing
    for point in report.points:
        assert "model.layer" in words  # which all names begin with
        assert {layer.name.removeprefix("model.layer.") for layer in point.layers} <= words
        assert all(layer.note.split()[-1] in words for layer in point.layers if layer.note)


def test_the_page_needs_no_network_and_has_no_scripts(text: str) -> None:
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert set(re.findall(r'[\w:]+="https?://[^"]*"', text)) == {
        'xmlns="http://www.w3.org/2000/svg"',
        'xmlns:xlink="http://www.w3.org/1999/xlink"',
    }
    assert "url(http" not in text
    assert "@import" not in text


def test_figures_follow_the_colours_of_the_page(text: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) >= 9
    for figure in figures:
        assert "var(--ink)" in figure
        assert not set(re.findall(r"#[0-9a-f]{6}\b", figure)) & set(COLOURS.values())
        assert 'role="img"' in figure
        assert "<style" not in figure
    light, dark = text.split("prefers-color-scheme: dark")
    for name in COLOURS:
        assert f"--{name}: " in light
        assert f"--{name}: " in dark


def test_no_two_figures_share_an_id(text: str) -> None:
    ids = [held["id"] for _, held in Page(text).tags if held.get("id")]
    assert len(ids) == len(set(ids)) > 10


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    name = "layer.0.<script>alert(1)</script>$x_1$"
    point = factorized(layers=[LayerRecord(name, 10, 20, 4, 0.2, 0.3)])
    report = Report([point, replace(point, step=50)], {"<b>loss": 0.5}, {}, {"$a": ((1, 0.5),)})
    text = written(report, tmp_path)
    assert "script" not in {tag for tag, _ in Page(text).tags}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;$x_1$" in text


def test_a_report_of_version_1_has_a_page(tmp_path: Path) -> None:
    layer = {"name": "0.up", "out_features": 10, "in_features": 20, "rank": 4, "error": 0.25}
    point = {"method": "svd", "step": 7, "model_before": 900, "model_after": 800}
    layers = [layer | {"predicted_loss": None}]
    data = {"points": [point | {"layers": layers}], "final": {}, "seconds_per_step": {}}
    text = written(Report.from_dict(data), tmp_path / "old")
    assert "<h1>old</h1>" in text
    assert {"0.up", "0.2500", "900", "800"} <= set(Page(text).words)


@pytest.mark.parametrize("path", ["a/b/report.html", "report.html"])
def test_the_folder_is_made_and_names_the_page(whole: Report, tmp_path: Path, path: str) -> None:
    write_page(whole, tmp_path / path)
    title = (tmp_path / path).parent.name
    assert f"<title>{title}</title>" in (tmp_path / path).read_text(encoding="utf-8")


def test_a_page_is_titled_by_the_model_and_the_data(whole: Report, tmp_path: Path) -> None:
    whole.about = {"model": "Fine: BertModel, /models/bert/base", "data": "TextData: glue, sst2"}
    page = written(whole, tmp_path / "run-7")
    assert "<h1>bert/base on glue, sst2</h1>" in page
    assert "<title>bert/base on glue, sst2 · run-7</title>" in page


@pytest.mark.parametrize(("facts", "columns"), [(3, 3), (5, 5), (6, 3), (7, 4), (8, 4)])
def test_cards_of_the_headline_stand_in_even_rows(
    facts: int, columns: int, whole: Report, tmp_path: Path
) -> None:
    if facts == 3:
        whole.seconds_per_step = {}
    names = [f"metric{number}" for number in range(max(0, facts - 4))]
    whole.points[0].metrics["before"] = whole.final = dict.fromkeys(names, 0.5)
    assert len(headline(whole)) == facts
    assert f'<ul class="headline" style="--columns: {columns}">' in written(whole, tmp_path)


def test_products_say_how_large_their_factors_are(text: str, whole: Report, tmp_path: Path) -> None:
    assert "first factor of a Kronecker" not in text
    point = whole.points[0]
    products = [replace(layer, first=(7, 19)) for layer in point.layers if layer.rank]
    text = written(replace(whole, points=[replace(point, layers=products)]), tmp_path)
    assert Page(text).words.count("7×19") == len(products) > 0
    assert "first factor of a Kronecker" in text


def test_the_headline_comes_first_then_what_was_run(whole: Report, tmp_path: Path) -> None:
    whole.about = {"model": "Tagger <b>", "seed": "7"}
    page = written(whole, tmp_path)
    figures = [fact.figure for fact in headline(whole)]
    places = [page.index(f"<b>{figure}</b>") for figure in figures]
    assert places == sorted(places)
    assert places[-1] < page.index("<dt>model</dt><dd>Tagger &lt;b&gt;</dd>") < page.index("<svg")
    assert "<details open" not in page
    first_table = page[page.index("<table>") : page.index("</table>")]
    assert "predicted" not in first_table
    whole.points[0].metrics["before"]["predicted_f1"] = 0.4321  # a metric of one's own stays
    page = written(whole, tmp_path)
    assert "predicted_f1" in page[page.index("<table>") : page.index("</table>")]


def test_layers_are_named_without_what_all_names_begin_with(whole: Report, tmp_path: Path) -> None:
    page = written(whole, tmp_path)
    assert "layer of model.layer</th>" in page
    assert '<th scope="row">0.up</th>' in page
    assert '<th scope="row">model.layer.0.up</th>' not in page


def test_every_trial_stands_in_the_page(tmp_path: Path) -> None:
    words = " ".join(Page(written(Report([searched()]), tmp_path)).words)
    assert "keep 0.5 0.496 0.9150 -0.0051 within" in words
    assert "keep 0.3 0.297 0.9000 0.0099 within on 0.25 of the data" in words
    assert "keep 0.25 0.248 not finite too much" in words
    assert "keep 0.37 0.361 0.8931 0.0168 within taken" in words
    for said in ("higher values are better", "0.9099", "0.0201", "no test of the result"):
        assert said in words
