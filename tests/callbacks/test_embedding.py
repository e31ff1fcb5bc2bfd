"""Embeddings made narrower in real fits: tied and not, resumed, exported, and refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as tf
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from torch import Tensor, nn

import lrcompress
from lrcompress.distill import Distilled, HiddenStates, Logits
from lrcompress.errors import (
    LayerError,
    NoMatchError,
    ObservationError,
    PlatformError,
    SettingError,
    ShapeError,
)
from lrcompress.nn import KroneckerEmbedding, LowRankEmbedding, LowRankLinear, SafeEmbedding
from lrcompress.structure.plan import Plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
Make = Callable[..., Any]
KINDS = {"low_rank": LowRankEmbedding, "kronecker": KroneckerEmbedding, "safe": SafeEmbedding}


def embedding(**kwargs: Any) -> lrcompress.FactorizeEmbedding:
    defaults: dict[str, Any] = {"at": 0.5, "every_n_steps": 2, "verbose": False}
    defaults |= {"report_path": None}
    if "rank" not in kwargs and "keep" not in kwargs:
        defaults["keep"] = 0.5
    return lrcompress.FactorizeEmbedding(**(defaults | kwargs))


def linears(**kwargs: Any) -> lrcompress.Factorize:
    defaults: dict[str, Any] = {"keep": 0.5, "at": 0.5, "every_n_steps": 2, "verbose": False}
    return lrcompress.Factorize(report_path=None, **(defaults | kwargs))


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Language(L.LightningModule):
    """A tied model of transformers; nothing of it is known to the callback."""

    def __init__(self, model: tf.PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 16, "intermediate_size": 16}


def gpt2() -> Language:
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return Language(tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=60, **sizes)))


def bert() -> Language:
    return Language(tf.BertForMaskedLM(tf.BertConfig(**TEXT)))


def t5() -> Language:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = tf.T5Config(vocab_size=60, **sizes, decoder_start_token_id=0)
    return Language(tf.T5ForConditionalGeneration(config))


def bart() -> Language:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True}
    feet = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = tf.BartConfig(vocab_size=60, max_position_embeddings=16, **sizes, **feet, **heads)
    return Language(tf.BartForConditionalGeneration(config))


def made(make: Callable[[], Language]) -> Language:
    L.seed_everything(0, verbose=False)
    return make()


def texts(num: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num):
        ids = torch.randint(5, 30, (4, 8), generator=generator)  # half of the tokens are never read
        mask = (torch.arange(8) < torch.randint(3, 9, (4, 1), generator=generator)).long()
        ids = ids * mask
        labels = torch.where(mask.bool(), ids, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def logits(model: Language) -> Tensor:
    return model.model.eval()(**texts(1)[0]).logits


TIED = {
    "gpt2": (gpt2, "transformer.wte", ["lm_head"]),
    "bert": (bert, "bert.embeddings.word_embeddings", ["cls.predictions.decoder"]),
    "t5": (t5, "shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    "bart": (bart, "model.shared", ["model.encoder.embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_table_and_its_head_share_their_factors(
    name: str, trainer: Make, loader: Make, tmp_path: Path
) -> None:
    make, table, others = TIED[name]
    model, callback = made(make), embedding(rank=4, restart_steps=0)
    before = sum(p.numel() for p in model.parameters())
    trainer(callback).fit(model, loader(texts()), loader(texts()))

    held = model.model.get_submodule(table)
    assert isinstance(held, LowRankEmbedding)
    for other in map(model.model.get_submodule, others):
        assert other.left.weight is held.left.weight
        assert other.right.weight is held.right.weight
    assert isinstance(model.model.get_output_embeddings(), LowRankLinear)
    (point,) = callback.report.points
    (record,) = point.layers
    assert (record.rank, record.before, record.after) == (4, 60 * 16, 4 * 76)
    assert "shares the factors" in record.note
    assert point.model_before == before
    assert point.model_after == before - 60 * 16 + 4 * 76
    assert sum(p.numel() for p in model.parameters()) == point.model_after
    assert point.metrics["after"].keys() == {"val_loss"}

    model.model.tie_weights()
    lrcompress.save_pretrained(model.model, tmp_path / "out")
    loaded = lrcompress.load_pretrained(tmp_path / "out")
    plan = Plan.of(model.model)
    assert Plan.of(loaded) == plan == Plan.from_dict(plan.to_dict())
    assert {x.name for x in plan if x.tied == f"{table}"} >= set(others)
    assert loaded.get_output_embeddings().left.weight is loaded.get_submodule(table).left.weight
    assert torch.equal(logits(Language(loaded)), logits(model))
    dense = lrcompress.merge_dense(loaded)
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert type(dense.get_input_embeddings()) is type(made(make).model.get_input_embeddings())
    torch.testing.assert_close(logits(Language(dense)), logits(model))
    dense.save_pretrained(tmp_path / "dense")
    plain = type(dense).from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(Language(plain)), logits(Language(dense)))

    with pytest.raises(TypeError, match=r"LowRankEmbedding.*not an instance of"):
        loaded.resize_token_embeddings(70)
    assert Plan.of(loaded) == plan
    assert dense.resize_token_embeddings(70).weight.shape == (70, 16)  # the way out


def test_an_untied_head_keeps_the_table_and_that_is_said(
    trainer: Make, loader: Make, tmp_path: Path
) -> None:
    model, callback = made(gpt2), embedding(rank=4, heads="untied", method="low_rank")
    before = sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=r"'model.lm_head' keeps the 960 parameters of 'model.tr"):
        trainer(callback).fit(model, loader(texts()), loader(texts()))
    assert type(model.model.lm_head) is nn.Linear
    assert sum(p.numel() for p in model.parameters()) == before + 4 * 76
    (record,) = callback.report.points[0].layers
    assert "lm_head keeps 960 parameters of its own" in record.note
    lrcompress.save_pretrained(model.model, tmp_path)
    loaded = lrcompress.load_pretrained(tmp_path)
    assert torch.equal(logits(Language(loaded)), logits(model))
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(embedding(rank=4, heads="untied").preview(made(gpt2)))
    shown = capture.get()
    assert f"whole model: {before:,} → {before + 304:,}" in shown
    assert "so the model grows by those of the factors" in shown


@pytest.mark.parametrize("method", KINDS)
def test_every_method_in_a_fit_with_linear_layers_distilled_and_exported(
    method: str, trainer: Make, loader: Make, tmp_path: Path
) -> None:
    L.seed_everything(0, verbose=False)
    config = tf.BertConfig(**TEXT, num_labels=2)
    student = Language(tf.BertForSequenceClassification(config))
    given = [x | {"labels": x["input_ids"][:, 0] % 2} for x in texts()]
    module = Distilled(student, losses=[Logits(), HiddenStates()], teacher_dir=tmp_path)
    small = {"rank": 8} if method == "kronecker" else {"rank": 4 if method == "low_rank" else 2}
    size = sum(p.numel() for p in student.parameters())
    callback, other = embedding(method=method, weighting="fisher", **small), linears()
    trainer(callback, other).fit(module, loader(given), loader(given))

    table = student.model.get_input_embeddings()
    assert type(table) is KINDS[method]
    assert any(isinstance(x, LowRankLinear) for x in student.modules())
    (record,) = callback.report.points[0].layers
    assert record.after == sum(p.numel() for p in table.parameters())
    assert callback.report.points[0].method == f"{method} embedding by fisher"
    joined = callback._run_report(module.trainer)
    assert len(joined.points) == 2
    now = sum(p.numel() for p in student.parameters())
    assert joined.points[-1].model_after == now
    assert joined.points[0].model_before == size
    assert joined.points[1].model_before == joined.points[0].model_after
    assert joined.points[1].bytes_before == joined.points[0].bytes_after

    lrcompress.save_pretrained(student.model, tmp_path / "out")
    loaded = lrcompress.load_pretrained(tmp_path / "out")
    one = given[0]
    assert torch.equal(loaded(**one).logits, student.model.eval()(**one).logits)
    if method == "safe":
        with pytest.raises(LayerError, match="SafeEmbedding reads whole sequences: there is no"):
            lrcompress.merge_dense(loaded)
    else:
        dense = lrcompress.merge_dense(loaded)(**one).logits
        torch.testing.assert_close(dense, loaded(**one).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.5},
        {"keep": [0.7, 0.4], "at": ["step:5", "epoch:2"], "weighting": "fisher"},
        {"method": "safe", "rank": 2, "weighting": "fisher", "fisher": "model", "logits": "head"},
        {"method": "kronecker", "rank": 8, "weighting": "none", "at": "step:7"},
    ],
    ids=["low rank", "two points", "safe, drawn labels", "kronecker"],
)
def test_a_run_resumed_at_any_step_ends_bit_identical(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def callbacks() -> list[L.Callback]:
        return [embedding(**options), linears(at="step:9")]

    whole = tagger()
    trainer(*callbacks(), every_step=True).fit(whole, loader(), loader())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    for path in saved[2:-1:3]:
        torch.manual_seed(123)
        model = tagger(width=16)
        trainer(*callbacks()).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name


def test_a_tied_run_resumes_from_a_checkpoint_alone(
    trainer: Make, loader: Make, tmp_path: Path
) -> None:
    whole = made(gpt2)
    trainer(embedding(rank=4), every_step=True).fit(whole, loader(texts()), loader(texts()))
    for step in (5, 12):
        model = made(gpt2)
        run = trainer(embedding(rank=4))
        run.fit(model, loader(texts()), loader(texts()), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(model, whole)
        assert model.model.lm_head.left.weight is model.model.transformer.wte.left.weight
    fresh = lrcompress.restore_structure(made(gpt2), tmp_path / "step=18.ckpt")
    assert Plan.of(fresh) == Plan.of(whole)


def test_optimizer_state_goes_to_the_factors_exactly(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model, seen = tagger(), {}

    class Grab(lrcompress.FactorizeEmbedding):
        def _change_model(self, trainer: Any, module: Any, now: int) -> None:
            (optimizer,) = trainer.optimizers
            dense = optimizer.state[module.embed.weight]["exp_avg"].clone()
            super()._change_model(trainer, module, now)
            left, right = module.embed.left.weight, module.embed.right.weight
            moved = [optimizer.state[p]["exp_avg"] for p in (left, right)]
            torch.testing.assert_close(moved[0], dense @ right.mT)
            torch.testing.assert_close(moved[1], left.mT @ dense)
            seen["group"] = [p for g in optimizer.param_groups for p in g["params"]]

    callback = Grab(rank=4, every_n_steps=2, verbose=False, report_path=None)
    trainer(callback).fit(model, loader(), loader())
    assert {id(p) for p in seen["group"]} == {id(p) for p in model.parameters()}


class Odd(L.LightningModule):
    """An embedding with whatever options, averaged into a regression."""

    def __init__(self, optimizer: type[Any] = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8, **options)
        self.optimizer = optimizer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        mean = self.embed(batch["input_ids"]).mean(1)
        return (mean.sum(1) - batch["labels"].float()).square().mean()

    def configure_optimizers(self) -> Any:
        more = {"momentum": 0.9} if self.optimizer is torch.optim.SGD else {}
        return self.optimizer(self.parameters(), lr=0.01, **more)


def test_sparse_gradients_and_padding_go_on(loader: Make, trainer: Make, batches: Make) -> None:
    L.seed_everything(0, verbose=False)
    given = [x | {"input_ids": x["input_ids"] * x["attention_mask"]} for x in batches()]
    model = Odd(sparse=True, padding_idx=0)
    assert not model.embed.weight[0].any()
    trainer(embedding(rank=3, method="low_rank", restart_steps=0)).fit(model, loader(given))
    assert isinstance(model.embed, LowRankEmbedding)
    assert model.embed.left.sparse
    assert not model.embed.left.weight[0].any()
    assert not model.embed(torch.tensor([0])).any()
    model.training_step(given[0], 0).backward()
    assert model.embed.left.weight.grad.is_sparse
    assert not model.embed.left.weight.grad.to_dense()[0].any()


def test_tokens_that_were_never_read_are_projected_like_others(trainer: Make, loader: Make) -> None:
    model, grabbed = made(gpt2), {}

    class Grab(lrcompress.FactorizeEmbedding):
        def _change_model(self, trainer: Any, module: Any, now: int) -> None:
            grabbed["table"] = module.model.transformer.wte.weight.detach().clone()
            inputs = self._observation.statistics.inputs
            grabbed["count"] = inputs["model.transformer.wte"].values["token_count"]
            super()._change_model(trainer, module, now)
            grabbed["new"] = module.model.transformer.wte.weight.detach().clone()

    callback = Grab(rank=12, every_n_steps=1, verbose=False, report_path=None)
    trainer(callback).fit(model, loader(texts()))
    never, table, new = grabbed["count"] == 0, grabbed["table"], grabbed["new"]
    assert never[:5].all()  # special tokens
    assert never[30:].all()
    assert grabbed["count"].dtype == torch.int64
    lost = ((table - new)[never].norm() / table[never].norm()).item()
    assert lost < 0.75
    (record,) = callback.report.points[0].layers
    assert f"{int(never.sum())} of 60 rows were never read" in record.note


WRONG = [
    ({"keep": None}, SettingError, "give keep, the share .* got keep=None and rank=None"),
    ({"keep": 0.5, "rank": 3}, SettingError, "got keep=0.5 and rank=3"),
    ({"keep": 30}, SettingError, r"did you mean 0\.3"),
    ({"rank": 0}, SettingError, "rank must be a whole number from 1, got 0"),
    ({"method": "low-rank"}, SettingError, "got 'low-rank', nearest: low_rank"),
    ({"weighting": "fish"}, SettingError, "got 'fish', nearest: fisher"),
    ({"heads": "loose"}, SettingError, "heads must be one of tied, untied; got 'loose'"),
    ({"floor": 2.0}, SettingError, "floor must be a share from 0 to 1, got 2.0"),
    ({"head_share": -1}, SettingError, "head_share must be a share from 0 to 1, got -1"),
    ({"keep": [0.5, 0.2]}, SettingError, "give one keep for every point"),
    ({"keep": [0.2, 0.5], "at": [0.3, 0.6]}, SettingError, "keep must fall from point to point"),
    (
        {"keep": [0.5, 0.2], "at": [0.3, 0.6], "method": "safe"},
        SettingError,
        "method 'safe' makes tables that cannot be factored again",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_what_is_wrong_is_said_at_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedding(**options)


UNFIT: list[tuple[Callable[[], L.LightningModule], dict[str, Any], type[Exception], str]] = [
    (
        gpt2,
        {"method": "kronecker"},
        LayerError,
        "'model.lm_head' is tied to .* pass heads='untied'",
    ),
    (gpt2, {"method": "safe", "heads": "untied"}, LayerError, "GPT2LMHeadModel generates: method="),
    (
        bert,
        {"targets": ["*.wpe"]},
        NoMatchError,
        r"targets: pattern '\*.wpe' matches none of the 3",
    ),
    (bert, {"exclude": ["*"]}, NoMatchError, "no embedding is left of 3: all were excluded"),
    (bert, {"keep": 0.01}, SettingError, "keep=0.01 is not possible for table .* takes 0.079"),
    (bert, {"rank": 13}, SettingError, r"rank 13 does not make table .* smaller; from 1 to 12 it"),
    (
        bert,
        {"rank": 3, "method": "kronecker", "heads": "untied"},
        ShapeError,
        "a rank that divides it, got 3; from 1, 2, 4, 8, 16",
    ),
    (
        lambda: Odd(max_norm=1.0),
        {},
        LayerError,
        "'embed' is a Embedding, .* max_norm shortens rows",
    ),
    (lambda: Odd(scale_grad_by_freq=True), {}, LayerError, "scale_grad_by_freq divides gradients"),
    (
        lambda: Language(
            tf.OPTForCausalLM(tf.OPTConfig(**TEXT, ffn_dim=16, word_embed_proj_dim=16))
        ),
        {"targets": ["*embed_positions"]},
        LayerError,
        "is a OPTLearnedPositionalEmbedding, .* something else than to look up rows",
    ),
    (
        lambda: Odd(torch.optim.SparseAdam, sparse=True),
        {},
        PlatformError,
        "SparseAdam takes sparse",
    ),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), UNFIT)
def test_what_cannot_be_factored_is_refused_before_the_first_step(
    make: Callable[[], L.LightningModule],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    trainer: Make,
    loader: Make,
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        trainer(embedding(**options)).fit(model, loader(texts()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._load_state_dict_pre_hooks for m in model.modules())


def test_sharding_is_refused_with_the_way_out(
    trainer: Make, loader: Make, sharding: ModelParallelStrategy
) -> None:
    with pytest.raises(PlatformError, match=r"use strategy='ddp', or .*save_pretrained writes"):
        trainer(embedding(), strategy=sharding).fit(made(bert), loader(texts()))


def test_a_table_that_is_never_read_is_named(tagger: Make, loader: Make, trainer: Make) -> None:
    model = tagger()
    model.idle = nn.Embedding(30, 8)
    with pytest.raises(NoMatchError, match=r"which of 2 embeddings is the tokens'.* targets="):
        trainer(embedding()).fit(model, loader())
    with pytest.raises(ObservationError, match="'idle' was never read in 3 observed steps"):
        trainer(embedding(targets=["idle"])).fit(model, loader())
    assert type(model.idle) is nn.Embedding


def test_position_tables_can_be_chosen(loader: Make, trainer: Make) -> None:
    model = made(bert)
    callback = embedding(targets=["*.position_embeddings", "*.word_embeddings"], keep=0.7)
    trainer(callback).fit(model, loader(texts()))
    inner = model.model.bert.embeddings
    assert isinstance(inner.position_embeddings, LowRankEmbedding)
    assert type(inner.token_type_embeddings) is nn.Embedding
    assert len(callback.report.points[0].layers) == 2


PROCESSES = """
import os, sys
sys.path.insert(0, {here!r})
import lightning as L
import torch
import lrcompress
from conftest import Loader, Tagger, sentences
from lightning.pytorch.callbacks import ModelCheckpoint

