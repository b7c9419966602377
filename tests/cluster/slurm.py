"""A Slurm cluster of two nodes on this machine: its own munge, controller and node daemons."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return f"{absent[0]} is not installed" if absent else None


class Cluster:
    """Daemons of a cluster in `folder`; use it in a `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names mean nothing to the network
        }

    def __enter__(self) -> "Cluster":
        options = {"host": socket.gethostname().partition(".")[0], "folder": self.folder}
        text = CONFIG.format(ports=_free_ports(3), **options)
        (self.folder / "slurm.conf").write_text(text)
        for name in ("state", "n1", "n2"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munged refuses folders that others may write to
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        files |= {"seed-file": "munged.seed", "key-file": "munge.key"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        # Folders above may belong to others.
        self.run("munged", "--force", *options)
        self.run("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        return self

    def __exit__(self, *_) -> None:
        for name in ("n1", "n2", "slurmctld", "munged"):
            self.kill(name)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.run("slurmd", "-N", name)

    def kill(self, daemon: str) -> None:
        """Kill a daemon without warning."""
        file = self.folder / f"{daemon}.pid"
        if file.exists():
            subprocess.run(["kill", "-9", file.read_text().strip()], stderr=subprocess.DEVNULL)

    def run(self, *command: str) -> str:
        """Run a command of Slurm; returns its output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def submit(self, script: Path, *options: str, cwd: Path) -> str:
        """Submit a batch script; returns the job's number."""
        output = self.run("sbatch", "-D", str(cwd), "-o", str(cwd / "job.log"), *options, script)
        return re.search(r"\d+", output).group()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, condition, seconds: float = 240) -> None:
        """Wait until the condition holds."""
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, self.run("squeue")
            time.sleep(0.2)

    def restart(self, number: str, lost: str | None = None) -> None:
        """Wait until a job is queued again; shorten the pause before it starts, in which its old
        credential ends, and extend its time limit. `lost`: a node to start again first."""
        self.wait(lambda: self.job(number)["Restarts"] == "1")
        if lost is not None:
            self.start_node(lost)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now+5", "TimeLimit=20")

    def state(self, number: str) -> str:
        """The state of a job once it has ended."""
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in ended)
        return self.job(number)["JobState"]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
