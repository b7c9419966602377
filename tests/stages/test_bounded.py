"""Code that comes as text ends, however many such tasks share a timer."""

import signal
import threading

import pytest

from rrhf_fast.stages.bounded import Limits, TooMuch

resource = pytest.importorskip("resource")


def spin():
    while True:
        pass


def settings():
    return (
        signal.getsignal(signal.SIGVTALRM),
        # In seconds; the clock ticks in steps of 4 ms, and may begin with one.
        [round(seconds, 1) for seconds in signal.getitimer(signal.ITIMER_VIRTUAL)],
        resource.getrlimit(resource.RLIMIT_AS),
    )


@pytest.mark.parametrize("before", [0, 3, 100])
def test_each_task_of_a_block_has_limits_of_its_own(before):
    limits, outside = Limits(seconds=1, size=2**30), settings()
    with limits.many():
        for _ in range(before):
            with limits:
                assert resource.getrlimit(resource.RLIMIT_AS) != outside[2]
            assert resource.getrlimit(resource.RLIMIT_AS) == outside[2]
        with pytest.raises(TooMuch, match="^takes more than 1 seconds$"), limits:
            spin()
        with pytest.raises(TooMuch, match="^takes more than 1 GiB of memory$"), limits:
            bytes(2**32)
        assert len(bytes(2**31)) == 2**31  # between tasks nothing is limited
        with pytest.raises(KeyError), limits:
            raise KeyError
        with limits:
            pass
    assert settings() == outside


def test_a_task_on_its_own():
    limits, outside = Limits(seconds=1), settings()
    with pytest.raises(TooMuch), limits:
        spin()
    assert settings() == outside
    with limits:
        pass
    assert settings() == outside


def test_the_time_of_a_block_is_that_of_no_task():
    limits = Limits(seconds=2)
    with limits.many():
        for _ in range(9):
            limits._tick(signal.SIGVTALRM, None)  # as after nine seconds
            with limits:
                limits._tick(signal.SIGVTALRM, None)
                limits._tick(signal.SIGVTALRM, None)


def test_memory_that_tasks_left_behind_is_no_task_s():
    limits, kept = Limits(seconds=20, size=2**28), []
    with limits.many():
        for _ in range(256):
            with limits:
                kept.append(bytearray(2**22))


def test_other_threads_and_systems_go_without(monkeypatch):
    limits, outside, seen = Limits(seconds=1, size=2**30), settings(), []

    def task():
        with limits.many(), limits:
            seen.append(settings())

    def in_a_thread():
        thread = threading.Thread(target=task)
        thread.start()
        thread.join()

    in_a_thread()
    with limits.many():
        within = settings()
        in_a_thread()
    monkeypatch.delattr(signal, "setitimer")
    monkeypatch.delattr(signal, "SIGVTALRM")
    with limits.many(), limits:
        pass
    monkeypatch.undo()
    assert seen == [outside, within] and settings() == outside
