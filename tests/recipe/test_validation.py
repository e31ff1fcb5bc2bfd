"""Every kind of fault a recipe can have, with its message; and that all are found at once."""

import sys
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import nn

from lrcompress.cli import main
from lrcompress.recipe.messages import classes_in, in_words, shown


class Color(Enum):
    red = 1


class Widget(L.LightningModule):
    def __init__(
        self,
        path: str,
        width: int = 4,
        names: list[str] | None = None,
        norm: Literal["layer", "batch"] = "layer",
        inner: nn.Module | None = None,
        color: Color = Color.red,
    ):
        super().__init__()
        self.net = nn.Linear(width, 1)


class OtherWidget(L.LightningModule):
    def __init__(self, path: str, height: int = 4):
        super().__init__()


class WidgetData(L.LightningDataModule):
    def __init__(self, tokenizer: str, batch_size: int = 1):
        super().__init__()


class WidgetCallback(L.Callback):
    def __init__(self, keep: float):
        pass

    def preview(self, model: L.LightningModule) -> str:
        return "sound"


HERE = __name__
MODEL = f"model: {{class_path: {HERE}.Widget, init_args: {{path: a}}}}"
CALLBACK = f"{{class_path: {HERE}.WidgetCallback, init_args: {{keep: 0.5}}}}"
TRAINER = f"trainer: {{accelerator: cpu, callbacks: [{CALLBACK}]}}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture
def faults(capsys: pytest.CaptureFixture[str]) -> Any:
    """Plan a recipe, a list of its lines, with overrides; return the lines of the error."""

    def plan(lines: list[str], *overrides: str) -> list[str]:
        Path("r.yaml").write_text("\n".join(lines))
        code = main(["plan", "--config", "r.yaml", *overrides])
        error = capsys.readouterr().err
        assert code == (2 if error else 0)
        return error.removeprefix("lrcompress: error: ").splitlines()

    return plan


