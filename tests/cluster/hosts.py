"""Two hosts on this machine: network namespaces that a third one, a switch, connects."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("ip", "unshare", "mount")


def missing() -> str | None:
    """Why no hosts can be made here."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in NEEDED if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{absent[0]} is not installed (iproute2, util-linux)"
    name = f"rrhf-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], env=_env(), capture_output=True)
    if made.returncode:
        return f"no network namespaces ({made.stderr.decode().strip()})"
    _run("ip", "netns", "del", name)
    return None


class TwoHosts:
    """Hosts 1 and 2, node1 and node2 by name; use it in a `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "TwoHosts":
        names = "".join(f"{self.address(i)} node{i}\n" for i in (1, 2))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        for i in (0, 1, 2):
            _run("ip", "netns", "add", _space(i))
        self._ip(0, "link", "add", "switch", "type", "bridge")
        self._ip(0, "link", "set", "switch", "up")
        for i in (1, 2):
            peer = ("peer", "name", f"port{i}", "netns", _space(0))
            self._ip(i, "link", "add", "eth0", "type", "veth", *peer)
            self._ip(i, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            self._ip(i, "link", "set", "eth0", "up")
            self._ip(i, "link", "set", "lo", "up")
            self._ip(0, "link", "set", f"port{i}", "master", "switch")
            self.mend(i)
        return self

    def __exit__(self, *_) -> None:
        self.power_off(*self.processes)
        for i in (0, 1, 2):
            _run("ip", "netns", "del", _space(i))

    @staticmethod
    def address(host: int) -> str:
        """A host's address."""
        return f"10.77.0.{host}"

    def cut(self, host: int) -> None:
        """Let nothing through between a host and the switch. Both sides still have their link."""
        self._ip(0, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Connect a host to the switch."""
        self._ip(0, "link", "set", f"port{host}", "up")

    def start(self, host: int, log: Path, *command: str) -> subprocess.Popen:
        """Start a command on a host; what it prints goes to the end of `log`."""
        setup = f"mount --bind {self.folder}/hosts /etc/hosts && hostname node{host}"
        inside = ("unshare", "--uts", "--mount", "sh", "-c", f'{setup} && exec "$@"', "sh")
        env = _env() | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", _space(host), *inside, sys.executable, *command],
                env=env, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def power_off(self, *processes: subprocess.Popen) -> None:
        """Kill these and all that they started."""
        for process in processes:
            for pid in [*_children(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()

    def _ip(self, host: int, *command: str) -> None:
        _run("ip", "-n", _space(host), *command)


def wait(condition, seconds: float, what: str) -> None:
    """Wait until the condition holds."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.2)


def _space(host: int) -> str:
    return f"rrhf-{os.getpid()}-{host}"


def _children(pid: int) -> list[int]:
    """Processes below one, however they have grouped themselves."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [*_children(child), child]
    return found


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _env() -> dict[str, str]:
    return os.environ | {"PATH": _path()}


def _run(*command: str) -> None:
    subprocess.run(command, env=_env(), check=True, capture_output=True, timeout=60)
