"""Refuses to build a package without its kernels; pyproject.toml says everything else.

rrhf_fast/kernels is a symbolic link to ../kernels. A Windows checkout without symbolic links, or a
zip file of the repository, turns it into a small text file, and setuptools would then leave out
rrhf_fast.kernels without a word.
"""

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "rrhf_fast" / "kernels").is_dir():
    raise SystemExit(
        "rrhf_fast/kernels must be a symbolic link to ../kernels: "
        "clone with git on a system that has symbolic links"
    )

setup()
