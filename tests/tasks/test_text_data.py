import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lrcompress.errors import SettingError
from lrcompress.tasks import TextClassification, TextData

Batch = dict[str, torch.Tensor]


class Record(L.Callback):
    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: object, batch: Batch, _: int
    ) -> None:
        self.batches.append(batch)


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def quiet_trainer(**settings: object) -> L.Trainer:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary"], False)
    return L.Trainer(**{**quiet, "accelerator": "cpu", "enable_checkpointing": False, **settings})


def fit(
    tiny_bert: Path,
    files: dict[str, str],
    folder: Path,
    resume: Path | None = None,
    workers: int = 0,
    **settings: object,
) -> tuple[list[Batch], TextClassification]:
    L.seed_everything(0 if resume is None else 1, verbose=False)
    module = TextClassification(str(tiny_bert))
    data = TextData(
        str(tiny_bert),
        ["sentence"],
        "label",
        max_length=32,
        batch_size=4,
        num_workers=workers,
        **files,
    )
    record = Record()
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    quiet_trainer(
        max_epochs=2, enable_checkpointing=True, callbacks=[record, keep], **settings
    ).fit(module, data, ckpt_path=resume, weights_only=True)
    return record.batches, module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}])
def test_resumed_at_any_step_it_sees_the_rest_of_the_uninterrupted_run(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path, settings: dict[str, object]
) -> None:
    whole, module = fit(tiny_bert, reviews, tmp_path / "whole", **settings)
    assert len(whole) == 10
    assert not same(whole[:5], whole[5:])

    for step in range(1, 11):
        saved = tmp_path / "whole" / f"step={step}.ckpt"
        rest, resumed = fit(tiny_bert, reviews, tmp_path / f"{step}", saved, **settings)
        assert same(rest, whole[step:]), step
        for name, tensor in module.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), (step, name)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_workers_do_not_change_the_batches(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    whole, _ = fit(tiny_bert, reviews, tmp_path / "whole")
    rest, _ = fit(
        tiny_bert, reviews, tmp_path / "rest", tmp_path / "whole" / "step=3.ckpt", workers=1
    )
    assert same(rest, whole[3:])


def test_a_fresh_fit_starts_at_the_first_batch_again(
    tiny_bert: Path, reviews: dict[str, str]
) -> None:
    data = TextData(str(tiny_bert), ["sentence"], "label", max_length=32, **reviews)
    data.setup("validate")
    data.load_state_dict({"epoch": 0, "served": 1})
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 1


class Plain(L.LightningModule):
    """No scheduler asks for the number of steps: Lightning restores the loader itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        return self.weight * batch["labels"].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_loader_on_its_own_is_resumed_too(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    data = TextData(str(tiny_bert), ["sentence"], "label", max_length=32, batch_size=4, **reviews)
    data.setup("fit")
    keep = ModelCheckpoint(tmp_path / "whole", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, rest = Record(), Record()
    quiet_trainer(max_epochs=2, callbacks=[whole, keep], enable_checkpointing=True).fit(
        Plain(), data.train_dataloader()
    )
    quiet_trainer(max_epochs=2, callbacks=[rest]).fit(
        Plain(),
        data.train_dataloader(),
        ckpt_path=tmp_path / "whole" / "step=7.ckpt",
        weights_only=True,
    )
    assert same(rest.batches, whole.batches[7:])


class Seen(L.Callback):
    """Writes which rows, by their last token, each rank saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: L.Trainer, module: object, outputs: object, batch: Batch, index: int
    ) -> None:
        name = f"{trainer.current_epoch}-{trainer.global_rank}-{index}.pt"
        torch.save(batch["input_ids"], self.folder / name)


