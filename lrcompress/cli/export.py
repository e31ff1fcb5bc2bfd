"""``lrcompress export``: the model of a checkpoint as a folder that can be loaded elsewhere."""

import json
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch import LightningModule
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from lrcompress.errors import CheckpointError, RecipeError, nearest
from lrcompress.export import merge_dense, save_pretrained
from lrcompress.files import read_checkpoint
from lrcompress.plan import restore_structure
from lrcompress.report import Report
from lrcompress.tasks.locations import model_folder

FORMATS = ("transformers", "dense")
USAGE = "lrcompress export CHECKPOINT FOLDER --config RECIPE [--format FORMAT] [--model.KEY VALUE]"


def export(options: list[str]) -> None:
    """Write the model of a checkpoint to a folder.

    Args:
        options: of the command line, after ``export``.

    Raises:
        RecipeError: if an option or the recipe's model is wrong.
        CheckpointError: if the checkpoint is not of that model.
    """
    places, given, overrides = _split(options)
    kind = given.get("--format", FORMATS[0])
    if kind not in FORMATS:
        raise RecipeError(f"--format: unknown format {kind!r}; nearest: {nearest(kind, FORMATS)}")
    if len(places) != 2 or "--config" not in given:
        raise RecipeError(f"expected a checkpoint, a folder and --config; usage: {USAGE}")
    checkpoint = read_checkpoint(places[0])
    module = _module(Path(given["--config"]), overrides)
    restore_structure(module, checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(f"{places[0]} is not of the recipe's model: {error}") from error
    model, tokenizer = _model_of(module), _tokenizer(module)
    if kind == "transformers":
        save_pretrained(model, places[1], tokenizer, _report(checkpoint))
        return
    merge_dense(model).save_pretrained(places[1])
    if tokenizer is not None:
        tokenizer.save_pretrained(places[1])


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
        if not equals and not rest:
            raise RecipeError(f"{name} needs a value; usage: {USAGE}")
        value = value if equals else rest.pop(0)
        if name in ("--config", "--format"):
            given[name] = value
        elif name.startswith("--model."):
            overrides.append(f"{name}={value}")
        else:
            known = ("--config", "--format", "--model.path")
            raise RecipeError(f"unknown option {name}; nearest: {nearest(name, known)}")
    return places, given, overrides


def _module(recipe: Path, overrides: list[str]) -> LightningModule:
    """Return the recipe's model, as the recipe makes it.

    Raises:
        RecipeError: if the recipe has none, or it is not made like that.
    """
    try:
        data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise RecipeError(f"{recipe} has no model")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    try:
        config = parser.parse_args([f"--model={json.dumps(data['model'])}", *overrides])
    except ArgumentError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    module = parser.instantiate_classes(config).model
    assert isinstance(module, LightningModule)
    return module


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
        return AutoTokenizer.from_pretrained(model_folder(path))
    except (OSError, ValueError):  # a folder with a model alone
        return None


def _report(checkpoint: dict[str, Any]) -> Report | None:
    """Return the report that a callback left in the checkpoint; weights alone have none."""
    states = checkpoint.get("callbacks", {}).values()
    kept = [state["report"] for state in states if isinstance(state, dict) and state.get("report")]
    return Report.from_dict(kept[-1]) if kept else None
