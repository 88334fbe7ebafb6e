"""Everything that has to pass. Plain ``nox`` runs it all; ``nox -l`` lists the parts.

What needs no Python in particular runs in the environment that nox runs in, where README's set-up
has installed all of it; so does the whole suite, under coverage, if that is the default Python. On
the other Pythons parts of it run, without the tests marked ``slow``: those are about faults and
load, or are repeated on another server or link, which doesn't depend on the version.

``nox -s quick`` answers within a minute of CPU time, for work in between.
``nox -s tests-3.12 -- tests/protocol -x`` passes arguments on to pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
DEFAULT = "3.11"
DATA = ROOT / ".nox" / "coverage-data"
OUTCOMES = ROOT / ".nox" / "outcomes"
PACKAGE = "anyio_kkrpc"
# Whether nox itself runs on the default Python.
IS_DEFAULT = sys.version_info[:2] == tuple(map(int, DEFAULT.split(".")))
# Tests mostly wait for servers and processes, so more of them than cores go on at once: more in the
# long run, as each worker collects all tests first. Those without servers don't wait, and pay for
# each worker (85 s of CPU time with four of them, 63 with two).
FEW_WORKERS, WORKERS, MORE_WORKERS = "2", "4", "6"
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
    # The await in a `finally` is of a function that bounds itself by move_on_after(shield=True), or
    # one that only raises what has been asked for.
    "ASYNC102": (
        "_driver/_asking",
        "_driver/_callbacks",
        "_channel",
        "_cli/_demo",
        "_serving/_crew",
        "_calling/_proxy",
        "_driver/_pump",
        "_serving/_operations",
        "kit/_messages",
        "kit/_outgoing",
        "redis/_transport",
        "transports/links",
    ),
    # What is caught is not swallowed: it is thrown into a coroutine or raised to whoever waits.
    "ASYNC103": (
        "_driver/_asking",
        "_driver/_callbacks",
        "_driver/_context",
        "_driver/_endings",
        "_serving/_crew",
        "_serving/_keyed",
        "kit/_inbound",
        "_driver/_pump",
        "_reactions",
        "_serving/_operations",
        "_runtime/_timer",
        "redis/_connection/_resp",
        "kit/_outgoing",
    ),
    "ASYNC104": (
        "_driver/_asking",
        "_driver/_context",
        "_serving/_crew",
        "_driver/_pump",
        "redis/_connection/_resp",
    ),
    # What is closed awaits nothing then.
    "ASYNC119": ("_calling/_handle",),
    # What raises takes the place of a coroutine function that failed when it was called.
    "ASYNC124": ("_serving/_invoking",),
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


# What the oldest Python runs with the oldest dependencies, not with the newest.
WITH_LOWEST = (
    "tests/protocol",
    "tests/conformance",
    "tests/redis",
    "tests/values",
    "tests/cli/test_cli.py",
    "tests/cli/test_top.py",
)

# What other processes do, which depends on the version of Python least.
OF_OTHERS = ("tests/faults", "tests/wire", "tests/typescript/test_interop.py")

# What depends on the version of Python most: the code of the library, part by part.
CODE = (
    *("protocol", "runtime", "values", "codecs", "driver", "calling", "serving", "core", "kit"),
    *("transports", "redis"),
)
# Of these, what has no I/O or uses memory transports.
WITHOUT_SERVERS = tuple(f"tests/{folder}" for folder in CODE[:-2])
# What only this Python needs of the extra `dev`; and compiling what isn't imported takes longer.
TOOLS = ("flake8", "flake8-async", "mypy", "nox", "pyright", "ruff")
os.environ.setdefault("PIP_NO_COMPILE", "1")
# Hundreds of processes import the same modules. Where the machine says to write no bytecode, it is
# kept away from the sources; otherwise each process would compile all of it anew.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".nox" / "bytecode"))

# Without I/O, on memory transports, the guards, and a slice on a real server.
QUICK = (
    *(*WITHOUT_SERVERS, "tests/guards"),
    *("tests/redis/test_transport.py", "tests/redis/test_options.py"),
    *("tests/redis/test_option_table.py", "tests/test_public_api.py", "tests/wire/test_page.py"),
    # Of asyncio's two loops the one that has no debug mode, which costs three times as much.
    *("-k", "not asyncio and not against_the_model and not instructions"),
    *("--hypothesis-profile", "quick"),
)

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
    "promises",
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


def _install_for_tests(session: nox.Session, *args: str) -> None:
    """Install the extra ``dev`` without what only checks and formats."""
    wanted = [
        requirement.replace(PACKAGE, ".", 1) if requirement.startswith(PACKAGE) else requirement
        for requirement in PROJECT["optional-dependencies"]["dev"]
        if re.split(r"[^\w-]", requirement)[0] not in TOOLS
    ]
    editable, *others = wanted
    session.install("--quiet", "-e", editable, *others, *args)


def _here(session: nox.Session, *command: str, env: dict[str, str] | None = None) -> None:
    """Run a module's command in the environment that nox runs in."""
    if find_spec("pytest") is None:
        session.error("nox must run where the extra dev is installed, as README's set-up does")
    session.run(sys.executable, "-m", *command, env=env, external=True)


