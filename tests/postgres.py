"""A real PostgreSQL server of the test's own, on a port that the system hands out."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster.session import free_port


def binaries() -> Path | None:
    """Where PostgreSQL's programs stand: on the PATH, or where Debian puts them."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name)
    return versions[-1] if versions else None


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a fresh database; the server ends with the block."""
    programs = binaries()
    assert programs is not None
    with tempfile.TemporaryDirectory(prefix="pavlov-pg-", dir="/tmp") as name:
        folder, port = Path(name), free_port()
        # initdb refuses to run as root; Debian's package brings a user for it.
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if as_user:
            shutil.chown(folder, "postgres")

        def run(*command: str) -> None:
            subprocess.run(
                [*as_user, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60
            )

        data = str(folder / "data")
        run(str(programs / "initdb"), "-D", data, "-A", "trust", "-U", "pavlov", "-E", "UTF8")
        # What a test writes need not outlive a power cut.
        hasty = "-c fsync=off -c synchronous_commit=off -c full_page_writes=off"
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} {hasty}"
        control = str(programs / "pg_ctl")
        run(control, "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            yield f"postgresql://pavlov@127.0.0.1:{port}/postgres"
        finally:
            run(control, "-D", data, "-m", "immediate", "-w", "stop")
