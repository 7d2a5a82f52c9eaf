"""Who may import whom (docs: the picture of folders)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {
    "pavlov": 6,
    "trainers": 5,
    "serving": 5,
    "actors": 4,
    "labelling": 3,
    "cluster": 2,
    "models": 1,
    "rlhf": 0,
}
TREE_FOLDERS = [*LEVELS, "tests", "benchmarks", "docs", "configs"]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def sources(package: str) -> list[Path]:
    return [path for path in [ROOT / f"{package}.py"] if path.exists()] + sorted(
        (ROOT / package).rglob("*.py")
    )


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(node: ast.AST, path: Path) -> Iterator[str]:
    """Absolute dotted names that an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            folder = path.relative_to(ROOT).parts[: -node.level]
            base = ".".join([*folder, *filter(None, [base])])
        yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def when_loaded(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, no TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from (grandchild for other in child.orelse for grandchild in ast.walk(other))
            continue
        yield child
        yield from when_loaded(child)


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}"


def test_rlhf_loads_no_framework():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("rlhf")
    ]
    assert {"rlhf", "rlhf.losses", "rlhf.config"} <= set(modules)
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "print({'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("package", LEVELS)
def test_imports_point_down_only(package):
    wrong = [
        f"{where(path, node)} imports {name}"
        for path in sources(package)
        for node in ast.walk(parse(path))
        for name in imported_modules(node, path)
        if (top := name.partition(".")[0]) in LEVELS
        and top != package
        and LEVELS[top] >= LEVELS[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", LEVELS)
def test_vllm_and_deepspeed_are_imported_inside_functions(package):
    wrong = [
        f"{where(path, node)} imports {name}"
        for path in sources(package)
        for node in when_loaded(parse(path))
        for name in imported_modules(node, path)
        if name.partition(".")[0] in {"vllm", "deepspeed"}
    ]
    assert not wrong


def test_the_door_imports_everything_else_lazily():
    assert not [
        f"{where(path, node)} imports {name}"
        for path in sources("pavlov")
        for node in when_loaded(parse(path))
        for name in imported_modules(node, path)
        if name.partition(".")[0] in LEVELS
    ]


@pytest.mark.parametrize("package", sorted(set(LEVELS) - {"cluster"}))
def test_ray_remote_is_applied_in_cluster_only(package):
    wrong = [
        where(path, node)
        for path in sources(package)
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "ray.remote")
        or "ray.remote" in imported_modules(node, path)
    ]
    assert not wrong


def test_no_folder_is_a_drawer_for_everything():
    drawers = {"utils", "common", "helpers", "misc"}
    top = [path for path in ROOT.iterdir() if path.is_dir()]
    below = [path for name in TREE_FOLDERS for path in (ROOT / name).rglob("*") if path.is_dir()]
    assert not [str(path.relative_to(ROOT)) for path in top + below if path.name in drawers]
