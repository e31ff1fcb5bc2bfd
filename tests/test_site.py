"""The site: it builds without a warning, has every public name, and works from disk."""

import re
import subprocess
import sys
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lrcompress.cli.guide import topics

SOURCE = Path(__file__).parents[1] / ".docs"
PUBLIC = ("", ".callbacks", ".distill", ".nn", ".bench", ".export", ".tasks", ".report")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason="the site needs lrcompress[docs]")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W"]
    command += ["-d", str(out / "read"), str(SOURCE), str(out / "html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def entries(site: Path) -> set[str]:
    """Every name that the site has an entry of, from its inventory: four lines, then the rest."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


def names_of(module: str) -> list[tuple[str, Any]]:
    public = import_module(f"lrcompress{module}")
    names = [name for name in public.__all__ if name != "__version__"]
    return [(f"{public.__name__}.{name}", getattr(public, name)) for name in names]


def test_every_public_name_has_an_entry(site: Path) -> None:
    found = entries(site)
    names = [one for module in PUBLIC for one in names_of(module)]
    missing = []
    for name, value in names:
        own = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else name
        shortest = f"lrcompress.{name.rpartition('.')[2]}"
        if not {name, own, shortest} & found:
            missing.append(name)
    assert not missing


def test_every_page_of_the_guide_is_there(site: Path) -> None:
    pages = {path.stem for path in (site / "guide").glob("*.html")}
    assert {*topics(), "README"} == pages


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """From disk there is no server, and no net: pages, scripts and the index lie beside them."""
    index = (site / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(")
    assert "LowRankLinear" in index
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', text)
        assert not [one for pair in loaded for one in pair if "//" in one], page.name
