"""Connections to other hosts: which are watched, and what happens when one is silent or ends."""

import socket
import subprocess
import sys
import threading

import pytest

from rrhf_fast.stages import links
from rrhf_fast.stages.links import watched_links

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts are watched on Linux only")
OTHER = "127.0.0.2"  # another host, as far as addresses go
SERVER = f"""
import socket, sys
server = socket.create_server(("{OTHER}", 0))
print(server.getsockname()[1], flush=True)
kept = server.accept()
sys.stdin.read(1)
"""


@pytest.fixture
def peer():
    """The port of a process on the other host, which accepts a connection and ends when told."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        process.port = int(process.stdout.readline())
        yield process
        process.kill()


def is_probed(connection):
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_connections_to_hosts_of_ranks_are_watched(peer, monkeypatch):
    lost, found = threading.Event(), []

    def give_up(command, config, host):
        found.append((command, config, host))
        lost.set()

    monkeypatch.setattr(links, "_give_up", give_up)
    seen = []

    def gather(own):
        seen.append(own)
        return [own, {OTHER, "10.1.2.3"}]

    with socket.create_connection((OTHER, peer.port), 5) as connection:
        with watched_links("train", "options", gather):
            assert is_probed(connection) and "127.0.0.1" in seen[0]
            assert not lost.wait(1.5)
        # A probe goes out after 5 seconds, so for some of them nothing comes.
        monkeypatch.setattr(links, "SILENCE", 3)
        with watched_links("train", "options", gather):
            assert lost.wait(30)
        assert found[0] == ("train", "options", OTHER)


def test_other_connections_are_left_alone(peer):
    with socket.create_connection((OTHER, peer.port), 5) as connection:
        for others in ([], [{"10.1.2.3"}], [{"127.0.0.1"}]):
            with watched_links("train", None, lambda own, others=others: [own, *others]):
                assert not is_probed(connection)
                assert "links" not in [thread.name for thread in threading.enumerate()]


def test_a_connection_that_ended_is_not_silent(peer, monkeypatch):
    monkeypatch.setattr(links, "SILENCE", 3)
    lost = []
    monkeypatch.setattr(links, "_give_up", lambda *found: lost.append(found))
    with socket.create_connection((OTHER, peer.port), 5) as connection:
        peer.communicate("x", timeout=30)
        assert connection.recv(1) == b""
        with watched_links("train", None, lambda own: [own, {OTHER}]):
            threading.Event().wait(5)
    assert not lost


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("[pair.cc:547] Connection closed by peer [10.0.0.2]:39094", "closed by peer [10.0.0.2]:"),
        ("[x] Connection reset by peer. Good luck", "another rank has ended (Connection reset by"),
        ("writev: Broken pipe", "another rank has ended (Broken pipe)"),
    ],
)
def test_a_rank_that_ended_is_one_line(message, said, monkeypatch):
    monkeypatch.setattr(links.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(links.signal, "signal", lambda *_: None)
    alone = ("train", None, lambda own: [own])
    with pytest.raises(links.RankLost, match="rank has") as found, watched_links(*alone):
        raise RuntimeError(message)
    assert said in str(found.value) and "luck" not in str(found.value)
    with pytest.raises(RuntimeError, match="other"), watched_links(*alone):
        raise RuntimeError("other")