@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks")
def test_two_ranks_share_the_rows_of_an_epoch(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    module = TextClassification(str(tiny_bert))
    data = TextData(str(tiny_bert), ["sentence"], "label", max_length=32, batch_size=4, **reviews)
    quiet_trainer(max_epochs=2, devices=2, strategy="ddp_fork", callbacks=[Seen(tmp_path)]).fit(
        module, data
    )

    data.setup("fit")
    expected = {tuple(i[i > 0].tolist()) for b in data.train_dataloader() for i in b["input_ids"]}
    for epoch in range(2):
        batches = [torch.load(file) for file in sorted(tmp_path.glob(f"{epoch}-*.pt"))]
        rows = [tuple(i[i > 0].tolist()) for batch in batches for i in batch]
        assert len(batches) == 6  # 18 rows in 3 rounds of 2 batches
        assert len(rows) == 18
        assert set(rows) == expected


def test_batches_hold_what_the_tokenizer_says(tiny_bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("a,b,same\ngood film,fine film,yes\nbad,a very sad story to avoid,no\n")
    data = TextData(str(tiny_bert), ["a", 1], "same", train=str(file), max_length=8)
    data.setup("fit")
    (batch,) = data.train_dataloader()

    encoded = [
        data.tokenizer(*pair, truncation=True, max_length=8)
        for pair in (("bad", "a very sad story to avoid"), ("good film", "fine film"))
    ]
    order = [0, 1] if batch["labels"].tolist() == [0, 1] else [1, 0]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert batch["input_ids"].shape == (2, 8)
    for row, which in enumerate(order):
        size = len(encoded[which]["input_ids"])
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[name][row, :size].tolist() == encoded[which][name]
            assert batch[name][row, size:].sum() == 0


def test_padding_in_the_tokenizer_file_is_switched_off(
    tiny_bert: Path, reviews: dict[str, str]
) -> None:
    data = TextData(str(tiny_bert), ["sentence"], "label", max_length=32, batch_size=1, **reviews)
    assert data.tokenizer.backend_tokenizer.padding["length"] == 32
    data.setup("fit")
    assert all(batch["attention_mask"].all() for batch in data.train_dataloader())


def test_evaluation_goes_from_long_to_short(tiny_bert: Path, reviews: dict[str, str]) -> None:
    data = TextData(
        str(tiny_bert), ["sentence"], "label", max_length=32, eval_batch_size=2, **reviews
    )
    data.setup("fit")
    widths = [batch["input_ids"].shape[1] for batch in data.val_dataloader()]
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)


def test_names_of_labels_are_numbered_by_the_training_file(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "one_kind.tsv"
    file.write_text("sentence\tlabel\ngood\tpos\n")
    data = TextData(
        str(tiny_bert), ["sentence"], "label", max_length=32, train=reviews["train"], val=str(file)
    )
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [1]


def test_a_limit_draws_rows_by_the_seed(tiny_bert: Path, reviews: dict[str, str]) -> None:
    def drawn(seed: int) -> list[list[int]]:
        data = TextData(
            str(tiny_bert), ["sentence"], "label", max_length=32, limit=4, seed=seed, **reviews
        )
        data.setup("fit")
        assert len(next(iter(data.val_dataloader()))["labels"]) == 4
        return sorted(next(iter(data.train_dataloader()))["input_ids"].tolist())

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_reads_a_named_data_set_by_its_splits(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text(f"text,label\ngood {split},1\nbad,0\n")
    data = TextData(str(tiny_bert), ["text"], "label", max_length=32, name=str(folder))
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["labels"]) == 2
    assert len(next(iter(data.val_dataloader()))["labels"]) == 2


def alone(path: str, folder: Path) -> str:
    """A copy of the file that has no validation or test file beside it."""
    return shutil.copy(path, folder / f"alone{Path(path).suffix}")


def test_trains_without_validation(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    train = alone(reviews["train"], tmp_path)
    data = TextData(str(tiny_bert), ["sentence"], "label", train=train, max_length=32)
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        quiet_trainer(max_epochs=1).fit(TextClassification(str(tiny_bert)), data)


def test_overfitting_sees_the_same_batch_every_epoch(
    tiny_bert: Path, reviews: dict[str, str]
) -> None:
    data = TextData(str(tiny_bert), ["sentence"], "label", max_length=32, batch_size=4, **reviews)
    record = Record()
    quiet_trainer(max_epochs=3, overfit_batches=1, callbacks=[record]).fit(
        TextClassification(str(tiny_bert)), data
    )
    assert len(record.batches) == 3
    assert all(same([batch], record.batches[:1]) for batch in record.batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give `name`.* or `train`.* got neither"),
        ({"name": "glue", "val": "a.csv"}, "got {'name': 'glue', 'val': 'a.csv'}"),
        ({"train": "a.csv", "text": []}, r"text must be one or two columns, got \[\]"),
        ({"train": "a.csv", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"train": "a.csv", "limit": 0}, "limit must be at least 1, got 0"),
        ({"train": "a.csv", "max_length": 65}, "max_length=65 is more than the 64 tokens"),
    ],
)
def test_refuses_settings_it_cannot_mean(
    tiny_bert: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        TextData(
            str(tiny_bert), **{"text": ["text"], "label": "label", "max_length": 32, **settings}
        )


def test_a_local_file_takes_the_place_of_the_hub_and_brings_those_beside_it(
    tiny_bert: Path, reviews: dict[str, str]
) -> None:
    data = TextData(
        str(tiny_bert), ["sentence"], "label", name="glue", train=reviews["train"], max_length=32
    )
    assert data.sources.splits == {**reviews, "test": None}
    data.setup("fit")


def test_says_which_split_is_not_there(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    train = alone(reviews["train"], tmp_path)
    data = TextData(str(tiny_bert), ["sentence"], "label", train=train, max_length=32)
    with pytest.raises(SettingError, match="there is no test split to test on; give `test`"):
        data.setup("test")


def test_the_real_encoder_reads_real_sentences(minilm: str, shared_data: Path) -> None:
    files = {"train": str(shared_data / "sst2/train.tsv"), "val": str(shared_data / "sst2/dev.tsv")}
    data = TextData(minilm, [1], 0, header=False, limit=8, max_length=16, **files)
    module = TextClassification(minilm)
    record = Record()
    quiet_trainer(max_steps=1, callbacks=[record], num_sanity_val_steps=0).fit(module, data)

    (batch,) = record.batches
    assert batch["input_ids"].shape[1] <= 16
    assert set(batch["labels"].tolist()) == {0, 1}
    assert module.model.bert.encoder.layer[5] is not None
