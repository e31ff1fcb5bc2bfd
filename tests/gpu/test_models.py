"""A Llama-type model on the card: attention, files, generation, several devices."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lrcompress
from lrcompress.nn import LowRankLinear

METHODS = ["svd", "asvd", "row_fisher", "kfac", "kronecker"]


def llama(attention: str = "sdpa", **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=64, **sizes,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def texts(device: torch.device, num: int = 4) -> list[dict[str, Tensor]]:
    """Batches with padding on the right, of which the loss takes nothing."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num):
        ids = torch.randint(3, 100, (8, 16), generator=generator)
        mask = torch.arange(16) < torch.randint(4, 17, (8, 1), generator=generator)
        labels = ids.masked_fill(~mask, -100)
        batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def compressed(device: torch.device, method: str = "kfac", attention: str = "sdpa") -> Any:
    model = llama(attention).to(device)
    record = lrcompress.compress(model, texts(device), loss, method=method, keep=0.5)
    return model, record


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_compressed_as_on_the_cpu(card: Any, method: str, attention: str) -> None:
    there, told = compressed(card.device, method, attention)
    here, known = compressed(torch.device("cpu"), method, "eager")
    assert {p.device for p in there.parameters()} == {card.device}
    assert [(x.name, x.rank) for x in told.layers] == [(x.name, x.rank) for x in known.layers]
    batch = texts(torch.device("cpu"))[0]
    with torch.no_grad():
        ours, theirs = (
            m(**{key: value.to(m.device) for key, value in batch.items()}) for m in (there, here)
        )
    torch.testing.assert_close(ours.loss.cpu(), theirs.loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_compressed_on_the_card(card: Any, dtype: torch.dtype) -> None:
    model = llama().to(card.device, dtype)
    batches = texts(card.device)
    with torch.no_grad():
        before = float(loss(model, batches[0]))
    record = lrcompress.compress(model, batches, loss, keep=0.7)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert record.model_after < 0.9 * record.model_before
    with torch.no_grad():
        assert float(loss(model, batches[0])) == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_written_from_the_card_and_loaded_to_it(
    card: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, record = compressed(card.device)
    model.to(dtype)
    lrcompress.save_pretrained(model, tmp_path, report=record)
    assert {value.device.type for value in load_file(tmp_path / "model.safetensors").values()} == {
        "cpu"
    }
    loaded = lrcompress.load_pretrained(tmp_path, dtype=dtype).to(card.device)
    assert any(isinstance(layer, LowRankLinear) for layer in loaded.modules())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    if card.name != "standin":  # of which accelerate knows nothing
        mapped = lrcompress.load_pretrained(
            tmp_path, dtype=dtype, device_map={"": str(card.device)}
        )
        assert {p.device for p in mapped.parameters()} == {card.device}
        torch.testing.assert_close(mapped.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_folder_of_the_card_is_loaded_by_a_machine_without(card: Any, tmp_path: Path) -> None:
    model, _ = compressed(card.device)
    lrcompress.save_pretrained(model, tmp_path)
    torch.save(model.lm_head.weight.detach().cpu(), tmp_path / "head.pt")
    script = (
        "import sys, torch, lrcompress; assert not torch.cuda.is_available(); "
        "model = lrcompress.load_pretrained(sys.argv[1]); "
        "assert torch.equal(model.lm_head.weight, torch.load(sys.argv[1] + '/head.pt'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("method", ["kfac", "kronecker"])
def test_generation_with_a_cache_is_that_without(card: Any, method: str) -> None:
    model, _ = compressed(card.device, method)
    ids = torch.arange(3, 11, device=card.device)[None]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    given |= {"min_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    with_cache, without = (model.generate(ids, use_cache=x, **given) for x in (True, False))
    assert with_cache.sequences.shape == (1, 20)
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    torch.testing.assert_close(with_cache.scores, without.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_two_devices_is_compressed_as_on_one(card: Any, method: str) -> None:
    if not card.others():
        pytest.skip("there is one device")

    class Spread(nn.Module):
        def __init__(self, *places: torch.device) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(100, 32).to(places[0])
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(place)
                for place in places
            )
            self.head = nn.Linear(32, 3).to(places[-1])

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            x = self.embed(batch["input_ids"].to(self.embed.weight.device))
            for block in self.blocks:
                x = x.to(block[0].weight.device)
                x = x + block(x)
            mask = batch["attention_mask"].unsqueeze(-1).to(x.device)
            found = self.head((x * mask).sum(1) / mask.sum(1))
            return nn.functional.cross_entropy(found, batch["input_ids"][:, 0].to(x.device) % 3)

    ends = []
    for places in ((card.device, card.others()[0]), (card.device, card.device)):
        model = Spread(*places)
        record = lrcompress.compress(
            model, texts(card.device), lambda model, batch: model(batch), method=method, keep=0.5
        )
        assert [p.device for p in model.blocks.parameters()] == [
            place for place, block in zip(places, model.blocks, strict=True)
            for _ in block.parameters()
        ]  # fmt: skip
        ends.append([(layer.name, layer.rank, layer.error) for layer in record.layers])
    assert [one[:2] for one in ends[0]] == [one[:2] for one in ends[1]]
    for one, other in zip(*ends, strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-3)
