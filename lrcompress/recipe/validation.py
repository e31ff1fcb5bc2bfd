"""Validation of recipes: every error with its place, what was expected and the nearest valid name.

jsonargparse stops at the first error it meets. Here its parser checks one value after the other,
and the arguments of a class only where it refuses the class.

A path in a message is the option that sets the value: ``model.width`` stands for ``width`` in the
``init_args`` of the class under ``model``.
"""

import pydoc
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.distill import DistillationLoss
from lrcompress.errors import LRCompressError
from lrcompress.recipe.messages import (
    choices_in,
    classes_in,
    in_words,
    nearest_class,
    nearest_of,
    shown,
    subclasses_of,
)
from lrcompress.recipe.sources import (
    CLASS_KEYS,
    COMMAND_LINE,
    INHERITED,
    NOWHERE,
    STRING,
    Recipe,
    as_mapping,
    below,
    entries_of,
    error_line,
    plain,
)

_SAY_THEIR_FAULTS = (CompressionCallback, DistillationLoss)
LINKED = {"data.tokenizer": "model.path"}  # an option that, if not given, is what another one is


def linked_from(source: str, args: Sequence[str]) -> str:
    """Return the option that a link reads: in the student, if the recipe's model has one.

    Example:
        >>> linked_from("model.path", ["--model=lrcompress.Distilled", "--model.student=Mine"])
        'model.student.path'
    """
    top, *rest = source.split(".")
    model = as_mapping(entries_of(Recipe(args).root).get(top), NOWHERE)
    init_args = as_mapping(entries_of(model).get("init_args"), NOWHERE)
    inside = ["student"] if "student" in entries_of(init_args) else []
    return ".".join((top, *inside, *rest))


def link_(parser: ArgumentParser, args: Sequence[str]) -> None:
    """Link options of a parser: one that is not given takes the value of another.

    Args:
        parser: of a command line whose model and data are classes.
        args: the command line after the verb.
    """
    for target, source in LINKED.items():
        keys = [key.replace(".", ".init_args.") for key in (target, linked_from(source, args))]
        parser.link_arguments(tuple(keys), keys[0], compute_fn=_first_given)


def _first_given(value: object, default: object) -> object:
    return default if value is None else value


def find_errors(parser: ArgumentParser, args: Sequence[str], *, refused: bool) -> list[str]:
    """Return every error in the recipe that a command line gives, one line each.

    Args:
        parser: what LightningCLI made for the verb.
        args: the command line after the verb.
        refused: whether the parser refused it. If it did not, only what the parser lets pass is
            checked: files with a key written twice, and values that callbacks and losses of
            lrcompress refuse.
    """
    recipe = Recipe(args)
    faults = [*recipe.faults]
    if refused:
        required = {"model"} if recipe.complete else set()
        faults += _check_keys(parser, recipe.root, where="", required=required)
    return [*faults, *_check_values(recipe.root, where="")]


def _check_keys(
    parser: ArgumentParser, node: MappingNode, where: str, required: set[str], prefix: str = ""
) -> Iterator[str]:
    """Yield the errors in a mapping whose keys are options of the parser, below the prefix."""
    actions = {
        action.dest.removeprefix(prefix): action
        for action in parser._actions
        if action.default is not SUPPRESS and action.dest.startswith(prefix)
    }
    groups = {dest.partition(".")[0] for dest in actions if "." in dest}
    for key, value in node.value:
        here = below(where, key.value)
        if key.value in actions:
            yield from _check_value(parser, actions[key.value], key, value, here)
        elif key.value in groups:
            yield from _check_group(parser, key, value, here, prefix)
        elif key.style != INHERITED:
            known = sorted(groups.union(dest for dest in actions if "." not in dest))
            inner = list(_further_in(node, key.value))
            near = f"; nearest valid: {', '.join(inner)}" if inner else nearest_of(key.value, known)
            yield error_line(key, here, f"unknown key{near}")
    for name in sorted(required - entries_of(node).keys()):
        if (here := below(where, name)) not in LINKED:
            typed = not where and node.start_mark.name == COMMAND_LINE
            way = "; give a recipe with --config FILE" if typed else ""
            yield error_line(node, here, f"required, found nothing{way}")


def _further_in(node: MappingNode, name: str) -> Iterator[str]:
    """Yield options of that name in nested classes, such as the student in a distilled model."""
    for key, value in node.value:
        path = entries_of(as_mapping(value, NOWHERE)).get("class_path")
        named = _locate(path.value, ()) if isinstance(path, ScalarNode) else None
        if isinstance(named, type) and name in {a.dest for a in _class_parser(named)._actions}:
            yield f"{key.value}.{name}"


