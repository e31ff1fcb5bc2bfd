"""``lrcompress report``: pages of runs from their files."""

from pathlib import Path

import pytest

from lrcompress.cli import main
from lrcompress.report import LayerRecord, PointRecord, Report


def saved(folder: Path, keep: int, accuracy: float) -> Path:
    layer = LayerRecord("layer.0.up", 100, 100, keep, 0.1, 0.01)
    figures = {"before": {"acc": 0.9}, "after": {"acc": accuracy - 0.1}}
    point = PointRecord("kfac", 10, [layer], 20_000, 10_000 + layer.after, metrics=figures)
    Report([point], {"acc": accuracy}).save(folder / "report.json")
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a" / "version_0", 10, 0.8)
    saved(tmp_path / "b" / "version_0", 20, 0.85)
    return ["a/version_0", "b/version_0/report.json"]


def test_one_run_gets_its_page_beside_its_report(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for run, page in zip(runs, ("a/version_0/report.html", "b/version_0/report.html"), strict=True):
        assert main(["report", run]) == 0
        assert "<h1>version_0</h1>" in Path(page).read_text(encoding="utf-8")
        assert f"the page is {page}" in capsys.readouterr().out


def test_several_runs_are_laid_side_by_side_under_names_that_differ(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *runs]) == 0
    shown = capsys.readouterr().out
    text = Path("comparison.html").read_text(encoding="utf-8")
    for place in (shown, text):
        for figure in ("a/version_0", "b/version_0", "12,000", "14,000", "0.8000", "0.8500"):
            assert figure in place
    assert "acc against size" in text
    assert main(["report", *runs, "--out", "else/page.html"]) == 0
    assert Path("else/page.html").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ('{"version": 9, "points": []}', 1, "expected a report of version 1 to 2, got 9"),
        ('{"version": 2, "poi', 1, "cannot be read as a report: Unterminated string"),
        ('{"points": [], "final": {}, "seconds_per_step": {}}', 1, "the run reached no point"),
        (None, 1, "report.json: there is no such report"),
    ],
)
def test_what_cannot_be_shown_is_an_error(
    runs: list[str],
    content: str | None,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    if content is not None:
        (bad / "report.json").write_text(content)
    assert main(["report", runs[0], "bad"]) == code
    error = capsys.readouterr().err
    assert error.startswith("lrcompress: error: ")
    assert message in error
    assert not Path("comparison.html").exists()


def test_a_wrong_option_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "required: RUN; usage: lrcompress report" in capsys.readouterr().err
    assert main(["report", "a", "--ou", "b"]) == 2
    assert "unrecognized arguments: --ou" in capsys.readouterr().err
