"""``lrcompress bench``: how fast and how large a model is, beside another or its dense form."""

import argparse
import copy
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel

from lrcompress.bench import BenchModel, OnnxModel, Run, TorchModel, compare
from lrcompress.bench.decoding import Decoding, GeneratingModel, compare_decoding
from lrcompress.bench.tables import bench_table, text_table
from lrcompress.bench.timing import one_thread
from lrcompress.errors import (
    NoMatchError,
    PlatformError,
    RecipeError,
    SettingError,
)
from lrcompress.export import load_pretrained, merge_dense
from lrcompress.nn import Replacement
from lrcompress.nn.decoding_layout import decoding_layout_
from lrcompress.report.tables import WIDTH
from lrcompress.tasks.locations import model_folder, named_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("eager", "compiled")
ONNX = "model.onnx"
TOKENIZERS = ("tokenizer*", "vocab*", "*.model")  # files of one


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; {' '.join(self.format_usage().split())}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lrcompress bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="folder of a model; with model.onnx in it, for onnxruntime")
    parser.add_argument("reference", nargs="?", help="another; by default the dense form of MODEL")
    parser.add_argument(
        "--shapes",
        type=_shapes,
        default=[(32, 128), (1, 32)],
        metavar="BATCHxLENGTH,…",
        help="by default 32x128,1x32",
    )
    parser.add_argument("--modes", type=_modes, default=["eager"], help="eager,compiled")
    parser.add_argument("--devices", type=lambda x: x.split(","), default=["cpu"], help="cpu,cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--rounds", type=_whole, default=20, help="calls of each, in turns")
    parser.add_argument(
        "--threads",
        type=_whole,
        help="of the CPU, by default as torch has it; of 1 its own time counts",
    )
    parser.add_argument(
        "--decode",
        type=_whole,
        metavar="TOKENS",
        help="generate so many after prompts of --shapes, with a cache: tokens a second",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="with --decode: show what each model makes of it; may be given several times",
    )
    parser.add_argument("--json", type=Path, help="file to write every figure to")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _shapes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected BATCHxLENGTH such as 32x128,1x32, got {text!r}")
    return [(int(one[1]), int(one[2])) for one in found if one]


def _modes(text: str) -> list[str]:
    found = text.split(",")
    if not set(found) <= set(MODES):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(MODES)}, got {text!r}")
    return found


