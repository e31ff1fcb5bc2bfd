"""The frozen teacher: outside the student's module tree, saved in a file of its own."""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrcompress.callbacks import fsdp
from lrcompress.distributed import ONE_PROCESS
from lrcompress.errors import CheckpointError, NoMatchError, PlatformError, nearest
from lrcompress.files import atomic_write
from lrcompress.structure.checkpoint import read_lightning_checkpoint
from lrcompress.structure.plan import restore_structure

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Teacher:
    """A frozen model in evaluation mode; no ``nn.Module`` itself, so no module tree holds it.

    Args:
        module: the model, frozen in place.
        whole: whether it is a model like the whole student, so that the same submodule is
            called; otherwise the model itself is called.
    """

    def __init__(self, module: nn.Module, *, whole: bool) -> None:
        self.module = module.eval().requires_grad_(False)
        self.whole = whole
        self._fingerprint: str | None = None

    def submodule(self, name: str) -> nn.Module:
        """Return the module to call where the student calls its submodule of that name.

        Raises:
            NoMatchError: if the teacher has no such submodule.
        """
        if not self.whole:
            return self.module
        try:
            return self.module.get_submodule(name)
        except AttributeError:
            names = [known for known, _ in self.module.named_modules() if known]
            raise NoMatchError(
                f"the teacher, a {type(self.module).__name__}, has no submodule {name!r} to call; "
                f"nearest: {nearest(name, names)}"
            ) from None

    def move_like_(self, student: nn.Module) -> None:
        """Move to the student's device and dtype."""
        floating = [p for p in student.parameters() if p.is_floating_point()]
        if floating:
            self.module.to(device=floating[0].device, dtype=floating[0].dtype)
            self.module.eval()

    @property
    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes and values of all weights."""
        if self._fingerprint is None:
            self._fingerprint = _hash(_tensors(self.module))
        return self._fingerprint

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of it, so that only all together can read it."""
        return fsdp.is_sharded(self.module)

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"teacher-{self.fingerprint[:16]}.safetensors"

    def save(self, folder: Path) -> None:
        """Write the weights into a file of the folder, atomically.

        To be called by the first process; where the teacher is sharded, by all.

        Raises:
            CheckpointError: if they cannot be written, as on a full disk.
        """
        path = folder / self.file
        processes = fsdp.ShardedProcesses.of() if self.sharded else ONE_PROCESS
        if not processes.run_on_first(lambda: not path.exists()):
            return
        tensors: dict[str, Tensor] = {}
        for name, tensor in _tensors(self.module).items():
            complete = fsdp.full_tensor(tensor).cpu()
            if processes.index == 0:
                tensors[name] = complete.clone()
        if processes.index:
            return
        try:
            with atomic_write(path) as passing:
                save_file(tensors, passing)
        except SafetensorError as error:
            raise CheckpointError(f"the teacher cannot be written to {path}: {error}") from error


def copy_model(student: nn.Module) -> nn.Module:
    """Return a copy of a module: its weights and structure, but no hook, graph or distillation.

    Of a module that FSDP2 has sharded the copy is sharded alike: no process holds all of it.

    Raises:
        PlatformError: if something in the module cannot be copied.
    """
    made = _copied(student)
    if not fsdp.is_sharded(student):
        return made
    return fsdp.shard_like_(made, student, _tensors(student))


def _copied(student: nn.Module) -> nn.Module:
    """Return a copy; of a sharded module one on the meta device, neither sharded nor filled.

    Raises:
        PlatformError: if something in the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    if "_distillation" in vars(student):
        memo[id(vars(student)["_distillation"])] = None
    for module in student.modules():
        held = [module.__dict__[name] for name in _HOOKS if name in module.__dict__]
        memo |= {id(hooks): OrderedDict() for hooks in held}
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    try:
        with fsdp.deepcopy_allowed(student) as given:
            made = copy.deepcopy(student, memo | given)
    except (RuntimeError, TypeError) as error:
        raise PlatformError(
            f"{type(student).__name__} cannot be copied as its own teacher: {error}; "
            "give a checkpoint or another module as teacher="
        ) from error
    vars(made).pop("_distillation", None)
    made.__class__ = getattr(made, "_student_class", type(made))
    return made


def load_copy(student: nn.Module, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Return a copy of the student in the structure and with the weights of ``tensors``.

    Raises:
        CheckpointError: if these are not the weights of such a module.
        PlatformError: if something in the student cannot be copied.
    """
    module = restore_structure(_copied(student), tensors)
    own = _tensors(module)
    embeddings = [f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Embedding)]
    for name in sorted(
        own.keys() & tensors.keys(), key=lambda name: (name not in embeddings, name)
    ):
        here, there = tuple(own[name].shape), tuple(tensors[name].shape)
        if here != there:
            kind = "another vocabulary: its" if name in embeddings else "other sizes or labels:"
            raise CheckpointError(
                f"the teacher {source} has {kind} {name!r} is {there}, in the student {here}; "
                "take a teacher that was trained with the student's tokenizer and labels"
            )
    differ = sorted(own.keys() ^ tensors.keys())
    if differ:
        where = "only in the file" if differ[0] in tensors else "only in the model"
        raise CheckpointError(
            f"the teacher {source} is no checkpoint of a {type(module).__name__}: "
            f"{differ[0]!r} is {where}, one of {len(differ)} names that differ"
        )
    if fsdp.is_sharded(student):
        return fsdp.shard_like_(module, student, tensors)
    module.load_state_dict(tensors, strict=False)
    return module


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a Lightning checkpoint or a safetensors file.

    Raises:
        CheckpointError: if it cannot be read, or holds none.
    """
    if path.suffix == ".safetensors":
        return read_file(path)
    try:
        state = read_lightning_checkpoint(path)["state_dict"]
    except CheckpointError as error:
        raise CheckpointError(f"the teacher {error}") from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: if it is none, or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the teacher {path} cannot be read: {error}") from error


def reload(student: nn.Module, folder: Path, record: Mapping[str, str]) -> nn.Module:
    """Return the teacher that a checkpoint names, from its own file.

    Args:
        student: a module of the teacher's class.
        folder: where the file is.
        record: ``file`` and ``hash``, as the checkpoint holds them.

    Raises:
        CheckpointError: if the file is missing or is not the one meant.
    """
    path = folder / record["file"]
    way_out = "put it back, or name the folder that holds it as teacher_dir="
    if not path.is_file():
        raise CheckpointError(
            f"the checkpoint was written by a run whose teacher is in {record['file']!r}, which "
            f"is not in {folder}; {way_out}"
        )
    tensors = read_file(path)
    if _hash(tensors) != record["hash"]:
        raise CheckpointError(
            f"{path} holds other weights than the teacher the checkpoint was written with; "
            f"{way_out}"
        )
    return load_copy(student, tensors, str(path))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(tensors):
        tensor = fsdp.full_tensor(tensors[name]).cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
