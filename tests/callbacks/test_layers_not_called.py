"""Layers that nothing calls stay with a note; LayerDrop, by which some are called at times."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lrcompress
from lrcompress.errors import ObservationError
from lrcompress.nn import LowRankLinear
from tests.callbacks.conftest import Loader, Tagger, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute 'drops' removed from hparams"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]
QUIET: dict[str, Any] = {"verbose": False, "validate": False, "report_path": None}
NOTE = "left as they are, for nothing called them in 6 observed steps: blocks.2.up, blocks.2.down"


class Dropping(Tagger):
    """A third block is never called, the second only in the steps that ``drops`` leaves it."""

    def __init__(self, drops: Callable[[int], bool] = lambda _: False) -> None:
        super().__init__(dropout=0.0)
        self.blocks.append(nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}))
        self.drops, self.step = drops, 0

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        every = self.blocks
        called = every[:1] if self.training and self.drops(self.step) else every[:2]
        self.step, self.blocks = self.step + self.training, called
        try:
            return super().forward(batch)
        finally:
            self.blocks = every


def model(**kwargs: Any) -> Dropping:
    L.seed_everything(0, verbose=False)
    return Dropping(**kwargs)


def factorize(**kwargs: Any) -> lrcompress.Factorize:
    return lrcompress.Factorize(
        **({"keep": 0.5, "at": "epoch:1", "every_n_steps": 1} | QUIET | kwargs)
    )


@pytest.mark.parametrize("method", ["kfac", "drone", "fwsvd", "kronecker"])
def test_what_is_never_called_stays_with_a_note_and_the_rest_is_as_without_it(
    method: str, trainer: Make
) -> None:
    made, ours = model(), factorize(method=method)
    trainer(ours).fit(made, Loader(sentences()))
    again, theirs = model(), factorize(method=method, exclude=["blocks.2.*"])
    trainer(theirs).fit(again, Loader(sentences()))
    assert type(made.blocks[2]["up"]) is nn.Linear
    (record,), (other,) = ours.report.points, theirs.report.points
    assert NOTE in record.note
    assert record.layers == other.layers
    for (name, one), two in zip(
        made.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert one.equal(two), name


def test_what_is_called_at_times_counts_what_was_seen(trainer: Make) -> None:
    """As with a layer that sees every other batch only."""
    made, ours = model(drops=lambda step: step % 2 == 0), factorize(allocation="uniform")
    grabbed: list[Any] = []
    change = ours._change_model
    ours._change_model = lambda *a: (grabbed.append(ours._observation.statistics), change(*a))  # type: ignore[method-assign, func-returns-value, assignment]
    trainer(ours).fit(made, Loader(sentences()))
    tokens = [int(batch["attention_mask"].sum()) for batch in sentences()]
    (seen,) = grabbed
    assert int(seen.of("blocks.0.up", ["input_moment"]).tokens) == sum(tokens)
    assert int(seen.of("blocks.1.up", ["input_moment"]).tokens) == sum(tokens[1::2])
    assert isinstance(made.blocks[1]["down"], LowRankLinear)


def test_that_nothing_at_all_was_called_is_an_error() -> None:
    made = model()
    given: dict[str, Any] = {"keep": 0.5, "mask": "attention_mask", "targets": ["blocks.2.*"]}
    message = "no token was seen|not observed|nothing"
    with pytest.raises(ObservationError, match=message):
        lrcompress.compress(made, sentences(2), lambda m, x: m(x).square().mean(), **given)
    record = lrcompress.compress(
        made, sentences(6), lambda m, x: m(x).square().mean(), keep=0.5, mask="attention_mask"
    )
    assert NOTE in record.note


SCRIPT = """
import json, os, sys
sys.path[:0] = [{root!r}]
import torch
import lightning as L
from tests.callbacks.test_layers_not_called import Dropping, factorize, model
from tests.callbacks.conftest import Loader, sentences
number = int(os.environ["RANK"])
for deal in (False, True):
    made, ours = model(drops=lambda step: step % 2 == number), factorize(deal=deal)
    run = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False,
        strategy="ddp_find_unused_parameters_true", callbacks=[ours])
    run.fit(made, Loader([{{k: v[number::2] for k, v in b.items()}} for b in sentences()]))
    record = ours.report.points[0]
    print(json.dumps([record.note, [[x.name, x.rank] for x in record.layers],
        float(sum(p.double().sum() for p in made.parameters()))]))
"""


def test_all_processes_leave_the_same_layers_and_end_alike(launch: Make, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[2])))
    told = [[json.loads(x) for x in one.splitlines() if x[:2] == '["'] for one in launch(script, 2)]
    assert told[0] == told[1]
    assert len(told[0]) == 2
    for note, layers, _ in told[0]:
        assert "nothing called them in 6 observed steps: blocks.2.up, blocks.2.down" in note
        assert [name for name, _ in layers] == [
            *("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"),
        ]
    assert torch.isfinite(torch.tensor([total for *_, total in told[0]])).all()
