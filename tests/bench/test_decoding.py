"""Tokens a second: what is generated, what is counted, what is promised."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lrcompress.bench.decoding import GeneratingModel, compare_decoding, read_in_a_step
from lrcompress.errors import SettingError

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(*, tied: bool, **changes: int) -> tf.LlamaForCausalLM:
    config = tf.LlamaConfig(**{**SIZES, **changes}, tie_word_embeddings=tied)
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["causal", "sequence to sequence"])
def test_every_step_is_one_token_with_a_cache(kind: str) -> None:
    model: nn.Module = llama(tied=False)
    if kind != "causal":
        sizes = {"d_model": 16, "vocab_size": 50, "encoder_layers": 1, "decoder_layers": 2}
        sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        model = tf.BartForConditionalGeneration(tf.BartConfig(**sizes))
    seen: list[int] = []
    layers = model.model.layers if kind == "causal" else model.model.decoder.layers
    layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    # nothing that the model prefers ends or changes what is generated
    model.generation_config.update(do_sample=True, temperature=0.5, max_length=9, eos_token_id=7)
    batch = {"input_ids": torch.randint(8, 50, (3, 9)), "attention_mask": torch.ones(3, 9).long()}
    first, later = GeneratingModel("one", model, 5).call(batch)
    assert seen == [9 if kind == "causal" else 1] + [1] * 5
    assert min(first, later) > 0
    assert model.generation_config.do_sample


def test_a_slower_model_is_measured_as_slower() -> None:
    small, large = (
        GeneratingModel(name, llama(tied=True, intermediate_size=width), 8)
        for name, width in (("small", 16), ("large", 131072))
    )
    batch = {"input_ids": torch.randint(8, 50, (1, 9))}
    run = compare_decoding(small, large, batch, device="cpu", rounds=3)
    assert (run.batch, run.length, run.tokens, list(run.models)) == (1, 9, 8, ["small", "large"])
    assert run.faster is not None
    assert run.faster > 1.5
    assert run.models["small"].tokens_per_second > run.models["large"].tokens_per_second
    assert run.models["large"].peak_bytes > large.held
    alone = compare_decoding(small, None, batch, device="cpu", rounds=1)
    assert (alone.faster, alone.promised, alone.share_of_promised) == (None, None, None)
    with pytest.raises(SettingError, match="two models are called 'small'; give them two names"):
        compare_decoding(small, small, batch, device="cpu", rounds=1)
    with pytest.raises(SettingError, match="rounds must be a whole number from 1, got 0"):
        compare_decoding(small, large, batch, device="cpu", rounds=0)


def test_a_step_reads_all_but_tables() -> None:
    tied, free = llama(tied=True), llama(tied=False)
    every = sum(p.nbytes for p in tied.parameters())
    assert read_in_a_step(tied) == every == read_in_a_step(free)
    assert sum(p.nbytes for p in free.parameters()) == every + 4 * 50 * 16


def test_a_model_that_does_not_generate_is_refused(tiny_bert: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(SettingError, match=r"one: decoding is of models that gen.*Net does not"):
        GeneratingModel("one", Net(), 3)
    with pytest.raises(SettingError, match="BertModel does not"):
        GeneratingModel("one", tf.BertModel.from_pretrained(tiny_bert), 3)
