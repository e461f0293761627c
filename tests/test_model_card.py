"""The model card says what is known, and nothing else."""

import pytest
from huggingface_hub import ModelCard

from common.cli import plain
from common.model_card import is_untouched, model_card, parameters
from train_gpt2 import GPT, GPTConfig

SIZES = plain(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16))
FACTS = {
    "step": 19073, "val_loss": 3.07123, "hellaswag_acc": 0.28, "hellaswag_acc_norm": 0.30512,
    "hellaswag_n": 10042, "hellaswag_style": "completion", "git": "abc123",
    "data_source": "HuggingFaceFW/fineweb-edu",
}  # fmt: skip


def test_the_card_has_every_fact_and_front_matter_that_the_hub_reads():
    text = model_card(SIZES, FACTS)
    data = ModelCard(text).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert "gpt2" in data.tags
    for line in (
        "| layers | 2 |", "| context, in tokens | 16 |", "| vocabulary | 50,257 |",
        "| data | `HuggingFaceFW/fineweb-edu` |", "| updates | 19,073 |",
        "| validation loss | 3.0712 |", "| commit of the code | `abc123` |",
        "| HellaSwag (10,042 questions, completion) | acc 0.2800, acc_norm 0.3051 |",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "pipeline(" in text


def test_a_card_without_facts_speaks_of_sizes_alone():
    text = model_card({**SIZES, "vocab_size": 300}, {})
    assert "loss" not in text and "HellaSwag" not in text and "data" not in text
    assert "None" not in text and "| parameters |" in text
    assert "pipeline(" not in text  # there is no tokenizer


def test_a_source_cannot_break_the_table():
    text = model_card(SIZES, {"data_source": "a|b\nc"})
    assert r"| data | `a\|b c` |" in text.splitlines()


def test_the_number_of_parameters_is_that_of_the_model():
    model = GPT(GPTConfig(**{**SIZES, "vocab_size": 384}))
    assert parameters(plain(model.config)) == sum(p.numel() for p in model.parameters())
    assert parameters(plain(GPTConfig())) == 124_439_808


@pytest.mark.parametrize("change", [str.upper, lambda text: text + " ", lambda text: text[:-9]])
def test_a_card_that_somebody_has_changed_is_known(tmp_path, change):
    path, text = tmp_path / "README.md", model_card(SIZES, FACTS)
    path.write_bytes(text.encode())
    assert is_untouched(path)
    path.write_bytes(change(text).encode())
    assert not is_untouched(path)
