from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from lrcompress.errors import NoMatchError, SettingError
from lrcompress.tasks.tables import pick_columns, quiet, read_table

ROWS = {"text": ["good", 'a "fine" film'], "label": ["1", "0"]}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = Dataset.from_dict(ROWS)
    with quiet():
        table.to_csv(tmp_path / "a.csv", index=False)
        table.to_json(tmp_path / "a.jsonl")
        table.to_parquet(tmp_path / "a.parquet")
        table.to_json(tmp_path / "a.json", lines=False)
    write(tmp_path / "a.tsv", 'text\tlabel\ngood\t1\na "fine" film\t0\n')

    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"):
        assert read_table(str(tmp_path / name)).to_dict() == ROWS, name


def test_reading_a_local_file_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    file = write(tmp_path / "a.jsonl", '{"text": "good", "label": 1}\n')
    assert len(read_table(file)) == 1


def test_fields_of_delimited_files_stay_text(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "text,label\nNA,01\nnull,2.0\n"))
    assert table.to_dict() == {"text": ["NA", "null"], "label": ["01", "2.0"]}


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.tsv", "\ufeffQuality\tText\n1\tgood\n"))
    assert table.column_names == ["Quality", "Text"]


def test_columns_without_a_header_are_named_by_position(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.tsv", "1\tgood\n\n0\tbad\n"), header=False)
    assert table.to_dict() == {"0": ["1", "0"], "1": ["good", "bad"]}


def test_quoting_can_be_switched(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", 'text\tlabel\n"one\ttwo"\t1\n')
    assert read_table(file, quoting=True)["text"][0] == "one\ttwo"
    with pytest.raises(SettingError, match=r"line 2: expected 2 fields .* is quoting=False right"):
        read_table(file)


@pytest.mark.parametrize(
    ("file", "rows"), [("train.tsv", 3668), ("dev.tsv", 408), ("test.tsv", 1725)]
)
def test_reads_every_row_of_mrpc(shared_data: Path, file: str, rows: int) -> None:
    table = read_table(str(shared_data / "mrpc" / file))
    assert len(table) == rows
    assert table.column_names == ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]


@pytest.mark.parametrize(
    ("file", "rows"), [("train.tsv", 6920), ("dev.tsv", 872), ("test.tsv", 1821)]
)
def test_reads_every_row_of_sst2(shared_data: Path, file: str, rows: int) -> None:
    table = read_table(str(shared_data / "sst2" / file), header=False)
    assert len(table) == rows
    assert set(table["0"]) == {"0", "1"}


def test_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "a\n")
    with pytest.raises(NoMatchError, match=r"no file .*trian.tsv; nearest there: train.tsv"):
        read_table(str(tmp_path / "trian.tsv"))
    with pytest.raises(NoMatchError, match="nearest there: none, nor its folder"):
        read_table(str(tmp_path / "absent" / "train.tsv"))


def test_names_the_nearest_extension(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parq", "")
    with pytest.raises(SettingError, match=r"unknown extension '.parq'.*nearest: .parquet"):
        read_table(file)


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_refuses_an_empty_file(tmp_path: Path, extension: str) -> None:
    with pytest.raises(SettingError, match=f"train{extension} is empty"):
        read_table(write(tmp_path / f"train{extension}", ""))


@pytest.mark.parametrize("text", ["text\tlabel\n", "\n\n"])
def test_refuses_a_file_without_rows(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingError, match=r"train.tsv has no rows"):
        read_table(write(tmp_path / "train.tsv", text))


def test_refuses_a_first_row_taken_for_a_header(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="not all different; is header=True right"):
        read_table(write(tmp_path / "a.tsv", "1\t1\n0\t1\n"))


def test_picks_columns_by_name_and_position() -> None:
    table = Dataset.from_dict({"stars": [1], "label": ["a title"], "text": ["a body"]})
    picked = pick_columns(table, ["label", 2], 0, "a.csv")
    assert picked.to_dict() == {"text": ["a title"], "pair": ["a body"], "label": [1]}


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        (
            ["texte"],
            "label",
            r"a.csv: no column 'texte'; choose .* \['text', 'label'\], nearest: text; .*header",
        ),
        (["text"], 2, r"a.csv: no column at position 2, only 0 to 1: \['text', 'label'\]"),
        (["text"], -1, r"a.csv: no column at position -1"),
    ],
)
def test_names_the_columns_there_are(text: list[int | str], label: int | str, message: str) -> None:
    with pytest.raises(NoMatchError, match=message):
        pick_columns(Dataset.from_dict(ROWS), text, label, "a.csv")


def test_refuses_a_column_taken_twice() -> None:
    with pytest.raises(SettingError, match=r"must be different columns, got \['text', 'text'\]"):
        pick_columns(Dataset.from_dict(ROWS), ["text"], 0, "a.csv")


def test_refuses_text_that_is_none() -> None:
    table = Dataset.from_dict({"text": [1, 2], "words": [["a"], ["b"]], "label": [0, 1]})
    with pytest.raises(SettingError, match=r"column 'text' holds Value\('int64'\), expected text"):
        pick_columns(table, ["text"], "label", "a.parquet")
    with pytest.raises(SettingError, match=r"column 'words' holds List.*, expected text"):
        pick_columns(table, ["words"], "label", "a.parquet")


@pytest.mark.parametrize("labels", [["1", ""], [1, None], [1.0, float("nan")]])
def test_refuses_missing_labels(labels: list[object]) -> None:
    table = Dataset.from_dict({"text": ["good", ""], "label": labels})
    with pytest.raises(
        SettingError, match="column 'label' misses 1 of 2 values, the first in row 1"
    ):
        pick_columns(table, ["text"], "label", "a.csv")


def test_refuses_missing_texts() -> None:
    table = Dataset.from_dict({"text": [None, "good"], "label": [0, 1]})
    with pytest.raises(
        SettingError, match="column 'text' misses 1 of 2 values, the first in row 0"
    ):
        pick_columns(table, ["text"], "label", "a.csv")


def test_quiet_puts_progress_bars_back() -> None:
    assert not datasets.are_progress_bars_disabled()
    with quiet(), quiet():
        assert datasets.are_progress_bars_disabled()
    assert not datasets.are_progress_bars_disabled()
