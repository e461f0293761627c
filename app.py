"""
A web page that continues a prompt with a GPT-2. `pip install -r requirements-app.txt`, then:

    python app.py                           the newest checkpoint under log/, on http://127.0.0.1:7860
    python app.py --model gpt2 --port 80    OpenAI's weights

A Hugging Face Space can run this repository without changes. Put `sdk: gradio`,
`sdk_version: 6.31.0` and `app_file: app.py` at the head of its README.md. Set its variable MODEL to
the name of a model on the hub; without it the page uses OpenAI's GPT-2.
"""

import copy
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import advice, explain, run_command
from common.hardware import OutOfMemory, device_errors
from common.metrics import run_facts
from common.weights import find_model
from sample import SampleConfig, continuations, cut_note, model_bytes, quantize
from train_gpt2 import GPT, TrainConfig, load_model, set_up_machine

if TYPE_CHECKING:
    import gradio

MAX_SAMPLES = 4
MAX_WAITING = 50  # requests in the queue
CSS = """
.gradio-container {max-width: 1000px !important; margin: auto}
#samples textarea {font-family: ui-serif, Georgia, serif; font-size: 1.05rem; line-height: 1.5}
footer {display: none !important}
"""


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Serve a web page where a model continues a prompt."""

    # checkpoint, run folder, Hugging Face folder, safetensors file or hub name (left out: variable
    # MODEL, else the newest checkpoint under log/, else gpt2)
    model: str | None = field(default_factory=lambda: os.environ.get("MODEL"))
    port: int = 7860  # port of the page
    host: str | None = None  # address to listen on (GRADIO_SERVER_NAME, else 127.0.0.1)


def facts_of(name: str) -> dict[str, Any]:
    """Return what a model's run knows of it, such as its validation loss; see `run_facts`."""
    path = Path(name)
    if path.suffix == ".pt" and path.stem[5:].isdigit():
        return run_facts(path.parent, int(path.stem[5:]))
    # a run exports its last weights to its subfolder hf
    return run_facts(path.parent) if path.name == "hf" else {}


def describe(name: str, model: GPT) -> str:
    """Return the text on top of the page: name, size, validation loss."""
    config, loss = model.config, facts_of(name).get("val_loss")
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    size = model.n_params - padding
    facts = [
        f"{size / 1e6:.0f}M parameters" if size >= 1e7 else f"{size / 1e6:.1f}M parameters",
        f"{config.n_layer} layers of width {config.n_embd}",
        f"context of {config.block_size} tokens",
        f"validation loss {loss:.3f}" if loss is not None else "validation loss unknown",
    ]
    return f"## {name}\n{' · '.join(facts)}"


def make_page(name: str, model: GPT) -> "gradio.Blocks":
    """Return the page. It serves one request at a time; the other requests wait in a queue."""
    import gradio as gr

    @functools.cache
    def int8_model() -> GPT:  # made at the first request, then kept
        return quantize(copy.deepcopy(model))

    def write(
        prompt: str, max_new_tokens: int, num_samples: int, temperature: float, top_k: int,
        top_p: float, seed: int, int8: bool,
    ) -> Iterator[list[dict]]:  # fmt: skip
        chosen = int8_model() if int8 else model
        if note := cut_note(chosen, prompt):
            gr.Info(note)
        try:
            config = SampleConfig(  # raises if a number is out of range
                num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature,
                top_k=top_k, top_p=top_p, seed=seed,
            )  # fmt: skip
            texts = [prompt] * num_samples
            with device_errors(chosen.transformer.wpe.weight.device):
                for pieces in continuations(chosen, prompt, config):
                    texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
                    yield [
                        gr.update(
                            value=texts[i] if i < num_samples else "", visible=i < num_samples
                        )
                        for i in range(MAX_SAMPLES)
                    ]
        except (ValueError, OSError) as error:
            raise gr.Error(explain(error)) from None

    small, smaller = (f"{n / 1e6:.0f} MB" for n in (model_bytes(model), model_bytes(model) * 0.26))
    with gr.Blocks(title=f"GPT-2: {name}", analytics_enabled=False) as page:
        gr.Markdown(describe(name, model))
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=12, elem_id="prompt", autofocus=True,
            placeholder="Leave empty to let the model start",
            value="Hello, I'm a language model,",
        )  # fmt: skip
        with gr.Row():
            start = gr.Button("Write", variant="primary", elem_id="write")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
        with gr.Row():
            length = gr.Slider(1, 1000, 200, step=1, label="Length", info="tokens per sample")
            temperature = gr.Slider(
                0, 2, SampleConfig.temperature, step=0.05, label="Temperature",
                info="0: always the likeliest token",
            )  # fmt: skip
            top_k = gr.Slider(
                0, 500, SampleConfig.top_k, step=1, label="Top-k", info="0: all tokens"
            )
            top_p = gr.Slider(
                0.01, 1, SampleConfig.top_p, step=0.01, label="Top-p",
                info="the likeliest that reach this together",
            )  # fmt: skip
        with gr.Row():
            samples = gr.Slider(1, MAX_SAMPLES, 1, step=1, label="Samples", info="written together")
            seed = gr.Number(
                SampleConfig.seed, label="Seed", info="same seed, same text", precision=0, minimum=0
            )
            int8 = gr.Checkbox(
                label="8-bit weights", info=f"{smaller} instead of {small}", elem_id="int8"
            )
        with gr.Column(elem_id="samples"):
            boxes = [
                gr.Textbox(label=f"Sample {i + 1}", lines=6, max_lines=12, visible=i == 0)
                for i in range(MAX_SAMPLES)
            ]
        inputs = [prompt, length, samples, temperature, top_k, top_p, seed, int8]
        writing = gr.on([start.click, prompt.submit], write, inputs, boxes, api_name="write")
        stop.click(None, cancels=[writing])
    return page.queue(default_concurrency_limit=1, max_size=MAX_WAITING)


def serve(config: AppConfig) -> None:
    """Load the model and serve the page until Ctrl-C."""
    try:
        import gradio as gr
    except ModuleNotFoundError:
        raise ValueError("gradio is missing: pip install -r requirements-app.txt") from None
    name = find_model(config.model or None)  # an empty MODEL is no model
    smaller = advice("give another --model", OutOfMemory)
    with smaller, set_up_machine(TrainConfig(dtype="float32"), alone=True) as machine:
        page = make_page(name, load_model(name, machine.device))
        sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
        # fonts of the visitor's system: the page loads nothing from other servers
        theme = gr.themes.Soft(primary_hue="emerald", font=sans, font_mono=mono)
        with advice("give another --port or --host"):
            page.launch(server_name=config.host, server_port=config.port, theme=theme, css=CSS)


def main() -> None:
    run_command(AppConfig, serve)


if __name__ == "__main__":
    main()
