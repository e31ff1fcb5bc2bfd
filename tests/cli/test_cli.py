"""``lrcompress`` as a user runs it: real fits of a tiny module, and how each ends."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrcompress
from lrcompress.cli import main
from lrcompress.errors import SettingError

SEEN: list[tuple[object, ...]] = []  # (path, train, tokenizer, seed) of every run


class Tiny(L.LightningModule):
    def __init__(self, path: str, fault: str | None = None):
        super().__init__()
        if fault == "setting":
            raise SettingError("num_labels must be 1 or more, got 0")
        self.path, self.fault = path, fault
        self.net = nn.Linear(4, 1)

    def setup(self, stage: str) -> None:
        if self.fault == "misconfiguration":
            raise MisconfigurationException("no such strategy")
        if self.fault == "bug":
            raise ZeroDivisionError("a bug")
        data = getattr(self.trainer, "datamodule", None)
        given = getattr(data, "train", None), getattr(data, "tokenizer", None)
        SEEN.append((self.path, *given, torch.initial_seed()))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    validation_step = training_step
    test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyWithLoader(Tiny):
    def __init__(self, width: int = 4):
        super().__init__("none")

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(4, 4))


class Data(L.LightningDataModule):
    def __init__(self, tokenizer: str, train: str = "a.tsv"):
        super().__init__()
        self.tokenizer, self.train = tokenizer, train

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(4, 4))

    val_dataloader = train_dataloader
    test_dataloader = train_dataloader


class PlainData(Data):
    def __init__(self, train: str = "a.tsv"):
        super().__init__("none", train)


class Planner(L.Callback):
    def __init__(self, keep: float = 0.5):
        if not 0 < keep < 1:
            raise SettingError(f"keep must be between 0 and 1, got {keep}")

    def preview(self, model: L.LightningModule) -> str:
        return f"{type(model).__name__}.net becomes smaller"


RECIPE = f"""
trainer:
  max_steps: 1
  accelerator: cpu
  enable_model_summary: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
    - class_path: {__name__}.Planner
model:
  class_path: {__name__}.Tiny
  init_args:
    path: bert
data:
  class_path: {__name__}.Data
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("LRCOMPRESS_DEBUG", raising=False)
    SEEN.clear()
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(verb: str, *overrides: str) -> int:
    return main([verb, "--config", "recipe.yaml", *overrides])


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_verb_runs_the_recipe_with_seed_0(verb: str) -> None:
    assert run(verb) == 0
    assert SEEN == [("bert", "a.tsv", "bert", 0)]


def test_the_command_line_overrides_the_recipe() -> None:
    assert run("fit", "--model.path", "gpt2", "--data.train=b.tsv", "--seed_everything=3") == 0
    assert SEEN == [("gpt2", "b.tsv", "gpt2", 3)]


def test_a_tokenizer_given_is_kept() -> None:
    assert run("fit", "--data.tokenizer=own") == 0
    assert SEEN[0][:3] == ("bert", "a.tsv", "own")


def test_data_without_a_tokenizer_is_left_alone() -> None:
    assert run("fit", f"--data={__name__}.PlainData") == 0
    assert SEEN[0][:3] == ("bert", "a.tsv", "none")


def test_a_module_may_bring_its_own_data_and_have_no_path(recipe: Path) -> None:
    recipe.write_text(f"trainer: {{max_steps: 1}}\nmodel: {__name__}.TinyWithLoader")
    assert run("fit", "--trainer.logger=false", "--trainer.enable_checkpointing=false") == 0
    assert SEEN[0][:3] == ("none", None, None)


def test_the_saved_recipe_gives_the_same_run(recipe: Path) -> None:
    assert run("fit", "--data.tokenizer=own") == 0
    saved = Path("lightning_logs/version_0/config.yaml")
    recipe.write_text(saved.read_text())
    assert run("fit") == 0
    assert SEEN[0] == SEEN[1]
    assert saved.read_text() == Path("lightning_logs/version_1/config.yaml").read_text()
    assert run("plan") == 0, "a plan takes what fit has written"


def test_without_logs_the_recipe_is_not_saved() -> None:
    assert run("fit", "--trainer.logger=false") == 0
    assert [path.name for path in Path().iterdir()] == ["recipe.yaml"]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_fixed_log_folder_can_be_used_twice() -> None:
    logger = "{class_path: CSVLogger, init_args: {save_dir: logs, name: '', version: ''}}"
    for seed in "12":
        assert run("validate", f"--trainer.logger={logger}", f"--seed_everything={seed}") == 0
    assert yaml.safe_load(Path("logs/config.yaml").read_text())["seed_everything"] == 2


def test_plan_prints_what_each_callback_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan") == 0
    assert capsys.readouterr().out == "Tiny.net becomes smaller\n"
    assert SEEN == []


def test_plan_needs_a_callback_that_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--trainer.callbacks=null") == 2
    expected = "lrcompress: error: trainer.callbacks: expected one that replaces layers, such as"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["--trainer.max_steps=x"], 2, "command line: trainer.max_steps: expected int, found 'x'"),
        (["--trainer.accelerator=gpuu"], 2, "trainer: You selected an invalid accelerator name:"),
        (["--model.fault=setting"], 1, "num_labels must be 1 or more, got 0"),
        (["--trainer.callbacks.keep=2"], 1, "keep must be between 0 and 1, got 2"),
        (["--model.fault=misconfiguration"], 1, "no such strategy"),
        (["--ckpt_path=none.ckpt"], 1, "Checkpoint file not found: none.ckpt"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, message: str
) -> None:
    assert run("fit", *overrides) == code
    error = capsys.readouterr().err
    assert error.startswith(f"lrcompress: error: {message}")
    assert error.count("\n") == 1


