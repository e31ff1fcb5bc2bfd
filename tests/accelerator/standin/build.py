"""Compile device.cpp with g++, once per torch version; some 20 seconds."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")


def library() -> Path:
    """Return the compiled library, from the cache if it is there; several processes may ask."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path(tempfile.gettempdir()) / "lrcompress"))
    folder = folder / f"standin-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    done = folder / f"{key}.so"
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            part = done.with_suffix(".part")
            subprocess.run(_command(part), check=True)
            part.replace(done)
    return done


def _command(out: Path) -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    folders = cpp_extension.library_paths()
    linked = [*(f"-L{path}" for path in folders), *(f"-Wl,-rpath,{path}" for path in folders)]
    given = ["-O1", "-std=c++20", "-shared", "-fPIC", abi, *include, str(SOURCE), *linked]
    return ["g++", *given, "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(out)]
