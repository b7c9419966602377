"""What the README and the docstrings show runs as it stands."""

import doctest
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from rrhf_fast import demo
from rrhf_fast.__main__ import COMMANDS
from rrhf_fast.data.forest import build_forest
from rrhf_fast.data.layouts import LAYOUTS
from rrhf_fast.data.rows import parse_row
from rrhf_fast.data.tokenise import TokenisedQuery
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample.config import SampleConfig
from rrhf_fast.score.config import ScoreConfig
from rrhf_fast.stages.command import parse_config
from rrhf_fast.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
TORCHRUN = {"nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port"}
TORCHRUN |= {"rdzv_backend", "rdzv_endpoint"}
README, DATA = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/data.md"))
PAGES = README + "".join(
    page.read_text(encoding="utf-8")
    for page in [*sorted((ROOT / "docs").glob("**/*.md")), ROOT / "CONTRIBUTING.md"]
)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGES, flags=re.DOTALL)


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_rows_shown_are_rows():
    rows = [text for language, text in BLOCKS if language == "json"]
    assert len(rows) == 3
    for row in rows:
        assert len(parse_row(json.loads(row), "README.md").responses) == 2


def test_the_layouts_shown_are_those_that_are_read():
    for layout in LAYOUTS:
        fields = ", ".join(f"`{name}`" for name in layout.signatures[0])
        example = f"`{json.dumps(layout.example)}`"
        assert f"| {layout.title} | {fields} | {layout.note} | {example} |" in DATA


CONFIGS = {
    "train": TrainConfig,
    "export": ExportConfig,
    "sample": SampleConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
    "iterate": IterateConfig,
}


def test_commands_and_options_exist(monkeypatch):
    monkeypatch.chdir(ROOT)  # for recipes
    commands = "\n".join(
        text.replace(" ...", "") for language, text in BLOCKS if language == "bash"
    )
    lines = commands.replace("\\\n", "").splitlines()
    # The command of a batch script ends with the quote of an earlier line.
    lines = (
        shlex.split(line.strip("'") if line.count("'") % 2 else line, comments=True)
        for line in lines
    )
    found = [
        (word.removeprefix("rrhf_fast."), line[i + 2 :])
        for line in lines
        for i, word in enumerate(line[1:])
        if (line[i] == "-m" and word.startswith("rrhf_fast."))
        or (line[i] == "rrhf-fast" and not word.startswith("--"))
    ]
    assert all(name in CONFIGS or name in COMMANDS for name, _ in found)
    found = [(name, arguments) for name, arguments in found if name in CONFIGS]
    assert {name for name, _ in found} == set(CONFIGS)
    for name, arguments in found:
        if "run.yaml" in arguments:  # the reader's own
            arguments = [word for word in arguments if word not in ("--config", "run.yaml")]
        config = parse_config(CONFIGS[name], arguments)
        assert name == "export" or config.validate() is None
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", commands):
        assert f"\n{target}:" in makefile
    about_ours = re.sub(r"python benchmarks/run.py(.*\\\n)*.*", "", PAGES)
    named = set(re.findall(r"--(\w+_\w+)", about_ours))
    known = {name for config in CONFIGS.values() for name in config.__dataclass_fields__}
    assert named and named <= known | TORCHRUN | {"print_config"}


def test_the_forest_shown_is_the_forest_built():
    def numbers(name):
        line = next(line for line in PAGES.splitlines() if line.lstrip().startswith(name))
        return [int(text) for text in line.removeprefix(f"  {name}").split()]

    prompt, shared, cat, dog = [1, 2, 3, 4], [5, 6, 7], [8, 9, 0], [10, 9, 0]
    query = TokenisedQuery(
        torch.tensor(prompt).int().numpy(),
        [torch.tensor(ids).int().numpy() for ids in (shared + cat, shared + dog, [11, 12, 9, 0])],
        torch.tensor([1.0, 0.5, 0.0]).numpy(),
    )
    forest = build_forest([query])
    assert numbers("subtree_end[j]") == forest.subtree_end.tolist()
    assert numbers("row j") == list(range(forest.num_tokens))


def test_every_file_of_the_trees_exists():
    trees = [text for language, text in BLOCKS if text.startswith("rrhf_fast/")]
    assert len(trees) == 2
    folders: list[str] = []  # that the line stands in
    for line in "".join(trees).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names, _, text = line.strip().partition("  ")
        for name in names.split():
            path = ROOT.joinpath(*folders[:depth], name)
            assert path.exists(), path
        for other in re.findall(r"[\w/]+\.py", text):
            assert any((place / other).exists() for place in (path.parent, path, ROOT)), other
        folders = [*folders[:depth], name]


@pytest.mark.parametrize("module", ["losses.rrhf", "train", "train.trainer"])
def test_docstring_examples(module, tmp_path):
    names = {"torch": torch, "folder": str(tmp_path), "TrainConfig": TrainConfig}
    names["demo_model"] = str(demo.MODEL_DIR)
    module = import_module(f"rrhf_fast.{module}")
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    examples = [test for test in finder.find(module, globs=vars(module) | names) if test.examples]
    assert examples
    for example in examples:
        runner.run(example, out=lambda text: None, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0


def test_the_pages_on_speed_are_what_the_figures_say():
    script = Path(__file__).parents[1] / "benchmarks" / "readme.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0
