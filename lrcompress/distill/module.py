"""Knowledge distillation for any LightningModule, whose class is extended in place."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from types import new_class
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lrcompress.callbacks import compatibility, trainer_state
from lrcompress.callbacks.trainer_state import TEACHER
from lrcompress.distill.distillation import START, Distillation
from lrcompress.distill.losses import DistillationLoss, Logits, Weight
from lrcompress.distill.teacher import reload
from lrcompress.errors import CheckpointError, PlatformError, SettingError
from lrcompress.statistics.masks import MASK, MaskSource

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy")


_CLASSES: dict[type[pl.LightningModule], "type[Distilled]"] = {}


class _InPlace:
    """Makes no object, but extends the class of the one it is given.

    It is no part of ``Distilled`` because jsonargparse would read the arguments off it.
    """

    def __new__(cls, student: Any = None, *_: Any, **__: Any) -> "_InPlace":
        if cls is not Distilled:  # rebuilt by pickle or deepcopy, which set its state themselves
            return super().__new__(cls)
        _check_student(student)
        student.__class__ = distilled_class(type(student))
        return cast("_InPlace", student)


class Distilled(_InPlace, pl.LightningModule):
    """Knowledge distillation of a LightningModule: the loss is ``task·L_task + Σ weight_i·L_i``.

    The object handed over is the object returned: its class is extended in place, as
    ``torch.nn.utils.parametrize`` does it, so that parameter names, checkpoints,
    hyperparameters, optimizers, logging, validation and testing are the student's own. Only
    ``training_step`` adds to the loss. :meth:`undistilled` gives the object its own class back.

    The teacher is called as the student's ``training_step`` calls its model: on the same
    arguments, in evaluation mode, without gradients, under the same autocast. It stands outside
    the module tree: in no state dict, no optimizer, no process group.

    By default it is the student itself at the moment its compression starts; until then
    the loss is the student's own. Checkpoints name that teacher, and its weights go into one
    file of their own beside them, written with the first checkpoint, so that a run that is
    resumed ends as the uninterrupted one.

    A run logs each part as ``distill_task``, ``distill_logits`` and so on, without weights.

    Args:
        student: the module to train, with automatic optimization.
        teacher: ``start``; a checkpoint file of the same module; or another module, of
            which, if it is a LightningModule, the same submodule is called as of the student,
            and otherwise the module itself. It is frozen, and moved to the student's device and
            dtype. Under FSDP2 the first two are sharded as the student is; a module is not.
        losses: what to learn from the teacher; by default ``[Logits()]``.
        task: the weight of the student's own loss, a number or a schedule as for the losses.
        call: the submodule whose call in ``training_step`` is repeated on the teacher, empty for
            the module itself; by default the outermost one whose output is a tensor or has
            ``.logits``, or ``.start_logits`` and ``.end_logits``, each a choice of positions.
        logits: the submodule that returns the logits, if it is another one.
        mask: where a batch has its padding mask, 1 at tokens: a key (``text.mask`` for one
            within), an index or a function of the batch. ``~key``: nonzero at padding, as in
            torch's ``key_padding_mask``. None if nothing is padded.
        teacher_dir: folder for the file of a teacher that is frozen on the way; by default
            ``teachers`` in the trainer's ``default_root_dir``.
        cache: folder to keep the teacher's features in, per example, so that later epochs need
            not run it. It costs disk: all that the losses compare. Of use where the inputs
            are the same in every epoch; not under FSDP2, where all processes run it together.

    Raises:
        SettingError: if an argument is not what it may be; in a fit, if a loss compares layers
            outside the repeated call, if the tokenizer has more tokens than the teacher, or if a
            schedule does not fit the length of the run.
        PlatformError: as a fit begins, without automatic optimization, with a ``training_step``
            set on the object, under FSDP1, DeepSpeed or tensor parallelism, or with ``cache``
            under FSDP2; as compression starts, if the student cannot be copied.
        CheckpointError: in a fit, if the teacher's file is missing, damaged or of another model,
            or if it or the cache cannot be read or written.
        NoMatchError: in the first step, if ``call``, ``logits`` or a loss names no submodule.
        ObservationError: in a step, if not exactly one call gives the logits, if a compared
            layer is not called exactly once or comes without a gradient, or if a loss needs a
            mask that the batch does not have.
        LayerError: in a step, if a compared layer returns no tensor.
        ShapeError: in a fit, if student and teacher do not fit together.

    Cost:
        One forward pass of the teacher in each step in which a loss has a weight above 0, and
        the memory of its weights.

    Example:
        >>> class Student(pl.LightningModule):
        ...     def training_step(self, batch, batch_idx): ...
        >>> student = Student()
        >>> distilled = Distilled(student, task=0.5)
        >>> distilled is student, isinstance(student, Distilled), type(student).__name__
        (True, True, 'DistilledStudent')
        >>> type(distilled.undistilled()) is Student
        True
    """

    _student_class: type[pl.LightningModule]
    _distillation: Distillation

    def __init__(
        self,
        student: pl.LightningModule,
        teacher: str | nn.Module = START,
        losses: list[DistillationLoss] | None = None,
        task: Weight = 0.5,
        call: str | None = None,
        logits: str | None = None,
        mask: MaskSource = MASK,
        teacher_dir: str | None = None,
        cache: str | None = None,
    ) -> None:
        assert self is student, "a class made by Distilled is not called"
        losses = [Logits()] if losses is None else losses
        losses = [losses] if isinstance(losses, DistillationLoss) else losses
        with ExitStack() as failed:
            failed.callback(setattr, self, "__class__", self._student_class)
            if teacher is self:
                raise SettingError(
                    "teacher is the student itself, which would freeze it; teacher='start' takes "
                    "a copy of it, or make one with copy.deepcopy"
                )
            distillation = Distillation(
                teacher, losses, task, call, logits, mask, teacher_dir, cache
            )
            failed.pop_all()
        object.__setattr__(self, "_distillation", distillation)
        _make_hparams_its_own(self)

    def undistilled(self) -> pl.LightningModule:
        """Give the object its own class again and drop the teacher; return the object."""
        object.__delattr__(self, "_distillation")
        self.__class__ = self._student_class  # type: ignore[assignment]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return _rebuilt, (self._student_class,), *made[2:]

    @classmethod
    @override
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the student that a checkpoint holds, as its own class does.

        Raises:
            SettingError: if called on ``Distilled`` itself, which does not know that class.
        """
        if cls is Distilled:
            raise SettingError(
                "a checkpoint of a distilled run is one of the student's class: call "
                "load_from_checkpoint of that class"
            )
        return cls._student_class.load_from_checkpoint(*args, **kwargs)

    def on_compression_start(self) -> None:
        """Copy the student as it is now to be the teacher, with ``teacher="start"``.

        Does nothing if there is a teacher already. At the first step of a fit it warns: such a
        teacher was never fine-tuned. Callbacks that compress call it before they first change
        the structure; a callback of one's own may call it at any other moment between two steps.

        Raises:
            PlatformError: if the student cannot be copied.

        Cost:
            The memory of a copy of the student's weights.
        """
        own = getattr(super(), "on_compression_start", None)
        if own is not None:
            own()
        distillation = self._distillation
        if distillation.source == START and distillation.teacher is None:
            if self._trainer is not None and self.trainer.global_step == 0:
                rank_zero_warn(
                    "Distilled takes the model as it is at the first step for its teacher, before "
                    "any fine-tuning; let compression start later (at=), or give teacher= a "
                    "checkpoint"
                )
            distillation.freeze(self)

    # What Lightning calls

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            _refuse(self)
            self._distillation.reset()
        super().setup(stage)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._distillation.get_teacher(self)
        data = getattr(self.trainer, "datamodule", None)
        self._distillation.check_vocabulary(self, getattr(data, "tokenizer", None))

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._distillation.weights(self.trainer)  # a schedule that cannot be placed ends here
        if not self._distillation.counts(self.trainer):
            rank_zero_warn(
                "Distilled learns nothing from the teacher in this run: the weight of every loss "
                "is 0 at all of its steps"
            )

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._distillation.teacher is None:
            rank_zero_warn(
                "Distilled never had a teacher, and training was on the student's own loss: "
                "teacher='start' begins when a callback such as lrcompress.Factorize starts to "
                "compress; add one, or give teacher= a checkpoint or a module"
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        record = self._distillation.record()
        if record is not None:
            checkpoint[TEACHER] = record
            teacher = self._distillation.teacher
            if self.trainer.is_global_zero or (teacher is not None and teacher.sharded):
                self._distillation.save(self._teacher_folder)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.get(TEACHER)
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if record is not None and fitting and self._distillation.source == START:
            if record.get("version") != 1:
                raise CheckpointError(
                    f"expected {TEACHER} of version 1, got version {record.get('version')!r}"
                )
            # before anything gives the student the structure that the checkpoint needs
            self._distillation.restore(self, reload(self, self._teacher_folder, record))
        super().on_load_checkpoint(checkpoint)

    @property
    def _teacher_folder(self) -> Path:
        folder = self._distillation.folder
        return Path(self.trainer.default_root_dir) / "teachers" if folder is None else Path(folder)


def distilled_class(student_class: type[pl.LightningModule]) -> type[Distilled]:
    """Return the class of distilled modules of a class, always the same one."""
    if student_class in _CLASSES:
        return _CLASSES[student_class]

    @wraps(student_class.training_step)
    def training_step(self: Distilled, *args: Any, **kwargs: Any) -> Any:
        return _training_step(self, args, kwargs)

    namespace = {
        "_student_class": student_class,
        "training_step": training_step,
        "__module__": student_class.__module__,
        "__doc__": student_class.__doc__,
    }
    name = f"Distilled{student_class.__name__}"
    bases = (Distilled, student_class)
    made = new_class(name, bases, {}, lambda body: body.update(namespace))
    _CLASSES[student_class] = cast("type[Distilled]", made)
    return _CLASSES[student_class]


def _training_step(module: Distilled, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the student's own step and add to its loss."""

    def own() -> Any:
        return module._student_class.training_step(module, *args, **kwargs)

    distillation = module._distillation
    batch = args[0] if args else next(iter(kwargs.values()), None)
    if module._trainer is None:
        return own()
    if distillation.teacher is None:
        return own() if distillation.dry_run_done else distillation.dry_run(module, batch, own)
    task, terms = distillation.weights(module.trainer)
    if not terms:
        return _with_loss(own(), lambda loss: loss if task == 1 else task * loss)
    output, values = distillation.step(module, batch, terms, own)
    if output is None:
        return None

    def total(loss: Tensor) -> Tensor:
        _log(module, {"distill_task": loss})
        # not without it where task is 0: all parameters take part, as DDP expects
        return task * loss + sum(w * v for (_, w), v in zip(terms, values, strict=True))

    names = dict(zip(map(id, distillation.losses), distillation.labels(), strict=True))
    _log(module, {names[id(loss)]: v for (loss, _), v in zip(terms, values, strict=True)})
    return _with_loss(output, total)


def _with_loss(output: Any, change: Any) -> Any:
    """Return the output of a step with its loss changed."""
    if isinstance(output, Mapping):
        return {**output, "loss": change(output["loss"])}
    return None if output is None else change(output)


def _log(module: Distilled, values: Mapping[str, Tensor]) -> None:
    if not module.trainer.barebones:
        for name, value in values.items():
            module.log(name, value.detach())


def _rebuilt(student_class: type[pl.LightningModule]) -> Distilled:
    """Return an empty object of a distilled class, for pickle and deepcopy to fill."""
    made = distilled_class(student_class)
    return cast("Distilled", made.__new__(made))


def _check_student(student: object) -> None:
    if isinstance(student, Distilled):
        raise SettingError(
            f"this {type(student).__name__} is distilled already; give all losses at once, or "
            "call undistilled() on it first"
        )
    if not isinstance(student, pl.LightningModule):
        kinds = {base.__module__.partition(".")[0] for base in type(student).__mro__}
        twin = "; it is one of pytorch_lightning, import lightning instead"
        raise SettingError(
            f"student is a LightningModule of the package lightning, got a "
            f"{type(student).__name__}{twin if 'pytorch_lightning' in kinds else ''}"
        )
    if type(student).training_step is pl.LightningModule.training_step:
        raise SettingError(f"{type(student).__name__} has no training_step to add a loss to")


def _refuse(module: Distilled) -> None:
    if not module.automatic_optimization:
        raise PlatformError(
            "Distilled adds to the loss that training_step returns, and with "
            "automatic_optimization = False no one reads it; use automatic optimization"
        )
    if "training_step" in vars(module):
        raise PlatformError(
            "training_step was set on the module itself and hides the one that Distilled "
            "extends; define it in the class"
        )
    strategy = {base.__name__ for base in type(module.trainer.strategy).__mro__}
    for name in sorted(strategy.intersection(_SHARDED)):
        raise PlatformError(
            f"Distilled copies and calls the whole module on each rank, which {name} takes "
            "apart; use one device, DDP or FSDP2 (ModelParallelStrategy)"
        )
    if trainer_state.uses_fsdp2(module.trainer):
        compatibility.check_no_tensor_parallel(module.trainer.strategy, "Distilled")
        if module._distillation.cache is not None:
            raise PlatformError(
                "cache= spares a process its call of the teacher, for which the others, that hold "
                "parts of it, would wait; leave cache= out under FSDP2"
            )


def _make_hparams_its_own(module: Distilled) -> None:
    """Replace the hyperparameters that LightningCLI saved for this class by the student's."""
    given = module.hparams
    student = given.get("student")
    of_ours = str(given.get("_class_path", "Distilled")).rpartition(".")[2] == "Distilled"
    if "_instantiator" not in given or not of_ours or not isinstance(student, Mapping):
        return
    own = {
        "_class_path": student["class_path"],
        **(student.get("init_args") or {}),
        **(student.get("dict_kwargs") or {}),
        "_instantiator": given["_instantiator"],
    }
    for held in (vars(module)["_hparams"], vars(module)["_hparams_initial"]):
        held.clear()
        held.update(own)
