"""TypeScript peers as child processes: kkrpc 0.2.2 from the registry, and peers of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.bounds import BOUND

JS = Path(__file__).parent / "js"
# Set by CI, which must have them: then what is missing is a failure.
REQUIRED = bool(os.environ.get("ANYIO_KKRPC_REQUIRE_NODE"))


def _missing(what: str) -> None:
    if REQUIRED:
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the scripts of ``js`` and the packages that they need."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        _missing("TypeScript peers need node and npm, and they are not on this machine")
    target = tmp_path_factory.mktemp("typescript") / "js"
    shutil.copytree(JS, target, ignore=shutil.ignore_patterns("node_modules"))
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--legacy-peer-deps"]
    done = subprocess.run(
        ["npm", "install", *options], cwd=target, capture_output=True, text=True, timeout=BOUND
    )
    if done.returncode:
        _missing(f"npm could not install the TypeScript peers: {done.stderr[-500:]}")
    return target
