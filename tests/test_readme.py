"""The pages name only what exists. `python tests/test_readme.py` corrects line numbers."""

import dataclasses
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ["README.md", "CONTRIBUTING.md", "AGENTS.md"]
PAGES = [*(ROOT / name for name in TOP), *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("benchmarks/**/*.md"))
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#L(\d+))?\)")
CONFIGS = {
    "train_gpt2.py": "TrainConfig",
    "fineweb.py": "DataConfig",
    "hellaswag.py": "HellaSwagConfig",
    "sample.py": "SampleConfig",
    "export.py": "ExportConfig",
    "bench.py": "BenchConfig",
    "plot.py": "PlotConfig",
    "app.py": "AppConfig",
}


def line_of(path: Path, name: str) -> int:
    """The line that defines `name`, from 1."""
    pattern = re.compile(rf"^(class|def) {name}\b|^{name} =|^# {name}$")
    lines = path.read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if pattern.match(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_they_name(page):
    links = LINK.findall(page.read_text())
    for text, target, line in links:
        if target.startswith("http"):
            continue
        path = page.parent / target
        assert path.exists(), f"{page.name}: {target}"
        if line:
            assert line_of(path, text.strip("`")) == int(line), f"run python {Path(__file__).name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_only_existing_flags(page):
    text = re.sub(r" \\\n\s*", " ", page.read_text())
    commands = re.findall(r"^(?:\S*python|torchrun) .*$", text, re.MULTILINE)
    commands += re.findall(r"`((?:python|torchrun) [^`]*)`", text.replace("\n", " "))
    for command in commands:
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word in CONFIGS), None)
        if script is None:
            continue
        config = getattr(import_module(script[:-3]), CONFIGS[script])
        fields = {field.name for field in dataclasses.fields(config)}
        for word in words[words.index(script) :]:
            if word.startswith("--"):
                name = word[2:].split("=")[0].removeprefix("no-").replace("-", "_")
                assert name in fields | {"help"}, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_and_targets_exist(page):
    text = page.read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    targets = (ROOT / "Makefile").read_text()
    for line in re.findall(r"`?make ([a-z][a-z -]*)", "\n".join(re.findall(r"`[^`]*`", text))):
        for target in line.split():
            assert re.search(rf"^{target}:", targets, re.MULTILINE), target


def correct_links(page: Path) -> None:
    def numbered(match: re.Match) -> str:
        text, target, line = match.groups()
        if not line:
            return match[0]
        return f"[{text}]({target}#L{line_of(page.parent / target, text.strip('`'))})"

    page.write_text(LINK.sub(numbered, page.read_text()))


if __name__ == "__main__":
    for each in PAGES:
        correct_links(each)
    sys.exit()
