"""Who may enter a transport or a channel: one ``async with``, in the process that made it.

A process that is forked has a copy of all that its parent made, with the same ids. Two peers with
one id take each other's answers, and two processes that read one connection its bytes.
"""

from __future__ import annotations

import os


class Entrance:
    """Lets one in.

    :ivar used: whether somebody has entered
    :param what: what is entered, for errors
    """

    __slots__ = ("_process", "_what", "used")

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = os.getpid()
        self.used = False

    def enter(self) -> None:
        """Enter.

        :raises RuntimeError: if it is used already, or was made before a fork
        """
        if self.used:
            raise RuntimeError(f"{self._what} can be entered once; make a new one")
        if self._process != (here := os.getpid()):
            raise RuntimeError(
                f"this {self._what} was made by process {self._process}, before a fork, and can't "
                f"be entered by process {here}, since both would have the same ids; make it after "
                "the fork, where the worker process starts (its start hook, or the application's "
                "lifespan)"
            )
        self.used = True
