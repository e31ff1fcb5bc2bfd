"""Docstrings of installed libraries, with the libraries' names masked."""

import ast
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice, takewhile
from pathlib import Path

from lrcompress.errors import NoMatchError, SettingError
from lrcompress.tasks.locations import package_root

MASK = "library"
ALIASES = {
    "huggingface_hub": ("hugging face", "huggingface"),
    "lightning": ("pl",),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "pyarrow": ("pa",),
    "sympy": ("sp",),
    "torch": ("pytorch",),
    "torchmetrics": ("tm",),
    "transformers": ("hugging face", "huggingface"),
}
SHORTEST_INSIDE_WORDS = 5
MIN_CHARACTERS, MAX_CHARACTERS = 60, 400
SECTION = re.compile(r"^\s*(?:[-=~]{3,}|>>>|\.\. |\w+:\s*$)", re.MULTILINE)
FOREIGN = re.compile(r"(^|/)(tests?|testing|_?vendor|_?vendored|externals?)/")


def docstring_splits(
    libraries: Sequence[str], sizes: Mapping[str, int]
) -> dict[str, list[tuple[str, str]]]:
    """Return pairs ``(text, library)`` for every split, equally many of each library.

    Where a library has fewer in one split, but at least half of its part, the others give more.
    The files are parsed, never imported. A folder's files all go to one split, and no text
    occurs twice, so that a text says little about those of other splits. The outcome depends
    on the installed versions only.

    Args:
        libraries: top-level names of installed packages.
        sizes: split -> texts in all.

    Raises:
        NoMatchError: if a library is not installed.
        SettingError: if a library has less than half of its part of a split, or all of them
            together have too few.

    Cost:
        A few seconds for some thousand texts: no more files are parsed than needed.
    """
    mask = mask_pattern(libraries)
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, str]]] = {split: [] for split in sizes}
    rest: dict[str, dict[str, Iterator[str]]] = {split: {} for split in sizes}
    for i, library in enumerate(libraries):
        root = package_root(library)
        if root is None:
            raise NoMatchError(
                f"library {library!r} is not installed as a package with folders: install it, or "
                "leave it out of `libraries`"
            )
        for split, files in _share_out(root, sizes).items():
            wanted = sizes[split] // len(libraries) + (i < sizes[split] % len(libraries))
            every = rest[split][library] = _fresh_texts(files, mask, seen)
            texts = list(islice(every, wanted))
            if len(texts) < wanted / 2:
                found = f"library {library!r} gave {len(texts)} of {wanted}"
                raise SettingError(_too_few(split, found))
            splits[split] += [(text, library) for text in texts]
    for split, size in sizes.items():
        _fill_(splits[split], rest[split], size, split)
    return splits


def _fill_(
    texts: list[tuple[str, str]], rest: Mapping[str, Iterator[str]], size: int, split: str
) -> None:
    """Add what is missing, in turns from the libraries that have more.

    Raises:
        SettingError: if none has.
    """
    while missing := size - len(texts):
        more = [(text, library) for library, every in rest.items() for text in islice(every, 1)]
        if not more:
            raise SettingError(_too_few(split, f"all libraries gave {len(texts)} of {size}"))
        texts += more[:missing]


def _too_few(split: str, found: str) -> str:
    return (
        f"{found} docstrings to {split}: lower {split}_size, or leave the library out of "
        "`libraries`"
    )


def mask_pattern(libraries: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of the names and usual aliases of libraries, in any case.

    Long names are found inside words too (``from_numpy``), short ones only on their own.

    Example:
        >>> mask_pattern(["numpy"]).sub("_", "np.array of to_numpy() and NumPy, not Np2")
        '_.array of to__() and _, not Np2'
    """
    names = {*libraries, *ALIASES, *(alias for each in ALIASES.values() for alias in each)}
    ordered = sorted(names, key=lambda name: (-len(name), name))
    inside = [re.escape(name) for name in ordered if len(name) >= SHORTEST_INSIDE_WORDS]
    alone = [re.escape(name) for name in ordered if len(name) < SHORTEST_INSIDE_WORDS]
    return re.compile(rf"{'|'.join(inside)}|\b(?:{'|'.join(alone)})\b", re.IGNORECASE)


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module, its classes and functions, in order.

    Source this Python cannot parse has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        try:
            module = ast.parse(source)
        except SyntaxError:
            return []
    return [text for node in _documented(module) if (text := ast.get_docstring(node))]


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def opening(docstring: str) -> str:
    r"""Return the paragraphs before the first section, example or directive, on one line.

    What follows tells libraries apart by its layout alone.

    Example:
        >>> opening("Add two\nnumbers.\n\nArgs:\n    a: one.")
        'Add two numbers.'
    """
    prose = takewhile(lambda part: not SECTION.search(part), docstring.split("\n\n"))
    return " ".join(" ".join(prose).split())


def _documented(node: Documented) -> Iterator[Documented]:
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)


def _share_out(root: Path, sizes: Mapping[str, int]) -> dict[str, list[Path]]:
    """Return the library's files by split, in an order set by their paths alone.

    Folders, the largest first, go to whichever split is furthest from its share of the bytes.
    """
    folders: dict[str, list[Path]] = {}
    for file in root.rglob("*.py"):
        if not FOREIGN.search(file.relative_to(root).as_posix()):
            folders.setdefault(file.parent.relative_to(root).as_posix(), []).append(file)
    weights = {name: sum(f.stat().st_size for f in files) for name, files in folders.items()}
    open_bytes = {
        split: sum(weights.values()) * size / sum(sizes.values()) for split, size in sizes.items()
    }
    shares: dict[str, list[Path]] = {split: [] for split in sizes}
    for name in sorted(folders, key=lambda name: (-weights[name], name)):
        split = max(open_bytes, key=lambda split: open_bytes[split])
        open_bytes[split] -= weights[name]
        shares[split] += folders[name]
    return {split: sorted(files, key=lambda f: _digest(f, root)) for split, files in shares.items()}


def _digest(file: Path, root: Path) -> str:
    return sha256(file.relative_to(root).as_posix().encode()).hexdigest()


def _fresh_texts(files: Iterable[Path], mask: re.Pattern[str], seen: set[str]) -> Iterator[str]:
    for file in files:
        for text in docstrings(file.read_text(encoding="utf-8", errors="replace")):
            plain = mask.sub(MASK, opening(text))[:MAX_CHARACTERS]
            if len(plain) >= MIN_CHARACTERS and plain.lower() not in seen:
                seen.add(plain.lower())
                yield plain
