import ast
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_gradtools


ROOT = Path(__file__).parents[1]
HEAVY = {"accelerate", "datasets", "peft", "torch", "transformers"}


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("module", ["hf_gradtools", "hf_gradtools.core", "hf_gradtools.cli"])
def test_importing_loads_nothing_heavy(module):
    loaded = run_python("-c", f"import sys, {module}; print(*sys.modules)").stdout.split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("name", hf_gradtools.__all__)
def test_public_name_resolves(name):
    assert getattr(hf_gradtools, name) is not None
    assert name in dir(hf_gradtools)


def test_lazy_names_are_the_ones_that_type_checkers_see():
    tree = ast.parse(Path(hf_gradtools.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in _areas()]
    assert {alias.name: node.module for node in imports for alias in node.names} == hf_gradtools._LAZY
    assert {*hf_gradtools._LAZY, "__version__"} == set(hf_gradtools.__all__)


def _areas() -> set[str]:
    return set(hf_gradtools._LAZY.values())


def test_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match="no attribute 'GhostDotProduct'; it has ActivationStore,"):
        _ = hf_gradtools.GhostDotProduct


def test_importing_every_module_prints_nothing():
    modules = [info.name for info in pkgutil.walk_packages(hf_gradtools.__path__, "hf_gradtools.")]
    assert "hf_gradtools.cli" in modules
    assert run_python("-c", f"import {', '.join(modules)}").stdout == ""


def test_cli_version():
    assert run_python("-m", "hf_gradtools.cli", "--version").stdout == f"hf-gradtools {hf_gradtools.__version__}\n"


def test_cli_help_names_every_area_within_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert " ghost " in run_python("-m", "hf_gradtools.cli", "--help").stdout
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0, seconds
