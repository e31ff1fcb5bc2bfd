"""What a module costs, against what can be counted by hand."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lrcompress.bench import TorchModel


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 16, bias=False)
        self.again = self.down
        self.register_buffer("table", torch.zeros(100), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_memory_is_what_is_held_and_what_a_call_allocates() -> None:
    model, x = Net(), torch.randn(8, 5, 64)
    subject = TorchModel("net", model)
    weights = 64 * 256 + 256 * 16
    assert subject.parameters == weights
    assert subject.stored_bytes == 4 * weights  # held twice, stored once
    middle, last = 8 * 5 * 256, 8 * 5 * 16
    assert subject.peak_bytes({"x": x}) == 4 * (weights + 100 + middle + last)
    assert subject.flops({"x": x}) == 2 * 8 * 5 * weights
    assert not model.training


def test_a_module_without_parameters_has_memory_too() -> None:
    x = torch.randn(8, 5)
    assert TorchModel("tanh", nn.Tanh()).peak_bytes({"input": x}) == x.nbytes


def test_attention_is_counted(tiny_bert: Path) -> None:
    model = tf.BertModel.from_pretrained(tiny_bert)
    ids = torch.ones(3, 10, dtype=torch.int64)
    flops = TorchModel("bert", model).flops({"input_ids": ids, "attention_mask": ids})
    hidden, inner, tokens = 32, 64, 3 * 10
    products = tokens * (4 * hidden**2 + 2 * hidden * inner)
    attention = 2 * tokens * 10 * hidden
    assert flops == 2 * (2 * (products + attention) + 3 * hidden**2)  # two layers and a pooler


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in itself
def test_a_compiled_module_computes_the_same() -> None:
    model, x = Net().eval(), torch.randn(4, 64)
    subject = TorchModel("net", model, stored_bytes=7, compiled=True)
    found = subject.call({"x": x})
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, model(x))
    assert not found.requires_grad
    assert (subject.mode, subject.stored_bytes) == ("compiled", 7)
    assert subject.peak_bytes({"x": x}) >= subject.held
