"""Everything that has to pass. Plain ``nox`` runs it all; ``nox -l`` lists the parts.

The whole suite runs under coverage on the default Python. On the other Pythons it runs without
the tests marked ``slow``: those are about faults and load, or are repeated on Redis after Valkey,
which doesn't depend on the version; the time is better spent on having every version each time.

``nox -s tests-3.12 -- tests/protocol -x`` passes arguments on to pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
DEFAULT = "3.11"
DATA = ROOT / ".nox" / "coverage-data"
PACKAGE = "anyio_kkrpc"
# Tests mostly wait for servers and processes, so more of them than cores go on at once.
WORKERS = "4"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]

# Codes of flake8-async that are not for this library.
ASYNC_IGNORED = {
    "ASYNC106": "an import style: names of AnyIO are imported one by one",
    "ASYNC109": "`timeout` is this library's vocabulary for deadlines that travel with a call",
    "ASYNC114": "configures ASYNC113, which needs every startable function by name",
    "ASYNC9": "asks for a checkpoint on every way out of every function; most are on hot paths, "
    "and the public ones that must have one are tested",
}
# Codes that are right in general; the files where what they ask for is done in another way.
ASYNC_EXCEPTIONS = {
    # The await in a `finally` is of a function that bounds itself by move_on_after(shield=True).
    "ASYNC102": (
        "_callbacks",
        "_channel",
        "_cli/_demo",
        "_proxy",
        "_pump",
        "redis/_transport",
        "transports/links",
    ),
    # What is caught is not swallowed: it is thrown into a coroutine or raised to whoever waits.
    "ASYNC103": (
        "_callbacks",
        "_context",
        "_pump",
        "_serving",
        "redis/_connection",
        "transports/bytestream",
    ),
    "ASYNC104": (
        "_pump",
        "redis/_connection",
    ),
}


def _find_pythons() -> list[str]:
    """Put the real interpreters of pyenv on PATH, before its shims; return what is missing.

    A shim exists for each version that is installed, and fails for those that aren't selected.
    """
    found = [str(Path(sys.executable).parent)]
    missing = []
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    shims = str(root / "shims")
    path = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry != shims]
    for version in PYTHONS:
        name = f"python{version}"
        installed = sorted(
            root.glob(f"versions/{version}.*/bin/{name}"),
            key=lambda p: [int(n) for n in re.findall(r"\d+", p.parts[-3])],
        )
        if installed:
            found.append(str(installed[-1].parent))
        elif not any(os.access(Path(entry, name), os.X_OK) for entry in path):
            missing.append(version)
    os.environ["PATH"] = os.pathsep.join([*found, *path, shims])
    return missing


MISSING = _find_pythons()
AVAILABLE = [version for version in PYTHONS if version not in MISSING]
if MISSING:
    sys.stderr.write(f"nox: skipped, not on this machine: Python {', '.join(MISSING)}\n")

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False
nox.options.sessions = [
    "lint",
    "types",
    f"tests-{DEFAULT}",
    "coverage",
    *(f"tests-{version}" for version in AVAILABLE if version != DEFAULT),
    "lowest",
    "examples",
    "docs",
    "build",
]


def _requirement(name: str) -> str:
    """Return the requirement of that name from the extra ``dev``, so that bounds stand once."""
    for requirement in PROJECT["optional-dependencies"]["dev"]:
        if re.split(r"[^\w-]", requirement)[0] == name:
            return str(requirement)
    raise LookupError(name)


def _pytest(session: nox.Session, *args: str, measure: bool = False) -> None:
    command = ["python", "-m"]
    if measure:
        command += ["coverage", "run", "-m"]
    session.run(
        *command,
        "pytest",
        "-n",
        WORKERS,
        *args,
        *session.posargs,
        env={"COVERAGE_FILE": str(DATA / "data")},
    )


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests, each on asyncio, asyncio with uvloop, and trio."""
    session.install("--quiet", "-e", ".[dev]")
    if session.python != DEFAULT:
        _pytest(session, "-m", "not slow")
        return
    DATA.mkdir(parents=True, exist_ok=True)
    for old in DATA.iterdir():
        old.unlink()
    _pytest(session, measure=True)


@nox.session(python=DEFAULT)
def coverage(session: nox.Session) -> None:
    """Combine and report what the tests on the default Python measured; fail below the bound."""
    session.install("--quiet", _requirement("coverage"))
    if not DATA.is_dir() or not any(DATA.iterdir()):
        session.error(f"there is nothing to report; run nox -s tests-{DEFAULT} first")
    env = {"COVERAGE_FILE": str(DATA / "combined")}
    parts = sorted(str(path) for path in DATA.glob("data*"))
    session.run("coverage", "combine", "--keep", "--quiet", *parts, env=env)
    session.run("coverage", "report", env=env)


