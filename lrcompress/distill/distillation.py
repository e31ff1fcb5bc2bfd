"""State of a distillation: its settings, its teacher, and the loss terms of each step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lrcompress.callbacks import trainer_state
from lrcompress.distill.cache import Cache, example_keys
from lrcompress.distill.capture import Call, CallCapture, OutputCapture
from lrcompress.distill.losses import LOGITS, DistillationLoss, Features
from lrcompress.distill.teacher import Teacher, copy_model, load_copy, read_weights
from lrcompress.errors import ObservationError, SettingError, ShapeError, nearest
from lrcompress.schedules import Piecewise
from lrcompress.statistics.masks import MaskSource, batch_mask, check_mask

START = "start"
Terms = list[tuple[DistillationLoss, float]]


class Distillation:
    """State of one distillation; the arguments are those of ``Distilled``."""

    def __init__(
        self,
        teacher: str | nn.Module,
        losses: Sequence[DistillationLoss],
        task: object,
        call: str | None,
        logits: str | None,
        mask: MaskSource,
        teacher_dir: str | None,
        cache: str | None,
    ) -> None:
        self.source = teacher
        self.losses = losses
        self.task = Piecewise.parse(task, "task")
        check_mask(mask)
        self.logits, self.mask = logits, mask
        self.folder = teacher_dir
        self.cache = Cache(cache) if cache is not None else None
        self.tap = CallCapture(call, logits)
        self.teacher: Teacher | None = None
        self.dry_run_done = False
        self._layers: dict[int, tuple[str, ...]] = {}
        self._checked: set[int] = set()
        _check_source(teacher)
        if not losses:
            raise SettingError(
                "losses is empty: nothing would be distilled; give some, such as "
                "[lrcompress.distill.Logits()], or train the module without Distilled"
            )
        for loss in losses:
            if not isinstance(loss, DistillationLoss):
                raise SettingError(
                    f"losses are objects such as lrcompress.distill.Logits(), got {loss!r}"
                )

    def reset(self) -> None:
        """Reset the state at the beginning of a fit."""
        self.tap = CallCapture(self.tap.call, self.logits)
        self._layers, self._checked = {}, set()
        self.dry_run_done = False
        if self.source == START:
            self.teacher = None

    # The teacher

    def freeze(self, student: nn.Module) -> None:
        """Make a copy of the student as it is now the teacher."""
        self._begin(student, copy_model(student), whole=True)

    def restore(self, student: nn.Module, module: nn.Module) -> None:
        """Use a teacher that was frozen before the run was interrupted."""
        self._begin(student, module, whole=True)

    def get_teacher(self, student: nn.Module) -> None:
        """Load a teacher that was given, or move the present one to the student's device."""
        if isinstance(self.source, nn.Module):
            self._begin(student, self.source, isinstance(self.source, pl.LightningModule))
        elif self.source != START and self.teacher is None:
            path = Path(self.source)
            module = load_copy(student, read_weights(path), str(path))
            self._begin(student, module, whole=True)
        elif self.teacher is not None:
            self.teacher.move_like_(student)

    def _begin(self, student: nn.Module, module: nn.Module, whole: bool) -> None:
        self.teacher = Teacher(module, whole=whole)
        self.teacher.move_like_(student)

    def record(self) -> dict[str, Any] | None:
        """Return the checkpoint's record of a frozen teacher; None if the teacher was given."""
        if self.source != START or self.teacher is None:
            return None
        return {"version": 1, "file": self.teacher.file, "hash": self.teacher.fingerprint}

    def save(self, folder: Path) -> None:
        """Write the teacher into a file of its own, unless it is there."""
        assert self.teacher is not None
        self.teacher.save(folder)

    # During a step

    def weights(self, trainer: pl.Trainer) -> tuple[float, Terms]:
        """Return the weight of the student's own loss, and the terms whose weight is not 0 now."""
        terms = [(loss, _weight(loss.weight, trainer)) for loss in self.losses]
        return _weight(self.task, trainer), [(loss, weight) for loss, weight in terms if weight]

    def counts(self, trainer: pl.Trainer) -> bool:
        """Return whether any term has a weight above 0 at any step of the run."""
        weights = [loss.weight for loss in self.losses]
        if any(weight.constant for weight in weights):
            return True  # spared the question how long the run is
        return any(weight.counts(*trainer_state.run_lengths(trainer)) for weight in weights)

    def step(
        self, student: pl.LightningModule, batch: Any, terms: Terms, run: Callable[[], Any]
    ) -> tuple[Any, list[Tensor]]:
        """Return what the student's own step gives, and the value of every term."""
        losses = [loss for loss, _ in terms]
        output, heard = self._run_captured(student, batch, losses, run)
        if heard is None:
            return None, []
        call, mine, mask = heard
        _check_graph(mine)
        theirs = self._teacher_features(student, call, mine, mask)
        return output, [self._value(student, loss, mine, theirs, mask) for loss in losses]

    def dry_run(self, student: pl.LightningModule, batch: Any, run: Callable[[], Any]) -> Any:
        """Return what the student's own step gives, after checking that every loss can run on it.

        A layer that a loss cannot find is so reported in the first step, and not after epochs of
        training, when there is a teacher.
        """
        output, heard = self._run_captured(student, batch, self.losses, run)
        if heard is not None:
            call, mine, mask = heard
            with torch.no_grad():
                self._compare(student, call, student.get_submodule(call.name))
                for loss in self.losses:
                    self._value(student, loss, mine, mine, mask)
            self.dry_run_done = True
        return output

    def _run_captured(
        self,
        student: pl.LightningModule,
        batch: Any,
        losses: Sequence[DistillationLoss],
        run: Callable[[], Any],
    ) -> tuple[Any, tuple[Call, Features, Tensor | None] | None]:
        """Return the output of a step; and its call, the features losses need, and the mask."""
        names = [self._names(student, loss) for loss in losses]
        needed = tuple(dict.fromkeys(name for some in names for name in some))
        tap = OutputCapture(student, self._tapped(needed))
        with ExitStack() as stack:
            stack.enter_context(self.tap.listening(student))
            stack.enter_context(tap.listening())
            output = run()
        if output is None:  # the student skips this batch
            return None, None
        call = self.tap.take()
        mine = self._features(tap.take(), call, needed)
        mask = self._mask(call, batch, required=any(loss.needs_mask for loss in losses))
        return output, (call, mine, mask)

    def _value(
        self,
        student: nn.Module,
        loss: DistillationLoss,
        mine: Features,
        theirs: Features,
        mask: Tensor | None,
    ) -> Tensor:
        names = self._names(student, loss)
        return loss({n: mine[n] for n in names}, {n: theirs[n] for n in names}, mask)

    def _names(self, student: nn.Module, loss: DistillationLoss) -> tuple[str, ...]:
        if id(loss) not in self._layers:
            self._layers[id(loss)] = loss.layers(student)
        return self._layers[id(loss)]

    def _tapped(self, needed: Iterable[str]) -> list[str]:
        """Return the submodules whose outputs to capture, with the logits' own if there is one."""
        names = [self.logits if name == LOGITS else name for name in needed]
        return list(dict.fromkeys(name for name in names if name is not None))

    def _features(
        self, outputs: Mapping[str, Tensor], call: Call, needed: Iterable[str]
    ) -> dict[str, Tensor]:
        logits = call.logits if self.logits is None else outputs.get(self.logits)
        if logits is None and LOGITS in needed:
            raise ObservationError(
                f"the call of {call.name or 'the module itself'!r} gives a "
                f"{type(call.output).__name__} without .logits; name the submodule that "
                "returns them with logits="
            )
        return {n: outputs[n] if n != LOGITS else cast("Tensor", logits) for n in needed}

    def _mask(self, call: Call, batch: Any, *, required: bool) -> Tensor | None:
        if self.mask is None:
            return None
        for source in (call.kwargs, *call.args, batch):
            if isinstance(source, Mapping) and self.mask in source:
                batch = source
                break
        check = required and self.teacher is None  # in the dry run, for no step may wait
        mask, complaint = batch_mask(
            batch, self.mask, "Distilled", check_values=check, check_shape=required
        )
        if complaint is not None and required:
            raise ObservationError(complaint)
        return mask

    @torch.no_grad()
    def _teacher_features(
        self, student: nn.Module, call: Call, mine: Features, mask: Tensor | None
    ) -> Features:
        """Return the teacher's features for a call, from the cache or from the teacher.

        Raises:
            ObservationError: if the cache cannot store them per example.
        """
        assert self.teacher is not None
        self._compare(student, call, self.teacher.submodule(call.name))
        if self.cache is None:
            return self._run(call, tuple(mine))
        size = next(iter(mine.values())).shape[0]
        for name, feature in mine.items():
            if feature.shape[0] != size:
                raise ObservationError(
                    f"the cache keeps features per example, but {_shown(name)} is "
                    f"{tuple(feature.shape)}, not {size} examples; leave cache= out"
                )
        keys = example_keys(call, size, mask, f"{self.teacher.fingerprint} {sorted(mine)}")
        known: Features | None = self.cache.read(keys, mine, mask)
        if known is None:
            known = self._run(call, tuple(mine))
            self.cache.write(keys, known, mask)
        return known

    def _run(self, call: Call, needed: Sequence[str]) -> dict[str, Tensor]:
        assert self.teacher is not None
        model = self.teacher.submodule(call.name)
        tap = OutputCapture(model, self._tapped(needed), _prefix(call))
        with tap.listening():
            output = model(*call.args, **call.kwargs)
        return self._features(tap.take(), Call(call.name, (), {}, output), needed)

    def _compare(self, student: nn.Module, call: Call, called: nn.Module) -> None:
        """Check once for every loss that it finds the same layers in student and teacher.

        Args:
            student: the whole student.
            call: of the student.
            called: the part of the teacher that repeats it.

        Raises:
            SettingError: if one looks at layers that are not in what is called.
        """
        for loss in self.losses:
            if id(loss) in self._checked or id(loss) not in self._layers:
                continue
            names = [name for name in self._layers[id(loss)] if name != LOGITS]
            outside = [name for name in names if not name.startswith(_prefix(call))]
            if outside:
                raise SettingError(
                    f"layer {outside[0]!r} is not in {call.name!r}, whose call is repeated on the "
                    "teacher; choose layers in it, or another call="
                )
            loss.check(student, called, _prefix(call))
            self._checked.add(id(loss))

    def check_vocabulary(self, student: pl.LightningModule, tokenizer: object) -> None:
        """Check that the teacher has the vocabulary size of student and tokenizer.

        Raises:
            ShapeError: if its embedding has another size than the student's.
            SettingError: if the data's tokenizer has more tokens than it.
        """
        if self.teacher is None or self.source == START:
            return
        mine, theirs = _vocabulary(student), _vocabulary(self.teacher.module)
        if mine is not None and theirs is not None and mine != theirs:
            raise ShapeError(
                f"the teacher has an input embedding of {theirs} tokens, the student one of "
                f"{mine}: distillation gives both the same token numbers; take a teacher with "
                "the student's tokenizer"
            )
        size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
        if theirs is not None and not isinstance(tokenizer, str) and size > theirs:
            raise SettingError(
                f"the data's tokenizer knows {size} tokens, the teacher {theirs}; "
                "take a teacher with the same tokenizer"
            )

    def labels(self) -> Iterator[str]:
        """Yield the name of each term in logs."""
        seen: dict[str, int] = {}
        for loss in self.losses:
            seen[loss.name] = seen.get(loss.name, 0) + 1
            number = seen[loss.name]
            yield f"distill_{loss.name}" + (f"_{number}" if number > 1 else "")


