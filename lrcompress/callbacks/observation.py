"""Observe some of the training steps before a point, and accumulate their statistics."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.callbacks.kept_batches import KeptBatches
from lrcompress.callbacks.sampling import Sampling
from lrcompress.callbacks.turns import Turns, place_
from lrcompress.distributed import ONE_PROCESS, Processes
from lrcompress.embedding import EmbeddingSettings
from lrcompress.engine.settings import Settings
from lrcompress.errors import CheckpointError, ObservationError, SettingError
from lrcompress.statistics.batches import batch_terms, labelled_terms, loss_terms
from lrcompress.statistics.capture import Recorder
from lrcompress.statistics.fisher import LogitsCapture, add_fisher
from lrcompress.statistics.masks import (
    batch_decoder_mask,
    batch_mask,
)
from lrcompress.statistics.moments import KINDS, OUTPUT_KINDS, Statistics
from lrcompress.statistics.reduction import (
    all_reduce_,
    gathered_on_first,
    of_layers,
    reduce_to_first_,
)
from lrcompress.structure.feed_forward import Blocks, BlockTrace

_EVERY, _FEWEST = 10, 16  # steps
_DEALT_FROM = 1 << 30  # bytes of statistics from which on layers are dealt to processes


class Observation:
    """Accumulates the statistics before each point, one point after another.

    Args:
        sampling: which steps, and whose gradients.
        processes: the processes that observe different batches at the same steps.
    """

    def __init__(self, sampling: Sampling, processes: Processes = ONE_PROCESS) -> None:
        self.sampling, self.processes = sampling, processes
        self.statistics = Statistics()
        self._recorder: Recorder | None = None
        self._tap: LogitsCapture | None = None
        self._generator = torch.Generator().manual_seed(processes.index)
        self._device: torch.device | str = "cpu"
        self._folded = (0, 0)  # steps and tokens of all processes, which the first holds
        self._step = ExitStack()
        self._terms, self._labelled = 1, False
        self._trial = False
        self._held: set[str] | None = None  # the kinds that a checkpoint has brought
        self._loaded: Mapping[str, Any] | None = None  # its statistics, until layers are known
        self._everything: Recorder | None = None  # of all layers, where only some are observed
        self._recorders: list[Recorder] = []  # of each turn
        self._turns: Turns | None = None  # where there are several
        self._turn, self._before, self._finite = 0, 0, False  # of the step that is observed
        self._written: Mapping[str, Any] = {}  # what a checkpoint says of turns
        self.owner: dict[str, int] | None = None  # which process observes a layer, if one alone
        self.blocks: Blocks | None = None  # of the model, where they are to be found
        self.kept = KeptBatches(-(-(sampling.refit_tokens or 0) // processes.size))
        self._trace: BlockTrace | None = None

    @property
    def dealt(self) -> str:
        """Where and when a layer was observed, in words, if not everywhere and always; or ""."""
        told = []
        if self.owner is not None:
            told.append(f"by one of {self.processes.size} processes, on its own batches")
        if self._turns is not None:
            told.append(f"in one of {len(self._turns)} parts of the window")
        return f"each layer was observed {', '.join(told)}" if told else ""

    @property
    def observing(self) -> bool:
        """Whether a step is being observed now."""
        return any(x is not None and x.observing for x in (self._recorder, self._everything))

    def watch(self, module: nn.Module, settings: Settings | EmbeddingSettings) -> None:
        """Prepare to observe the targeted layers.

        Raises:
            NoMatchError: if a pattern matches nothing, or ``logits`` names no submodule.
            CheckpointError: if a checkpoint was loaded that cannot be gone on with.
        """
        self._device = self.sampling.offload or next(module.parameters()).device
        every = self._new_recorder(module, settings, settings.watched(module), Statistics())
        self._check_held({kind for shapes in every.shapes.values() for kind in shapes})
        from_gradients = {*OUTPUT_KINDS, "token_fisher"} & set(self.sampling.kinds)
        drawn = self.sampling.fisher == "model" and bool(from_gradients)
        self.owner = self._dealt(every, drawn)
        own = [x for x in every.layers if self.owner is None or self.owner[x] == self._index]
        self._take_turns(every)
        if self._loaded is not None and (self.owner is not None or self._index == 0):
            loaded = self._loaded if self.owner is None else of_layers(self._loaded, own)
            self.statistics.load_state_dict(loaded, self._device)
        self._loaded = None
        if isinstance(settings, Settings) and settings.narrow_blocks and self.blocks is None:
            self._trace = BlockTrace(module, settings.watched(module))
        self._everything = every if self.owner is not None or self._turns else None
        groups = [own] if self._turns is None else self._turns.groups
        self._recorders = [
            self._new_recorder(module, settings, [x for x in names if x in own], self.statistics)
            for names in groups
        ]
        self._recorder = self._recorders[0]
        if drawn:
            self._tap = LogitsCapture(module, self.sampling.logits)

    @property
    def watching(self) -> bool:
        """Whether layers are known, of which steps are observed."""
        return bool(self._recorders)

    @property
    def nbytes(self) -> int:
        """Bytes that this process's statistics may take where layers are, at one time."""
        return max((one.nbytes for one in self._recorders), default=0)

    @property
    def nbytes_on_host(self) -> int:
        """Bytes that they may take on the host, where groups of layers take turns."""
        return sum(one.nbytes for one in self._recorders) if self._turns else 0

    def _take_turns(self, every: Recorder) -> None:
        """Prepare groups of layers to take turns, if they shall, and go on from a checkpoint.

        Raises:
            CheckpointError: if it was written within a window of other turns.
        """
        turns = Turns(every, self.sampling.turns)
        if self._folded[0]:
            turns.load(self._written, self.processes)
        self._turns = turns if len(turns) > 1 else None
        self._device = "cpu" if self._turns else self._device  # also what others have seen

    def _new_recorder(
        self,
        module: nn.Module,
        settings: Settings | EmbeddingSettings,
        names: Sequence[str],
        statistics: Statistics,
    ) -> Recorder:
        return Recorder(
            module,
            names,
            self.sampling.kinds,
            statistics=statistics,
            offload=self.sampling.offload,
            shared=settings.shared,
            name=self.sampling.owner,
        )

    def _dealt(self, every: Recorder, drawn: bool) -> dict[str, int] | None:
        """Return which process observes which layer, or None where all observe all.

        Layers of one module go to one process, for they may read one tensor. Where parameters are
        sharded and labels are drawn, all have to run the backward pass as far: nothing is dealt.

        Raises:
            SettingError: if that is asked for.
        """
        deal, processes = self.sampling.deal, self.processes
        if processes.size == 1 or deal is False:
            return None
        if processes.sharded and drawn:
            if deal:
                raise SettingError(
                    "deal=True with fisher='model' is not possible under FSDP2, where all "
                    "processes run the same backward passes; use fisher='labels', or deal=False"
                )
            return None
        if deal is None and every.nbytes < _DEALT_FROM:
            return None
        groups: dict[str, float] = {}
        for name in every.layers:
            parent = name.rpartition(".")[0]
            groups[parent] = groups.get(parent, 0.0) + every.bytes_of(name)
        owner = processes.assign(groups)
        return {name: owner[name.rpartition(".")[0]] for name in every.layers}

    @property
    def _index(self) -> int:
        return self.processes.index

    def _check_held(self, needed: set[str]) -> None:
        """Check that a checkpoint, if one was loaded, has the statistics it is to go on with.

        Raises:
            CheckpointError: if it was written while others were observed.
        """
        every = (*KINDS, *self.sampling.of_tables)
        lacking = [] if self._held is None else [x for x in every if x in needed - self._held]
        if lacking:
            has = ", ".join(kind for kind in every if kind in (self._held or ()))
            raise CheckpointError(
                f"the checkpoint was written after steps in which {has} was observed, and "
                f"{self.sampling.owner} now needs {', '.join(lacking)} of them too; resume with "
                "the settings it was written with, or from a checkpoint of before that window"
            )
        self._held = None

    def reset(self) -> None:
        """Drop all statistics after a point, since they were of other weights."""
        self.statistics, self._recorder, self._tap = Statistics(), None, None
        self._recorders, self._turn, self._turns = [], 0, None
        self._loaded = self._everything = self.owner = self.blocks = self._trace = None
        self._folded = (0, 0)
        self.kept.clear()

    def due(self, ahead: int, window: int) -> bool:
        """Return whether to observe a step that is ``ahead`` steps before the point."""
        every = self.sampling.every_n_steps or min(_EVERY, max(1, window // _FEWEST))
        turns = 1 if self._turns is None else len(self._turns)
        if self.sampling.every_n_steps is None:  # so that a layer sees as many tokens
            every = max(1, every // (turns * (1 if self.owner is None else self.processes.size)))
        sampled = ahead % min(every, max(1, window // turns)) == 0
        most = self.sampling.max_tokens
        seen = self._tokens
        if self._turns is not None:
            seen = self._turns.seen.get(self.turn(ahead, window), 0)
        full = most is not None and seen >= most
        return bool(self.sampling.kinds) and 0 < ahead <= window and sampled and not full

    def turn(self, ahead: int, window: int) -> int:
        """Return which group of layers is observed ``ahead`` steps before the point, from 0."""
        if self._turns is None or not 0 < ahead <= window:
            return 0
        return self._turns.at(ahead, window)

    @property
    def started(self) -> bool:
        """Whether any process has observed anything yet."""
        return max(self.statistics.steps, self._folded[0]) > 0

    @property
    def _tokens(self) -> int:
        """Tokens that a layer has seen, those since the last fold as if others had seen as many."""
        if self.owner is not None:
            return self.statistics.tokens
        folded = self._folded[1]
        since = self.statistics.tokens - (folded if self.processes.index == 0 else 0)
        return folded + since * self.processes.size

    @property
    def _watching(self) -> Recorder:
        """What observes a step: of all layers in a trial, so that every process finds the same."""
        found = self._everything if self._trial and self._everything else self._recorder
        assert found is not None
        return found

    def open_step(self, batch: Any, turn: int = 0, *, trial: bool = False) -> None:
        """Observe the step that begins with this batch, until :meth:`close_step`.

        Args:
            batch: as the training step gets it.
            turn: which group of layers is observed, of :meth:`turn`.
            trial: add nothing, and raise what observing such a step would.

        Raises:
            ShapeError: if its padding mask is not ``(examples, length)``, nor has choices.
            ObservationError: if its padding mask is no tensor, or not of zeros and ones.
        """
        self._trial, self._turn, self._recorder = trial, turn, self._recorders[turn]
        if self._turns is not None and not trial:
            place_(self.statistics, self._recorder.layers)
            self._before = self._tokens
        first = trial or not self.statistics.steps  # later ones are not waited for
        given = self.sampling.mask, self.sampling.owner
        mask, missing = batch_mask(batch, *given, check_values=first)
        if self.kept.limit and not trial:
            self.kept.hold(batch, mask, self.statistics.steps)
        # now, for a training step may take its labels out of a batch
        self._terms, self._labelled = batch_terms(batch), labelled_terms(batch) is not None
        decoder = None
        if self.sampling.mask is not None:
            decoder = batch_decoder_mask(batch, self.sampling.owner, check_values=first)
        tapped = self._tap is not None and not trial  # gradients of another loss are asked for
        watching = self._watching.step(
            mask,
            decoder_mask=decoder,
            missing=missing,
            source=self.sampling.mask,
            trial=trial,
            keep_outputs=tapped,
        )
        self._step.enter_context(watching)
        if self._trace is not None:
            self._step.enter_context(self._trace.forward())
        if self._tap is not None:
            self._step.enter_context(self._tap.listening())

    def before_backward(self, loss: Tensor, factor: float) -> None:
        """Add the inputs of the forward pass, and observe gradients from here on.

        Args:
            loss: of the step; its graph tells of feed-forward blocks.
            factor: what the mean loss is multiplied by before its backward pass.

        Raises:
            ObservationError: if labels are to be drawn and no logits were found.
        """
        finite = bool(loss.isfinite())
        if self._trace is not None:
            self.blocks, self._trace = self._trace.blocks(loss), None
        if self._trial:
            if self._tap is not None and finite:
                self._tap.take()  # which says if there are none
            self._watching.commit(finite=finite)
            return
        assert self._recorder is not None
        if not self._labelled and self._tap is None:  # drawn labels have terms of their own
            self._terms = loss_terms(loss) or self._terms
        logits = self._tap.take() if self._tap is not None and finite else None
        # labels are drawn wherever there are logits, also where nothing is to be predicted
        terms = self._terms if logits is None or logits.ndim < 3 else logits[..., 0].numel()
        self._recorder.commit(terms / factor, terms=terms, finite=finite)
        self._finite = finite
        if self._tap is None:
            return
        if logits is not None:  # in the loss scale's range: half-precision gradients may vanish
            add_fisher(self._recorder, logits, self._generator, factor, keep_graph=True)
        self._recorder.arm(False)

    def close_step(self) -> None:
        """Remove all hooks."""
        if self._trace is not None:
            self._trace.forget()
        self._step.close()
        if self._turns is not None and self._finite:
            self._turns.add(self._turn, self._tokens - self._before)
        self._finite = False
        self.kept.settle(self.statistics.steps)

    def drop_step(self) -> None:
        """Remove all hooks of a step that was interrupted; no more of it is added."""
        for one in (self._recorder, self._everything):
            if one is not None:
                one.drop()
        self.close_step()

    def merge_(self) -> None:
        """Sum the statistics over all processes, at the point, and release the layers.

        Where each has observed its own layers, nothing is summed but counts. Steps and tokens
        are those of a layer.
        """
        self._recorder = self._tap = self._everything = self._trace = None
        mine, parts = self.statistics, sum(bool(one.layers) for one in self._recorders)
        mine.tokens, self._recorders = -(-mine.tokens // max(1, parts)), []
        if self.owner is None:
            all_reduce_(mine, self.processes, self._device)
        else:
            mine.steps, mine.skipped, mine.tokens = self._counts()
        if self._turns is not None:
            self._turns.agree_(self.processes, dealt=self.owner is not None)
            mine.steps = -(-mine.steps // len(self._turns))

    def _counts(self) -> tuple[int, int, int]:
        """Return steps, skipped ones, and the tokens a layer has seen, of all processes."""
        mine = self.statistics
        every = self.processes.all_gather((mine.steps, mine.skipped, mine.tokens))
        steps, skipped, tokens = zip(*every, strict=True)
        return max(steps), sum(skipped), sum(tokens) // len(tokens)

    def check(self, point: object) -> None:
        """Check that at least one step was observed.

        Raises:
            ObservationError: if no step was observed though statistics are needed.
        """
        if self.sampling.kinds and not self.statistics.steps:
            raise ObservationError(
                f"nothing was observed before point {point}: {self.statistics.skipped} steps "
                "were skipped as not finite; widen window= or lower every_n_steps="
            )
        if self._turns is not None:
            self._turns.check(point)

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes have seen, in plain types and tensors on the CPU.

        The first process then holds it, as in a run that resumes from the file, so that both
        add up the same numbers in the same order. Where each observes its own layers, they stay
        where they are, and the first returns copies of all.
        """
        blocks = {} if self.blocks is None else {"blocks": self.blocks.to_dict()}
        kept = {"kept": self.kept.state(self.processes)} if self.kept.limit else {}
        turns: dict[str, Any] = {}
        if self._turns is not None:
            turns["turns"] = self._turns.state(self.processes)
        elif self._loaded is not None and self._written:
            turns["turns"] = dict(self._written)
        return self._sums() | blocks | kept | turns

    def _sums(self) -> dict[str, Any]:
        if self._loaded is not None:  # nothing was observed since
            return {"statistics": self._loaded, "folded": list(self._folded)}
        if self.owner is not None:
            state = gathered_on_first(self.statistics, self.processes)
            steps, skipped, tokens = self._counts()
            return {
                "statistics": {**state, "counts": [steps, skipped, tokens]},
                "folded": [steps, tokens],
            }
        if self.processes.size > 1:
            reduce_to_first_(self.statistics, self.processes, self._device)
        seen = [self.statistics.steps, self.statistics.tokens]
        steps, tokens = self.processes.run_on_first(lambda: seen)
        self._folded = (steps, tokens)
        return {"statistics": self.statistics.state_dict(), "folded": [steps, tokens]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Load what :meth:`state_dict` returned, with any number of processes.

        Sums stay in the file's tensors until :meth:`watch` knows which layers are this process's.
        """
        self.blocks = Blocks.from_dict(state["blocks"]) if "blocks" in state else None
        self.kept.load(state.get("kept", ()), self.processes)
        steps, tokens = state["folded"]
        sides = (state["statistics"][side].values() for side in ("inputs", "outputs"))
        self._held = {kind for side in sides for sums in side for kind in sums} if steps else None
        self._folded, self._written = (steps, tokens), state.get("turns", {})
        self._loaded = state["statistics"] if steps else None

    def label_rng_state(self) -> torch.Tensor:
        """Return the state of the generator that draws this process's labels."""
        return self._generator.get_state()

    def set_label_rng_state(self, state: torch.Tensor) -> None:
        """Set the generator to a state from :meth:`label_rng_state`."""
        self._generator.set_state(state.cpu())