def bench(options: Sequence[str]) -> None:
    """Measure a model, beside another one if there is one, and print what was found.

    Args:
        options: of the command line, after ``bench``.

    Raises:
        RecipeError: if an option is wrong.
        PlatformError: if a device is not there.
    """
    given = _parser().parse_args(options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself
    threads = torch.get_num_threads()
    for device in given.devices:
        _check_device(device)
    try:
        torch.set_num_threads(given.threads or threads)
        _measure(given)
    finally:
        torch.set_num_threads(threads)


def _measure(given: argparse.Namespace) -> None:
    first = _Model(given.model, given)
    second = _Model(given.reference, given, like=first) if given.reference else first.dense()
    models = [first] if second is None else [first, second]
    if len({model.onnx is None for model in models}) > 1:
        raise RecipeError("expected two models for torch or two for onnxruntime, got one of each")
    onnx = first.onnx is not None
    if given.decode is not None and (onnx or given.modes != ["eager"]):
        raise RecipeError("--decode generates with eager models of torch, got ONNX or --modes")
    if given.prompt and given.decode is None:
        raise RecipeError("--prompt is answered in so many tokens: give --decode TOKENS with it")
    prompts = [first.prompt(text, given.decode) for text in given.prompt]
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    if busy > 1 and not one_thread() and given.devices == ["cpu"]:
        _tell(
            f"this machine was busy in the last minute (load {busy:.1f}): beside other work "
            "ratios of several threads mean little; --threads 1 counts the thread's own time"
        )
    subjects: Sequence[BenchModel]
    runs: list[Run] | list[Decoding]
    subjects, runs = _calls(models, given) if given.decode is None else _decodings(models, given)
    texts = {
        text: {one.name: first.text(one.answer(ids.to(given.devices[-1]))) for one in subjects}  # type: ignore[attr-defined]
        for text, ids in zip(given.prompt, prompts, strict=True)
    }
    machine = _machine(given.devices)
    title = f"lrcompress bench: {machine}, {given.dtype}, {given.rounds} rounds"
    # figures that are cut say nothing: a line that is too long for the terminal wraps
    console = Console(width=max(WIDTH, Console().width))
    console.print(bench_table(subjects, runs, title))
    if texts:
        console.print(text_table(texts))
    if given.json is not None:
        sizes = {
            one.name: {"parameters": one.parameters, "stored_bytes": one.stored_bytes}
            for one in subjects
        }
        found = {"machine": machine, "dtype": given.dtype, "models": sizes}
        found |= {"texts": texts} if texts else {}
        text = json.dumps(found | {"runs": [run.to_dict() for run in runs]}, indent=1)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n", encoding="utf-8")


def _tell(text: str) -> None:
    """Say what is being done, apart from the result."""
    sys.stderr.write(f"lrcompress bench: {text}\n")


def _calls(
    models: Sequence["_Model"], given: argparse.Namespace
) -> tuple[Sequence[BenchModel], list[Run]]:
    """Measure one call of each model, in every mode on every device."""
    onnx = models[0].onnx is not None
    subjects: list[BenchModel] = []
    runs = []
    for device in ["cpu"] if onnx else given.devices:
        for mode in ["onnx"] if onnx else given.modes:
            for batch, length in given.shapes:
                _tell(f"{batch} × {length}, {mode} on {device}: {given.rounds} calls of each model")
                torch.compiler.reset()  # a graph of its own for every shape
                subjects = [model.model_to_measure(mode, device) for model in models]
                inputs = models[0].inputs(batch, length, device)
                other = subjects[1] if subjects[1:] else None
                runs.append(compare(subjects[0], other, inputs, device=device, rounds=given.rounds))
    return subjects, runs


def _decodings(
    models: Sequence["_Model"], given: argparse.Namespace
) -> tuple[Sequence[BenchModel], list[Decoding]]:
    """Measure how fast each model generates, on every device."""
    subjects: list[GeneratingModel] = []
    runs = []
    for device in given.devices:
        for batch, length in given.shapes:
            _tell(f"{batch} × {length} on {device}: {given.decode} tokens, {given.rounds} times")
            inputs = models[0].inputs(batch, length, device, given.decode + 1)
            subjects = [model.model_to_decode(given.decode, device) for model in models]
            other = subjects[1] if subjects[1:] else None
            how = {"device": device, "rounds": given.rounds}
            runs.append(compare_decoding(subjects[0], other, inputs, **how))
    return subjects, runs


class _Model:
    """A model of the command line: a folder of ``transformers``, or a file of onnxruntime.

    Args:
        place: folder, ``package:…`` or file.
        given: the options.
        like: a model whose class it is loaded as, if it is the same architecture.
    """

    def __init__(self, place: str, given: argparse.Namespace, like: "_Model | None" = None) -> None:
        self.name, self.threads = place, torch.get_num_threads()
        self.onnx: Path | None = None
        self.model: nn.Module | None = None
        self.stored_bytes: int | None = None
        path = Path(place)
        self.path = path = path if path.suffix == ".onnx" else Path(model_folder(place))
        if path.is_dir() and (path / ONNX).is_file():
            path = path / ONNX
        if path.suffix == ".onnx":
            if not path.is_file():
                raise NoMatchError(f"there is no file {path}")
            self.onnx = path
            self.config = AutoConfig.from_pretrained(path.parent)
            return
        with named_source(place):
            self.config = AutoConfig.from_pretrained(path)
        self.model = _loaded(path, self.config, DTYPES[given.dtype], like)
        if path.is_dir():
            self.stored_bytes = sum(x.stat().st_size for x in path.glob("*.safetensors")) or None

    def dense(self) -> "_Model | None":
        """Return the model with plain layers; None if it has no others."""
        if self.model is None or not any(isinstance(m, Replacement) for m in self.model.modules()):
            return None
        plain = copy.copy(self)
        plain.name, plain.stored_bytes = "its dense form", None
        plain.model = merge_dense(self.model)
        return plain

    def model_to_measure(self, mode: str, device: str) -> BenchModel:
        if self.onnx is not None:
            return OnnxModel(self.name, self.onnx, self.threads)
        assert self.model is not None
        model = self.model.to(device)
        return TorchModel(self.name, model, self.stored_bytes, compiled=mode == "compiled")

    def model_to_decode(self, tokens: int, device: str) -> GeneratingModel:
        assert self.model is not None
        model = self.model.to(device)
        decoding_layout_(model)
        return GeneratingModel(self.name, model, tokens, self.stored_bytes)

    def inputs(self, batch: int, length: int, device: str, more: int = 0) -> dict[str, Tensor]:
        """Return random tokens without padding, where ``more`` follow.

        Raises:
            SettingError: if the model reads no tokens, or not so many.
        """
        words = getattr(self.config, "vocab_size", None)
        if words is None:
            kind = self.config.model_type
            raise SettingError(f"bench makes up token ids, which a {kind} model does not read")
        self._check_length(length, more)
        ids = torch.randint(words, (batch, length), generator=torch.Generator().manual_seed(0))
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.config.is_encoder_decoder:
            found["decoder_input_ids"] = ids
        return {name: x.to(device) for name, x in found.items()}

    def _check_length(self, length: int, more: int) -> None:
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and length + more > most:
            then = f" and {more} more" if more else ""
            raise SettingError(
                f"{self.name} reads at most {most} tokens, got length {length}{then}"
            )

    @cached_property
    def _tokenizer(self) -> Any:
        files = [x for kind in TOKENIZERS for x in self.path.glob(kind)]
        if self.path.is_dir() and not files:  # transformers would make up an empty one
            raise SettingError(f"--prompt: {self.name} has no tokenizer to read it with")
        return AutoTokenizer.from_pretrained(self.path)

    def prompt(self, text: str, tokens: int) -> BatchEncoding:
        """Return a prompt as tokens; with a chat template, as what a user says.

        Raises:
            SettingError: if there is no tokenizer, or the model reads no so many tokens.
        """
        kinds = {"return_tensors": "pt", "return_dict": True}
        if self._tokenizer.chat_template:
            said = [{"role": "user", "content": text}]
            found = self._tokenizer.apply_chat_template(said, add_generation_prompt=True, **kinds)
        else:
            found = self._tokenizer(text, return_tensors="pt")
        kept = {name: found[name] for name in ("input_ids", "attention_mask")}
        self._check_length(kept["input_ids"].shape[1], tokens)
        return BatchEncoding(kept)

    def text(self, ids: Tensor) -> str:
        """Return what tokens say."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _loaded(path: Path, config: Any, dtype: torch.dtype, like: _Model | None) -> PreTrainedModel:
    if getattr(config, "quantization_config", None) is not None:
        return load_pretrained(path, dtype=dtype)
    name = next(iter(config.architectures or []), "")
    kind: Any = getattr(transformers, name, AutoModel)
    if like is not None and like.model is not None and like.config.model_type == config.model_type:
        kind = type(like.model)  # a new head costs as much as a trained one
    model = kind.from_pretrained(path, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise RecipeError(f"--devices: expected some of cpu,cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise PlatformError("--devices: torch finds no CUDA device here; leave cuda out")


def _machine(devices: Sequence[str]) -> str:
    threads = (
        "1 CPU thread's own time" if one_thread() else f"{torch.get_num_threads()} CPU threads"
    )
    found = f"torch {torch.__version__}, {threads}"
    return found + (f", {torch.cuda.get_device_name()}" if "cuda" in devices else "")
