"""Everything about the package is said in pyproject.toml.

This file is the place for what a declarative file cannot say: compiling `csrc/` against the installed torch.
"""

from setuptools import setup

setup()