@pytest.mark.parametrize(
    ("lines", "overrides"),
    [
        ([TRAINER, MODEL], []),
        ([TRAINER, MODEL], ["--model.width", "5", "--model.init_args.norm=batch"]),
        ([TRAINER, MODEL], [f"--model={HERE}.OtherWidget", "--model.height=2"]),
        ([TRAINER, f"model: {HERE}.Widget"], ["--model.path=a"]),
        ([TRAINER, MODEL, f"data: {HERE}.WidgetData"], []),
        ([TRAINER, "<<: {seed_everything: 1}", MODEL], []),
        ([TRAINER, MODEL, "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-3}}"], []),
        ([MODEL], [f"--trainer.callbacks+={HERE}.WidgetCallback", "--trainer.callbacks.keep=0.1"]),
    ],
)
def test_a_sound_recipe_has_no_faults(faults: Any, lines: list[str], overrides: list[str]) -> None:
    assert faults(lines, *overrides) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        # keys
        ("optimiser: 1", "optimiser: unknown key; nearest valid: optimizer"),
        ("trainer: {max_epoch: 3}", "trainer.max_epoch: unknown key; nearest valid: max_epochs"),
        ("data: {class_pth: x}", "data.class_pth: unknown key; nearest valid: class_path"),
        (
            f"data: {{class_path: {HERE}.WidgetData, init_args: {{batchsize: 3}}}}",
            "data.batchsize: unknown key; nearest valid: batch_size",
        ),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: a}}]}",
            "trainer.callbacks[0].monitr: unknown key; nearest valid: monitor",
        ),
        ("trainer:", "trainer: expected keys and values, found null"),
        ("trainer: 3", "trainer: expected keys and values, found 3"),
        # types
        ("trainer: {max_epochs: few}", "trainer.max_epochs: expected int or null, found 'few'"),
        ("seed_everything: [1]", "seed_everything: expected bool or int, found [1]"),
        (
            f"data: {{class_path: {HERE}.WidgetData, init_args: {{batch_size: two}}}}",
            "data.batch_size: expected int, found 'two'",
        ),
        (
            "trainer: {precision: 16-mixd}",
            "trainer.precision: expected 64 or 32 or 16 or 'transformer-engine' or ",
        ),
        # classes
        (
            "trainer: {callbacks: [EarlyStoping]}",
            "trainer.callbacks[0]: expected a subclass of Callback, found 'EarlyStoping'; "
            "nearest valid: lightning.pytorch.callbacks.EarlyStopping",
        ),
        (
            "trainer: {callbacks: {class_path: lrcompress.Factorise}}",
            "trainer.callbacks: expected a subclass of Callback, found 'lrcompress.Factorise'; "
            "nearest valid: lrcompress.Factorize",
        ),
        (
            f"trainer: {{callbacks: {{class_path: {HERE}.Widgetcallback}}}}",
            f"trainer.callbacks: expected a subclass of Callback, found '{HERE}.Widgetcallback'; "
            f"nearest valid: {HERE}.WidgetCallback",
        ),
        (
            f"trainer: {{callbacks: {{class_path: {HERE}.Widget}}}}",
            f"trainer.callbacks: expected a subclass of Callback, found '{HERE}.Widget'",
        ),
        (
            "data: {class_path: nowhere.WidgetData}",
            "data: expected a subclass of LightningDataModule, found 'nowhere.WidgetData'; "
            f"nearest valid: {HERE}.WidgetData",
        ),
        ("optimizer: AdamWW", "optimizer: expected a subclass of Optimizer, found 'AdamWW'; "),
        (
            "lr_scheduler: torch.optim.lr_scheduler.StepLR",
            "lr_scheduler.step_size: required, found nothing",
        ),
        # what is missing
        ("trainer: {callbacks: [EarlyStopping]}", "trainer.callbacks[0].monitor: required, found"),
        ("data: {init_args: {batch_size: 3}}", "data.class_path: required, found nothing"),
    ],
)
def test_a_fault_says_line_option_and_what_is_valid(faults: Any, line: str, message: str) -> None:
    (fault, *others) = faults([MODEL, line])
    assert fault.startswith(f"r.yaml:2: {message}")
    assert all("required" in other for other in others)


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ("path: a, width: wide", "model.width: expected int, found 'wide'"),
        ("path: a, names: [1]", "model.names: expected list[str] or null, found [1]"),
        (
            "path: a, norm: bach",
            "model.norm: expected 'layer' or 'batch', found 'bach'; nearest valid: batch",
        ),
        ("path: a, color: rad", "model.color: expected Color, found 'rad'"),
        ("width: 3", "model.path: required, found nothing"),
        (
            "path: a, inner: {class_path: torch.nn.Linear, init_args: {bias: 3.5, in_features: 3}}",
            "model.inner.bias: expected bool, found 3.5",
        ),
        ("path: a, inner: torch.nn.Linnear", "model.inner: expected a subclass of Module, found "),
    ],
)
def test_arguments_of_classes_are_checked_at_any_depth(
    faults: Any, init_args: str, message: str
) -> None:
    lines = ["model:", f"  class_path: {HERE}.Widget", f"  init_args: {{{init_args}}}"]
    assert faults(lines)[0].split(": ", 1)[1].startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.max_epoch=3", "trainer.max_epoch: unknown key; nearest valid: max_epochs"),
        ("--trainer.max_epochs=few", "trainer.max_epochs: expected int or null, found 'few'"),
        ("--model.pth=b", "model.pth: unknown key; nearest valid: path"),
        ("--model.width=wide", "model.width: expected int, found 'wide'"),
        ("--trainer.callbacks.kep=1", "trainer.callbacks[0].kep: unknown key; nearest valid: keep"),
        (
            "--trainer.callbacks+=EarlyStoping",
            "trainer.callbacks[1]: expected a subclass of Callback, found 'EarlyStoping'; nearest",
        ),
        (f"--model={HERE}.Wiget", "model: expected a subclass of LightningModule, found "),
        ("--trainer.fast_dev_run", "trainer.fast_dev_run: expected a value, found none"),
        ("stray", "expected --key=value, found 'stray'"),
        ("--bogus=1", "bogus: unknown key; nearest valid: "),
    ],
)
def test_overrides_are_checked_as_the_recipe_is(faults: Any, override: str, message: str) -> None:
    assert faults([TRAINER, MODEL], override)[0].startswith(f"command line: {message}")