def _weight(weight: Piecewise, trainer: pl.Trainer) -> float:
    if weight.constant is not None:  # spared the question how long the run is
        return weight.constant
    return weight.at(trainer.global_step, *trainer_state.run_lengths(trainer))


def _check_source(teacher: object) -> None:
    if isinstance(teacher, nn.Module):
        return
    expected = "teacher is 'start', a checkpoint file or a module"
    if not isinstance(teacher, str):
        raise SettingError(f"{expected}, got {teacher!r}")
    path = Path(teacher)
    if teacher == START or path.is_file():
        return
    if path.is_dir():
        raise SettingError(
            f"{expected}, got the folder {teacher!r}; for a transformers model give a module "
            "that loads it, such as lrcompress.tasks.TextClassification(path=...)"
        )
    if not path.suffix:
        raise SettingError(f"{expected}, got {teacher!r}, which is none; nearest: {START}")
    files = [str(file) for file in path.parent.glob(f"*{path.suffix}") if file.is_file()]
    near = f"nearest: {nearest(teacher, files)}" if files else f"none is in {path.parent}"
    raise SettingError(f"{expected}, got {teacher!r}, a file that does not exist; {near}")


def _prefix(call: Call) -> str:
    """Return what the names of everything in the called submodule begin with."""
    return f"{call.name}." if call.name else ""


def _check_graph(features: Features) -> None:
    if torch.is_grad_enabled() and not any(f.requires_grad for f in features.values()):
        raise ObservationError(
            f"the student's {', '.join(map(_shown, features))} came without a gradient: is "
            "all before them frozen, or checkpointed with use_reentrant=True?"
        )


def _shown(name: str) -> str:
    return "logits" if name == LOGITS else repr(name)


def _vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens the input embedding has, if there is a plain one."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
        get = getattr(module, "get_input_embeddings", None)
        if get is not None:
            found = get()
            return found.num_embeddings if isinstance(found, nn.Embedding) else None
    return None
