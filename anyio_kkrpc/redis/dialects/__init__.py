"""How records become the fields of a Redis stream entry, and entries become records."""

from __future__ import annotations

from ._base import Dialect as Dialect
from ._base import Entry as Entry
from .native import NativeDialect as NativeDialect
