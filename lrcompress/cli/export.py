"""``lrcompress export``: the model of a checkpoint as a folder that can be loaded elsewhere."""

import json
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import rich
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from lrcompress.callbacks.between_fits import load_weights_
from lrcompress.cli.int8 import check_measured, int8_table
from lrcompress.engine.factored_layers import store_pivoted_
from lrcompress.errors import CheckpointError, RecipeError, nearest
from lrcompress.export import merge_dense, save_pretrained, save_remote_code
from lrcompress.export.model_card import model_card
from lrcompress.export.onnx import INT8, ONNX, export_onnx, quantize_onnx
from lrcompress.export.torch_export import PROGRAM, export_program
from lrcompress.recipe import link_
from lrcompress.report import Report
from lrcompress.structure.checkpoint import read_lightning_checkpoint
from lrcompress.structure.plan import Plan
from lrcompress.tasks.locations import model_folder, source_arguments

FORMATS = ("transformers", "dense", "remote-code", "onnx", "torch-export")
INT8_FLAG, PIVOTED = "--int8", "--pivoted"
FLAGS, OPTIONS = (INT8_FLAG, PIVOTED), ("--config", "--format")
USAGE = (
    "lrcompress export CHECKPOINT FOLDER --config RECIPE [--format FORMAT] [--int8] [--pivoted] "
    "[--model.KEY VALUE] [--data.KEY VALUE]"
)
HELP = """\
  --int8: for FORMAT onnx: in 8-bit whole numbers too, with a table of what that loses
  --pivoted: store low-rank layers as pivoted rows: the same model in fewer parameters
"""
TEXT = "one short text, as long as any other, stands for all there will be"


def export(options: list[str]) -> None:
    """Write the model of a checkpoint to a folder.

    Args:
        options: of the command line, after ``export``.

    Raises:
        RecipeError: if an option or the recipe is wrong, or ``--int8`` cannot be measured.
        CheckpointError: if the checkpoint is not of the recipe's model.
        ExportError: if a graph cannot be made, or computes something else than the model.
    """
    if {"-h", "--help"} & {*options}:
        sys.stdout.write(f"usage: {USAGE}\n\n  FORMAT: {', '.join(FORMATS)}\n{HELP}")
        return
    places, given, overrides = _checked(options)
    kind, int8 = given["--format"], INT8_FLAG in given
    checkpoint = read_lightning_checkpoint(Path(places[0]))
    module, data = _parts(Path(given["--config"]), overrides, int8)
    if int8:
        check_measured(module)
    load_weights_(module, checkpoint, places[0])
    if PIVOTED in given:
        store_pivoted_(module)
    if kind in ("onnx", "torch-export"):
        _write_graph(module, data, kind, places[1])
        return
    model, tokenizer = _model_of(module), _tokenizer(module)
    if kind == "transformers":
        save_pretrained(model, places[1], tokenizer, _report(checkpoint, model))
        rich.print(f"written; lrcompress.load_pretrained({places[1]!r}) loads it")
        return
    if kind == "remote-code":
        save_remote_code(model, places[1], tokenizer)
        rich.print("written; from_pretrained(…, trust_remote_code=True) loads it")
        return
    merge_dense(model).save_pretrained(places[1])
    if tokenizer is not None:
        tokenizer.save_pretrained(places[1])
    rich.print("written; from_pretrained of transformers loads it")


def _write_graph(
    module: LightningModule, data: LightningDataModule | None, kind: str, folder: str
) -> None:
    """Write the graph, in int8 too if there is data to measure it on; print the differences."""
    model, tokenizer = _model_of(module), _tokenizer(module)
    example = _example(module, tokenizer)
    write, name = (export_onnx, ONNX) if kind == "onnx" else (export_program, PROGRAM)
    difference = write(model, folder, example, tokenizer)
    rich.print(f"{name}: the largest difference to the model is {difference:.2g}")
    if kind != "onnx":
        inputs = ", ".join(f"'{key}': …" for key in example)
        path = Path(folder) / name
        rich.print(f"torch.export.load('{path}').module()({{{inputs}}}) gives a dict")
    if data is not None:
        quantize_onnx(folder)
        files = [Path(folder) / name for name in (ONNX, INT8)]
        rich.print(int8_table(module, model, data, files))


def _example(module: LightningModule, tokenizer: Any) -> dict[str, Tensor]:
    """Return example inputs of the model: the module's own, or the tokens of a text.

    Raises:
        RecipeError: if there is neither.
    """
    example = module.example_input_array
    if isinstance(example, dict):
        return example
    if tokenizer is None:
        raise RecipeError(
            f"{type(module).__name__} has no dict as example_input_array, and no tokenizer beside "
            "its model to make one; call lrcompress.export.export_onnx with an example"
        )
    return dict(tokenizer([TEXT, TEXT], return_tensors="pt"))


