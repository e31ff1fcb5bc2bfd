"""Factor a checkpoint between two fits, for strategies that do not allow it during a fit."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer
from typing_extensions import override

from lrcompress.callbacks import trainer_state
from lrcompress.callbacks.factorize import Factorize
from lrcompress.callbacks.warmup import LearningRateWarmup, check_warmup
from lrcompress.engine.settings import check_device, check_present
from lrcompress.errors import CheckpointError, PlatformError, SettingError
from lrcompress.files import atomic_write
from lrcompress.report import Report
from lrcompress.schedules import Warmup
from lrcompress.structure.checkpoint import read_lightning_checkpoint
from lrcompress.structure.plan import restore_structure

VERSION = 1
_PRECISIONS: dict[torch.dtype | None, Any] = {torch.bfloat16: "bf16-true", torch.float64: "64-true"}
STATE = "lrcompress.StartFrom"  # the callback's key in a checkpoint


class StartFrom(pl.Callback):
    """Start a fit from weights that were factored between two fits, under any strategy.

    The module must have its layers once it is constructed: structure and weights are set in
    ``setup``, before a strategy shards or wraps it. A module that is built in ``configure_model``
    calls ``lrcompress.restore_structure(self, checkpoint)`` at the end of it, and loads the
    weights there. Optimizer and schedules are the new fit's own. In step ``k`` from 0 the
    learning rate is ``restart_scale · min(1, (k + 1) / restart_steps)`` times that of the
    schedules. ``report`` says what factoring did. In ``validate`` and ``test`` only the structure
    is set: the weights there may have been trained since.

    Args:
        checkpoint: What ``lrcompress factor`` wrote, or a checkpoint of a fit with this callback.
        restart_steps: Steps over which the learning rate rises, as a number or as a fraction of
            all steps.
        restart_scale: What the learning rate is multiplied by after the rise.

    Raises:
        SettingError: If an argument is not what it may be; in ``fit``, if ``restart_steps`` is a
            fraction and the number of steps is not known in advance.
        CheckpointError: In ``setup``: if the file cannot be read, was not written by
            ``lrcompress factor`` or such a fit, or does not belong to the module.
        PlatformError: In ``fit``: if the learning rate is to rise and an optimizer is none of
            torch.

    Example:
        >>> StartFrom("factored.ckpt", restart_steps=100).restart_scale
        1.0
    """

    def __init__(
        self, checkpoint: str, restart_steps: float = 0.05, restart_scale: float = 1.0
    ) -> None:
        super().__init__()
        check_warmup(restart_steps, restart_scale)
        self.checkpoint = checkpoint
        self.restart_steps, self.restart_scale = restart_steps, restart_scale
        self.report = Report()
        self._taken = 0
        self._warmup: LearningRateWarmup | None = None
        self._hooks = ExitStack()

    @property
    @override
    def state_key(self) -> str:
        return STATE

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        held = read_lightning_checkpoint(self.checkpoint)
        state = held.get("callbacks", {}).get(STATE)
        if state is None:
            raise CheckpointError(
                f"{self.checkpoint} was not factored between two fits; StartFrom takes what "
                "`lrcompress factor` wrote, or a checkpoint of a fit that StartFrom began"
            )
        self.load_state_dict(state)
        self._taken = 0
        if stage == "fit":
            load_weights_(pl_module, held, self.checkpoint)
        else:  # what is validated may have been trained since
            restore_structure(pl_module, held)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = self.restart_steps
        if 0 < steps < 1:
            total, _ = trainer_state.run_lengths(trainer)
            if total == float("inf"):
                raise SettingError(
                    f"restart_steps={steps} is a share of a length that is not known in advance; "
                    "set max_steps on the Trainer, or give a number of steps"
                )
            steps *= total
        if int(steps) < 1 and self.restart_scale == 1:
            return
        strange = [type(x).__name__ for x in trainer.optimizers if not isinstance(x, Optimizer)]
        if strange:
            raise PlatformError(
                f"StartFrom lets the learning rate of torch optimizers rise, and {strange[0]} is "
                "none; set restart_steps=0 and restart_scale=1, and let your schedule begin low"
            )
        self._warmup = LearningRateWarmup(Warmup(int(steps), self.restart_scale), self._taken)
        self._warmup.attach(trainer.optimizers, self._hooks)

    @override
    def state_dict(self) -> dict[str, Any]:
        taken = self._taken if self._warmup is None else self._warmup.taken
        return {"version": VERSION, "taken": taken, "report": self.report.to_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != VERSION:
            raise CheckpointError(
                f"expected StartFrom state of version {VERSION}, "
                f"got version {state_dict.get('version')!r}"
            )
        self._taken = state_dict["taken"]
        self.report = Report.from_dict(state_dict["report"])

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._hooks.close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._taken = self.state_dict()["taken"]
        self._warmup = None
        self._hooks.close()


def factor_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    module: pl.LightningModule,
    data: Any,
    callback: Factorize,
    *,
    point: int = 1,
    batches: int = 100,
    device: str = "cpu",
) -> Report:
    """Factor the weights of a fit that has ended, for another fit with :class:`StartFrom`.

    It runs on one device, whatever the fits run on. ``callback`` observes training batches in
    evaluation mode while no weight changes, and then does what it would do at its point. A
    checkpoint in bfloat16 or float64 is computed with in that; one in float16, whose gradients
    may vanish, and one of several dtypes, in those of the module.

    Args:
        checkpoint: one file: of any strategy that writes one, or consolidated.
        out: the file to write, atomically: a Lightning checkpoint of weights, with the report. By
            default the callback's own report is written beside it.
        module: of the checkpoint's class; it is factored in place.
        data: a datamodule or training batches, as ``Trainer.fit`` takes them; None for a module
            that has its own.
        callback: how to factor; not changed.
        point: which of its points, counted from 1.
        batches: how many batches to observe.
        device: that the model, its statistics and the solve are on, such as ``"cuda"``; the
            callback's ``offload`` and ``solve_device`` move what is theirs.

    Returns:
        The report of what was done.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or is not of the module.
        SettingError: if ``point``, ``batches`` or ``device`` is not what it may be, or ``keep`` of
            the callback cannot be met.
        PlatformError: if there is no such device, or it has not the memory.
        NoMatchError: if a pattern of the callback matches no layer.
        LayerError: if a targeted layer is frozen or cannot be factored.
        ObservationError: if there are no statistics: no batches, no finite loss, or a layer that
            has no part in it.
        NotFiniteError: if a weight or a statistic holds a NaN or an infinity.
        OSError: if ``out`` cannot be written.

    Cost:
        ``batches`` forward and backward passes, two validations unless the callback has
        ``validate=False``, and the factoring; memory for weights, gradients, statistics, and of
        the solve what a point takes.
    """
    check_device("device", device)
    check_present("device", device)
    once = callback.between_fits(point, batches)
    held = read_lightning_checkpoint(checkpoint)
    weights = filter(torch.is_tensor, held["state_dict"].values())
    dtypes = {x.dtype for x in weights if x.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype in _PRECISIONS:
        module.to(dtype)
    load_weights_(module, held, checkpoint)
    del held
    modes = {name: part.training for name, part in module.named_modules()}
    trainer = pl.Trainer(
        accelerator=torch.device(device).type,
        devices=1,
        strategy=SingleDeviceStrategy(device=torch.device(device)),
        precision=_PRECISIONS.get(dtype),
        max_epochs=-1,
        max_steps=batches + 1,
        check_val_every_n_epoch=batches + 2,  # the callback validates, before and after
        num_sanity_val_steps=0,
        default_root_dir=Path(out).parent,  # for the report
        callbacks=[once],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with ExitStack() as after, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training")
        after.callback(vars(module).pop, "configure_optimizers", None)
        module.configure_optimizers = lambda: _NoUpdate(module.parameters())  # type: ignore[method-assign]
        trainer.fit(module.eval(), data)
    for name, part in module.named_modules():
        part.training = modes.get(name, module.training)
    held = trainer_state.weights_checkpoint(trainer)
    state = {"version": VERSION, "taken": 0, "report": once.report.to_dict()}
    with atomic_write(out) as passing:
        torch.save({**held, "callbacks": {STATE: state}}, passing)
    return once.report


def load_weights_(module: pl.LightningModule, held: Mapping[str, Any], source: str | Path) -> None:
    """Give a module the structure and the weights of a checkpoint.

    Args:
        module: changed in place.
        held: the checkpoint, with ``state_dict``.
        source: its path, for the error message.

    Raises:
        CheckpointError: if they are not of such a module, which may then hold some of them.
    """
    restore_structure(module, held)
    try:
        module.load_state_dict(held["state_dict"], strict=module.strict_loading)
    except Exception as error:  # names and values may be anything
        raise CheckpointError(
            f"{source} is not of this {type(module).__name__}: {error}; a module that is built in "
            "configure_model has to load it there"
        ) from error


class _NoUpdate(Optimizer):
    """An optimizer that runs the closure and changes no parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    @override
    def step(self, closure: Any = None) -> Any:
        return None if closure is None else torch.enable_grad()(closure)()
