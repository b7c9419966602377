"""The package must be whole, kernels included, however it is installed and wherever Python starts.

kernels/ is reached as rrhf_fast.kernels through a symbolic link and holds no __init__.py, because
transformers probes for a package named `kernels`. Each test copies the repository, installs the
copy in a fresh environment without network, and asks a new process where each module comes from.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]

# Where the kernels live: in an unpacked sdist, which holds no links, in the package.
KERNELS = "kernels" if (REPO / "kernels").is_dir() else "rrhf_fast/kernels"
in_a_checkout = pytest.mark.skipif(
    KERNELS != "kernels", reason="an unpacked sdist holds no link to kernels/"
)

# Folders that the sdist holds beside the package.
BESIDE = ("tests", "benchmarks", "docs", "examples", "experiments", "recipes")

# Reads module names and data files from argv[1], prints where this process finds them.
PROBE = """
import importlib.util, json, sys
from importlib.resources import files
import rrhf_fast, rrhf_fast.kernels

def origin(name):
    spec = importlib.util.find_spec(name)
    return spec and spec.origin

asked = json.loads(sys.argv[1])
print(json.dumps({
    "modules": {name: origin(name) for name in asked["modules"]},
    "data": [name for name in asked["data"] if files("rrhf_fast").joinpath(name).is_file()],
    "top_level_kernels": origin("kernels"),
}))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build can read, so that nothing is written into the repository."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for path in REPO.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for folder in ("rrhf_fast", KERNELS, *BESIDE):
        if (REPO / folder).exists():
            ignore = shutil.ignore_patterns("__pycache__")
            options = {"symlinks": True, "ignore": ignore, "dirs_exist_ok": True}
            shutil.copytree(REPO / folder, tree / folder, **options)
    return tree


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """An empty environment that borrows the packages of the one running the tests."""
    path = tmp_path / "env"
    venv.create(path, with_pip=False, symlinks=True)
    borrowed = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    # Entries of a .pth file are appended, and the .pth files found in them are not read: an
    # editable install of rrhf_fast in the running environment stays out of the way.
    (site_packages(env=path) / "borrowed.pth").write_text("\n".join(borrowed))
    return path


def site_packages(env: Path) -> Path:
    return next(env.glob("lib/python*/site-packages"))


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The standard output of `command`; its standard error becomes the failure's message."""
    # HOME and PATH, say, but no PYTHONPATH and no settings of pip's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(env: Path, *arguments: str | Path, cwd: Path) -> None:
    # Not importorskip: a process that imported pip cannot import setuptools, as Inductor does.
    if not list(importlib.metadata.distributions(name="pip")):
        pytest.skip("installs with pip, which this environment lacks")
    offline = ("--isolated", "--no-index", "--no-deps", "--no-build-isolation")
    # --ignore-installed: pip must not look at an rrhf_fast in the borrowed environment.
    pip = (sys.executable, "-m", "pip", "--python", env / "bin" / "python", "install")
    run(*pip, *offline, "--ignore-installed", *arguments, cwd=cwd)


def check(env: Path, tree: Path, *, cwd: Path, found_in: Path, **variables: str) -> None:
    """Python, started in `cwd`, finds every module and data file of `tree` below `found_in`."""
    package = tree / "rrhf_fast"
    # rglob does not follow the link, so the kernels are listed from where they live.
    sources = [path.relative_to(tree) for path in package.rglob("*.py")]
    home = tree / KERNELS
    kernels = [Path("rrhf_fast/kernels") / path.relative_to(home) for path in home.rglob("*.py")]
    assert kernels, f"{KERNELS} holds no modules"
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for path in {*sources, *kernels}
    }
    demo = [path for path in (package / "demo").rglob("*") if path.is_file()]
    data = [str(path.relative_to(package)) for path in demo if path.suffix not in (".py", ".pyc")]

    asked = json.dumps({"modules": list(modules), "data": data})
    found = json.loads(run(env / "bin" / "python", "-c", PROBE, asked, cwd=cwd, **variables))

    assert not [name for name, origin in found["modules"].items() if origin is None], "not found"
    for name, origin in found["modules"].items():
        # samefile, because an editable install may reach a file through a link.
        assert os.path.samefile(origin, found_in / modules[name]), f"{name} is {origin}"
    assert set(data) == set(found["data"]), "data files left out: see package-data in pyproject"
    # No regular package `kernels` of ours. Hugging Face's may well be installed.
    top_level = found["top_level_kernels"]
    ours = (tree, site_packages(env))
    assert top_level is None or not any(Path(top_level).is_relative_to(path) for path in ours)


def test_without_install(env: Path, tree: Path, elsewhere: Path) -> None:
    check(env, tree, cwd=tree, found_in=tree)
    check(env, tree, cwd=elsewhere, found_in=tree, PYTHONPATH=str(tree))


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(env: Path, tree: Path, elsewhere: Path, mode: str) -> None:
    install(env, f"--config-settings=editable_mode={mode}", "-e", ".", cwd=tree)
    check(env, tree, cwd=elsewhere, found_in=tree)
    check(env, tree, cwd=tree, found_in=tree)


