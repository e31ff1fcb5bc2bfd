"""The verbs of ``lrcompress`` that need torch and Lightning: all but ``guide``."""

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import disable_possible_user_warnings
from typing_extensions import override

import lrcompress.tasks  # noqa: F401  so that recipes may say TextClassification
from lrcompress.callbacks import Factorize, WholeCheckpointIO, factor_checkpoint
from lrcompress.cli.bench import bench
from lrcompress.cli.export import export
from lrcompress.cli.plan import print_plan
from lrcompress.cli.report import report
from lrcompress.distill import Distilled
from lrcompress.errors import CheckpointError, LRCompressError, PlatformError, RecipeError, nearest
from lrcompress.recipe import find_errors, link_
from lrcompress.structure.checkpoint import read_checkpoint

EXPECTED = (LRCompressError, MisconfigurationException, OSError)  # need no traceback
WITHOUT_TRAINER = {"bench": bench, "export": export, "report": report}
ONE_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
ONE_CPU |= {"precision": None, "plugins": None}
UNASKED = ("Seed set to", "GPU available", "TPU available", "HPU available", "💡 Tip")


def run(args: list[str]) -> None:
    """Run a verb other than ``guide``.

    Args:
        args: of the command line, from the verb on.

    Raises:
        LRCompressError: if something is wrong that needs no traceback.
        PlatformError: if that is what Lightning calls a misconfiguration.
        OSError: if a file is not there, or cannot be read or written.
    """
    if "" not in sys.path:
        sys.path.append("")  # modules beside the recipe, as under `python -m`
    try:
        with _quiet():
            WITHOUT_TRAINER.get(args[0], lambda _: _RecipeCLI(args))(args[1:])
    except Exception as error:
        expected = _unwrapped(error)
        if not isinstance(expected, LRCompressError):
            expected = _unreadable(args) or expected
        if isinstance(expected, MisconfigurationException):
            raise PlatformError(str(expected)) from error
        if expected is error or not isinstance(expected, EXPECTED):
            raise
        raise expected  # noqa: B904  its cause is its own


def _unreadable(args: list[str]) -> CheckpointError | None:
    """Return the error in the checkpoint that was to be resumed, in clearer words than torch's."""
    given = dict(pairwise(args)) | dict(x.split("=", 1) for x in args if "=" in x)
    path = Path(given.get("--ckpt_path", ""))
    if path.is_file():
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            return error
    return None


def _unwrapped(error: BaseException) -> BaseException:
    """Return what a constructor raised, which jsonargparse wraps in a ValueError or several."""
    while isinstance(error, ValueError) and not isinstance(error, EXPECTED) and error.__cause__:
        error = error.__cause__
    return error


class _Trainer(Trainer):
    """The Trainer of recipes, with ``plan`` and ``factor`` besides Lightning's own verbs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # no one chose another
            self.strategy.checkpoint_io = WholeCheckpointIO()

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,  # noqa: ARG002  the files that fit writes have it
        curve: int | None = None,
        plot: str | None = None,
        measure: bool | list[str] = False,
    ) -> None:
        """Print which layers the recipe would replace, without training, after a fit's checks.

        Args:
            model: of the recipe.
            datamodule: of the recipe.
            ckpt_path: A checkpoint whose weights the model gets first.
            weights_only: As of fit; a plan reads nothing else.
            curve: Training batches from which to predict the loss of every method at several
                keeps.
            plot: A file for a figure of that.
            measure: Measure the recipe's method, or the methods that are named, on the validation
                data at every keep, without retraining; solved from the curve's training batches.
        """
        given = {"ckpt_path": ckpt_path, "curve": curve, "plot": plot, "measure": measure}
        print_plan(self, model, datamodule, **given)  # type: ignore[arg-type]

    def factor(
        self,
        model: LightningModule,
        checkpoint: str,
        out: str,
        point: int = 1,
        batches: int = 100,
        device: str = "cpu",
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Factor a finished fit's weights, for another fit to start from with StartFrom.

        Args:
            model: The recipe's model.
            checkpoint: What the fit left, in one file.
            out: The file to write.
            point: Which point of the recipe's Factorize, counted from 1.
            batches: Training batches to observe.
            device: Where the model is meanwhile, such as cuda or cuda:1.
            datamodule: The recipe's data.
        """
        callback = only_factorize(self)
        student = model.undistilled() if isinstance(model, Distilled) else model
        factor_checkpoint(
            checkpoint,
            out,
            student,
            datamodule,
            callback,
            point=point,
            batches=batches,
            device=device,
        )


