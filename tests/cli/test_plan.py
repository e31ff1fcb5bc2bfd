"""``lrcompress plan``: the checks of a fit, where points lie, and what cuts would cost."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from lrcompress.cli import main
from lrcompress.engine.loss_curves import KEEPS

QUICKSTART = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")


@pytest.fixture
def arguments(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return [
        *("--config", QUICKSTART, f"--model.path={tiny_bert}", "--trainer.accelerator=cpu"),
        *("--data.train_size=96", "--data.val_size=12", "--data.test_size=12"),
        *("--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path / 'root'}"),
    ]


def losparse(*options: str) -> list[str]:
    given = [f"--trainer.callbacks.{option}" for option in ("keep=0.5", "mask_every=2", *options)]
    return ["--trainer.callbacks=lrcompress.LoSparse", *given]


def test_points_lie_at_steps_and_nothing_is_written(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", *arguments, "--trainer.logger=true"]) == 0
    assert "point epoch:2 is step 6 of 9" in capsys.readouterr().out
    assert main(["plan", *arguments, *losparse()]) == 0
    shown = capsys.readouterr().out
    assert "split at step 0, pruned from 1 to 5, compacted at 5, of 9 steps" in shown
    assert not [path for path in tmp_path.iterdir() if path.name != "datasets_cache"]


def test_what_a_fit_would_take_is_said_once(
    arguments: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.count("memory of a process, about:") == 1
    assert "memory of a process" not in caplog.text
    assert "error" not in shown  # which is not known yet, and neither is any loss
    assert "share of loss" not in shown


@pytest.mark.parametrize(("encoding", "arrow"), [("ascii", "->"), ("utf-8", "→")])
def test_consoles_that_lack_characters_show_others(
    encoding: str, arrow: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert main(["plan", *arguments]) == 0
    sys.stdout.flush()
    assert re.search(rf"whole model: [\d,]+ {arrow} [\d,]+", shown.getvalue().decode(encoding))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (losparse("prune_from=step:7", "prune_until=step:7"), "phases must follow each other"),
        (["--trainer.callbacks.keep=0.001"], "the least keep is"),
        (losparse("keep=0.001"), "the least keep is"),
        (["--trainer.callbacks.at=step:9"], "point step:9 is step 9, at or beyond the end"),
        (
            [
                "--trainer.callbacks=[{class_path: lrcompress.Factorize, init_args: {keep: 0.5}},"
                "{class_path: lrcompress.LoSparse, init_args: {keep: 0.5}}]"
            ],
            "LoSparse and Factorize both target layer",
        ),
    ],
    ids=["phases", "keep", "keep of LoSparse", "point", "both"],
)
def test_what_a_fit_refuses_a_plan_refuses(
    arguments: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, *options]) == 1
    assert message in capsys.readouterr().err


def test_a_curve_is_the_loss_at_every_keep_and_a_picture(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, "--curve=2", "--plot=curve.svg"]) == 0
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^ (0\.\d+) +(.*?) *$", shown, flags=re.MULTILINE))
    assert len(rows) == 10
    half, tenth = rows["0.5"].split(), rows["0.2"].split()
    assert len(half) == 7
    assert [text[0] for text in half] == [*"0000", *"+++"]  # the last three know the loss
    assert all(float(more) > float(less) for more, less in zip(tenth, half, strict=True))
    assert "tokens of 2 batches" in shown
    assert "<svg" in Path("curve.svg").read_text(encoding="utf-8")

    # what stays because it is not faster is measured at a point alone
    assert main(["plan", *arguments, "--curve=2", "--trainer.callbacks.keep_measured=true"]) == 0
    measured = capsys.readouterr().out
    assert re.findall(r"^ (0\.\d+) +(.*?) *$", measured, flags=re.MULTILINE) == [*rows.items()]


def test_a_curve_may_be_measured_on_the_validation_data(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every keep for one validation, from one solve; the model is left as it was."""
    options = ["--curve=2", "--measure=true", "--plot=measured.svg"]
    assert main(["plan", *arguments, *options]) == 0
    shown = capsys.readouterr().out
    rows = {
        a: b.split() for a, b in re.findall(r"^ (1|0\.\d+) +(.*?) *$", shown, flags=re.MULTILINE)
    }
    assert set(rows) <= {"1", *map(str, KEEPS)}
    assert {"1", "0.5"} <= set(rows)
    names = ["1", *(str(keep) for keep in KEEPS if str(keep) in rows)]
    kept = [float(rows[name][2 if rows[name][1] in "kM" else 1]) for name in names]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 1.0
    assert all(float(name) >= share for name, share in zip(names, kept, strict=True))
    assert "keep 1 is the model as it is" in shown
    assert "<svg" in Path("measured.svg").read_text(encoding="utf-8")
    assert main(["plan", *arguments, *options]) == 0
    again = capsys.readouterr().out
    strip = r" \d+\.\d\d ×"
    assert re.sub(strip, "", again) == re.sub(strip, "", shown)


