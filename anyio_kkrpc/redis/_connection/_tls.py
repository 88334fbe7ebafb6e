"""Encryption of connections: the certificates, read again once their files have changed."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

from ..._runtime._log import quoted
from ._threads import in_thread
from ._url import CERT_REQS

logger = logging.getLogger("anyio_kkrpc")

# What OpenSSL calls an answer that isn't TLS.
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "UNKNOWN_PROTOCOL",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "RECORD_TOO_LARGE",
)
# What a server's alert about the certificate of its client ends with.
_CERTIFICATE_ALERTS = (
    "ALERT_ACCESS_DENIED",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_CERTIFICATE_EXPIRED",
    "ALERT_CERTIFICATE_REVOKED",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_UNKNOWN_CA",
    "ALERT_UNSUPPORTED_CERTIFICATE",
)
# By which a file is known to be the one that was read.
_State = tuple[object, ...]


class CertificateFileError(ValueError):
    """A file that an option names can't be used."""


@dataclass(frozen=True)
class Tls:
    """How the connections to the servers of one URL are encrypted.

    :ivar given: the user's own context, in place of all options but ``ssl_server_hostname``
    :ivar ssl_cert_reqs: ``required``, ``optional`` or ``none``
    :ivar ssl_check_hostname: whether the server's certificate must be for its host name
    :ivar ssl_server_hostname: the name that the servers' certificates are for; that of each server
        if ``None``
    :ivar ssl_ca_certs: file of the CAs, the system's if ``None``
    :ivar ssl_certfile: file of the client's own certificate, with those that it is signed by
    :ivar ssl_keyfile: file of its key, if it isn't in the same one
    """

    given: ssl.SSLContext | None = None
    ssl_cert_reqs: str = "required"
    ssl_check_hostname: bool = True
    ssl_server_hostname: str | None = None
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    _kept: _Kept = field(default_factory=lambda: _Kept(), init=False, repr=False, compare=False)

    def name_of(self, host: str) -> str:
        """Return the name that a server's certificate must have, which it is told as well."""
        # A dot at the end says that the name is complete; it is no part of it.
        return self.ssl_server_hostname or host.removesuffix(".")

    async def context(self) -> ssl.SSLContext:
        """Return what the next connection is made with.

        :raises CertificateFileError: if a file can't be used, and none like it could before
        """
        if self.given is not None:
            return self.given
        return await in_thread(partial(self._kept.current, self._look, self.load))

    def advice(self, exc: ssl.SSLError) -> str:
        """Return what to check after an error of TLS."""
        if isinstance(exc, ssl.SSLCertVerificationError):
            return (
                "that the server's certificate is valid for this host name (or give "
                "ssl_server_hostname), and ssl_ca_certs"
            )
        reason = exc.reason or ""
        if reason.endswith(_NOT_TLS):
            return "the port, and that it speaks TLS (if not, the url begins with redis://)"
        own = "ssl_certfile and ssl_keyfile in the url" if self.given is None else "ssl_context"
        if reason.endswith("ALERT_CERTIFICATE_REQUIRED"):
            return f"{own}: the server asks for a certificate of its clients"
        if reason.endswith(_CERTIFICATE_ALERTS):
            return f"{own}: the server doesn't accept the certificate"
        if reason.endswith("ALERT_HANDSHAKE_FAILURE"):
            return (
                f"the versions and ciphers of TLS, and {own}: the server may ask for a certificate"
            )
        return "the versions and ciphers of TLS that server and client have in common"

    def _look(self) -> _State | None:
        """Return the state of all files, ``None`` if it isn't known."""
        paths = [self.ssl_ca_certs, self.ssl_certfile, self.ssl_keyfile]
        if self.ssl_ca_certs is None:
            system = ssl.get_default_verify_paths()
            paths += [system.cafile, system.capath]
        try:
            found = [os.stat(path) for path in paths if path is not None]
        except OSError:
            return None
        return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)

    def load(self) -> ssl.SSLContext:
        """Return what connections are made with, read from the files as they are now. It blocks.

        :raises CertificateFileError: if a file can't be used
        """
        names = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
        for name, path in zip(
            names, (self.ssl_ca_certs, self.ssl_certfile, self.ssl_keyfile), strict=True
        ):
            if path is not None:
                try:
                    with open(path, "rb"):
                        pass
                except OSError as exc:
                    raise CertificateFileError(f"{name}: {exc.strerror}: {path!r}") from exc
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca_certs)
        except (ssl.SSLError, OSError) as exc:
            raise CertificateFileError(
                f"ssl_ca_certs: no certificates in {self.ssl_ca_certs!r}"
            ) from exc
        context.check_hostname = self.ssl_check_hostname and self.ssl_cert_reqs != "none"
        context.verify_mode = CERT_REQS[self.ssl_cert_reqs]
        if self.ssl_certfile is not None:
            self._load_certificate(context, self.ssl_certfile)
        return context

    def _load_certificate(self, context: ssl.SSLContext, path: str) -> None:
        def no_password() -> str:
            # Without it, OpenSSL would ask on the terminal.
            raise CertificateFileError(
                "ssl_keyfile: the key is encrypted; give an ssl_context in place of it"
            )

        try:
            context.load_cert_chain(path, self.ssl_keyfile, no_password)
        except (ssl.SSLError, OSError) as exc:
            key = "" if self.ssl_keyfile is None else f" with the key in {self.ssl_keyfile!r}"
            raise CertificateFileError(
                f"ssl_certfile, ssl_keyfile: no certificate in {path!r}{key} ({quoted(exc)})"
            ) from exc


class _Kept:
    """What the files had when they could last be read. Threads use it, one at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._context: ssl.SSLContext | None = None
        self._state: _State | None = None
        self._failing = False

    def current(
        self, look: Callable[[], _State | None], load: Callable[[], ssl.SSLContext]
    ) -> ssl.SSLContext:
        """Return what was read before, unless the files have changed and can be read."""
        with self._lock:
            before = look()
            if self._context is not None and before is not None and before == self._state:
                self._recovered()
                return self._context
            try:
                context = load()
            except CertificateFileError as exc:
                if self._context is None:
                    raise
                self._failed(exc)
                return self._context
            self._recovered()
            self._context = context
            # What was exchanged meanwhile is read the next time.
            self._state = before if before == look() else None
            return context

    def _failed(self, exc: CertificateFileError) -> None:
        # Somebody may be about to write it, or has written the certificate and not its key.
        if not self._failing:
            logger.warning("%s; TLS goes on with what was read before", exc)
        self._failing = True

    def _recovered(self) -> None:
        if self._failing:
            logger.warning("the files of TLS can be read again")
        self._failing = False
