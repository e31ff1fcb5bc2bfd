"""Search in a fit for the smallest model that ends within a drop: ``keep="auto"``.

At each point the model is solved once, and bisection over hundredths of ``keep`` validates
candidates. What may be lost at a point is more than the drop as far as training brings it back,
see :func:`~lrcompress.keep_search.allowed_loss`. The last state that was within the drop is kept on
disk: where what followed is judged too bold, at the next point or at the end, the run goes back.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lrcompress.callbacks import trainer_state
from lrcompress.callbacks.compiled import keep_compiled
from lrcompress.callbacks.keep_trials import KeepTrials, finite, number, why_none
from lrcompress.callbacks.kept_state import KeptState, keep_state, read_state, restore_state_
from lrcompress.callbacks.observation import Observation
from lrcompress.distributed import Processes
from lrcompress.engine.solved_model import Sizes, SolvedModel
from lrcompress.errors import (
    CheckpointError,
    NoMatchError,
    NotFiniteError,
    ObservationError,
    nearest,
)
from lrcompress.keep_search import (
    Drop,
    Recovery,
    Target,
    allowed_loss,
    check_leaves_some,
)
from lrcompress.report.record import PointRecord
from lrcompress.report.trials import SearchRecord, TrialRecord
from lrcompress.statistics.moments import Statistics
from lrcompress.statistics.reduction import gathered_on_first
from lrcompress.structure.feed_forward import Blocks

NO_TEST = "measured on the validation data that keep was chosen on, which are no test of it"
Figures = dict[str, float]
Seen = tuple[Statistics, Mapping[str, int] | None, Blocks | None]
# Solves the model from statistics, the owners of its layers if any, and feed-forward blocks.
Solve = Callable[[Statistics, Mapping[str, int] | None, Blocks | None], SolvedModel]


@dataclass
class KeepSearch:
    """The search of a run, over all its points.

    Attributes:
        drop: by how much the metric may get worse.
        monitor: name of the metric, as validation logs it.
        mode: ``"max"`` where higher values are better, ``"min"`` where lower ones are.
        max_trials: validations a point at most.
        trial_share: of the validation data, for the first trials of a point.
        verbose: say what every trial gave.
        target: what a model may lose, known from the first point on.
        recoveries: what training has brought back so far, point by point.
        changed: what was lost just after the last point that changed the model, and its step.
        kept: the last state that was within the drop.
        tried: what ``keep`` gave when it was tried from that state.
        written: files of kept states, which stay for runs that are resumed from before.
        judged: the step at which the end was judged.
    """

    drop: Drop
    monitor: str
    mode: str
    max_trials: int
    trial_share: float = 1.0
    verbose: bool = True
    target: Target | None = None
    recoveries: list[Recovery] = field(default_factory=list)
    changed: tuple[float, int] | None = None
    kept: KeptState | None = None
    tried: dict[float, Figures] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    judged: int | None = None

    # State

    def reset(self) -> None:
        """Forget a run."""
        self.target = self.changed = self.kept = self.judged = None
        self.recoveries, self.written, self.tried = [], [], {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types."""
        return {
            "target": self.target and asdict(self.target),
            "recoveries": [asdict(one) for one in self.recoveries],
            "changed": self.changed and list(self.changed),
            "kept": self.kept and asdict(self.kept),
            "tried": [[keep, dict(figures)] for keep, figures in self.tried.items()],
            "written": list(self.written),
            "judged": self.judged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; a kept file that is gone is said."""
        self.target = Target(**state["target"]) if state["target"] else None
        self.recoveries = [Recovery(**one) for one in state["recoveries"]]
        self.changed = (state["changed"][0], state["changed"][1]) if state["changed"] else None
        self.kept = KeptState(**state["kept"]) if state["kept"] else None
        self.tried = {keep: dict(figures) for keep, figures in state["tried"]}
        self.written, self.judged = [*state["written"]], state["judged"]
        if self.kept is not None and self.judged is None and not self.kept.is_there:
            rank_zero_warn(
                f"{self.kept.path} is not there, the state of before point {self.kept.point}: the "
                "run goes on, but cannot go back to it; put the file there before you resume"
            )

    # Before training

    def check_metric(self, trainer: pl.Trainer) -> None:
        """Check on one validation batch that there is such a metric.

        Raises:
            ObservationError: if there is no validation.
            NoMatchError: if validation does not log the metric.
            SettingError: if all of it may be lost, whatever it will be.
        """
        figures = trainer_state.run_validation(trainer, 1)
        if not figures:
            raise ObservationError(
                f"keep='auto' is chosen by {self.monitor!r} on validation data, and there is none "
                "that logs anything: give trainer.fit validation data and validation_step a "
                "self.log, and leave limit_val_batches=0 and barebones out"
            )
        self._check_logged(figures)
        most = trainer_state.greatest_value(trainer, self.monitor)
        if self.target is None and most is not None:
            check_leaves_some(self.drop, self.monitor, self.mode, most)
        value = abs(figures[self.monitor])
        if self.target is None and self.mode == "max" and self.drop.amount(value) >= value > 0:
            rank_zero_warn(
                f"drop={self.drop.amount(value):g} allows all of {self.monitor} to be lost, which "
                f"is {value:.4g} before training; give drop='1%' for a hundredth of it"
            )
        if self.verbose and self.target is None:
            rank_zero_info(
                f"lrcompress: keep='auto' looks for the smallest model within the drop of "
                f"{self.monitor}, of which {BETTER[self.mode]} values are better"
            )

    def _check_logged(self, figures: Figures) -> None:
        if self.monitor not in figures:
            raise NoMatchError(
                f"monitor={self.monitor!r} is not logged in validation, which logs "
                f"{', '.join(sorted(figures))}; nearest: {nearest(self.monitor, figures, 1)}"
            )

    # At a point

    def change_(
        self, run: "Run", solve: Solve, *, point: int, steps: float, last: bool
    ) -> PointRecord:
        """Search at a point, install what was found, and return what was done.

        Args:
            run: as it is at the point.
            solve: the model as it is, or as it was gone back to.
            point: its number, from 1.
            steps: until the next point, or until the end.
            last: whether no other follows.

        Raises:
            NotFiniteError: if the metric of the dense model is not finite.
            NoMatchError: if validation does not log the metric.
        """
        figures = self._validated(run)
        value, notes = figures[self.monitor], []
        if self.target is None:
            self._set_target(value)
        assert self.target is not None
        lost = self.target.lost(value)
        if self.changed is not None:
            found = Recovery.measured(self.changed[0], lost, run.step - self.changed[1])
            self.recoveries += [] if found is None else [found]
        watched, stuck = run.observation, False
        seen: Seen = watched.statistics, watched.owner, watched.blocks
        if self.target.is_within(lost):
            self._keep(run, figures, point)
        else:
            back = self._go_back(run, lost)
            stuck = back is None
            if back is not None:
                seen, figures, note = back
                notes.append(note)
        left = self.target.lost(figures[self.monitor])
        allowed = allowed_loss(self.target.drop, self.recoveries, steps, last=last, left=left)
        self._tell_allowed(run, allowed, left)
        solved = solve(*seen)
        given = figures, allowed, {} if stuck else self.tried
        sizes, after, record = self._search(run, solved, *given, stuck=stuck)
        metrics = {"before": figures, "after": after}
        done = self._install(run, solved, sizes, record, metrics, notes, stuck=stuck)
        if sizes is not None:
            self.changed = (self.target.lost(after[self.monitor]), run.step)
        return done

    def end_(self, run: "Run", solve: Solve) -> tuple[PointRecord | None, Figures] | None:
        """Judge the end of training, and go back where it is not within the drop.

        Args:
            run: as it is after its last step.
            solve: the model that was gone back to.

        Returns:
            What was done where the run went back, else None, and the figures that it ends with;
            None where it was judged before.
        """
        if self.target is None or self.judged == run.step:
            return None
        self.judged = run.step
        figures = self._validated(run)
        lost = self.target.lost(figures[self.monitor])
        back = None
        if not self.target.is_within(lost):
            back = self._go_back(run, lost)
        if back is None:
            return None, figures
        seen, figures, note = back
        solved = solve(*seen)
        sizes, after, found = self._search(run, solved, figures, self.target.drop, self.tried)
        done = self._install(run, solved, sizes, found, {"before": figures, "after": after}, [note])
        return done, after

    def discard(self, processes: Processes) -> None:
        """Remove kept states, at the end of a run."""
        for path in self.written if processes.index == 0 else ():
            Path(path).unlink(missing_ok=True)

    def _set_target(self, value: float) -> None:
        if not math.isfinite(value):
            raise NotFiniteError(
                f"monitor={self.monitor!r} is {value} for the dense model, before the first point: "
                "nothing can be said of what others lose"
            )
        self.target = Target.of(self.monitor, self.mode, value, self.drop)

    def _validated(self, run: "Run", share: float = 1.0) -> Figures:
        """Return the figures of a validation, of the metric the mean over all processes."""
        batches = trainer_state.validation_batches(run.trainer, share)
        figures = trainer_state.run_validation(run.trainer, batches)
        self._check_logged(figures)
        every = run.processes.all_gather(figures[self.monitor])
        if any(x != every[0] and not (math.isnan(x) and math.isnan(every[0])) for x in every):
            rank_zero_warn(
                f"{self.monitor!r} is not the same in all processes, and their mean is taken; log "
                "it with sync_dist=True, or as a metric of torchmetrics"
            )
            figures[self.monitor] = sum(every) / len(every)
        return figures

    def _keep(self, run: "Run", figures: Figures, point: int) -> None:
        """Keep the state on disk that the run may go back to; in trial runs nothing is."""
        self.tried = {}
        if run.folder is None:
            return
        mine, seen = run.observation, run.observation.statistics
        if mine.owner is not None:
            held: dict[str, Any] = gathered_on_first(seen, run.processes)
        else:
            held = seen.state_dict() if run.processes.index == 0 else {}
        self.kept = keep_state(
            run.folder / f"lrcompress-before-point-{point}.pt",
            run.module,
            run.trainer.optimizers,
            held,
            mine.blocks,
            run.processes,
            point=point,
            step=run.step,
            figures=figures,
        )
        self.written = [*dict.fromkeys((*self.written, self.kept.path))]

    def _go_back(self, run: "Run", lost: float) -> tuple[Seen, Figures, str] | None:
        """Go back to the kept state; None, with a warning, where there is none."""
        assert self.target is not None
        said = f"{self.monitor} has lost {lost:.6g}, and {self.target.drop:.6g} is allowed"
        kept = self.kept
        there = run.processes.all_gather(kept is not None and kept.is_there)
        if kept is None or not all(there):
            rank_zero_warn(f"lrcompress: {said}, but there is no state to go back to")
            return None
        try:
            state = read_state(kept, run.processes)
        except CheckpointError as error:
            rank_zero_warn(f"lrcompress: {said}, but it cannot go back: {error}")
            return None
        trainer_state.drop_gradients(run.module)
        device = run.observation.sampling.offload or next(run.module.parameters()).device
        found, blocks = restore_state_(state, run.module, run.trainer.optimizers, device)
        run.sync()
        note = f"{said}: went back to the state of before point {kept.point}, of step {kept.step}"
        if self.verbose:
            rank_zero_info(f"lrcompress: {note}")
        return (found, None, blocks), dict(kept.figures), note

    def _search(
        self,
        run: "Run",
        solved: SolvedModel,
        figures: Figures,
        allowed: float,
        tried: dict[float, Figures],
        *,
        stuck: bool = False,
    ) -> tuple[Sizes | None, Figures, SearchRecord]:
        """Return the sizes that were found, None for those that stand, and their figures."""
        assert self.target is not None
        trials = KeepTrials(
            *(solved, self.target, allowed, self.monitor, figures),
            *(partial(self._measured, run, solved), tried, self.max_trials),
            partial(self._tell_trial, allowed=allowed),
        )
        keep = None if stuck else trials.search(self.trial_share)
        record = SearchRecord(
            *(self.monitor, self.mode, self.target.reference, self.target.drop),
            *(allowed, finite(figures[self.monitor]), keep, tuple(trials.trials)),
        )
        if keep is None:
            return None, figures, record
        return solved.choose(keep), tried[keep], record

    def _measured(
        self, run: "Run", solved: SolvedModel, sizes: Sizes | None, share: float
    ) -> Figures:
        """Return the figures of sizes, None for those that stand, on a share of the data."""
        if sizes is None:
            return self._validated(run, share)
        try:
            with solved.on_trial(sizes):
                keep_compiled(run.module)
                return self._validated(run, share)
        finally:
            keep_compiled(run.module)

    def _install(
        self,
        run: "Run",
        solved: SolvedModel,
        sizes: Sizes | None,
        record: SearchRecord,
        metrics: dict[str, Figures],
        notes: list[str],
        *,
        stuck: bool = False,
    ) -> PointRecord:
        standing = solved.standing
        done = solved.install_(sizes, run.trainer.optimizers, run.step)
        run.sync()
        done.search, done.metrics = record, metrics
        said = ""
        if sizes is None:
            said = f"nothing smaller was found: {why_none(record, standing, stuck=stuck)}"
        if said and self.verbose:
            rank_zero_info(f"lrcompress, step {run.step}: {said}")
        done.note = "; ".join(filter(None, (*notes, done.note, said)))
        return done

    def _tell_allowed(self, run: "Run", allowed: float, left: float) -> None:
        assert self.target is not None
        if self.verbose:
            left = max(0.0, left)  # what is lost for good
            back = 1 - (self.target.drop - left) / (allowed - left) if allowed > left else 0.0
            why = "as at points before" if self.recoveries else "as is assumed until the next point"
            told = (
                f": training brings back {back:.0%} of what is lost anew, {why}" if back > 0 else ""
            )
            rank_zero_info(
                f"lrcompress, step {run.step}: {allowed:.6g} of {self.monitor} may be lost here, "
                f"{self.target.drop:.6g} in the end{told}"
            )

    def _tell_trial(self, trial: TrialRecord, *, allowed: float) -> None:
        if self.verbose:
            on = "" if trial.share == 1 else f" on {trial.share:g} of the validation data"
            rank_zero_info(
                f"lrcompress: keep={trial.keep:g}: {self.monitor} {number(trial.value)}{on}, "
                f"{number(trial.lost)} lost of {allowed:.6g} allowed: "
                + ("within" if trial.within else "too much")
            )

    def tell_end(self, record: PointRecord, figures: Figures) -> None:
        """Say what the run ends with: in the record of its last point, and so in its last table.

        Where there is no table, it is said here; what was hardly meant is always warned of.
        """
        assert self.target is not None
        value = figures[self.monitor]
        lost = self.target.lost(value)
        ends = "ends within" if self.target.is_within(lost) else "does NOT end within"
        said = f"the run {ends} drop={self.target.drop:.6g} of {self.monitor}"
        if record.keep == 1:
            said = f"no smaller model was found, all layers are dense; {said}"
        whole = (
            f"{said}: {value:.6g} against {self.target.reference:.6g} of the dense model before "
            f"the first point, {NO_TEST}"
        )
        record.note = "; ".join(filter(None, (record.note, whole)))
        if record.keep == 1 or not self.target.is_within(lost):
            rank_zero_warn(f"lrcompress: {said if self.verbose else whole}")
        elif not self.verbose:
            rank_zero_info(f"lrcompress: {whole}")


@dataclass
class Run:
    """A fit as a search sees it at a point or at its end.

    Attributes:
        trainer: of the fit.
        module: the model.
        step: optimizer steps so far.
        observation: of the steps before the point.
        processes: of the run.
        sync: checks the structure in all processes, and adapts DDP to it.
        folder: for kept states; None in trial runs, of which nothing is kept.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    step: int
    observation: Observation
    processes: Processes
    sync: Callable[[], None]
    folder: Path | None


BETTER = {"max": "higher", "min": "lower"}
