# SPDX-License-Identifier: MIT
# ruff: noqa: BLE001 - a thread keeps whatever ended it
"""The reactor over a queue that the test controls, from one thread and from several."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from mmcow.errors import Interrupted
from mmcow.tasks import Completion, Reactor, completed


class ManualQueue:
    """A queue whose completions come when the test says so.

    ``turn(True)`` sleeps until something in flight was finished, as the kernel does: a completion
    that somebody else took away wakes nobody.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.pending: list[Completion[int]] = []
        self.in_flight: list[Completion[int]] = []
        self.finished: list[tuple[Completion[int], int]] = []
        self.waiting = 0
        self.collected_beside_a_waiter = 0
        self.break_in: BaseException | None = None

    @property
    def busy(self) -> bool:
        return bool(self.pending or self.in_flight or self.finished)

    def request(self) -> Completion[int]:
        completion: Completion[int] = Completion()
        self.pending.append(completion)
        return completion

    def finish(self, completion: Completion[int], value: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: completion in self.in_flight, 10)
            self.in_flight.remove(completion)
            self.finished.append((completion, value))
            self.changed.notify_all()

    def submit(self) -> None:
        with self.changed:
            pending, self.pending = self.pending, []
            self.in_flight += pending
            self.changed.notify_all()

    def turn(self, wait: bool) -> list[tuple[Completion[int], int]]:
        self.submit()
        with self.changed:
            if self.waiting:
                self.collected_beside_a_waiter += 1
            if wait:
                self.waiting += 1
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: bool(self.finished), 10)
                self.waiting -= 1
            finished, self.finished = self.finished, []
        if self.break_in is not None and finished:
            error, self.break_in = self.break_in, None
            raise error
        return finished

    def deliver(self, finished: list[tuple[Completion[int], int]]) -> None:
        for completion, value in finished:
            completion.set(value)

    def wait_for_sleeper(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.waiting > 0, 10)


class Waiter(threading.Thread):
    """Runs one coroutine through the reactor and keeps what came of it."""

    def __init__(self, reactor: Reactor, coroutine: object) -> None:
        super().__init__(daemon=True)
        self.reactor = reactor
        self.coroutine = coroutine
        self.value: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.reactor.run(self.coroutine)
        except BaseException as error:
            self.error = error

    def result(self) -> object:
        self.join(10)
        assert not self.is_alive(), "still waiting"
        if self.error is not None:
            raise self.error
        return self.value


@pytest.fixture
def queue() -> ManualQueue:
    return ManualQueue()


@pytest.fixture
def reactor(queue: ManualQueue) -> Reactor:
    return Reactor(queue)


def test_run_returns_what_the_coroutine_returns(reactor):
    async def work():
        return 7

    assert reactor.run(work()) == 7


def test_run_raises_what_the_coroutine_raises(reactor):
    async def work():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        reactor.run(work())


def test_awaiting_a_done_completion_goes_on_at_once(reactor):
    async def work():
        return await completed(5)

    assert reactor.spawn(work()).result() == 5


def test_completion_is_awaitable_by_many(reactor):
    completion: Completion[int] = Completion()

    async def work():
        return await completion

    tasks = [reactor.spawn(work()) for _ in range(3)]
    completion.set(4)
    assert [reactor.wait(task) for task in tasks] == [4, 4, 4]


def test_completion_drops_what_it_kept_when_done():
    completion: Completion[int] = Completion(keep=bytearray(3))
    completion.set(0)
    assert completion.keep is None


def test_callbacks_added_after_the_end_are_called_at_once():
    completion: Completion[int] = Completion()
    seen = []
    completion.on_done(seen.append)
    completion.on_done(seen.append)
    completion.set(1)
    completion.on_done(seen.append)
    assert seen == [completion] * 3


def test_error_reaches_every_waiter(reactor):
    completion: Completion[int] = Completion()

    async def work():
        return await completion

    tasks = [reactor.spawn(work()) for _ in range(2)]
    completion.fail(OSError(5, "x"))
    for task in tasks:
        with pytest.raises(OSError, match="x"):
            reactor.wait(task)


def test_waiting_for_what_nobody_delivers_is_an_error_and_no_hang(reactor):
    async def work():
        await Completion()

    with pytest.raises(RuntimeError, match="deadlock"):
        reactor.run(work())


def test_requests_of_one_pass_are_submitted_together(queue, reactor):
    requests = []

    async def work():
        requests.append(queue.request())
        return await requests[-1]

    tasks = [reactor.spawn(work()) for _ in range(5)]
    assert not queue.in_flight
    reactor.poll()
    assert queue.in_flight == requests
    for n, request in enumerate(requests):
        queue.finish(request, n)
    reactor.poll()
    assert [task.result() for task in tasks] == [0, 1, 2, 3, 4]


