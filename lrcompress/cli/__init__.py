"""Compress language models by low-rank factors while Lightning fine-tunes them.

usage: lrcompress VERB --config RECIPE [--KEY VALUE ...]   (or lrcompress --version)

  fit        train as the recipe says, and compress on the way
  validate   run once over the validation data
  test       run once over the test data
  plan       print which layers the recipe would replace, without training
  factor     factor a checkpoint between two fits, for strategies that cannot on the way:
             lrcompress factor --config RECIPE --checkpoint CKPT --out FACTORED
  export     write the model of a checkpoint, for transformers or as one graph (--format):
             lrcompress export CKPT FOLDER --config RECIPE
  bench      measure time, memory and size of a model, beside another or its dense form:
             lrcompress bench FOLDER [FOLDER] --shapes 32x128,1x32
  report     write the page of a run, or of several: lrcompress report RUN [RUN ...] --out PAGE
  guide      print a page of the guide: lrcompress guide [TOPIC]

A recipe is a LightningCLI file with trainer, model and data; every key of it can be given on
the command line too, and what comes later wins. `lrcompress VERB --help` lists all of them.

  lrcompress fit --config recipe.yaml
  lrcompress fit --config recipe.yaml --model.path bert-base-uncased --trainer.max_epochs 1
Faults in the recipe itself end with exit code 2, later ones with 1; LRCOMPRESS_DEBUG=1 shows where.
"""

import io
import os
import sys
import traceback
from importlib import import_module

from lrcompress import __version__
from lrcompress.cli.guide import guide
from lrcompress.errors import LRCompressError, RecipeError
from lrcompress.report.formatting import PLAIN


def main(args: list[str] | None = None) -> int:
    """Run ``lrcompress`` with the arguments, by default those of the process.

    Returns:
        The exit code: 0, 2 after an error in the recipe, 1 after any other.
    """
    args = sys.argv[1:] if args is None else args
    _replace_unprintable()
    if not args or args[0] in {"-h", "--help"}:
        sys.stdout.write(f"{__doc__}\n")
        return 0 if args else 2
    if args == ["--version"]:
        sys.stdout.write(f"lrcompress {__version__}\n")
        return 0
    try:
        if args[0] == "guide":
            guide(args[1:])
        else:  # only now, for torch and Lightning take seconds
            import_module("lrcompress.cli.verbs").run(args)
    except (LRCompressError, OSError) as error:
        if os.environ.get("LRCOMPRESS_DEBUG") == "1":
            traceback.print_exc()
        sys.stderr.write(f"lrcompress: error: {error}\n")
        return 2 if isinstance(error, RecipeError) else 1
    return 0


def _replace_unprintable() -> None:
    """Let a console that lacks characters of help and tables show others in their place."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors in ("strict", "surrogateescape"):
        out.reconfigure(errors=PLAIN)
