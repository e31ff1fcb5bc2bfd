"""Run the tests with the oldest or the newest versions that pyproject.toml allows.

``python tests/versions.py oldest --python 3.11 tests/nn`` makes the environment
``.versions/oldest-3.11``, or brings the one that is there up to date, and runs pytest in it
with what else is given. It needs ``uv`` (``pip install uv``), which finds or fetches that Python.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of what is not named in pyproject.toml the newest that fits is taken: the oldest of all never
# worked together, and nobody has it.
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}


def environment(which: str, python: str, extra: list[str]) -> Path:
    """Make the environment and return its folder."""
    folder = ROOT / ".versions" / f"{which}-{Path(python).name}"
    uv("venv", "--quiet", "--allow-existing", "--python", python, str(folder))
    wanted = ["--editable", f"{ROOT}[demo,test]", *extra]
    options = ["--resolution", RESOLUTIONS[which], "--upgrade", "--python", str(folder)]
    uv("pip", "install", *options, *wanted)
    return folder


def uv(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "uv", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("which", choices=RESOLUTIONS)
    parser.add_argument("--python", default="3.11", help="3.11, 3.12, 3.13, or a path")
    parser.add_argument(
        "--with",
        dest="extra",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help="also install this, such as torch==2.13.0 where the newest would take gigabytes",
    )
    options, arguments = parser.parse_known_args()
    folder = environment(options.which, options.python, options.extra)
    tests = [str(folder / "bin" / "python"), "-m", "pytest", *arguments]
    unconnected = os.environ | {"HF_HUB_OFFLINE": "1"}
    sys.exit(subprocess.run(tests, cwd=ROOT, env=unconnected).returncode)


if __name__ == "__main__":
    main()
