"""Every transition of a call, a callback and a stream, as tables; nothing else.

A table maps a state to the inputs that are legal in it, and each of those to the next state. An
input that a state doesn't list is a `ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import TypeVar

from ._errors import ProtocolError


class CallState(IntEnum):
    """A call, at the side that made it."""

    WAITING = 0
    ANSWERED = 1
    FAILED = 2
    EXPIRED = 3
    CANCELLED = 4
    LOST = 5


class CallInput(IntEnum):
    RESULT = 0
    ERROR = 1
    TIMEOUT = 2
    CANCEL = 3
    LOSE = 4


# A second answer (of another peer, or of a worker that was thought dead) is legal and dropped.
_ANSWERED_AGAIN = (CallInput.RESULT, CallInput.ERROR)

CALL: Mapping[CallState, Mapping[CallInput, CallState]] = {
    CallState.WAITING: {
        CallInput.RESULT: CallState.ANSWERED,
        CallInput.ERROR: CallState.FAILED,
        CallInput.TIMEOUT: CallState.EXPIRED,
        CallInput.CANCEL: CallState.CANCELLED,
        CallInput.LOSE: CallState.LOST,
    },
    **{
        state: dict.fromkeys(_ANSWERED_AGAIN, state)
        for state in CallState
        if state is not CallState.WAITING
    },
}


class HandlingState(IntEnum):
    """A request, at the side that serves it."""

    RUNNING = 0
    CANCELLING = 1
    DONE = 2


class HandlingInput(IntEnum):
    CANCEL = 0
    FINISH = 1
    LOSE = 2


HANDLING: Mapping[HandlingState, Mapping[HandlingInput, HandlingState]] = {
    HandlingState.RUNNING: {
        HandlingInput.CANCEL: HandlingState.CANCELLING,
        HandlingInput.FINISH: HandlingState.DONE,
        HandlingInput.LOSE: HandlingState.DONE,
    },
    HandlingState.CANCELLING: {
        HandlingInput.CANCEL: HandlingState.CANCELLING,
        HandlingInput.FINISH: HandlingState.DONE,
        HandlingInput.LOSE: HandlingState.DONE,
    },
    HandlingState.DONE: {},
}


class CallbackState(IntEnum):
    """A function that was passed to the other side, at the side that has the function."""

    LIVE = 0
    RELEASED = 1


class CallbackInput(IntEnum):
    EXPORT = 0
    CALL = 1
    RELEASE = 2
    RELEASE_LAST = 3
    LOSE = 4


CALLBACK: Mapping[CallbackState, Mapping[CallbackInput, CallbackState]] = {
    CallbackState.LIVE: {
        CallbackInput.EXPORT: CallbackState.LIVE,
        CallbackInput.CALL: CallbackState.LIVE,
        CallbackInput.RELEASE: CallbackState.LIVE,
        CallbackInput.RELEASE_LAST: CallbackState.RELEASED,
        CallbackInput.LOSE: CallbackState.RELEASED,
    },
    CallbackState.RELEASED: {},
}


class ConsumerState(IntEnum):
    """A stream, at the side that reads it."""

    IDLE = 0
    OPEN = 1
    LEAVING = 2
    ENDED = 3
    FAILED = 4


class ConsumerInput(IntEnum):
    PULL = 0
    ITEM = 1
    END = 2
    ERROR = 3
    LEAVE = 4
    LOSE = 5
    ANSWER = 6


CONSUMER: Mapping[ConsumerState, Mapping[ConsumerInput, ConsumerState]] = {
    ConsumerState.IDLE: {
        ConsumerInput.PULL: ConsumerState.OPEN,
        ConsumerInput.ANSWER: ConsumerState.IDLE,
        ConsumerInput.END: ConsumerState.ENDED,
        ConsumerInput.ERROR: ConsumerState.FAILED,
        ConsumerInput.LEAVE: ConsumerState.LEAVING,
        ConsumerInput.LOSE: ConsumerState.FAILED,
    },
    ConsumerState.OPEN: {
        ConsumerInput.PULL: ConsumerState.OPEN,
        ConsumerInput.ITEM: ConsumerState.OPEN,
        ConsumerInput.ANSWER: ConsumerState.OPEN,
        ConsumerInput.END: ConsumerState.ENDED,
        ConsumerInput.ERROR: ConsumerState.FAILED,
        ConsumerInput.LEAVE: ConsumerState.LEAVING,
        ConsumerInput.LOSE: ConsumerState.FAILED,
    },
    # Items that were under way when the consumer left are dropped.
    ConsumerState.LEAVING: {
        ConsumerInput.ITEM: ConsumerState.LEAVING,
        ConsumerInput.ANSWER: ConsumerState.LEAVING,
        ConsumerInput.END: ConsumerState.ENDED,
        ConsumerInput.ERROR: ConsumerState.ENDED,
        ConsumerInput.LOSE: ConsumerState.ENDED,
    },
    ConsumerState.ENDED: {},
    ConsumerState.FAILED: {},
}


class ProducerState(IntEnum):
    """A stream, at the side that has the source."""

    PAUSED = 0
    READY = 1
    LEFT = 2
    DONE = 3


class ProducerInput(IntEnum):
    PULL = 0
    ITEM = 1
    LAST_ITEM = 2
    END = 3
    ERROR = 4
    LEAVE = 5
    LOSE = 6
    HAND_OVER = 7


PRODUCER: Mapping[ProducerState, Mapping[ProducerInput, ProducerState]] = {
    # A source may end or fail without credit: neither is an item.
    ProducerState.PAUSED: {
        ProducerInput.PULL: ProducerState.READY,
        ProducerInput.HAND_OVER: ProducerState.PAUSED,
        ProducerInput.END: ProducerState.DONE,
        ProducerInput.ERROR: ProducerState.DONE,
        ProducerInput.LEAVE: ProducerState.LEFT,
        ProducerInput.LOSE: ProducerState.DONE,
    },
    ProducerState.READY: {
        ProducerInput.PULL: ProducerState.READY,
        ProducerInput.HAND_OVER: ProducerState.PAUSED,
        ProducerInput.ITEM: ProducerState.READY,
        ProducerInput.LAST_ITEM: ProducerState.PAUSED,
        ProducerInput.END: ProducerState.DONE,
        ProducerInput.ERROR: ProducerState.DONE,
        ProducerInput.LEAVE: ProducerState.LEFT,
        ProducerInput.LOSE: ProducerState.DONE,
    },
    # The consumer has left; the source is being closed, then that is acknowledged.
    ProducerState.LEFT: {
        ProducerInput.PULL: ProducerState.LEFT,
        ProducerInput.LEAVE: ProducerState.LEFT,
        ProducerInput.END: ProducerState.DONE,
        ProducerInput.ERROR: ProducerState.DONE,
        ProducerInput.LOSE: ProducerState.DONE,
    },
    ProducerState.DONE: {},
}

_S = TypeVar("_S", bound=IntEnum)
_I = TypeVar("_I", bound=IntEnum)


def advance(table: Mapping[_S, Mapping[_I, _S]], state: _S, step: _I) -> _S:
    """Return the state that follows ``state`` on ``step``.

    :raises ProtocolError: if the table has no such transition
    """
    try:
        return table[state][step]
    except KeyError:
        what = type(state).__name__.removesuffix("State").lower()
        raise ProtocolError(f"{what}: {step.name} is not legal in {state.name}") from None