def test_poll_submits_what_its_own_completions_led_to(queue, reactor):
    """This test lets a task ask for a second request inside ``poll``: it must not stay pending."""

    async def work():
        await queue.request()
        await queue.request()

    task = reactor.spawn(work())
    reactor.poll()
    queue.finish(queue.in_flight[0], 0)
    reactor.poll()
    assert len(queue.in_flight) == 1
    queue.finish(queue.in_flight[0], 0)
    reactor.poll()
    assert task.done


def test_second_thread_does_not_collect_while_the_first_waits(queue, reactor):
    """This test lets a leader sleep for its one request while another thread comes along. If that
    one collected, the leader would sleep for ever (it did, with both queue back ends)."""
    first = queue.request()
    second = queue.request()

    async def wait_for(completion):
        return await completion

    leader = Waiter(reactor, wait_for(first))
    queue.wait_for_sleeper()
    follower = Waiter(reactor, wait_for(second))
    time.sleep(0.02)
    queue.finish(second, 2)
    assert follower.result() == 2
    queue.finish(first, 1)
    assert leader.result() == 1
    assert queue.collected_beside_a_waiter == 0


def test_second_thread_submits_while_the_first_waits(queue, reactor):
    async def ask():
        return await queue.request()

    leader = Waiter(reactor, ask())
    queue.wait_for_sleeper()
    first = queue.in_flight[0]
    follower = Waiter(reactor, ask())
    with queue.changed:
        assert queue.changed.wait_for(lambda: len(queue.in_flight) == 2, 10)
    second = next(r for r in queue.in_flight if r is not first)
    queue.finish(second, 2)
    assert follower.result() == 2
    queue.finish(first, 1)
    assert leader.result() == 1


def test_leader_that_is_done_hands_over(queue, reactor):
    async def ask():
        return await queue.request()

    leader = Waiter(reactor, ask())
    queue.wait_for_sleeper()
    first = queue.in_flight[0]
    followers = [Waiter(reactor, ask()) for _ in range(3)]
    with queue.changed:
        assert queue.changed.wait_for(lambda: len(queue.in_flight) == 4, 10)
    others = [r for r in queue.in_flight if r is not first]
    queue.finish(first, 1)
    assert leader.result() == 1
    for request in others:
        queue.finish(request, 3)
    assert [follower.result() for follower in followers] == [3, 3, 3]


def test_poll_beside_a_leader_leaves_collecting_to_it(queue, reactor):
    async def ask():
        return await queue.request()

    leader = Waiter(reactor, ask())
    queue.wait_for_sleeper()
    mine = reactor.spawn(ask())
    reactor.poll()
    assert len(queue.in_flight) == 2
    first, second = queue.in_flight
    queue.finish(second, 2)
    queue.finish(first, 1)
    leader.result()
    reactor.wait(mine)
    assert queue.collected_beside_a_waiter == 0


def test_interrupt_between_collecting_and_delivering_is_sticky(queue, reactor):
    """This test loses a completion to a KeyboardInterrupt: nothing may wait for it for ever."""

    async def ask():
        return await queue.request()

    task = reactor.spawn(ask())
    reactor.poll()
    queue.break_in = KeyboardInterrupt()
    queue.finish(queue.in_flight[0], 0)
    with pytest.raises(KeyboardInterrupt):
        reactor.wait(task)
    for _ in range(2):
        with pytest.raises(Interrupted):
            reactor.wait(task)
    with pytest.raises(Interrupted):
        reactor.run(ask())


def test_interrupt_in_poll_is_sticky(queue, reactor):
    async def ask():
        return await queue.request()

    task = reactor.spawn(ask())
    reactor.poll()
    queue.break_in = KeyboardInterrupt()
    queue.finish(queue.in_flight[0], 0)
    with pytest.raises(KeyboardInterrupt):
        reactor.poll()
    with pytest.raises(Interrupted):
        reactor.wait(task)


def test_interrupted_leader_frees_its_followers(queue, reactor):
    async def ask():
        return await queue.request()

    leader, followers = lead_and_follow(queue, reactor, ask(), [ask(), ask()])
    queue.break_in = KeyboardInterrupt()
    queue.finish(queue.in_flight[0], 0)
    with pytest.raises(KeyboardInterrupt):
        leader.result()
    for follower in followers:
        with pytest.raises(Interrupted):
            follower.result()