number, root = int(os.environ["RANK"]), {root!r}

def run(name, ckpt_path=None, **options):
    L.seed_everything(1000 * number, verbose=False)
    torch.manual_seed(0)
    model = Tagger(dropout=0.0)
    torch.manual_seed(1000 * number)  # a new layer is drawn otherwise in every process
    seen = []
    class Grab(lrcompress.FactorizeEmbedding):
        def _change_model(self, *args):
            seen.append(self._observation.statistics.state_dict())
            super()._change_model(*args)
    callback = Grab(at=0.5, every_n_steps=1, verbose=False, report_path=None, **options)
    saving = ModelCheckpoint(f"{{root}}/{{name}}", "{{step}}", every_n_train_steps=1, save_top_k=-1,
        save_on_train_epoch_end=False)
    trainer = L.Trainer(callbacks=[callback, saving], max_epochs=3, accelerator="cpu", devices=2,
        strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=root)
    parts = [{{k: v[number::2] for k, v in batch.items()}} for batch in sentences()]
    trainer.fit(model, Loader(parts), ckpt_path=ckpt_path)
    kept = {{"model": model.state_dict(), "statistics": seen,
             "optimizer": trainer.optimizers[0].state_dict()}}
    torch.save(kept, f"{{root}}/{{name}} {{number}}.pt")

