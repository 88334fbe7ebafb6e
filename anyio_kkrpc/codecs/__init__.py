"""Codecs: records as JSON or CBOR."""

from __future__ import annotations

from ..abc import Codec
from ._guarded import GuardedCodec
from .json import JSONCodec as JSONCodec

__all__ = ("JSONCodec", "get_codec")


def get_codec(codec: str | Codec) -> Codec:
    """Return the codec of that name, or the codec itself; one of a user's has no other errors than
    it may have.

    :raises ValueError: if there is none of that name
    :raises ImportError: if it needs an extra that isn't installed
    """
    if isinstance(codec, Codec):
        known = type(codec).__module__.startswith(__name__)
        return codec if known else GuardedCodec(codec)
    if codec == "json":
        return JSONCodec()
    if codec == "cbor":
        try:
            from .cbor import CBORCodec
        except ImportError as exc:
            raise ImportError("codec 'cbor' needs cbor2: pip install 'anyio_kkrpc[cbor]'") from exc
        return CBORCodec()
    raise ValueError(f"codec: 'json', 'cbor' or a Codec, not {codec!r:.80}")