def _checked(options: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the checked options, as :func:`_split` does, with a format.

    Raises:
        RecipeError: if an option is wrong or missing.
    """
    places, given, overrides = _split(options)
    kind = given.setdefault("--format", FORMATS[0])
    if kind not in FORMATS:
        raise RecipeError(f"--format: unknown format {kind!r}; nearest: {nearest(kind, FORMATS)}")
    if INT8_FLAG in given and kind != "onnx":
        raise RecipeError(f"{INT8_FLAG} is for --format onnx, got --format {kind}")
    if PIVOTED in given and kind == "dense":
        raise RecipeError(f"{PIVOTED} is for low-rank layers, of which --format dense has none")
    if len(places) != 2 or "--config" not in given:
        raise RecipeError(f"expected a checkpoint, a folder and --config; usage: {USAGE}")
    return places, given, overrides


def _split(options: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the places, the options of this verb, and those that change the recipe's model.

    Raises:
        RecipeError: if there are others.
    """
    places: list[str] = []
    given: dict[str, str] = {}
    overrides: list[str] = []
    rest = list(options)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            places.append(f"{name}{equals}{value}")
            continue
        if name in FLAGS and not equals:
            given[name] = ""
            continue
        if not equals and not rest:
            raise RecipeError(f"{name} needs a value; usage: {USAGE}")
        value = value if equals else rest.pop(0)
        if name in OPTIONS:
            given[name] = value
        elif name.startswith(("--model.", "--data.")):
            overrides.append(f"{name}={value}")
        else:
            known = (*OPTIONS, *FLAGS, "--model.path")
            raise RecipeError(
                f"unknown option {name}; of the recipe only --model.KEY and --data.KEY count here, "
                f"nearest: {nearest(name, known)}"
            )
    return places, given, overrides


def _parts(
    recipe: Path, overrides: list[str], with_data: bool
) -> tuple[LightningModule, LightningDataModule | None]:
    """Return the recipe's model, and its data if requested.

    Raises:
        RecipeError: if the recipe has none, or its arguments are wrong.
    """
    try:
        contents = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    kinds = {"model": LightningModule} | ({"data": LightningDataModule} if with_data else {})
    parser, given = ArgumentParser(exit_on_error=False), []
    for name, kind in kinds.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), dict):
            raise RecipeError(f"{recipe} has no {name}")
        parser.add_subclass_arguments(kind, name, required=True)
        given.append(f"--{name}={json.dumps(contents[name])}")
    given += [x for x in overrides if x.startswith(tuple(f"--{name}." for name in kinds))]
    if with_data:
        link_(parser, given)
    try:
        config = parser.parse_args(given)
    except ArgumentError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    made = parser.instantiate_classes(config)
    return made.model, made.data if with_data else None


def _model_of(module: nn.Module) -> PreTrainedModel:
    """Return the one ``transformers`` model that a module holds.

    Raises:
        CheckpointError: if it holds none or several.
    """
    found: dict[str, PreTrainedModel] = {}
    for name, inner in module.named_modules():
        if isinstance(inner, PreTrainedModel) and not any(name.startswith(f"{x}.") for x in found):
            found[name] = inner
    if len(found) != 1:
        raise CheckpointError(
            f"{type(module).__name__} must hold one transformers model to export, it holds "
            f"{', '.join(found) or 'none'}"
        )
    return next(iter(found.values()))


def _tokenizer(module: LightningModule) -> Any:
    """Return the tokenizer beside the model that training began with, or None."""
    path = module.hparams.get("path")
    if path is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(**source_arguments(model_folder(path)))
    except (OSError, ValueError):  # a folder with a model alone
        return None


def _report(checkpoint: dict[str, Any], model: PreTrainedModel) -> Report | None:
    """Return the report that a callback left in the checkpoint; weights alone have none.

    Raises:
        CheckpointError: if it is none.
    """
    states = checkpoint.get("callbacks")
    kept = [
        state["report"]
        for state in (states.values() if isinstance(states, dict) else ())
        if isinstance(state, dict) and state.get("report")
    ]
    if not kept:
        return None
    try:
        report = Report.joined(map(Report.from_dict, kept))
        model_card(model, Plan(), report)  # which reads all of it
    except Exception as error:  # values may be anything
        raise CheckpointError(f"the report in the checkpoint cannot be read: {error!r}") from error
    return report