def test_install(env: Path, tree: Path, elsewhere: Path) -> None:
    install(env, ".", cwd=tree)
    check(env, tree, cwd=elsewhere, found_in=site_packages(env))
    check(env, tree, cwd=tree, found_in=tree)


def build(env: Path, tree: Path, kind: str) -> Path:
    """Build a "sdist" or a "wheel" of the tree, and return its file."""
    code = f"from setuptools.build_meta import build_{kind} as build; build('dist')"
    run(env / "bin" / "python", "-c", code, cwd=tree)
    (built,) = (tree / "dist").iterdir()
    return built


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_what_is_published_installs_and_runs(
    env: Path, tree: Path, elsewhere: Path, kind: str
) -> None:
    install(env, build(env, tree, kind), cwd=elsewhere)
    check(env, tree, cwd=elsewhere, found_in=site_packages(env))
    script = env / "bin" / "rrhf-fast"
    page = run(script, "--help", cwd=elsewhere)
    assert page == run(env / "bin" / "python", "-m", "rrhf_fast", "--help", cwd=elsewhere)
    assert {"train", "sample", "score", "evaluate", "iterate", "export", "env"} <= set(page.split())
    facts = run(script, "env", cwd=elsewhere)
    assert str(site_packages(env)).removeprefix(str(Path.home())) in facts.splitlines()[0]
    steps = ("--max_steps", "2", "--train_batch_size", "4", "--output_dir", "out")
    cheap = ("--eval_max_new_tokens", "2", "--data_cache_dir", "cache")
    run(script, "train", *steps, *cheap, cwd=elsewhere, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert (elsewhere / "out" / "model.safetensors").exists()


def test_the_sdist_holds_what_a_build_and_the_tests_need(env: Path, tree: Path) -> None:
    stray = ["runs/1/model.safetensors", ".venv/x.py", "rows.jsonl", "tests/x/__pycache__/a.pyc"]
    stray += ["rrhf_fast/data/.rows.jsonl.saving", "rrhf_fast/train/rows.jsonl", "build/lib/a.py"]
    for name in stray:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    with tarfile.open(build(env, tree, "sdist")) as archive:
        members = [member for member in archive if not member.isdir()]
    assert all(member.isfile() for member in members)  # no links, that an unpacker may refuse
    names = {member.name.partition("/")[2] for member in members}
    assert not names & set(stray)
    needed = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "Makefile"]
    folders = ("rrhf_fast", *BESIDE)
    sources = [path for folder in folders for path in (tree / folder).rglob("*.py")]
    sources += (tree / "rrhf_fast" / "kernels").glob("*.py")  # rglob does not follow the link
    needed += [str(path.relative_to(tree)) for path in sources]
    assert not set(needed) - names
    tops = {*folders, *needed, "rrhf_fast.egg-info", "PKG-INFO", "setup.cfg", "MANIFEST.in"}
    tops |= {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "constraints-oldest.txt"}
    assert {name.partition("/")[0] for name in names} <= tops


def test_the_wheel_holds_the_package_alone(env: Path, tree: Path) -> None:
    with zipfile.ZipFile(build(env, tree, "wheel")) as archive:
        names = archive.namelist()
        (entries,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "rrhf-fast = rrhf_fast.__main__:script" in archive.read(entries).decode()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"rrhf_fast"}


@in_a_checkout
def test_build_refuses_a_lost_link(env: Path, tree: Path) -> None:
    """A Windows checkout without symbolic links has a text file that holds the link's target."""
    link = tree / "rrhf_fast" / "kernels"
    link.unlink()
    link.write_text("../kernels")
    with pytest.raises(AssertionError, match="must be a symbolic link"):
        install(env, ".", cwd=tree)


def test_transformers_ignores_our_kernels(tree: Path, elsewhere: Path) -> None:
    assert not (tree / KERNELS / "__init__.py").exists()
    script = (
        "from transformers import PreTrainedModel;"
        "from transformers.utils import is_kernels_available;"
        "print(is_kernels_available())"
    )
    from_root, from_elsewhere = (
        run(sys.executable, "-c", script, cwd=cwd) for cwd in (tree, elsewhere)
    )
    assert from_root == from_elsewhere


def test_hugging_face_kernels_wins(tree: Path, elsewhere: Path) -> None:
    """With Hugging Face's package installed, `import kernels` in the root must give theirs."""
    theirs = elsewhere / "kernels" / "__init__.py"
    theirs.parent.mkdir()
    theirs.touch()
    script = "import kernels; print(kernels.__file__)"
    # PYTHONPATH comes after the current folder, as site-packages does.
    found = run(sys.executable, "-c", script, cwd=tree, PYTHONPATH=str(elsewhere))
    assert Path(found.strip()) == theirs
