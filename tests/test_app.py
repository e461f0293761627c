"""
The page: what it names, what a request writes; and, in a real browser, how it streams.

The browser needs chromium and chromedriver on the path, and from pip
requirements-app.txt and selenium==4.51.0.

    python -m pytest -m slow tests/test_app.py
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, save, spread

import app
from common.generate import generate
from common.tokenizer import EOT, encode, get_tokenizer
from train_gpt2 import GPT, GPTConfig

METRICS = """{"event": "val", "step": 0, "loss": 10.8}
{"event": "val", "step": 7, "loss": 3.28125}
{"event": "val", "step": 9, "loss": 1.0}
"""


@pytest.fixture
def gradio(monkeypatch) -> MagicMock:
    """Stand in for gradio: it notes what the page is made of."""
    fake = MagicMock(update=lambda **changes: changes, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "gradio", fake)
    return fake


def test_the_page_of_the_newest_run_names_it_and_its_loss(gradio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL", raising=False)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8))
    run = tmp_path / "log" / "mine"
    run.mkdir(parents=True)
    save(model, run / "ckpt_000007.pt")
    (run / "metrics.jsonl").write_text(METRICS)
    name = os.path.join("log", "mine", "ckpt_000007.pt")
    for config in app.AppConfig(), app.AppConfig(model=""), app.AppConfig(model="log/mine"):
        app.serve(config)
        assert gradio.Blocks.call_args.kwargs["title"] == f"GPT-2: {name}"
        (top,) = gradio.Markdown.call_args.args
        assert top.startswith(f"## {name}\n") and "validation loss 3.281" in top


def test_the_loss_of_another_model_is_never_shown(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    expected = {
        "ckpt_000000.pt": 10.8, "ckpt_000007.pt": 3.28125, "ckpt_000009.pt": 1.0, "hf": 1.0,
        "gpt2": None, "distilgpt2": None, "other.pt": None, "no/ckpt_000007.pt": None,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, loss in expected.items():
        assert app.facts_of(name).get("val_loss") == loss, name
        assert app.facts_of(str(tmp_path / name)).get("val_loss") == loss, name


def test_a_request_writes_with_its_settings(gradio):
    torch.manual_seed(0)
    model = spread(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=50304)))
    app.make_page("mine", model)
    write = gradio.on.call_args.args[1]
    names = ("max_new_tokens", "num_samples", "temperature", "top_k", "top_p", "seed", "int8")

    def first_text(prompt: str, **changes) -> str:
        settings = dict(zip(names, (8, 2, 1.0, 50, 1.0, 42, False), strict=True)) | changes
        *_, boxes = write(prompt, *(settings[name] for name in names))
        assert [box["visible"] for box in boxes] == [True, True, False, False]
        return boxes[0]["value"]

    likeliest = first_text("Hello", temperature=0)
    assert likeliest == first_text("Hello", top_p=1e-9) != first_text("Hello")
    ids = [EOT, *encode("Hello").tolist()]
    (written,) = generate(model, ids, max_new_tokens=8, temperature=0)
    marked = first_text("<|endoftext|>Hello", temperature=0)
    assert marked == "<|endoftext|>Hello" + get_tokenizer().decode(written)
    assert len(first_text("Hello", int8=True)) > 5
    with pytest.raises(RuntimeError, match="top_p 0: give a number above 0"):
        first_text("Hello", top_p=0)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a small random model that writes long texts."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = spread(GPT(GPTConfig(n_layer=8, n_head=2, n_embd=32, block_size=64)))
    path = save(model, folder / "ckpt_000007.pt")
    (folder / "metrics.jsonl").write_text(METRICS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "app.py", "--model", str(path), "--port", str(port)]
    server = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None
        try:
            return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, "the page", 180)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browse(url: str) -> Iterator[Callable[[], "Person"]]:
    """Return a function that opens the page in a new browser."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium or chromedriver is missing")
    opened = []

    def open_page() -> Person:
        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.add_argument("--window-size=1100,1200")
        options.binary_location = shutil.which("chromium")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        opened.append(webdriver.Chrome(options, service))
        opened[-1].get(url)
        return Person(opened[-1])

    yield open_page
    for browser in opened:
        browser.quit()


class Person:
    """A person who uses the page in a browser."""

    def __init__(self, browser):
        self.browser = browser
        wait_for(lambda: self.find("#write"), "the button")

    def find(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def type(self, text: str) -> None:
        (box,) = self.find("#prompt textarea")
        box.clear()
        box.send_keys(text)

    def click(self, selector: str) -> None:
        self.find(selector)[0].click()

    def set(self, label: str, value: object) -> None:
        (box,) = self.find(f"input[type=number][aria-label*='{label}']")
        box.send_keys("\ue009a\ue000" + str(value) + "\ue004")  # Ctrl-A, the value, Tab

    def texts(self) -> list[str]:
        return [box.get_property("value") for box in self.find("#samples textarea")]


@pytest.mark.slow
def test_text_appears_while_it_is_written_and_stops_on_request(browse, tmp_path: Path):
    ann, bob = browse(), browse()
    top = ann.find("h2")[0].text + ann.find("h2 + p")[0].text
    assert "ckpt_000007.pt" in top and "1.7M parameters" in top
    assert "validation loss 3.281" in top  # that of its step, not a later one
    ann.type("Once upon a time")
    ann.set("Length", 1000)
    ann.click("#write")
    lengths = set()
    wait_for(lambda: lengths.add(len(ann.texts()[0])) or len(lengths) > 5, "text to stream in")
    assert ann.texts()[0].startswith("Once upon a time")
    bob.type("It was")
    bob.set("Length", 20)
    bob.set("Samples", 3)
    bob.set("Top-p", 0.9)
    bob.click("#int8 input")
    bob.click("#write")
    time.sleep(1)
    assert bob.texts() == [""]  # one request after the other
    ann.click("#stop")
    wait_for(lambda: len(bob.texts()) == 3 and len(bob.texts()[2]) > 20, "bob's turn")
    assert all(text.startswith("It was") for text in bob.texts())
    stopped = ann.texts()[0]
    time.sleep(2)
    assert ann.texts()[0] == stopped and len(encode(stopped)) < 900
    ann.click("#write")  # it can start again
    wait_for(lambda: ann.texts()[0] != stopped, "text again")


@pytest.mark.slow
def test_the_page_cannot_be_reached_from_other_machines(url):
    port = int(url.rsplit(":", 1)[1])
    with socket.socket(socket.AF_INET6) as other, pytest.raises(OSError):
        other.connect(("::1", port))
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    for address in (a for a in addresses if "." in a):
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)