def test_debug_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRCOMPRESS_DEBUG", "1")
    assert run("fit", "--model.fault=setting") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("fit", "--model.fault=bug")


def test_help_is_short_and_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 25
    assert text.startswith("Compress language models by low-rank factors")
    for line in (
        "  fit        train as the recipe says, and compress on the way",
        "  validate   run once over the validation data",
        "  test       run once over the test data",
        "  guide      print a page of the guide: lrcompress guide [TOPIC]",
        "  plan       print which layers the recipe would replace, without training",
        "  lrcompress fit --config recipe.yaml",
    ):
        assert line in text.splitlines()


def test_without_arguments_the_help_is_shown_as_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "usage: lrcompress VERB" in capsys.readouterr().out


def test_the_help_of_a_verb_is_that_of_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_print_config_shows_the_recipe_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("fit", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 1


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validat") == 2
    expected = "lrcompress: error: expected a verb, found 'validat'; nearest valid: validate"
    assert capsys.readouterr().err.startswith(expected)


def test_modules_beside_the_recipe_can_be_named(recipe: Path) -> None:
    Path("beside.py").write_text("from lightning.pytorch.demos.boring_classes import BoringModel\n")
    importlib.invalidate_caches()  # the folder may have been looked at within the clock's tick
    recipe.write_text("model: beside.BoringModel")
    assert run("validate", "--trainer.logger=false", "--trainer.limit_val_batches=1") == 0


def test_python_dash_m_says_nothing_unasked(recipe: Path) -> None:
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    recipe.write_text(
        "trainer: {max_steps: 2, accelerator: cpu, enable_checkpointing: false, "
        "enable_progress_bar: false, enable_model_summary: false}\n"
        f"model: {boring}Model\ndata: {boring}DataModule\n"
    )
    command = [sys.executable, "-m", "lrcompress", "fit", "--config", "recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    # what torchao says when transformers imports it, of libraries for GPUs and of its own types,
    # and bitsandbytes where the CPU could do more than it has kernels for
    theirs = re.compile(
        r"Failed to load (.*torchao|CPU gemm)|.*torch/utils/_pytree.py.*register_constant"
    )
    said = [line for line in done.stderr.splitlines() if not theirs.match(line)]
    assert said == ["`Trainer.fit` stopped: `max_steps=2` reached."]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_on_resuming_the_recipe_says_what_the_model_is(tiny_bert: Path, tmp_path: Path) -> None:
    quickstart = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    arguments = [
        *("--config", quickstart, f"--model.path={tiny_bert}", "--trainer.accelerator=cpu"),
        *("--data.train_size=64", "--data.val_size=12", "--data.test_size=12"),
        *(f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"),
        "--trainer.enable_checkpointing=true",
        "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
        *(f"--trainer.callbacks.dirpath={tmp_path / 'saved'}", "--trainer.callbacks.filename=last"),
        "--trainer.max_epochs=1",
    ]
    assert main(["fit", *arguments, "--model.lr=0.001"]) == 0
    checkpoint = f"--ckpt_path={tmp_path / 'saved' / 'last.ckpt'}"
    again = [f"--trainer.callbacks.dirpath={tmp_path / 'again'}", "--trainer.max_epochs=2"]
    assert main(["fit", *arguments, *again, "--model.lr=0.5", checkpoint]) == 0
    saved = torch.load(tmp_path / "again" / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("verb", "says", "own"),
    [
        ("plan", "Print which layers the recipe would replace", "--curve"),
        ("factor", "Factor a finished fit's weights", "--checkpoint"),
        ("fit", "Runs the full optimization routine", "--ckpt_path"),
    ],
)
def test_the_help_of_a_verb_begins_with_its_own_options(
    verb: str, says: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    places = [told.index(part) for part in (f"usage: lrcompress {verb} ", says, own, "--trainer.")]
    assert places == sorted(places)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lrcompress {lrcompress.__version__}\n"


@pytest.mark.parametrize(
    "options",
    [[], ["--trainer.callbacks=lrcompress.LoSparse", "--trainer.callbacks.keep=0.5"]],
    ids=["Factorize", "LoSparse"],
)
def test_a_trial_run_of_one_step_compresses_and_writes_nothing(
    options: list[str],
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    quickstart = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    arguments = [
        *("--config", quickstart, f"--model.path={tiny_bert}", "--trainer.accelerator=cpu"),
        *("--data.train_size=64", "--data.val_size=12", "--data.test_size=12"),
        *(f"--trainer.default_root_dir={tmp_path / 'root'}", "--trainer.enable_progress_bar=false"),
    ]
    assert main(["fit", *arguments, *options, "--trainer.fast_dev_run", "1"]) == 0
    assert "lrcompress: what was lost and gained" in capsys.readouterr().out
    assert "in a trial run (fast_dev_run)" in caplog.text
    assert not (tmp_path / "root").exists()
