"""Servers of models that a run starts when it needs them, and stops."""

import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from rrhf_fast.data.checks import one_line
from rrhf_fast.stages.endpoint import EndpointDown
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.ranks import Ranks

_HOST = "127.0.0.1"
# The largest answer to anything asked here.
_LIMIT = 2**20
# Variables by which launchers tell a process that it is a rank.
_OF_RANKS = re.compile("RANK$|WORLD_SIZE$|(LOCAL|GROUP|ROLE)_|MASTER_(ADDR|PORT)$|TORCHELASTIC_")


@dataclass
class ServeConfig:
    """A server that is started here"""

    serve_command: str | None = None
    """Command that starts an OpenAI-compatible server on this machine, with {model} and {port} for
    what to serve and where, such as 'vllm serve {model} --port {port} --generation-config vllm'.
    It runs while there is something to ask."""
    serve_timeout: Annotated[float, Gt(0), Le(86400)] = 1800.0
    """Seconds in which that server has to be ready."""

    def check_serving(self) -> None:
        """Raise ValueError, with the option's name, for a command that cannot work."""
        if self.serve_command is None:
            return
        try:
            words = shlex.split(self.serve_command)
        except ValueError as error:
            raise ValueError(f"serve_command: {error}") from error
        for part in ("{model}", "{port}"):
            if not any(part in word for word in words):
                raise ValueError(f"serve_command: expected {part} in it, found none")


class Servers:
    """Starts one server at a time; in a `with` block, which stops it however it ends.

    Args:
        log: file for what the server prints; removed unless the block fails.
        ranks: those that ask the server, which the first one starts; default this process alone.
    """

    def __init__(self, config: ServeConfig, log: str, ranks: Ranks | None = None):
        self._config, self._log, self._ranks = config, Path(log), ranks or Ranks()
        self._process: subprocess.Popen | None = None
        self._running: tuple[str, str, str] | None = None

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.stop()
        if kind is None and self._ranks.is_first:
            self._log.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server, if there is one."""
        process, self._process, self._running = self._process, None, None
        if process is None:
            return
        process.stdin.close()  # see guard.py
        process.wait()

    def serve(self, model: str, base: str | None = None) -> tuple[str, str]:
        """Start a server of a model, a folder or a name on the hub, unless that one is running;
        returns its address and its name for the model. If `model` is a folder of LoRA adapters,
        they are loaded into a server of their `base` model. All ranks must call.

        Raises:
            ValueError: the server ended before it was ready, or cannot load the adapters; or ranks
                are on several hosts.
            EndpointDown: it was not ready in time.
        """
        if self._running is None or self._running[0] != model:
            self.stop()
            if len(set(self._ranks.gather(socket.gethostname()))) > 1:
                problem = "ranks on several hosts need a server that all reach"
                raise ValueError(f"serve_command: {problem} (start one, and name it by base_url)")
            self._running = self._ranks.once(lambda: self._begin(model, base))
        return self._running[1:]

    def _begin(self, model: str, base: str | None) -> tuple[str, str, str]:
        port = self._start(base or model)
        self._wait(port)
        name = _load_adapters(port, model) if base else _name_of(port, model)
        return model, f"http://{_HOST}:{port}/v1", name

    def _start(self, model: str) -> int:
        """Start the command; returns its port."""
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            port = probe.getsockname()[1]
        values = {"{model}": model, "{port}": str(port)}
        command = []
        for word in shlex.split(self._config.serve_command):
            for name, value in values.items():
                word = word.replace(name, value)
            command.append(word)
        if shutil.which(command[0]) is None:
            raise ValueError(f"serve_command: {one_line(command[0], 100)}: no such command")
        say(f"starting {one_line(shlex.join(command))}")
        # A server of a rank is no rank itself.
        env = {k: v for k, v in os.environ.items() if not _OF_RANKS.match(k)}
        guard = [sys.executable, str(Path(__file__).with_name("guard.py"))]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
                start_new_session=True,  # Ctrl-C of a terminal is this process's to handle
            )
        return port

    def _wait(self, port: int) -> None:
        """Until the server answers."""
        end = time.monotonic() + self._config.serve_timeout
        while not any(_get(port, path)[0] == 200 for path in ("/health", "/v1/models")):
            code = self._process.poll()
            if code is not None:
                problem = f"the server ended with exit code {code} before it was ready"
                raise ValueError(f"serve_command: {problem} ({self._last_words()})")
            if time.monotonic() > end:
                problem = f"the server was not ready in {self._config.serve_timeout:g} s"
                raise EndpointDown(f"serve_command: {problem} ({self._last_words()})")
            time.sleep(0.2)

    def _last_words(self) -> str:
        """What the server printed last, or the last error there is."""
        with self._log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
            lines = file.read().decode(errors="replace").splitlines()
        lines = [line for line in lines if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        last = one_line((errors or lines or ["nothing"])[-1], 300)
        return f"it says: {last}; all of it is in {self._log}"


def _load_adapters(port: int, folder: str) -> str:
    """Load adapters into a server; returns their name there."""
    name = Path(folder).resolve().name
    body = {"lora_name": name, "lora_path": str(Path(folder).resolve())}
    status, answer = _request(port, "POST", "/v1/load_lora_adapter", json.dumps(body))
    if status != 200:
        says = one_line(answer.decode(errors="replace"), 300)
        cure = "vLLM needs --enable-lora, and --max-lora-rank for ranks above 16"
        problem = f"{folder}: the server does not load these adapters: {status} {says} ({cure})"
        raise ValueError(f"serve_command: {problem}")
    return name


def _name_of(port: int, model: str) -> str:
    """The server's name for its only model."""
    try:
        names = [entry["id"] for entry in json.loads(_get(port, "/v1/models")[1])["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    names = [name for name in names if isinstance(name, str)]
    return model if model in names or not names else names[0]


def _get(port: int, path: str) -> tuple[int, bytes]:
    return _request(port, "GET", path)


def _request(port: int, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
    """Status and body of an answer; status 0 if there is none. Without proxies."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=600)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read(_LIMIT)
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