def _check_values(node: Node, where: str) -> Iterator[str]:
    """Yield the errors that the classes of a recipe raise for their arguments' values."""
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _check_values(item, f"{where}[{index}]")
    elif isinstance(node, MappingNode):
        entries = entries_of(node)
        if "class_path" in entries:
            named = _locate(plain(entries["class_path"]), _SAY_THEIR_FAULTS)
            yield from _check_making(named, node, where)
        for key, value in node.value:
            here = where if key.value in CLASS_KEYS else below(where, key.value)
            if key.value != "class_path":
                yield from _check_values(value, here)
    elif node.tag == STRING:
        named = {cls.__name__: cls for cls in subclasses_of(_SAY_THEIR_FAULTS)}.get(node.value)
        yield from _check_making(named, as_mapping(node, node.start_mark), where)


def _check_making(named: object, node: MappingNode, where: str) -> Iterator[str]:
    """Yield the error of a class of lrcompress for its arguments, if making an object is cheap."""
    if not isinstance(named, type) or not issubclass(named, _SAY_THEIR_FAULTS):
        return
    if not named.__module__.startswith("lrcompress."):
        return
    entries = entries_of(node)
    given = as_mapping(entries.get("init_args"), node.start_mark)
    try:
        named(**_class_parser(named).parse_object(plain(given)).as_dict())
    except LRCompressError as error:
        keys = [key for key, _ in given.value if str(error).startswith(f"{key.value} ")]
        key, here = (keys[0], below(where, keys[0].value)) if keys else (node, where)
        yield error_line(key, here, str(error))
    except ArgumentError:  # of types and keys, which are checked one by one
        return


def _check_group(
    parser: ArgumentParser, key: Node, value: Node, where: str, prefix: str
) -> Iterator[str]:
    if isinstance(value, MappingNode):
        yield from _check_keys(parser, value, where, set(), f"{prefix}{key.value}.")
    elif value.tag != STRING or not _accepts(parser, prefix + key.value, value.value):
        yield error_line(key, where, f"expected keys and values, found {shown(plain(value))}")


def _check_value(
    parser: ArgumentParser, action: Action, key: Node, node: Node, where: str
) -> Iterator[str]:
    value = plain(node)
    if _accepts(parser, action.dest, value):
        return
    hint = getattr(action, "_typehint", Any)
    bases = tuple(dict.fromkeys(classes_in(hint)))
    faults = list(_check_classes(bases, node, where))
    if not faults and not (isinstance(value, dict) and "class_path" in value):
        found = f"{shown(value)}{nearest_of(str(value), choices_in(hint))}"
        faults = [error_line(key, where, f"expected {in_words(hint)}, found {found}")]
    yield from faults


def _accepts(parser: ArgumentParser, dest: str, value: Any) -> bool:
    settings = Namespace()  # type: ignore[no-untyped-call]
    settings[dest] = value
    try:
        parser.validate(settings, skip_required=True)
    except Exception:  # besides TypeError and KeyError, what the user's own types raise
        return False
    return True


def _check_classes(bases: tuple[type, ...], node: Node, where: str) -> Iterator[str]:
    """Yield the errors in a class, or in each of a list; nothing if the node is neither."""
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _check_classes(bases, item, f"{where}[{index}]")
    elif isinstance(node, MappingNode) and (bases or "class_path" in entries_of(node)):
        yield from _check_class(bases, node, where)
    elif bases and node.tag == STRING:
        yield from _check_class(bases, as_mapping(node, node.start_mark), where)


def _check_class(bases: tuple[type, ...], node: MappingNode, where: str) -> Iterator[str]:
    entries = entries_of(node)
    for key, _ in node.value:
        if key.value not in CLASS_KEYS:
            here = below(where, key.value)
            yield error_line(key, here, f"unknown key{nearest_of(key.value, CLASS_KEYS)}")
    if "class_path" not in entries:
        yield error_line(node, below(where, "class_path"), "required, found nothing")
        return

    path = entries["class_path"]
    try:
        named = _locate(path.value, bases)
    except pydoc.ErrorDuringImport as error:
        yield error_line(path, where, f"importing {path.value} raised {error.value!r}")
        return
    if named is None or (bases and isinstance(named, type) and not issubclass(named, bases)):
        wanted = "a subclass of " + " or ".join(base.__name__ for base in bases)
        found = f"{path.value!r}{nearest_class(path.value, bases)}"
        yield error_line(path, where, f"expected {wanted if bases else 'a class'}, found {found}")
    elif isinstance(named, type):
        parser = _class_parser(named)
        required = {action.dest for action in parser._actions if action.required}
        required -= entries_of(as_mapping(entries.get("dict_kwargs"), node.start_mark)).keys()
        init_args = as_mapping(entries.get("init_args"), path.start_mark)
        yield from _check_keys(parser, init_args, where, required)


def _locate(path: str, bases: tuple[type, ...]) -> object | None:
    """Return what a class path names; a known class may go by its bare name."""
    bare = {cls.__name__: cls for cls in subclasses_of(bases)}
    return bare.get(path) or pydoc.locate(path)


def _class_parser(cls: type) -> ArgumentParser:
    skip = set()
    if issubclass(cls, Optimizer | LRScheduler):  # Lightning gives them what they work on
        skip = {"params"} if issubclass(cls, Optimizer) else {"optimizer"}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True, skip=skip)
    return parser
