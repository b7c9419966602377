"""The package must be whole, kernels included, however it is installed and wherever Python starts.

kernels/ is reached as rrhf_fast.kernels through a symbolic link and holds no __init__.py, because
transformers probes for a package named `kernels`. Each test copies the repository, installs the
copy in a fresh environment without network, and asks a new process where each module comes from.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]

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
    for folder in ("rrhf_fast", "kernels", "tests", "benchmarks"):
        if (REPO / folder).exists():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPO / folder, tree / folder, symlinks=True, ignore=ignore)
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
    pytest.importorskip("pip", reason="installs with pip, which this environment lacks")
    offline = ("--isolated", "--no-index", "--no-deps", "--no-build-isolation")
    # --ignore-installed: pip must not look at an rrhf_fast in the borrowed environment.
    pip = (sys.executable, "-m", "pip", "--python", env / "bin" / "python", "install")
    run(*pip, *offline, "--ignore-installed", *arguments, cwd=cwd)


def check(env: Path, tree: Path, *, cwd: Path, found_in: Path, **variables: str) -> None:
    """Python, started in `cwd`, finds every module and data file of `tree` below `found_in`."""
    package = tree / "rrhf_fast"
    # rglob does not follow the link, so the kernels are listed from where they live.
    sources = [path.relative_to(tree) for path in package.rglob("*.py")]
    kernels = [Path("rrhf_fast") / path.relative_to(tree) for path in tree.glob("kernels/**/*.py")]
    assert kernels, "kernels/ holds no modules"
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources + kernels
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


def test_install_from_sdist(env: Path, tree: Path, elsewhere: Path) -> None:
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(env / "bin" / "python", "-c", build, cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    install(env, sdist, cwd=elsewhere)
    check(env, tree, cwd=elsewhere, found_in=site_packages(env))


def test_build_refuses_a_lost_link(env: Path, tree: Path) -> None:
    """A Windows checkout without symbolic links has a text file that holds the link's target."""
    link = tree / "rrhf_fast" / "kernels"
    link.unlink()
    link.write_text("../kernels")
    with pytest.raises(AssertionError, match="must be a symbolic link"):
        install(env, ".", cwd=tree)


def test_transformers_ignores_our_kernels(tree: Path, elsewhere: Path) -> None:
    assert not (tree / "kernels" / "__init__.py").exists()
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
