"""Sphinx: ``nox -s docs`` builds this strictly, without the network."""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata
from typing import Any

from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "anyio_kkrpc"
author = copyright = "the anyio_kkrpc authors"
release = metadata.version("anyio_kkrpc")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
# Other projects' inventories can't be fetched here, so their names stay without links, and so do
# private names in annotations, such as type variables.
nitpick_ignore_regex = [("py:.*", r"(?!anyio_kkrpc\b).*"), ("py:.*", r"anyio_kkrpc\.(\w+\.)*_.*")]
OTHERS = ("anyio", "typing", "print", "asynccontextmanager")

html_theme = "furo"
html_title = f"anyio_kkrpc {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "any"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

PUBLIC = [
    "anyio_kkrpc",
    "anyio_kkrpc.abc",
    "anyio_kkrpc.asgi",
    "anyio_kkrpc.codecs",
    "anyio_kkrpc.kit",
    "anyio_kkrpc.middleware",
    "anyio_kkrpc.otel",
    "anyio_kkrpc.records",
    "anyio_kkrpc.relay",
    "anyio_kkrpc.redis",
    "anyio_kkrpc.redis.dialects",
    "anyio_kkrpc.sse",
    "anyio_kkrpc.testing",
    "anyio_kkrpc.testing.pytest_plugin",
    "anyio_kkrpc.transports",
    "anyio_kkrpc.websocket",
]


def find_public_names() -> dict[str, str]:
    """Return the name that is documented for each name under which a thing is defined."""
    found: dict[str, str] = {}
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or vars(module)
        for name in names:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                defined = f"{thing.__module__}.{thing.__qualname__}"
                found.setdefault(defined, f"{module_name}.{name}")
    return found


def resolve(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Link annotations to where classes are documented, and names in docstrings, tilde or not."""
    domain, target = env.get_domain("py"), node.get("reftarget", "")
    public = app.config["public_names"].get(target)
    if public is not None and node.get("refdomain") == "py":
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)
    if node.get("reftype") != "any":
        return None
    name = target.lstrip("~")
    content = nodes.literal(name, name.rpartition(".")[2] if name != target else name)
    if name.partition(".")[0] in OTHERS:
        return content
    found = domain.resolve_any_xref(env, node["refdoc"], app.builder, name, node, content)
    return found[0][1] if len(found) == 1 else None


def setup(app: Sphinx) -> None:
    """Add what the pages need."""
    app.add_lexer("output", TextLexer)
    app.add_config_value("public_names", find_public_names(), "env")
    app.connect("missing-reference", resolve)
