"""Short fits of a small tagger on the stand-in device, with every callback."""

import sys
from functools import partial
from pathlib import Path

from vtrainer import trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "callbacks"))
import short_runs
from short_runs import Loader, Tagger, callbacks, sentences, tagger

fit = partial(short_runs.fit, trainer)
__all__ = ["Loader", "Tagger", "callbacks", "fit", "sentences", "tagger", "trainer"]
