"""Numbers of what goes to inboxes, where Redis refused some of it or took it late; without any I/O.

Readers wait for a number that is left out, so none is, unless its sender counts anew. Those of the
version before wait for nothing, and drop what comes behind a greater number.
"""

from __future__ import annotations

from ._commands import Commands
from ._ledger import Ledger, Post

__all__ = ("Numbers",)


class Numbers:
    """Keeps the numbers of one writer's posts right. It is told what was refused.

    :param commands: counts
    :param ledger: has what waits
    :ivar late: what comes late for peers that would drop it
    """

    def __init__(self, commands: Commands, ledger: Ledger) -> None:
        self._commands = commands
        self._ledger = ledger
        self.late: set[Post] = set()

    def leave_out(self, post: Post) -> None:
        """Note that nothing with the number of a post will be in the inbox that it was for."""
        self.late.discard(post)
        recipient = _recipient(post)
        if recipient is not None:
            self._commands.begin_anew(recipient)

    def come_late(self, post: Post) -> None:
        """Note that a post was refused, and may come behind what is numbered above it."""
        recipient = _recipient(post)
        if recipient is not None and not self._commands.takes_late(recipient):
            self.late.add(post)

    def raise_late(self) -> None:
        """Give what waits for peers that would drop it numbers above all that they have had.

        What may have arrived, and wasn't refused since, keeps the one by which it is recognized.
        """
        late = {post for post in self.late if post.waits}  # others wait for a right still
        self.late -= late
        recipients = {_recipient(post) for post in late}
        for recipient in recipients:
            if recipient is not None:
                self._commands.begin_anew(recipient)
        for post in self._ledger.waiting():
            recipient = _recipient(post)
            if recipient in recipients and (post in late or not post.unknown):
                self._ledger.rewrite(post, self._commands.number_anew)


def _recipient(post: Post) -> str | None:
    """Return the peer that a post is for, if it is numbered."""
    return None if post.number is None or post.envelope is None else post.envelope.recipient
