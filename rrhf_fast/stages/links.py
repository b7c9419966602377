"""Notice that another host is gone.

A host that loses its power or its network sends nothing, not even the end of its connections. Ranks
that wait for it would wait until the time limit of their collective, which is 30 minutes over gloo.
Here the kernel is told to probe the connections that ranks have to other hosts, and a thread looks
at when the last answer came. Kernels answer probes, so a rank that is busy, or stopped by a
debugger, is not taken for dead.
"""

import os
import re
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rrhf_fast.stages.ending import PREEMPTED, fail, how_to_resume
from rrhf_fast.stages.launcher import launched

# Seconds between probes, and without any answer until a host is taken for lost.
_PROBE, SILENCE = 5, 30
_ESTABLISHED = 1  # tcpi_state of Linux
# What gloo says about a rank that has ended.
_ENDED = re.compile(r"Connection (closed|reset) by peer( \[[^]]*\]:\d+)?|Broken pipe")


class RankLost(RuntimeError):
    """Another rank ended while this one waited for it."""


@contextmanager
def watched_links(
    command: str, config: object, gather: Callable[[set[str]], list[set[str]]]
) -> Iterator[None]:
    """Inside, watch the TCP connections to hosts of other ranks that this process has now. Once one
    of these has been silent for 30 seconds, end the process with a line on stderr and exit code 75:
    the main thread may be waiting for that host and not return. Hosts are watched on Linux only.

    Args:
        command: for messages, with `config`, its options.
        gather: returns the values of all ranks, as `Ranks.gather`.

    Raises:
        RankLost: instead of a RuntimeError of gloo that says so.
    """
    links, done = _links(gather), threading.Event()

    def watch() -> None:
        while not done.wait(1):
            for link, host in links.items():
                if _silence(link) >= SILENCE:
                    _give_up(command, config, host)

    thread = threading.Thread(target=watch, name="links", daemon=True)
    if links:
        thread.start()
    try:
        yield
    except RuntimeError as error:
        if ended := _ENDED.search(str(error)):
            # Now, so that the others notice at once, and not one neighbour after the other.
            for link, _ in _connections():
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
                link.close()
            # The rank that ended says why; where its launcher ends this one, that is all.
            with suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20 if launched().local_rank else 10)
            raise RankLost(f"another rank has ended ({ended[0]})") from error
        raise
    finally:
        done.set()
        if links:
            thread.join()  # for ever if it is ending the process
        for link in links:
            link.close()


def _give_up(command: str, config: object, host: str) -> None:
    """End the process; of each host one rank says why. A launcher's signal would not end it, while
    the main thread waits."""
    if launched().local_rank:
        time.sleep(10)
        os._exit(PREEMPTED)
    problem = f"nothing has come from host {host} for {SILENCE} seconds"
    os._exit(fail(command, f"{problem}; {how_to_resume(config)}", PREEMPTED))


def _links(gather: Callable[[set[str]], list[set[str]]]) -> dict[socket.socket, str]:
    """Copies of this process's connections to hosts of other ranks, each with the address."""
    found = dict(_connections())
    own = {_address(link.getsockname()) for link in found}
    others = set().union(*gather(own)) - own
    links = {link: host for link, host in found.items() if host in others}
    for link in found.keys() - links.keys():
        link.close()
    for link in links:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE)
        # The thread is to notice first: what the main thread would raise is less clear.
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2 * SILENCE // _PROBE)
    return links


def _connections() -> Iterator[tuple[socket.socket, str]]:
    """Copies of this process's TCP connections, each with the other side's address."""
    if not (hasattr(socket, "TCP_INFO") and os.path.isdir("/proc/self/fd")):
        return
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(int(name)).st_mode)
        except OSError:  # that of the folder, which is closed by now
            continue
        if not is_socket:
            continue
        link, host = socket.socket(fileno=os.dup(int(name))), None
        if link.family in (socket.AF_INET, socket.AF_INET6) and link.type == socket.SOCK_STREAM:
            with suppress(OSError):  # not connected
                host = _address(link.getpeername())
        if host is None:
            link.close()
        else:
            yield link, host


def _address(name: tuple) -> str:
    return name[0].removeprefix("::ffff:")


def _silence(link: socket.socket) -> float:
    """Seconds since anything came from the other host; 0 once a side has ended the connection."""
    info = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    if info[0] != _ESTABLISHED:
        return 0
    return min(struct.unpack_from("=2I", info, 52)) / 1000  # since the last data, and the last ACK