def test_no_model_is_a_fault(faults: Any) -> None:
    assert faults(["seed_everything: 1"]) == ["r.yaml:1: model: required, found nothing"]


def test_without_a_recipe_it_is_said_how_one_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    told = "command line: model: required, found nothing; give a recipe with --config FILE"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: [1,\nb: 2\n",
            "r.yaml:3: expected YAML: expected ',' or ']', but got '<stream end>' "
            "while parsing a flow sequence of line 1",
        ),
        ("a: !thing 1", "r.yaml:1: expected YAML: could not determine a constructor for the tag"),
        ("a: \x00", "r.yaml: unacceptable character #x0000: special characters"),
        ("", "r.yaml: expected keys and values, found nothing"),
        ("- 1", "r.yaml: expected keys and values, found [1]"),
    ],
)
def test_a_file_that_is_no_recipe_says_where(faults: Any, text: str, message: str) -> None:
    (fault,) = faults([text])
    assert fault.startswith(message)


def test_a_key_written_twice_is_a_fault_of_an_otherwise_sound_recipe(faults: Any) -> None:
    lines = [TRAINER, MODEL, "seed_everything: 1", "seed_everything: 2"]
    expected = "r.yaml:4: seed_everything: expected once, found again after line 3"
    assert faults(lines) == [expected]


def test_a_missing_file_names_the_nearest(faults: Any) -> None:
    Path("more.yaml").write_text("")
    (fault,) = faults([TRAINER, MODEL], "--config=mor.yaml")
    assert fault.startswith("mor.yaml: expected a file, found none; nearest valid: more.yaml")


def test_a_section_in_a_file_of_its_own_is_checked_there(faults: Any, folder: Path) -> None:
    Path("t.yaml").write_text("max_epochs: 1\nmin_epoch: 1")
    (fault,) = faults(["trainer: t.yaml", MODEL])
    assert fault.startswith("t.yaml:2: trainer.min_epoch: unknown key; nearest valid: min_epochs")
    (fault,) = faults([MODEL], "--trainer=t.yaml")
    assert fault.startswith("t.yaml:2: trainer.min_epoch: unknown key; nearest valid: min_epochs")


def test_a_later_file_wins_and_its_faults_are_its_own(faults: Any) -> None:
    Path("late.yaml").write_text("model:\n  init_args:\n    width: wide\n    path: b")
    lines = [TRAINER, "model:", f"  class_path: {HERE}.Widget", "  init_args: {width: broad}"]
    assert faults(lines, "--config", "late.yaml") == [
        "late.yaml:3: model.width: expected int, found 'wide'"
    ]


def test_arguments_of_a_replaced_class_are_no_faults(faults: Any) -> None:
    lines = [TRAINER, f"model: {{class_path: {HERE}.Widget, init_args: {{path: a, width: 3}}}}"]
    overrides = f"--model={HERE}.OtherWidget", "--seed_everything=[1]"
    expected = "command line: seed_everything: expected bool or int, found [1]"
    assert faults(lines, *overrides) == [expected]


def test_what_raises_on_import_is_told(faults: Any) -> None:
    Path("broken.py").write_text("import nowhere")
    (fault,) = faults([TRAINER, MODEL, "data: broken.Data"])
    assert fault == (
        "r.yaml:3: data: importing broken.Data raised "
        "ModuleNotFoundError(\"No module named 'nowhere'\")"
    )


