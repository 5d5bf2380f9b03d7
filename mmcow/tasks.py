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
import time
from collections import deque
from itertools import starmap
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mmcow.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

__all__ = ["Completion", "Interrupted", "Reactor", "Task", "TurnQueue", "completed"]

T = TypeVar("T")

_PAUSE_SECONDS = 0.001
# Whoever should have woken a sleeper may have been interrupted on the way, even twice.
_FOLLOW_SECONDS = 1.0
_QUIESCE_SECONDS = 0.1


def _pause() -> None:
    time.sleep(_PAUSE_SECONDS)


# Arguments of one call without any, for ``starmap``.
_ONE_CALL: tuple[tuple[()]] = ((),)


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
        suspended = self._reactor.suspended
        suspended.discard(self)
        try:
            awaited: Completion[Any] = self._coroutine.send(None)
        except StopIteration as stop:
            self.set(stop.value)
        except Exception as error:  # noqa: BLE001 - belongs to whoever awaits the task
            self.fail(error)
        except BaseException as error:
            # A KeyboardInterrupt is the thread's that runs the task, which need not be the one
            # that waits for it.
            self._reactor.interrupted = error
            self.fail(Interrupted(error))
            raise
        else:
            suspended.add(self)
            awaited.on_done(self._wake)

    def abandon(self) -> None:
        """Close the coroutine where it waits; what it cleans up, it cleans up now."""
        self._coroutine.close()

    def _wake(self, _: Completion[Any]) -> None:
        self._reactor.ready.append(self)


class TurnQueue(Protocol):
    """What a reactor needs of an I/O queue."""

    def path(self) -> Any:
        """A new path (``storage.host``), for requests that need no reactor; None without."""

    @property
    def busy(self) -> bool:
        """True while requests are pending or in flight."""

    def submit(self) -> None:
        """Submit what is pending; collect nothing. Never blocks.

        Called while another thread waits inside ``turn``: that one collects.
        """

    def turn(self, wait: bool) -> list[tuple[Completion[Any], int]]:
        """Submit what is pending; collect what is done, at least one if ``wait``.

        Blocks at most until a signal, or until a lone request is over. Called by one thread at a
        time.
        """

    def deliver(self, finished: list[tuple[Completion[Any], int]]) -> None:
        """Give the results collected by ``turn`` to their completions."""