def test_several_methods_are_measured_side_by_side(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same batches; what a method loses is what it loses when it is measured alone."""
    shown = {}
    for methods in ("[drone,asvd]", "[drone]", "[asvd]"):
        options = ["--curve=2", f"--measure={methods}", f"--plot={methods}.svg"]
        assert main(["plan", *arguments, *options]) == 0
        shown[methods] = capsys.readouterr().out
    both = re.findall(r"^ (0\.\d+) +(drone|asvd) +(.*?) +\d+\.\d\d ×", shown["[drone,asvd]"], re.M)
    alone = {
        name: re.findall(r"^ (0\.\d+) +(.*?) +\d+\.\d\d ×", shown[methods], re.M)
        for name, methods in (("drone", "[drone]"), ("asvd", "[asvd]"))
    }
    for name, rows in alone.items():
        assert len(rows) > 3
        beside = [(keep, row) for keep, one, row in both if one == name]
        assert [(keep, row.split()) for keep, row in beside] == [
            (keep, row.split()) for keep, row in rows
        ]
    assert [keep for keep, *_ in both] == sorted((keep for keep, *_ in both), reverse=True)
    assert "keep: 0.5, method: asvd" in " ".join(shown["[drone,asvd]"].split())
    drawn = Path("[drone,asvd].svg").read_text(encoding="utf-8")
    assert drawn.count("<!-- drone -->") == drawn.count("<!-- asvd -->") == 1


def test_a_curve_is_of_the_weights_of_a_checkpoint_and_leaves_them_alone(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saving = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: saved"
    both = f"[{saving}, filename: '{{epoch}}', save_top_k: -1}}}}, "
    both += "{class_path: lrcompress.Factorize, init_args: {keep: 0.5, at: epoch:2, "
    both += "report_path: null, verbose: false}}]"
    fit = ["--trainer.enable_checkpointing=true", "--model.lr=0.01", f"--trainer.callbacks={both}"]
    assert main(["fit", *arguments, *fit]) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "saved" / "epoch=1.ckpt"
    before = checkpoint.read_bytes()
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6  # dense, trained
    shown = []
    for options in ([], [f"--ckpt_path={checkpoint}"], [f"--ckpt_path={checkpoint}"]):
        assert main(["plan", *arguments, "--curve=1", *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1] == shown[2]
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--curve=0"], "curve: expected a number of training batches from 1"),
        (["--measure=true"], "measure: expected --curve beside it, the number of training bat"),
        (
            ["--curve=1", "--measure=[kfac,dron]"],
            "measure: expected true, or methods of svd, fwsvd, asvd, drone, row_fisher, kfac, "
            "weighted_kfac; got 'dron'; nearest: 'drone'",
        ),
        (["--ckpt_path=none.ckpt"], "none.ckpt cannot be read as a checkpoint"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, *options]) != 0
    assert message in capsys.readouterr().err
