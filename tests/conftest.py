"""Fixtures that more than one folder of tests uses."""

import functools
import importlib.metadata
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import lightning as L
import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir
from lightning.fabric.utilities import registry
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = (
    *("the", "a", "of", "in", "and", "was", "for", "with", "not", "very", "more", "most", "to"),
    *("film", "movie", "story", "plot", "music", "actor", "scene", "love", "fun", "life", "time"),
    *("good", "bad", "great", "awful", "fine", "dull", "funny", "sad", "warm", "cold", "avoid"),
)

# The same few examples in every run, and nothing kept beside the tests
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=20, database=None
)
hypothesis.settings.load_profile("same")

# Each Trainer reads the metadata of all installed packages, which takes longer than a step.
registry.entry_points = functools.cache(importlib.metadata.entry_points)


@pytest.fixture
def fails_at_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Let the first call of a function of ``torch.linalg`` fail; returns what it is called with."""

    def of(name: str) -> list[Any]:
        plain, calls = getattr(torch.linalg, name), []

        def gives_up(matrix: torch.Tensor, **given: Any) -> Any:
            calls.append(matrix)
            if len(calls) == 1:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return plain(matrix, **given)

        monkeypatch.setattr(torch.linalg, name, gives_up)
        return calls

    return of


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what ``datasets`` writes out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="session")
def free_port() -> Callable[[], str]:
    return lambda: next(PORTS)


def unused_ports() -> Iterator[str]:
    """Each once; below those that the system hands out, in a thousand of this worker's own."""
    first = 10_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.SystemRandom().sample(range(first, first + 1000), 1000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                yield str(port)


PORTS = unused_ports()


# One process imports everything, which takes longer than most scripts, and then becomes many
# for each script it is told of. Frozen objects are not gone through when one of those ends.
FORK = """
import gc, json, os, runpy, sys
import lightning.pytorch.cli, lrcompress.callbacks, lrcompress.distill
gc.freeze()
for line in sys.stdin:
    script, count, environment = json.loads(line)
    started = []
    for number in range(count):
        started.append(os.fork())
        if not started[-1]:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{script}.{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
            os.environ.clear()
            os.environ.update(environment | {"RANK": str(number), "LOCAL_RANK": str(number)})
            os.chdir(os.path.dirname(script))
            runpy.run_path(script, run_name="__main__")
            sys.exit()
    ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    print(json.dumps(ended), flush=True)
"""


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., list[str]]]:
    """Run a script in several processes of one group; return what each printed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **streams) as server:
        yield functools.partial(run_processes, server)


def run_processes(
    server: subprocess.Popen[str], script: Path, count: int, *codes: int
) -> list[str]:
    """Run a script in ``count`` processes that end with these codes; by default all with 0."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": next(PORTS), "WORLD_SIZE": str(count)}
    group |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for number in range(count):
        for name in ("out", "err"):
            Path(f"{script}.{number}.{name}").write_text("")
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps([str(script), count, os.environ | group]) + "\n")
    server.stdin.flush()
    ended = json.loads(server.stdout.readline())
    told, errors = (
        [Path(f"{script}.{number}.{name}").read_text() for number in range(count)]
        for name in ("out", "err")
    )
    shown = "\n".join(error[-2500:] for error in errors)
    assert ended == [*(codes or [0] * count)], shown
    return told


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT (2 layers, hidden 32, no dropout) and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BART (1 layer a side, width 16, no dropout) and the tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_bart")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{key}": n for side in sides for key, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {f"{side}_attention_heads": 2 for side in sides}
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    ends = {"bos_token_id": first, "decoder_start_token_id": first, "eos_token_id": last}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            max_position_embeddings=64,
            dropout=0.0,
            pad_token_id=tokenizer.pad_token_id,
            forced_eos_token_id=last,
            **sizes,
            **heads,
            **ends,
        )
        BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS, *".,!?'-"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    # as in MiniLM's tokenizer.json: every text padded to a fixed length unless switched off
    tokenizer.enable_padding(length=32)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(*callbacks: L.Callback, every_step: bool = False, **kwargs: Any) -> L.Trainer:
        saving = ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
        )
        held = [*callbacks, *([saving] if every_step else [])]
        defaults: dict[str, Any] = {
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": every_step,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(callbacks=held, **(defaults | kwargs))

    return make


WAITS = {"nonzero", "_local_scalar_dense", "item", "is_nonzero", "masked_select", "equal"}
WAITS |= {"_unique2", "unique_dim", "unique_consecutive", "bincount", "histc"}


class NoWaits(TorchDispatchMode):
    """Fails where an operation would have to wait for a GPU to know its result's size or value."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            found = {index.dtype for index in args[1] if index is not None}
            assert not found & {torch.bool, torch.uint8}, f"{name} by truth values waits"
        return func(*args, **kwargs or {})


@pytest.fixture
def no_waits() -> type[NoWaits]:
    """A context that fails where a GPU would be waited for, forward and backward."""
    return NoWaits
