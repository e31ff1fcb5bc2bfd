"""Parsing of recipes: YAML files merged with overrides, each value with its file and line.

It is a tree of YAML nodes, whose marks hold file and line. Later values change earlier ones as
jsonargparse does it: mappings grow together, ``key+`` appends to a list, a class may be given by
its path alone, and an option below a class is one of its ``init_args``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, Mark, Node, ScalarNode, SequenceNode

from lrcompress.errors import RecipeError
from lrcompress.recipe.messages import nearest_of, shown

COMMAND_LINE = "command line"
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
INHERITED = "inherited"  # the style of keys whose class a later line replaced by another
STRING, SEQUENCE, MAPPING = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
NOWHERE = Mark(COMMAND_LINE, 0, 0, 0, None, None)


class Recipe:
    """The recipe that the arguments of a command line make, as a tree of YAML nodes.

    Attributes:
        root: the tree, ``trainer``, ``model`` and ``data`` at its top.
        faults: the errors found in files and arguments, one line each.
        complete: whether every file could be read; if not, what is missing may be in one that
            could not.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.faults: list[str] = []
        self.complete = True
        root: Node | None = None
        for option, value in _options(args):
            match option, value:
                case "print_config", _:
                    pass
                case "", _:
                    self.faults.append(f"{COMMAND_LINE}: expected --key=value, found {value!r}")
                case _, None:
                    self.faults.append(f"{COMMAND_LINE}: {option}: expected a value, found none")
                case "config", path:
                    root = _merged(root, self._read_recipe(Path(path)))
                case _:
                    root = self._overridden(root, option.split("."), _override(value))
        self.root = as_mapping(root, NOWHERE)

    def _overridden(self, root: Node | None, keys: list[str], value: Node) -> Node | None:
        node = value if keys[1:] else self._included(value, Path())
        return _placed(root, keys, node) if node else root

    def _read_recipe(self, path: Path) -> MappingNode:
        contents = self._read(path) or as_mapping(None, NOWHERE)
        included = [(key, self._included(value, path.parent)) for key, value in contents.value]
        contents.value = [(key, value) for key, value in included if value]
        return contents

    def _included(self, node: Node, folder: Path) -> Node | None:
        """Return what a file of its own holds, as in ``trainer: trainer.yaml``, or the node."""
        if node.tag == STRING and Path(node.value).suffix in {".yaml", ".yml"}:
            return self._read(folder / node.value)
        return node

    def _read(self, path: Path) -> MappingNode | None:
        """Return the contents of a file, or None, with the reason added to the errors."""
        try:
            node = _contents(path)
            self.faults += _repeated_keys(node, "")
            plain(node)  # refuses unknown tags, and resolves `<<` within the nodes
        except yaml.MarkedYAMLError as error:
            self.faults.append(_yaml_fault(path, error))
        except (RecipeError, yaml.YAMLError, UnicodeDecodeError) as error:
            self.faults.append(f"{path}: {' '.join(str(error).split())}")
        else:
            return node
        self.complete = False
        return None


