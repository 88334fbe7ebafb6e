"""What is done to objects that passed a relay: which of it passes, and to whom."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET

from anyio_kkrpc import (
    DeliveryError,
    MethodNotFoundError,
    RemoteMember,
    RemoteObject,
    TransportClosedError,
)
from anyio_kkrpc._driver._asking import RefusedError
from anyio_kkrpc._driver._remote_object import Root, root_of
from anyio_kkrpc._references._held import Handle
from anyio_kkrpc._serving._relaying import is_clean, pass_on, relayed

pytestmark = pytest.mark.anyio


class Owner:
    """Notes what it is asked."""

    relayed = True

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def ask(self, root: Root, *what: Any, undefined: bool = False) -> Any:
        self.asked.append(what)
        return UNSET if undefined else None

    def check(self, root: Root) -> None: ...

    def release(self, handle: Handle) -> None: ...

    def drop(self, handle: Handle) -> None: ...


async def test_what_its_owner_is_asked() -> None:
    """As it is, below what passed; of a member that passed, a call is that of a method."""
    owner = Owner()
    whole = RemoteObject(Root(owner, Handle("1", None), is_function=False))
    member = RemoteMember(root_of(whole)[0], ("deep",))
    assert await relayed(whole, "call", ("ask",))("?") is UNSET
    await relayed(whole, "apply", ())(1, b=2)
    await relayed(member, "apply", ())(1)
    await relayed(member, "get", ("name",))()
    await relayed(member, "set", ("name",))(5)
    assert owner.asked == [
        ("call", ("ask",), ("?",), {}),
        ("apply", (), (1,), {"b": 2}),
        ("call", ("deep",), (1,), {}),
        ("get", ("deep", "name"), (), {}),
        ("set", ("deep", "name"), (5,), {}),
    ]
    assert relayed(whole, "get", ())() is whole
    assert relayed(member, "member", ("name",))() == whole.deep.name


@pytest.mark.parametrize(
    ("what", "path"),
    [
        ("call", ("_hidden",)),
        ("get", ("a", "constructor")),
        ("apply", ("a",)),
        ("call", ()),
        ("release", ()),
        ("new", ("a",)),
        ("set", ("x",) * 17),
        ("member", ("a.b",)),
    ],
)
def test_what_does_not_pass(what: str, path: tuple[str, ...]) -> None:
    whole = RemoteObject(Root(Owner(), Handle("1", None), is_function=False))
    with pytest.raises(RefusedError) as refused:
        relayed(whole, what, path)
    assert isinstance(refused.value.error, MethodNotFoundError)


def test_paths() -> None:
    assert is_clean(("a", "b"))
    assert not any(map(is_clean, [("",), ("_a",), ("a.b",), ("a",) * 17]))


async def test_what_became_of_a_question() -> None:
    """The link that is gone is told as what that means for who asked; a handler's error is that."""

    async def fail(error: Exception) -> None:
        raise error

    for error in (TransportClosedError("gone"), DeliveryError("gone")):
        with pytest.raises(RefusedError) as refused:
            await pass_on(fail(error), RefusedError)
        assert type(refused.value.error) is DeliveryError
    with pytest.raises(ValueError, match="its own"):
        await pass_on(fail(ValueError("its own")), RefusedError)
