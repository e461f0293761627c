"""The model card of an export: README.md, which the hub shows as the model's page."""

import hashlib
from pathlib import Path
from typing import Any

from common.tokenizer import EOT

CARD = "README.md"
MARK = "\n<!-- This page is replaced by the next export unless you change it. {digest} -->\n"


def model_card(model_config: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the text of a model card.

    `facts` are those of `run_facts`. The card says only what is known.
    """
    sizes = {
        "layers": "n_layer",
        "heads": "n_head",
        "width": "n_embd",
        "context, in tokens": "block_size",
        "vocabulary": "vocab_size",
    }
    rows = [(what, f"{model_config[name]:,}") for what, name in sizes.items()]
    rows.append(("parameters", f"{parameters(model_config):,}"))
    if "data_source" in facts:
        source = " ".join(str(facts["data_source"]).split()).replace("|", "\\|")
        rows.append(("data", f"`{source}`"))
    if "step" in facts:
        rows.append(("updates", f"{facts['step']:,}"))
    if "val_loss" in facts:
        rows.append(("validation loss", f"{facts['val_loss']:.4f}"))
    if "hellaswag_n" in facts:
        style = f", {facts['hellaswag_style']}" if "hellaswag_style" in facts else ""
        what = f"HellaSwag ({facts['hellaswag_n']:,} questions{style})"
        scores = [name for name in ("acc", "acc_norm") if f"hellaswag_{name}" in facts]
        values = (f"{name} {facts[f'hellaswag_{name}']:.4f}" for name in scores)
        rows.append((what, ", ".join(values)))
    if "git" in facts:
        rows.append(("commit of the code", f"`{facts['git']}`"))
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags:", "- gpt2", "---", "",
        "# GPT-2", "",
        "A language model with the architecture of GPT-2.", "",
        "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows), "",
        "```python", *how_to_load(model_config), "```", "",
    ]  # fmt: skip
    text = "\n".join(lines)
    return text + MARK.format(digest=digest(text))


def how_to_load(model_config: dict[str, Any]) -> list[str]:
    """Return lines of Python that load the model."""
    if model_config["vocab_size"] > EOT:
        length = min(100, model_config["block_size"] // 2)  # 256, the default, may not fit
        return [
            "from transformers import pipeline",
            "",
            'generate = pipeline("text-generation", "FOLDER")  # or its name on the hub',
            f'texts = generate("Hello, I am", max_new_tokens={length})',
            'print(texts[0]["generated_text"])',
        ]
    return [  # the vocabulary is not GPT-2's, so the folder has no tokenizer
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")  # or its name on the hub',
    ]


def parameters(model_config: dict[str, Any]) -> int:
    """Return the number of parameters of a GPT-2, without padding."""
    C = model_config["n_embd"]
    block = 12 * C * C + 13 * C  # four matrices with biases, and two LayerNorms
    tables = (model_config["vocab_size"] + model_config["block_size"]) * C
    return tables + model_config["n_layer"] * block + 2 * C


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_untouched(path: Path) -> bool:
    """Tell whether a model card is as `model_card` wrote it: somebody may have changed it."""
    try:
        text = path.read_bytes().decode()
    except ValueError:
        return False
    body = text[: text.rfind("\n<!--")]
    return text == body + MARK.format(digest=digest(body))