def _options(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield options without their dashes and their values; a stray word has an empty option."""
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "-c":
            word = "--config"
        if not word.startswith("--"):
            yield "", word
            continue
        option, equals, value = word.removeprefix("--").partition("=")
        follows = bool(rest) and not rest[0].startswith("--")
        yield option, value if equals else rest.pop(0) if follows else None


def _contents(path: Path) -> MappingNode:
    if not path.is_file():
        known = [file.name for file in path.parent.glob("*.yaml")]
        raise RecipeError(f"expected a file, found none{nearest_of(path.name, known)}")
    node = _compose(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(node, MappingNode):
        found = shown(plain(node)) if node else "nothing"
        raise RecipeError(f"expected keys and values, found {found}")
    return node


def _yaml_fault(path: Path, error: yaml.MarkedYAMLError) -> str:
    line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
    since = f" {error.context} of line {error.context_mark.line + 1}" if error.context_mark else ""
    return f"{path}{line}: expected YAML: {error.problem}{since}"


def _compose(text: str, name: str) -> Node | None:
    loader = yaml.SafeLoader(text)
    loader.name = name  # what the marks of its nodes are called
    return loader.get_single_node()


def _override(value: str) -> Node:
    """Return a node for a value on the command line; only lists and mappings are read as YAML."""
    try:
        node = _compose(value, COMMAND_LINE)
    except yaml.YAMLError:
        node = None
    if isinstance(node, MappingNode | SequenceNode):
        return node
    return ScalarNode(STRING, value, NOWHERE)


def _repeated_keys(node: Node, where: str) -> Iterator[str]:
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{where}[{index}]")
    if isinstance(node, MappingNode):
        seen: dict[str, Node] = {}
        for key, value in node.value:
            here = below(where, key.value)
            if key.value in seen:
                line = seen[key.value].start_mark.line + 1
                yield error_line(key, here, f"expected once, found again after line {line}")
            seen[key.value] = key
            yield from _repeated_keys(value, here)


def as_mapping(node: Node | None, mark: Mark) -> MappingNode:
    """Return the node itself, or the class whose path it is, or an empty mapping."""
    if isinstance(node, MappingNode):
        return node
    if isinstance(node, ScalarNode) and node.tag == STRING:
        key = ScalarNode(STRING, "class_path", node.start_mark)
        return MappingNode(MAPPING, [(key, node)], node.start_mark)
    return MappingNode(MAPPING, [], mark)


def entries_of(node: MappingNode) -> dict[str, Node]:
    """Return the values of a mapping by their keys."""
    return {key.value: value for key, value in node.value}


def _placed(node: Node | None, path: list[str], value: Node, mark: Mark | None = None) -> Node:
    """Return the node after the value was put under the path, in place where there is one."""
    if not path:
        return _merged(node, value)
    if isinstance(node, SequenceNode) and node.value:  # an option below a list is for its last item
        node.value[-1] = _placed(node.value[-1], path, value, mark)
        return node

    mark = mark or value.start_mark
    node = as_mapping(node, mark)
    entries = entries_of(node)
    if "class_path" in entries and path[0] not in CLASS_KEYS:
        path = ["init_args", *path]
    name, *rest = path
    if name.endswith("+") and not rest:
        name = name.removesuffix("+")
        value = _appended(entries.get(name), value)
    entry = ScalarNode(STRING, name, mark), _placed(entries.get(name), rest, value, mark)
    names = [key.value for key, _ in node.value]
    place = names.index(name) if name in names else len(names)
    node.value[place : place + 1] = [entry]
    return node


def _appended(node: Node | None, value: Node) -> SequenceNode:
    items = [*_items(node), *_items(value)] if node else _items(value)
    return SequenceNode(SEQUENCE, items, value.start_mark)


def _items(node: Node) -> list[Node]:
    return list(node.value) if isinstance(node, SequenceNode) else [node]


def _merged(old: Node | None, new: Node) -> Node:
    """Return what ``new`` makes of ``old``: mappings grow together, all else is replaced."""
    if isinstance(old, MappingNode) and "class_path" in entries_of(old):
        new = as_mapping(new, new.start_mark) if isinstance(new, ScalarNode) else new
    if not (isinstance(old, MappingNode) and isinstance(new, MappingNode)):
        return new
    before, after = (entries_of(node).get("class_path") for node in (old, new))
    init_args = entries_of(old).get("init_args")
    if before and after and before.value != after.value and isinstance(init_args, MappingNode):
        for key, _ in init_args.value:
            key.style = INHERITED  # the parser keeps those that the other class has too
    for key, value in new.value:
        _placed(old, [key.value], value, key.start_mark)
    return old


def error_line(node: Node, where: str, text: str) -> str:
    """Return the line of a message: file and line of the node, option, what is wrong."""
    mark = node.start_mark
    place = mark.name if mark.name == COMMAND_LINE else f"{mark.name}:{mark.line + 1}"
    return f"{place}: {where}: {text}"


def below(where: str, key: str) -> str:
    """Return the option for a key below another option; below nothing it is the key itself."""
    return f"{where}.{key}" if where else key


def plain(node: Node) -> Any:
    """Return the value a node stands for, in lists, dicts and scalars."""
    return yaml.constructor.SafeConstructor().construct_document(node)
