import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config

from lrcompress.errors import SettingError
from lrcompress.tasks import TextClassification, TextData
from lrcompress.tasks.fine_tuning import decay_groups


def trainer(**settings: object) -> L.Trainer:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_checkpointing"], False)
    model_summary = {"enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, **model_summary, "max_epochs": 2, **settings})


def text_data(tiny_bert: Path, files: dict[str, str], **settings: object) -> TextData:
    return TextData(
        str(tiny_bert), ["sentence"], "label", batch_size=4, max_length=32, **files, **settings
    )


def test_learns_what_it_is_shown(tiny_bert: Path, reviews: dict[str, str]) -> None:
    L.seed_everything(0, verbose=False)
    module = TextClassification(str(tiny_bert), lr=1e-2, metrics=["accuracy", "f1", "matthews"])
    data = text_data(tiny_bert, {"train": reviews["train"], "val": reviews["train"]})
    fit = trainer(max_epochs=12)
    fit.fit(module, data)

    assert fit.callback_metrics["train_loss"] < 0.5
    assert fit.callback_metrics["val_accuracy"] > 0.9
    assert {"val_loss", "val_f1", "val_matthews"} <= set(fit.callback_metrics)


def test_validation_is_exact_over_uneven_batches(tiny_bert: Path, reviews: dict[str, str]) -> None:
    module = TextClassification(str(tiny_bert), metrics=["accuracy", "f1"])
    data = text_data(tiny_bert, {"train": reviews["val"], "val": reviews["train"]})
    found = {}
    for size in (4, 18):
        data.eval_batch_size = size
        found[size] = trainer().validate(module, data, verbose=False)[0]

    assert set(found[4]) == {"val_loss", "val_accuracy", "val_f1"}
    assert found[4] == pytest.approx(found[18], abs=1e-6)


def test_test_metrics_have_their_own_names(tiny_bert: Path, reviews: dict[str, str]) -> None:
    data = text_data(tiny_bert, {**reviews, "test": reviews["val"]})
    (found,) = trainer().test(TextClassification(str(tiny_bert)), data, verbose=False)
    assert set(found) == {"test_loss", "test_accuracy"}


def test_one_label_is_regression(tiny_bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("sentence,label\n" + "".join(f"film {i},{i / 4}\n" for i in range(8)))
    module = TextClassification(str(tiny_bert), num_labels=1, metrics=["spearman", "pearson"])
    files = {"train": str(file), "val": str(file)}
    fit = trainer(max_epochs=1)
    fit.fit(module, text_data(tiny_bert, files, regression=True))
    assert {"val_loss", "val_spearman", "val_pearson"} <= set(fit.callback_metrics)


def test_random_weights_need_only_a_config(tmp_path: Path) -> None:
    BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    ).save_pretrained(tmp_path)
    module = TextClassification(str(tmp_path), num_labels=3, pretrained=False)
    assert module.model.classifier.out_features == 3
    assert module.model.training


def test_a_decoder_pads_with_its_end_of_text(tmp_path: Path) -> None:
    GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, eos_token_id=8).save_pretrained(
        tmp_path
    )
    module = TextClassification(str(tmp_path), pretrained=False)
    assert module.model.config.pad_token_id == 8


def test_a_new_classifier_is_no_news(tiny_bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        TextClassification(str(tiny_bert))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_a_new_body_is_news(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny_bert)
    weights = {name: p for name, p in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        TextClassification(str(tmp_path))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "encoder.layer.1" in caplog.text


def test_vectors_do_not_decay_and_matrices_do() -> None:
    factored = nn.Module()
    factored.left, factored.right = nn.Linear(2, 6), nn.Linear(5, 2, bias=False)
    model = nn.Sequential(nn.Embedding(3, 5), factored, nn.LayerNorm(6))
    model[2].requires_grad_(False)

    matrices, vectors = decay_groups(model, weight_decay=0.1)

    assert [p.shape for p in matrices["params"]] == [(3, 5), (6, 2), (2, 5)]
    assert [p.shape for p in vectors["params"]] == [(6,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("schedule", "last"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)]
)
def test_learning_rate_rises_then_follows_the_schedule(
    tiny_bert: Path, reviews: dict[str, str], schedule: str, last: float
) -> None:
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = TextClassification(str(tiny_bert), lr=1.0, warmup=0.2, schedule=schedule)
    fit = trainer(callbacks=[Watch()])
    fit.fit(module, text_data(tiny_bert, reviews))

    assert rates[:3] == pytest.approx([0.0, 0.5, 1.0])  # 2 of 10 steps
    assert len(rates) == 10
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(last)


def test_a_schedule_needs_an_end(tiny_bert: Path, reviews: dict[str, str]) -> None:
    fit = trainer(max_epochs=-1)
    with pytest.raises(SettingError, match="schedule 'linear' needs to know when training ends"):
        fit.fit(TextClassification(str(tiny_bert)), text_data(tiny_bert, reviews))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 0}, "num_labels must be 1 .* got 0"),
        ({"warmup": 1.5}, "warmup is a share of all steps, from 0 to 1, got 1.5"),
        ({"schedule": "liner"}, "unknown schedule 'liner'; nearest: linear"),
        ({"metrics": ["mathews"]}, "unknown metric 'mathews'; nearest: matthews"),
    ],
)
def test_refuses_settings_it_cannot_mean(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TextClassification("never/loaded", **settings)


@pytest.mark.parametrize(
    ("num_labels", "regression", "message"),
    [
        (2, False, "num_labels=2, but the data has 3 classes"),
        (1, False, "num_labels=1, but the data has 3 classes"),
        (2, True, "num_labels=2, but the data is for 1, where 1 means regression"),
    ],
)
def test_the_head_must_fit_the_data(
    tiny_bert: Path, tmp_path: Path, num_labels: int, regression: bool, message: str
) -> None:
    file = tmp_path / "three.csv"
    file.write_text("sentence,label\ngood,2\nfine,1\nbad,0\n")
    module = TextClassification(str(tiny_bert), num_labels=num_labels)
    data = text_data(tiny_bert, {"train": str(file)}, regression=regression)
    with pytest.raises(SettingError, match=message):
        trainer().fit(module, data)


def test_loads_again_from_its_checkpoint(
    tiny_bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    module = TextClassification(str(tiny_bert), metrics=["f1"])
    fit = trainer(max_epochs=1)
    fit.fit(module, text_data(tiny_bert, reviews))
    fit.save_checkpoint(tmp_path / "a.ckpt")

    loaded = TextClassification.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    assert loaded.hparams == module.hparams
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