@nox.session(python=DEFAULT)
def lint(session: nox.Session) -> None:
    """Run ruff, and flake8-async for the structured concurrency that ruff doesn't check."""
    session.install("--quiet", *map(_requirement, ("ruff", "flake8", "flake8-async")))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    codes: dict[str, list[str]] = {}
    for code, modules in ASYNC_EXCEPTIONS.items():
        for module in modules:
            codes.setdefault(module, []).append(code)
    exceptions = [f"{PACKAGE}/{module}.py:{','.join(found)}" for module, found in codes.items()]
    session.run(
        "flake8",
        *("--select", "ASYNC", "--extend-ignore", ",".join(ASYNC_IGNORED)),
        *("--per-file-ignores", " ".join(exceptions), PACKAGE),
    )


@nox.session(python=DEFAULT)
def types(session: nox.Session) -> None:
    """Check the package, the examples and the typing tests with mypy and pyright."""
    session.install("--quiet", "-e", ".[dev]")
    session.run("mypy", "--strict", PACKAGE, "tests/typing", *_examples())
    session.run("pyright", PACKAGE, "tests/typing", *_examples())
    # Fails unless all that is public has a type.
    session.run("pyright", "--verifytypes", PACKAGE, "--ignoreexternal")


def _examples() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*.py"))


@nox.session(python=DEFAULT)
def examples(session: nox.Session) -> None:
    """Run the examples as their readers would, each against a server of its own."""
    if not (ROOT / "tests" / "test_examples.py").exists():
        session.skip("there is no tests/test_examples.py")
    session.install("--quiet", "-e", ".[dev]")
    _pytest(session, "tests/test_examples.py")


@nox.session(python=DEFAULT)
def docs(session: nox.Session) -> None:
    """Build the docs strictly: a name that isn't found or a page in no menu is an error."""
    session.install("--quiet", "-e", ".[docs]")
    session.run(
        *("sphinx-build", "--nitpicky", "--fail-on-warning", "--keep-going", "--quiet"),
        *("--builder", "html", "--fresh-env", "docs", "docs/_build"),
    )


@nox.session(python=DEFAULT, reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build wheel and sdist, and test the wheel in a clean environment, away from the checkout."""
    session.install("--quiet", "build", "twine")
    tmp = Path(session.create_tmp()).resolve()
    dist, empty = tmp / "dist", tmp / "empty"
    for directory in (dist, empty):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    session.run("python", "-m", "build", "--outdir", str(dist), str(ROOT), silent=True)
    files = sorted(map(str, dist.iterdir()))
    session.run("twine", "check", "--strict", *files)
    session.run("python", "-m", "venv", "--clear", str(empty / "venv"))
    python = str(empty / "venv" / "bin" / "python")
    wheel = next(file for file in files if file.endswith(".whl"))
    shutil.copytree(ROOT / "tests", empty / "tests")
    shutil.copy(ROOT / "pyproject.toml", empty)
    session.chdir(empty)

    def install(extras: str = "") -> None:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        session.run(*pip, wheel + extras, external=True)

    install()
    program = "import anyio_kkrpc as a; print(a.__file__, a.RPCChannel, a.MemoryTransport)"
    session.run(python, "-I", "-c", program, external=True)
    install("[redis]")
    program = "import anyio_kkrpc; print(anyio_kkrpc.RedisStreamsTransport)"
    session.run(python, "-I", "-c", program, external=True)
    install("[cli]")
    session.run(str(empty / "venv" / "bin" / "anyio-kkrpc"), "call", "--help", external=True)
    install("[dev]")
    tested = ["tests/protocol", "tests/core", "tests/codecs", "tests/test_testing_kit.py"]
    session.run(python, "-m", "pytest", "-q", "-n", WORKERS, *tested, external=True)


@nox.session(python=AVAILABLE[:1])
def lowest(session: nox.Session) -> None:
    """Run the core tests on the oldest Python with the oldest dependencies that are promised."""
    extras = PROJECT["optional-dependencies"]
    direct = [*PROJECT["dependencies"], _requirement("trio")]
    for name in ("redis", "cbor", "pydantic", "otel", "cli"):
        direct += extras[name]
    constraints = Path(session.create_tmp()) / "lowest.txt"
    own = f"{PACKAGE}["  # an extra may bring another one along
    lines = [re.sub(r"\s*>=\s*", "==", name) for name in direct if not name.startswith(own)]
    constraints.write_text("\n".join(lines) + "\n")
    session.install("--quiet", "-e", ".[dev]", "-c", str(constraints))
    session.run("python", "-m", "pip", "list", "--format", "freeze", silent=False)
    tested = ("tests/protocol", "tests/conformance", "tests/redis", "tests/core/test_validation.py")
    _pytest(session, "-m", "not slow", *tested, "tests/test_cli.py", "tests/test_top.py")
