"""What `ray job submit --working-dir .` sends to the cluster."""

import shutil
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_upload_leaves_out_runs_caches_and_environments(tmp_path: Path) -> None:
    packaging = pytest.importorskip(
        "ray._private.runtime_env.packaging", reason="ray is not installed"
    )
    folder = tmp_path / "pavlov"
    code = [
        "pavlov.py",
        "rlhf/config/__init__.py",
        "trainers/demo_prompts.jsonl",
        "configs/demo.toml",
    ]
    rest = [
        "runs/demo/policy/model.safetensors",
        ".venv/bin/python",
        ".git/HEAD",
        "rlhf/__pycache__/config.cpython-311.pyc",
        ".mypy_cache/3.11/cache",
        ".ruff_cache/cache",
        ".pytest_cache/README.md",
        "pavlov.egg-info/PKG-INFO",
    ]
    for name in [*code, *rest]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    archive = tmp_path / "upload.zip"

    packaging._zip_files(
        str(folder), [], str(archive), include_parent_dir=False, include_gitignore=True
    )

    sent = {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")}
    assert sent == {*code, ".gitignore", ".rayignore"}