def lead_and_follow(queue, reactor, first, others):
    """A thread that waits in the queue, and others that wait for it; each with one request."""
    leader = Waiter(reactor, first)
    queue.wait_for_sleeper()
    followers = [Waiter(reactor, other) for other in others]
    with queue.changed:
        assert queue.changed.wait_for(lambda: len(queue.in_flight) == 1 + len(others), 10)
    wait_until(lambda: len(reactor._sleepers) == len(others))
    return leader, followers


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class BreakInto:
    """A trace function: raises KeyboardInterrupt at the n-th line that a method of the reactor
    runs, as a signal would."""

    def __init__(self, name: str, line: int) -> None:
        self.name, self.left, self.struck = name, line, False

    def __call__(self, frame, event, _):
        if frame.f_code.co_name != self.name:
            return self if not self.struck else None
        if event == "line" and not self.struck:
            self.left -= 1
            if self.left == 0:
                self.struck = True
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("line", range(1, 11))
def test_interrupt_while_followers_are_woken_loses_none(queue, reactor, line):
    """Ten lines: three sleepers, three lines each, and the end of the loop."""

    async def ask():
        return await queue.request()

    break_in = BreakInto("_wake_all", line)

    async def ask_traced():
        value = await queue.request()
        sys.settrace(break_in)
        return value

    leader, followers = lead_and_follow(queue, reactor, ask_traced(), [ask() for _ in range(3)])
    queue.finish(queue.in_flight[0], 0)
    with pytest.raises(KeyboardInterrupt):
        leader.result()
    assert break_in.struck
    for request in list(queue.in_flight):
        queue.finish(request, 0)
    closing = threading.Thread(target=reactor.quiesce, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive(), "the one that closes waits for ever"
    for follower in followers:
        with pytest.raises(Interrupted):
            follower.result()


def test_leader_interrupted_twice_leaves_no_follower_asleep(queue, reactor):
    """The second interrupt strikes where the first lets the followers go."""

    async def ask():
        return await queue.request()

    async def ask_traced():
        sys.settrace(BreakInto("_wake_all", 1))
        return await queue.request()

    leader, followers = lead_and_follow(queue, reactor, ask_traced(), [ask(), ask()])
    queue.break_in = KeyboardInterrupt()
    queue.finish(queue.in_flight[0], 0)
    with pytest.raises(KeyboardInterrupt):
        leader.result()
    for follower in followers:
        with pytest.raises(Interrupted):
            follower.result()


def test_leader_leaves_once_another_thread_was_interrupted(queue, reactor):
    async def ask():
        return await queue.request()

    leader = Waiter(reactor, ask())
    queue.wait_for_sleeper()
    other = reactor.spawn(ask())
    reactor.poll()
    with reactor.lock:
        reactor.interrupted = KeyboardInterrupt()
    queue.finish(next(r for r in queue.in_flight if r is not None and not r.done), 0)
    # Whichever of the two requests that was: the leader must not go back to sleep.
    try:
        leader.result()
    except Interrupted:
        pass
    assert not queue.waiting
    assert other is not None


def test_quiesce_waits_for_the_leader(queue, reactor):
    """This test closes while another thread sleeps in the queue, which must not be freed then."""

    async def ask():
        return await queue.request()

    leader = Waiter(reactor, ask())
    queue.wait_for_sleeper()
    quiet = threading.Thread(target=reactor.quiesce, daemon=True)
    quiet.start()
    time.sleep(0.02)
    assert quiet.is_alive()
    queue.finish(queue.in_flight[0], 1)
    quiet.join(10)
    assert not quiet.is_alive()
    assert leader.result() == 1


def test_quiesce_with_nobody_inside_returns_at_once(reactor):
    reactor.quiesce()


def test_lock_is_left_as_it_was_found_after_a_wait_at_any_depth(queue, reactor):
    async def ask():
        return await queue.request()

    def finish():
        queue.wait_for_sleeper()
        queue.finish(queue.in_flight[0], 1)

    helper = threading.Thread(target=finish)
    with reactor.lock, reactor.lock, reactor.lock:
        helper.start()
        assert reactor.run(ask()) == 1
    helper.join()
    taken = []
    other = threading.Thread(target=lambda: taken.append(reactor.lock.acquire(timeout=5)))
    other.start()
    other.join()
    assert taken == [True]


def test_keyboard_interrupt_of_a_coroutine_reaches_its_waiter(reactor):
    async def work():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reactor.run(work())
    with pytest.raises(Interrupted):
        reactor.run(work())


def test_interrupt_in_another_threads_coroutine_is_the_runners(queue, reactor):
    """This test breaks into a leader while it runs a follower's coroutine: the KeyboardInterrupt
    is the leader's (it may be the main thread), the follower hears that it was interrupted."""

    async def ask():
        return await queue.request()

    async def struck():
        await queue.request()
        raise KeyboardInterrupt

    leader = Waiter(reactor, ask())
    queue.wait_for_sleeper()
    first = queue.in_flight[0]
    follower = Waiter(reactor, struck())
    with queue.changed:
        assert queue.changed.wait_for(lambda: len(queue.in_flight) == 2, 10)
    queue.finish(next(r for r in queue.in_flight if r is not first), 0)
    with pytest.raises(KeyboardInterrupt):
        leader.result()
    with pytest.raises(Interrupted):
        follower.result()