def test_what_only_the_parser_knows_is_said_in_its_words(faults: Any) -> None:
    abstract = "{class_path: lightning.pytorch.loggers.logger.Logger}"
    assert "is abstract" in "\n".join(faults([MODEL, f"trainer: {{logger: {abstract}}}"]))


def test_all_faults_come_at_once_in_the_order_of_the_recipe(faults: Any) -> None:
    lines = [
        "seed_everythng: 1",
        "trainer:",
        "  max_epoch: 3",
        "  callbacks:",
        "    - EarlyStoping",
        "    - class_path: ModelCheckpoint",
        "      init_args:",
        "        save_top_k: many",
        "model:",
        f"  class_path: {HERE}.Widget",
        "  init_args:",
        "    widht: 3",
        "data: nowhere.Data",
    ]
    found = faults(lines, "--model.names=3", "--config=none.yaml", "stray")
    places = [fault.split(" ", 1)[0] + fault.split(" ", 2)[1] for fault in found]
    assert places == [
        "none.yaml:expected",
        "commandline:",
        "r.yaml:1:seed_everythng:",
        "r.yaml:3:trainer.max_epoch:",
        "r.yaml:5:trainer.callbacks[0]:",
        "r.yaml:8:trainer.callbacks[1].save_top_k:",
        "r.yaml:12:model.widht:",
        "commandline:",
        "r.yaml:12:model.path:",
        "r.yaml:13:data:",
    ]


def test_values_that_ours_refuse_come_at_once_with_their_place(faults: Any) -> None:
    lines = [
        "trainer:",
        "  callbacks:",
        "    - class_path: lrcompress.Factorize",
        "      init_args:",
        "        keep: 1.5",
        "    - class_path: LoSparse",
        "      init_args: {keep: 0.5, at: 1.5}",
        "    - class_path: Factorize",
        "model:",
        "  class_path: lrcompress.Distilled",
        "  init_args:",
        f"    student: {{class_path: {HERE}.Widget, init_args: {{path: a}}}}",
        "    losses: [{class_path: lrcompress.distill.Logits, init_args: {temperature: 0}}]",
    ]
    places = [
        "r.yaml:5: trainer.callbacks[0].keep: keep must be above 0",
        "r.yaml:6: trainer.callbacks[1]: a point is a fraction of training between 0 and 1, 'epo",
        "r.yaml:8: trainer.callbacks[2]: keep is missing: the share of parameters that remains",
        "r.yaml:13: model.losses[0].temperature: temperature must be above 0, such as 2.0, got 0",
        "command line: trainer.callbacks[2].offload: offload must be a device of torch",
    ]
    found = faults(lines)
    assert len(found) == 4
    assert all(fault.startswith(place) for fault, place in zip(found, places, strict=False))
    found = faults(lines, "--trainer.callbacks.keep=0.5", "--trainer.callbacks.offload=gpu")
    assert [line.split(": ")[1] for line in found][2] == "trainer.callbacks[2].offload"
    assert found[2].startswith(places[4])
    found = faults(lines, "--trainer.max_epoch=3")
    assert len(found) == 5
    assert "unknown key; nearest valid: max_epochs" in found[0]


def test_an_option_of_a_class_further_in_is_named(faults: Any) -> None:
    student = f"{{class_path: {HERE}.Widget, init_args: {{path: a}}}}"
    model = f"model: {{class_path: lrcompress.Distilled, init_args: {{student: {student}}}}}"
    found = faults([TRAINER, model], "--model.width=5")
    assert found == ["command line: model.width: unknown key; nearest valid: student.width"]


def test_types_in_words() -> None:
    assert in_words(int | None) == "int or null"
    assert in_words(dict[str, torch.Tensor]) == "dict[str, Tensor]"
    assert list(classes_in(list[L.Callback] | L.Callback | Literal["x"] | Color | None)) == [
        L.Callback,
        L.Callback,
    ]


def test_long_values_are_cut() -> None:
    assert shown("a" * 100) == "'" + "a" * 78 + "…"