class Reactor:
    """Runs tasks over one queue, for any number of threads.

    ``lock`` guards everything above the queue: tasks, engine state, metadata. It is
    the first lock in the order and is not held while a thread waits in the kernel.
    Of several threads that wait for their tasks one (the leader) waits in the kernel for
    all; the others submit, and wait for it to hand over. While there is a leader nobody else
    collects: a leader whose last completion another thread took away would sleep for ever.
    """

    def __init__(self, queue: TurnQueue) -> None:
        self.queue = queue
        self.ready: deque[Task[Any]] = deque()
        self.suspended: set[Task[Any]] = set()
        # What broke in (KeyboardInterrupt) while requests were being handled. A result may have
        # been lost on its way, so nothing may be waited for any more.
        self.interrupted: BaseException | None = None
        self.lock = threading.RLock()
        self._watches: list[tuple[Callable[[], bool], Completion[None]]] = []
        self._sleepers: list[threading.Lock] = []
        self._has_leader = False
        self._followers = 0
        self._quiescing = 0

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> Task[T]:
        """Start a coroutine; it runs at once up to its first wait. Lock held."""
        task = Task(self, coroutine)
        task.step()
        return task

    def watch(self, is_so: Callable[[], bool]) -> Completion[None]:
        """A completion for something that comes true when requests which are not this reactor's own
        complete: looked at after each turn. Lock held."""
        completion: Completion[None] = Completion()
        self._watches.append((is_so, completion))
        self._look()
        return completion

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end from this thread and return its result.

        After a KeyboardInterrupt the reactor refuses every later call: what was in flight
        completes or not, its buffers stay referenced, and the caller opens anew.
        """
        with self.lock:
            if self.interrupted is not None:
                coroutine.close()
                self.check()
            return self.wait(self.spawn(coroutine))

    def perform(self, begin: Callable[[], Completion[T]]) -> T:
        """Begin a request under the lock, as ``run`` does a coroutine, and wait for it."""
        with self.lock:
            self.check()
            try:
                completion = begin()
            except Exception:
                raise
            except BaseException as error:
                # It struck between two steps of the bookkeeping: who knows which.
                self.interrupted = error
                raise
            return self.wait(completion)

    def wait(self, completion: Completion[T]) -> T:
        """Turn the queue until ``completion`` is done; return its result."""
        self.drive(completion)
        return completion.result()

    def drive(self, completion: Completion[Any]) -> None:
        """Turn the queue until ``completion`` is done, whatever it ends with."""
        with self.lock:
            try:
                self._drain()
                if not completion.done:
                    self.check()
                    self._wait(completion)
            except Exception:
                raise
            except BaseException as error:
                self.interrupted = error
                raise

    def check(self) -> None:
        """Raise Interrupted if a KeyboardInterrupt broke in before."""
        if self.interrupted is not None:
            raise Interrupted(self.interrupted)

    def poll(self) -> None:
        """Submit, collect without waiting, run what became ready. For event loops."""
        with self.lock:
            try:
                self._drain()
                self._turn_without_waiting()
                while self.ready:
                    self._drain()
                    self._turn_without_waiting()
            except Exception:
                raise
            except BaseException as error:
                self.interrupted = error
                raise

    def quiesce(self) -> None:
        """Wait until no other thread waits for a task: before the queue is closed.

        Where the reactor was interrupted they leave with Interrupted, the leader when one of its
        requests completes; otherwise their tasks must come to an end by themselves.
        """
        with self.lock:
            self._quiescing += 1
            try:
                while self._has_leader or self._followers:
                    self._wake_all()
                    self._sleep(_QUIESCE_SECONDS)
            finally:
                self._quiescing -= 1

    def abandon_tasks(self) -> None:
        """Close the coroutines that an interrupt left waiting for ever, while what they would clean
        up is still open: a garbage collection would do it at any later time."""
        with self.lock:
            while self.suspended:
                self.suspended.pop().abandon()
            self.ready.clear()

    def _wait(self, completion: Completion[Any]) -> None:
        while not completion.done:
            self.check()
            if self._has_leader:
                self._follow(completion)
                continue
            self._has_leader = True
            try:
                self._lead(completion)
            finally:
                self._has_leader = False
                if self._followers or self._quiescing:
                    self._wake_all()

    def _follow(self, completion: Completion[Any]) -> None:
        self.queue.submit()
        self._drain()  # what could not be submitted has failed already
        if completion.done:
            return
        self._followers += 1
        try:
            self._sleep(_FOLLOW_SECONDS)
        finally:
            self._followers -= 1
            if self._quiescing:
                self._wake_all()

    def _lead(self, completion: Completion[Any]) -> None:
        while not completion.done:
            self.check()
            if self._watches and not self.ready:
                self._turn_watching()
                continue
            if not self.ready and not self.queue.busy:
                raise RuntimeError("deadlock: a task waits for something nobody will deliver")
            self._turn(wait=not self.ready)
            self._drain()
            if self._followers:
                self._wake_all()

    def _turn_watching(self) -> None:
        """What is watched for may come true without a word from the queue: in the middle of another
        thread's transfer, or because another thread has collected it. So no sleep in the kernel."""
        self._turn(wait=False)
        if not self.ready:
            self._without_lock(_pause)
            self._look()
        self._drain()
        if self._followers:
            self._wake_all()

    def _turn_without_waiting(self) -> None:
        if self._has_leader:
            self.queue.submit()
        else:
            self._turn(wait=False)

    def _turn(self, wait: bool) -> None:
        finished = self._turn_unlocked() if wait else self.queue.turn(False)
        if finished:
            self.queue.deliver(finished)
        if self._watches:
            self._look()

    def _look(self) -> None:
        watches, self._watches = self._watches, []
        for watch in watches:
            is_so, completion = watch
            if is_so():
                completion.set(None)
            else:
                self._watches.append(watch)

    def _turn_unlocked(self) -> list[tuple[Completion[Any], int]]:
        return self._without_lock(lambda: self.queue.turn(True))

    def _sleep(self, most_seconds: float) -> None:
        """Wait, without the lock, for the next ``_wake_all`` or so long. Not a Condition: a
        KeyboardInterrupt can strike in one between giving up the lock and knowing how deep it was
        held."""
        waiter = threading.Lock()
        waiter.acquire()
        self._sleepers.append(waiter)
        try:
            self._without_lock(lambda: waiter.acquire(timeout=most_seconds))
        finally:
            self._sleepers.remove(waiter)

    def _wake_all(self) -> None:
        # Each sleeper strikes itself off: a KeyboardInterrupt in the middle of this leaves those
        # behind it where the next call finds them.
        for waiter in self._sleepers:
            if waiter.locked():
                waiter.release()

    def _without_lock(self, wait: Callable[[], T]) -> T:
        """Call ``wait`` with the lock given up entirely, whatever the depth."""
        saved: list[Any] = []
        release = self.lock._release_save  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            # One call in C: no KeyboardInterrupt gets between giving the lock up and knowing how
            # deep it was held.
            saved.extend(starmap(release, _ONE_CALL))
            return wait()
        finally:
            if saved:
                self.lock._acquire_restore(saved[0])  # type: ignore[attr-defined]  # noqa: SLF001

    def _drain(self) -> None:
        ready = self.ready
        while ready:
            ready.popleft().step()
