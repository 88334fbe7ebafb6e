"""What TypeScript peers write: the messages of kkrpc's two generations, without I/O.

`classic` are those of kkrpc 0.x, as JSON or superjson, `compact` those of kkrpc 2. What superjson
has and Python lacks are the classes `URL`, `BigInt` and `Map`. `UNDEFINED`, which is
``msgspec.UNSET``, is JavaScript's ``undefined``.
"""

from __future__ import annotations

from typing import Final

from msgspec import UNSET, UnsetType

from ._restoring import URL as URL
from ._restoring import BigInt as BigInt
from ._restoring import Map as Map

UNDEFINED: Final[UnsetType] = UNSET
"""What is ``undefined`` in JavaScript: an argument, an item or a member that came so, or is to."""