def only_factorize(trainer: Trainer) -> Factorize:
    """Return the one Factorize of the recipe.

    Raises:
        RecipeError: if there is none, or there are several.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, Factorize)]
    if len(found) != 1:
        raise RecipeError(
            f"trainer.callbacks: expected one lrcompress.Factorize, which can factor between two "
            f"fits, found {', '.join(type(callback).__name__ for callback in callbacks) or 'none'}"
        )
    return found[0]


class SaveRecipe(SaveConfigCallback):
    """Saves the whole recipe beside the logs of a run; nowhere if the run keeps no logs."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # read on every process, for it is a broadcast
        self.log_dir = trainer.log_dir if trainer.loggers else None
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.log_dir is None:
            return
        # Lightning's own way of saving leaves the linked tokenizer out
        text = self.parser.dump(self.config, "yaml", False, skip_link_targets=False)
        files = get_filesystem(self.log_dir)
        files.makedirs(self.log_dir, exist_ok=True)
        with files.open(f"{self.log_dir}/{self.config_filename}", "w") as file:
            file.write(text)


def recipe_verbs() -> dict[str, set[str]]:
    """Return the verbs that take a recipe, each with what of it is no option of the verb."""
    verbs = LightningCLI.subcommands()
    del verbs["predict"]
    return verbs | {verb: {"model", "datamodule"} for verb in ("plan", "factor")}


class _RecipeCLI(LightningCLI):
    """LightningCLI for any module and data, which reports all errors of a recipe at once."""

    def __init__(self, args: list[str]) -> None:
        verbs = recipe_verbs()
        if args[0] not in verbs:
            near = nearest(args[0], [*verbs, *WITHOUT_TRAINER, "guide"])
            raise RecipeError(f"expected a verb, found {args[0]!r}; nearest valid: {near}")
        self._options = args[1:]
        self._verb = {args[0]: verbs[args[0]]}
        settings = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            args=args,
            trainer_class=_Trainer,
            seed_everything_default=0,
            save_config_callback=SaveRecipe,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={
                "prog": "lrcompress",
                **settings,
                **{verb: dict(settings) for verb in self._verb},  # its own description
            },
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the verb that was asked for: a parser of another would be built in vain."""
        return self._verb

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Let the help of a verb begin with its own options, and not with the Trainer's."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"lrcompress {subcommand} --config RECIPE [--KEY VALUE ...]"
        groups: Any = parser._action_groups
        own = groups.pop()  # a verb's arguments are added last
        own.title = f"options of {subcommand}"
        groups.insert(0, own)
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        link_(parser, self._options)

    @override
    def _parse_ckpt_path(self) -> None:
        """Take the model's arguments from recipe and command line, not from a checkpoint.

        Lightning would let the checkpoint's hyperparameters win over both, without a word.
        """

    @override
    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        if self.subcommand == "factor":  # whatever the fits run on
            kwargs |= ONE_CPU
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # such as an accelerator that does not exist
            raise RecipeError(f"trainer: {error}") from error

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        verb, *options = args
        refusal = None
        try:
            self.config = parser.parse_args(args)
            self.config[verb].trainer["callbacks"]  # a trainer that is no mapping passes the parser
        except Exception as error:  # ArgumentError, or what a strange recipe makes it raise
            refusal = error
        faults = find_errors(self._parser(verb), options, refused=refusal is not None)
        if isinstance(refusal, ArgumentError) and not faults:
            faults = [str(refusal)]
        if faults:
            raise RecipeError("\n".join(faults)) from refusal
        if refusal:
            raise refusal


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence routine messages of Lightning and transformers; warnings that matter stay."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI causes them
    spoken, shown = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    names = "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(_is_asked_for)
    with warnings.catch_warnings():
        disable_possible_user_warnings()
        warnings.filterwarnings("ignore", ".*`tensorboardX` has been removed")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning under torch 2.13
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_asked_for)
            transformers.logging.set_verbosity(spoken)
            if shown:
                transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _is_asked_for(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNASKED)