run("low", rank=4, weighting="fisher")
run("resumed", f"{{root}}/low/step=7.ckpt", rank=4, weighting="fisher")
run("safe", rank=3, method="safe")
"""


def test_two_processes_end_alike_resume_and_count_as_one(
    launch: Make, tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESSES.format(here=str(Path(__file__).parent), root=str(tmp_path)))
    launch(script, 2)

    def kept(name: str, number: int) -> Any:
        return torch.load(tmp_path / f"{name} {number}.pt")

    def flat(kept: Any) -> list[Tensor]:
        state = kept["optimizer"]["state"]
        return [*kept["model"].values(), *(v for one in state.values() for v in one.values())]

    for name in ("low", "resumed", "safe"):
        pairs = zip(flat(kept(name, 0)), flat(kept(name, 1)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    pairs = zip(flat(kept("low", 0)), flat(kept("resumed", 0)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    seen: list[Any] = []

    class Grab(lrcompress.FactorizeEmbedding):
        def _change_model(self, *args: Any) -> None:
            seen.append(self._observation.statistics.state_dict())
            super()._change_model(*args)

    model = tagger(dropout=0.0)
    torch.manual_seed(0)
    model = type(model)(dropout=0.0)
    alone = Grab(
        rank=4, weighting="fisher", every_n_steps=1, verbose=False, report_path=None, at=0.5
    )
    trainer(alone).fit(model, loader())
    ours, theirs = seen[0], kept("low", 0)["statistics"][0]
    key = ("inputs", "embed", "token_count")
    assert torch.equal(ours[key[0]][key[1]][key[2]], theirs[key[0]][key[1]][key[2]])
    fisher = [x["outputs"]["embed"]["token_fisher"] for x in (ours, theirs)]
    torch.testing.assert_close(*fisher)


@pytest.mark.parametrize("method", KINDS)
def test_fused_sgd_goes_on_with_another_table(
    method: str, tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    model.configure_optimizers = lambda: torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, fused=True
    )
    trainer(embedding(method=method)).fit(model, loader(), loader())
    assert isinstance(model.embed, KINDS[method])
