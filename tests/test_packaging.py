"""What an installation brings, and from where it is found."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from hatchling.builders.wheel import WheelBuilder

import lrcompress

ROOT = Path(__file__).parents[1]


def test_a_script_in_the_folder_above_the_clone_finds_the_package(tmp_path: Path) -> None:
    (tmp_path / "lrcompress" / "tests").mkdir(parents=True)  # what a clone looks like from there
    ask = "import lrcompress; print(lrcompress.Plan.__name__, lrcompress.__file__)"
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "Plan"


def test_the_wheel_holds_the_package_and_what_it_reads(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(ZipFile(wheel).namelist())
    package = ROOT / "lrcompress"
    wanted = {path for end in ("*.py", "*.html", "*.md", "py.typed") for path in package.rglob(end)}
    assert {str(path.relative_to(ROOT)) for path in wanted} <= names
    assert f"lrcompress-{lrcompress.__version__}.dist-info/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {
        "lrcompress",
        f"lrcompress-{lrcompress.__version__}.dist-info",
    }
