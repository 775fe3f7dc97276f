"""Ctrl-C and SIGTERM on the command line: the first signal ends the command in order, a second one ends it at once.

A thread reads the signals (`signal.set_wakeup_fd`), so that they are heard whatever Python is busy with: an import, a
long product, the end of the interpreter. Only modules that load at once are imported here.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from os import _exit as exit_at_once
from types import FrameType
from typing import Any


class Answer(enum.Enum):
    """The effect of a first signal."""

    EXIT = "the process ends at once: all that it wrote is whole, and nothing else is worth keeping"
    RAISE = "KeyboardInterrupt, or what the solver at work does instead"
    FINISH = "it is noted; what is being written is written"


class Interrupts:
    """The signals that this process received decide how it ends.

    Attributes
    ----------
    received : int or None
        The first signal.
    kept : str
        What is kept if the process ends now, and how to go on.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.kept = ""
        self._answer = Answer.EXIT
        self._watching = False

    @property
    def code(self) -> int:
        """The exit code of a process that a signal ended: 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    @contextlib.contextmanager
    def answer(self, answer: Answer) -> Iterator[None]:
        """Answer signals in this way inside the block."""
        before, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = before

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Listen inside the block. Nested blocks, other threads and the processes of torchrun change nothing."""
        elastic = "TORCHELASTIC_RUN_ID" in os.environ  # there one signal of the user reaches a process several times
        if self._watching or elastic or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received, self.kept, self._watching = None, "", True
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # A signal that the parent had ignored (nohup, a job in the background) stays ignored.
        old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN}
        for signum, handler in {signal.SIGINT: self._interrupt, signal.SIGTERM: _terminate}.items():
            if signum in old:
                signal.signal(signum, handler)
        listener = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            self._watching = False
            for signum, previous in old.items():
                if signal.getsignal(signum) != signal.SIG_IGN:  # see `ignore`
                    signal.signal(signum, previous)
            signal.set_wakeup_fd(wakeup)
            writer.close()
            listener.join()

    def ignore(self) -> None:
        """Ignore signals from here on: while the interpreter ends, Python would print a traceback."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._answer is Answer.RAISE:
            raise KeyboardInterrupt

    def _listen(self, reader: socket.socket) -> None:
        while signals := reader.recv(1):
            if self.received is not None:
                _leave("", self.code)
            self.received = signals[0]
            if self._answer is Answer.EXIT:
                _leave(f"interrupted: {self.kept or 'nothing was begun'}", self.code)
            _say("stopping and keeping what is good; Ctrl-C again ends at once")
        reader.close()


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C, also while a solver runs."""
    handler: Any = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signum, frame)


def _say(text: str) -> None:
    """Write a line to standard error, over the progress line if there is one."""
    clear = "\r\x1b[2K\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{text}\n".encode())


def _leave(text: str, code: int) -> None:
    if text:
        _say(text)
    exit_at_once(code)


interrupts = Interrupts()
"""The signals of this process."""