def _pytest(session: nox.Session, *args: str, workers: str = WORKERS) -> None:
    """Run what may depend on the version of Python; the default one tries what does on the loop."""
    thinned = [] if session.posargs else ["--covering-once"]
    session.run("python", "-m", "pytest", "-n", workers, *thinned, *args, *session.posargs)


def _empty(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()


@nox.session(name=f"tests-{DEFAULT}", python=False if IS_DEFAULT else DEFAULT)
def tests_default(session: nox.Session) -> None:
    """Run all tests but the examples, each on asyncio, uvloop and trio, under coverage.

    Not on each combination of loop, server and other parameters, unless tests are chosen: see
    tests/covering.py. Coverage is measured on one loop and one server: see tests/measured.py.
    """
    python = sys.executable
    if session.python:
        session.install("--quiet", "-e", ".[dev]")
        python = "python"
    _empty(DATA)
    _empty(OUTCOMES)
    session.run(
        *(python, "-m", "coverage", "run", "-m", "pytest", "-n", MORE_WORKERS),
        *("--ignore", "tests/test_examples.py", f"--outcomes={OUTCOMES}"),
        *(session.posargs or ["--covering"]),
        env={"COVERAGE_FILE": str(DATA / "data")},
        external=True,
    )


@nox.session(python=[version for version in PYTHONS if version != DEFAULT])
def tests(session: nox.Session) -> None:
    """Run the tests that may depend on the version of Python: those of `CODE`.

    The oldest runs the rest instead, since it runs most of those in ``lowest``, but not what is
    about servers and peers in other processes. Those between the oldest and the newest start no
    servers. uvloop is tried on the default Python, and so is each test on each loop: here it is on
    one or another, but what is about loops (tests/covering.py).
    """
    _install_for_tests(session)
    chosen, workers = [f"tests/{folder}" for folder in CODE], WORKERS
    if session.python not in (AVAILABLE[0], AVAILABLE[-1]):
        chosen, workers = [*WITHOUT_SERVERS], FEW_WORKERS
    if session.python == AVAILABLE[0]:
        chosen = [f"--ignore={path}" for path in (*WITH_LOWEST, *OF_OTHERS)]
    _pytest(session, "-m", "not slow", "-k", "not uvloop", *chosen, workers=workers)


@nox.session(python=False)
def promises(session: nox.Session) -> None:
    """Fail unless each test that docs/delivery.md names has run on the default Python."""
    if not OUTCOMES.is_dir() or not any(OUTCOMES.iterdir()):
        session.error(f"there is nothing to look at; run nox -s tests-{DEFAULT} first")
    _here(session, "tests.promises", str(OUTCOMES))


@nox.session(python=False)
def coverage(session: nox.Session) -> None:
    """Combine and report what the tests on the default Python measured; fail below the bound."""
    if not DATA.is_dir() or not any(DATA.iterdir()):
        session.error(f"there is nothing to report; run nox -s tests-{DEFAULT} first")
    env = {"COVERAGE_FILE": str(DATA / "combined")}
    parts = sorted(str(path) for path in DATA.glob("data*"))
    _here(session, "coverage", "combine", "--keep", "--quiet", *parts, env=env)
    _here(session, "coverage", "report", env=env)


@nox.session(python=False)
def quick(session: nox.Session) -> None:
    """Run what tells most in a minute of CPU time; no proof that everything passes."""
    _here(session, "pytest", "-n", "2", "-m", "not slow", *QUICK, *session.posargs)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Run ruff, and flake8-async for the structured concurrency that ruff doesn't check."""
    _here(session, "ruff", "check", ".")
    _here(session, "ruff", "format", "--check", ".")
    codes: dict[str, list[str]] = {}
    for code, modules in ASYNC_EXCEPTIONS.items():
        for module in modules:
            codes.setdefault(module, []).append(code)
    exceptions = [f"{PACKAGE}/{module}.py:{','.join(found)}" for module, found in codes.items()]
    # It takes a second for some modules; there is nothing for it in those that know no event loop.
    word = re.compile(r"\b(async|await|anyio|asyncio|trio)\b")
    modules = sorted((ROOT / PACKAGE).rglob("*.py"))
    looked_at = [str(one.relative_to(ROOT)) for one in modules if word.search(one.read_text())]
    _here(
        session,
        "flake8",
        *("--select", "ASYNC", "--extend-ignore", ",".join(ASYNC_IGNORED)),
        *("--per-file-ignores", " ".join(exceptions), *looked_at),
    )


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Check the package, the examples and the typing tests with mypy and pyright."""
    _here(session, "mypy", "--strict", PACKAGE, "tests/typing", *_examples())
    _here(session, "pyright", PACKAGE, "tests/typing", *_examples())
    # Fails unless all that is public has a type.
    _here(session, "pyright", "--verifytypes", PACKAGE, "--ignoreexternal")


def _examples() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*.py"))


@nox.session(python=False)
def examples(session: nox.Session) -> None:
    """Run the examples as their readers would."""
    _here(session, "pytest", "-n", WORKERS, "tests/test_examples.py", *session.posargs)


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
    tested = [*WITHOUT_SERVERS, "tests/testing/test_kit.py"]
    # All modules are there: that depends on no loop, and on no number of examples.
    less = ("-k", "not uvloop and not asyncio", "--hypothesis-profile", "quick")
    session.run(python, "-m", "pytest", "-q", "-n", FEW_WORKERS, *less, *tested, external=True)


@nox.session(python=AVAILABLE[:1])
def lowest(session: nox.Session) -> None:
    """Run the core tests on the oldest Python with the oldest dependencies that are promised."""
    extras = PROJECT["optional-dependencies"]
    direct = [*PROJECT["dependencies"], _requirement("trio")]
    for name in ("redis", "cbor", "pydantic", "otel", "cli", "websocket"):
        direct += extras[name]
    constraints = Path(session.create_tmp()) / "lowest.txt"
    own = f"{PACKAGE}["  # an extra may bring another one along
    lines = [re.sub(r"\s*>=\s*", "==", name) for name in direct if not name.startswith(own)]
    constraints.write_text("\n".join(lines) + "\n")
    _install_for_tests(session, "-c", str(constraints))
    session.run("python", "-m", "pip", "list", "--format", "freeze", silent=False)
    # uvloop has no lowest version that is promised.
    _pytest(session, "-m", "not slow", "-k", "not uvloop", *WITH_LOWEST)
