# SPDX-License-Identifier: MIT
"""Coroutines over an I/O queue, without an event loop of their own.

Owns: ``Completion`` (a result to come), ``Task`` (a coroutine being run) and
``Reactor`` (runs tasks, submits what they asked for in one batch, collects what
came back). Every request algorithm of mmcow is one coroutine that awaits
completions; who turns the reactor decides the flavour: a thread that wants one
answer (``Reactor.run``), an asyncio loop (``Reactor.poll``) or the simulator's queue.

Never: does I/O itself, knows files or images, starts threads.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mmcow.errors import MmcowError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

T = TypeVar("T")


class Interrupted(MmcowError):
    """A KeyboardInterrupt struck while requests were being handled; open the image again."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("interrupted in the middle of a request; open the image again")
        self.__cause__ = cause


class Completion(Generic[T]):
    """A result to come. Awaitable by tasks, any number of times.

    ``keep`` holds whatever must outlive the operation (buffers the kernel writes to);
    it is dropped when the result is in.
    """

    __slots__ = ("_callbacks", "done", "error", "keep", "value")

    def __init__(self, keep: object = None) -> None:
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self.keep = keep
        self._callbacks: list[Callable[[Completion[T]], None]] | None = None

    def __await__(self) -> Generator[Completion[T], None, T]:
        if not self.done:
            yield self
        return self.result()

    def result(self) -> T:
        """Return the value, or raise the error. Only once ``done``."""
        assert self.done
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]

    def set(self, value: T) -> None:
        """Deliver the value and wake whoever waits."""
        assert not self.done
        self.value = value
        self._finish()

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead of a value."""
        assert not self.done
        self.error = error
        self._finish()

    def on_done(self, callback: Callable[[Completion[T]], None]) -> None:
        """Call back once done; at once if it already is."""
        if self.done:
            callback(self)
        elif self._callbacks is None:
            self._callbacks = [callback]
        else:
            self._callbacks.append(callback)

    def _finish(self) -> None:
        self.done = True
        self.keep = None
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is not None:
            for callback in callbacks:
                callback(self)


def completed(value: T) -> Completion[T]:
    """A completion that already has its value."""
    completion: Completion[T] = Completion()
    completion.set(value)
    return completion


class Task(Completion[T]):
    """A coroutine being run by a reactor; done when it returns or raises."""

    __slots__ = ("_coroutine", "_reactor")

    def __init__(self, reactor: Reactor, coroutine: Coroutine[Any, Any, T]) -> None:
        super().__init__()
        self._reactor = reactor
        self._coroutine = coroutine

    def step(self) -> None:
        """Run until the coroutine waits for something that is not there, or ends."""
        try:
            awaited: Completion[Any] = self._coroutine.send(None)
        except StopIteration as stop:
            self.set(stop.value)
        # Whatever ends the coroutine belongs to whoever awaits the task: a
        # KeyboardInterrupt that struck inside it as well as an Exception.
        except BaseException as error:  # noqa: BLE001
            if not isinstance(error, Exception):
                self._reactor.interrupted = error
            self.fail(error)
        else:
            awaited.on_done(self._wake)

    def _wake(self, _: Completion[Any]) -> None:
        self._reactor.ready.append(self)


class TurnQueue(Protocol):
    """What a reactor needs of an I/O queue."""

    @property
    def busy(self) -> bool:
        """True while requests are pending or in flight."""

    def turn(self, wait: bool) -> list[tuple[Completion[Any], int]]:
        """Submit what is pending; collect what is done, at least one if ``wait``.

        Blocks at most until a signal. Must be callable by a second thread while a
        first one waits inside.
        """

    def deliver(self, finished: list[tuple[Completion[Any], int]]) -> None:
        """Give the results collected by ``turn`` to their completions."""


class Reactor:
    """Runs tasks over one queue, for any number of threads.

    ``lock`` guards everything above the queue: tasks, engine state, metadata. It is
    the first lock in the order and is not held while a thread waits in the kernel.
    Of several threads that wait for their tasks one (the leader) waits in the kernel for
    all; the others wait for it to hand over.
    """

    def __init__(self, queue: TurnQueue) -> None:
        self.queue = queue
        self.ready: deque[Task[Any]] = deque()
        # What broke in (KeyboardInterrupt) while requests were being handled. A result may have
        # been lost on its way, so nothing may be waited for any more.
        self.interrupted: BaseException | None = None
        self.lock = threading.RLock()
        self._progress = threading.Condition(self.lock)
        self._has_leader = False
        self._followers = 0

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        """Start a coroutine; it runs at once up to its first wait. Lock held."""
        task = Task(self, coroutine)
        task.step()
        return task

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end from this thread and return its result.

        After a KeyboardInterrupt the reactor refuses every later call: what was in flight
        completes or not, its buffers stay referenced, and the caller opens anew.
        """
        with self.lock:
            return self.wait(self.spawn(coroutine))

    def wait(self, completion: Completion[T]) -> T:
        """Turn the queue until ``completion`` is done; return its result."""
        with self.lock:
            try:
                self._drain()
                if not completion.done:
                    self._wait(completion)
            except Exception:
                raise
            except BaseException as error:
                self.interrupted = error
                raise
        return completion.result()

    def poll(self) -> None:
        """Submit, collect without waiting, run what became ready. For event loops."""
        with self.lock:
            self._drain()
            self._turn(wait=False)
            while self.ready:
                self._drain()
                self._turn(wait=False)

    def _wait(self, completion: Completion[Any]) -> None:
        self._turn(wait=False)
        self._drain()
        while not completion.done:
            if self.interrupted is not None:
                raise Interrupted(self.interrupted)
            if self._has_leader:
                self._followers += 1
                try:
                    self._progress.wait()
                finally:
                    self._followers -= 1
                continue
            self._has_leader = True
            try:
                self._lead(completion)
            finally:
                self._has_leader = False
                if self._followers:
                    self._progress.notify_all()

    def _lead(self, completion: Completion[Any]) -> None:
        while not completion.done:
            if not self.ready and not self.queue.busy:
                raise RuntimeError("deadlock: a task waits for something nobody will deliver")
            self._turn(wait=not self.ready)
            self._drain()
            if self._followers:
                self._progress.notify_all()

    def _turn(self, wait: bool) -> None:
        if wait:
            # RLock: leave it entirely, whatever the depth, as Condition.wait does.
            saved = self.lock._release_save()  # type: ignore[attr-defined]  # noqa: SLF001
            try:
                finished = self.queue.turn(True)
            finally:
                self.lock._acquire_restore(saved)  # type: ignore[attr-defined]  # noqa: SLF001
        else:
            finished = self.queue.turn(False)
        if finished:
            self.queue.deliver(finished)

    def _drain(self) -> None:
        ready = self.ready
        while ready:
            ready.popleft().step()
