"""Base class of callbacks whose ``keep`` may be searched for within the fit."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lrcompress.callbacks import reporting, trainer_state
from lrcompress.callbacks.kept_state import run_folder
from lrcompress.callbacks.scheduled import CompressionCallback
from lrcompress.callbacks.search import KeepSearch, Run
from lrcompress.callbacks.search_settings import check_platform
from lrcompress.engine.settings import Settings
from lrcompress.engine.solved_model import SolvedModel, solve_model
from lrcompress.report import PointRecord
from lrcompress.statistics.moments import Statistics
from lrcompress.structure.feed_forward import Blocks


class AutoKeepCallback(CompressionCallback):
    """Where ``_search`` is set, ``keep`` is searched for at each point, and the end is judged."""

    _search: KeepSearch | None = None

    @abstractmethod
    def settings_at(self, stage: int) -> Settings:
        """Return which layers are factored at a point, and how."""

    def _solve(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        statistics: Statistics,
        owner: Mapping[str, int] | None,
        blocks: Blocks | None,
    ) -> SolvedModel:
        """Solve the model for the present point; after the last one, as for that."""
        return solve_model(
            module,
            statistics,
            self.settings_at(min(self._stage, len(self.points) - 1)),
            processes=self._processes,
            owner=owner,
            track=reporting.progress_bar(trainer, verbose=self.verbose),
            forward_context=trainer.precision_plugin.forward_context,
            blocks=blocks,
            train_balanced=True,
        )

    def _search_keep(
        self, trainer: pl.Trainer, module: pl.LightningModule, now: int
    ) -> PointRecord:
        """Search at the present point, and return what was done."""
        assert self._search is not None
        ends = [*self._point_steps[self._stage + 1 :], self._total]
        return self._search.change_(
            self._run(trainer, module, now),
            partial(self._solve, trainer, module),
            point=self._stage + 1,
            steps=ends[0] - now,
            last=len(ends) == 1,
        )

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule, now: int) -> Run:
        sync = partial(self._sync_structure, trainer, module)
        folder = run_folder(trainer)
        return Run(trainer, module, now, self._observation, self._processes, sync, folder)

    @override
    def _end_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Judge what the run ends with, and tell what was done where it went back."""
        if self._search is None or not self.report.points:
            return
        run = self._run(trainer, module, trainer_state.steps_done(trainer))
        solve = partial(self._solve, trainer, module)
        judged = self._search.end_(run, solve)
        if judged is None:
            return
        record, figures = judged
        if record is not None:
            self.report.points.append(record)
            # in place of those of the model that was left, where training has ended already
            self.report.note(run.step, record.metrics["after"], gap=0)
            trainer_state.reset_best_scores(trainer)
            whole = self._run_report(trainer).points[0].model_before
            reporting.tell_point(trainer, record, whole, verbose=self.verbose)
        self._search.tell_end(self.report.points[-1], figures)

    @override
    def _reset(self) -> None:
        super()._reset()
        if self._search is not None:
            self._search.reset()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        held = None if self._search is None else self._search.state_dict()
        super().setup(trainer, pl_module, stage)
        if self._search is None:
            return
        if stage == "fit":
            others = [x for x in self._compression_callbacks(trainer) if x is not self]
            check_platform(self._processes, others)
        if held is not None and self._stage:  # a second fit goes on where the first ended
            self._search.load_state_dict(held)

    @override
    def state_dict(self) -> dict[str, Any]:
        found = {} if self._search is None else {"search": self._search.state_dict()}
        return super().state_dict() | found

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self._search is not None and "search" in state_dict:
            self._search.load_state_dict(state_dict["search"])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._search is not None and not self._is_done:
            self._search.check_metric(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if self._search is not None:
            self._search.discard(self._processes)
