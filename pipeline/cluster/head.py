"""Start and stop a Ray head on this machine that takes jobs, and drain a node of any cluster.

The job server listens on the loopback address. Ray's other ports listen on all addresses, which no option changes;
like the job server they accept nothing without the token.

The head is a session of its own. Its first process is remembered with its start time, so that `stop` ends it and what
it started, and never another Ray of this machine (`ray stop` ends them all).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.submit import FINAL, STOP_WAIT, STOP_WAIT_SECONDS, client, wait_for_end
from pipeline.cluster.temp_folder import short_temp_folder
from pipeline.core.files import REPOSITORY, write_json_atomic
from scldm.errors import InputError

log = logging.getLogger(__name__)
RAY = (sys.executable, "-m", "ray.scripts.scripts")
START_SECONDS = 120
TRIES = 3
# Ray gives its own processes 30 s, which no setting changes; a busy machine needs longer, less so with warm files.
SLOW = ("timed out during startup", "Timed out waiting for node info")
STARTED = "Ray runtime started"  # in its log; the job server answers before that
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Head:
    """A head that `start` started."""

    pid: int
    born: float  # start time of the process, as the system reports it: a pid is used again
    root: str
    port: int
    dashboard_port: int
    log: str

    @property
    def submit_address(self) -> str:
        """URL of the job server."""
        return f"http://{LOOPBACK}:{self.dashboard_port}"


def state_file() -> Path:
    """Return the file that remembers the head."""
    return Path.home() / ".scldm" / "cluster.json"


def start(*, root: Path | None, port: int, dashboard_port: int, temp_dir: Path | None, arguments: list[str]) -> Head:
    """Start a head and wait until it has run a job.

    Args:
        root: Where jobs run; default: the current folder if it has jobs/, else the repository.
        arguments: More options of `ray start`, for example --num-cpus=8.
    """
    if (running := find()) is not None:
        raise InputError(
            f"a Ray head is already running (process {running.pid}, {running.submit_address}); stop it with "
            "scldm cluster stop"
        )
    _check_ports({"--port": port, "--dashboard-port": dashboard_port})
    env = environment(ensure_token())
    root = (root or (Path.cwd() if Path("jobs").is_dir() else REPOSITORY)).resolve()
    command = [*RAY, "start", "--head", "--block", "--disable-usage-stats", f"--port={port}"]
    command += ["--include-dashboard=true", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"]
    folder = temp_dir or short_temp_folder()
    command += [f"--temp-dir={folder}"] if folder else []
    # Ray's own defaults are fixed ports: next to another Ray of this machine the agent would run no job, without a
    # message, and the client server, which nothing here uses and no option turns off, would end the head.
    command += [f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}", *arguments]
    for tries_left in reversed(range(TRIES)):
        head, process = _launch(command, root, env, port=port, dashboard_port=dashboard_port)
        if (problem := _wait_until_ready(head, process)) is None:
            return head
        stop(force=True)
        if not tries_left or not any(slow in problem for slow in SLOW):
            raise InputError(problem)
        log.warning("Ray did not start within the 30 s that it allows itself (a busy machine?); trying again")
    raise AssertionError("unreachable: the last try returns or raises")


def _launch(
    command: list[str], root: Path, env: dict[str, str], *, port: int, dashboard_port: int
) -> tuple[Head, subprocess.Popen[Any]]:
    """Start the process and remember it before anything else can go wrong."""
    import psutil

    path = state_file().with_name("cluster.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        process = subprocess.Popen(
            command, cwd=root, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    born = psutil.Process(process.pid).create_time()
    head = Head(process.pid, born, str(root), port=port, dashboard_port=dashboard_port, log=str(path))
    write_json_atomic(state_file(), asdict(head))
    return head, process


def environment(token: Path | None) -> dict[str, str]:
    """Return the environment of the head and, through it, of all jobs: no other cluster's address, this python."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    env.update(RAY_AUTH_MODE="token", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    env.setdefault(STOP_WAIT, str(STOP_WAIT_SECONDS))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    return env | ({"RAY_AUTH_TOKEN_PATH": str(token)} if token is not None else {})


def ensure_token() -> Path | None:
    """Return the file of the token, which is created if there is none; None if RAY_AUTH_TOKEN holds the token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(secrets.token_hex(32))
    return path


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _check_ports(ports: dict[str, int]) -> None:
    taken = []
    for option, port in ports.items():
        with socket.socket() as s:
            if s.connect_ex((LOOPBACK, port)) == 0:
                taken.append(f"{option}={port}")
    if taken:
        raise InputError(f"in use already: {', '.join(taken)}; another Ray? Give other numbers")


def _wait_until_ready(head: Head, process: subprocess.Popen[Any]) -> str | None:
    """Return None once the head has run a job, else what is wrong with it."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.5)
        if STARTED in Path(head.log).read_text(errors="replace") and _runs_a_job(head, until - time.monotonic()):
            return None
    end = "ended" if process.poll() is not None else f"runs no job after {START_SECONDS} s"
    tail = "\n".join(Path(head.log).read_text(errors="replace").splitlines()[-15:])
    return f"the head {end}; {head.log} ends with:\n{tail}"


def _runs_a_job(head: Head, seconds: float) -> bool:
    """Whether `true` succeeds as a job. The job server answers before there is an agent that runs what it takes."""
    name = f"scldm-ready-{secrets.token_hex(3)}"
    try:
        with client(head.submit_address) as jobs:
            jobs.submit_job(entrypoint="true", submission_id=name)
            status = wait_for_end(jobs, name, seconds).status.value
            jobs.delete_job(name)
    except InputError:
        return False
    return bool(status == "SUCCEEDED")


def find() -> Head | None:
    """Return the head that was started here; None if there is none or it has ended."""
    import psutil

    try:
        head = Head(**json.loads(state_file().read_text()))
        return head if abs(psutil.Process(head.pid).create_time() - head.born) < 0.01 else None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    except (TypeError, ValueError) as error:
        raise InputError(f"{state_file()} was not written by this version; delete it if no head is running") from error


def stop(*, force: bool) -> str:
    """Stop the head that `start` started, and nothing else; refuse while jobs run unless forced."""
    import psutil

    head = find()
    if head is None:
        state_file().unlink(missing_ok=True)
        return "no head runs that `scldm cluster start` started"
    if not force:
        with client(head.submit_address) as jobs:
            running = [j.submission_id for j in jobs.list_jobs() if j.status.value not in FINAL]
        if running:
            raise InputError(f"jobs run: {', '.join(running)}; scldm stop each of them first, or give --force")
    own = psutil.Process(head.pid)
    processes = [own, *own.children(recursive=True)]
    own.terminate()
    _, left = psutil.wait_procs(processes, timeout=30)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            process.kill()
    psutil.wait_procs(left, timeout=10)
    state_file().unlink(missing_ok=True)
    return f"stopped the head of {head.submit_address} ({len(processes)} processes)"


def drain(*, address: str | None, seconds: int) -> str:
    """Announce that this node goes away in some seconds, and wait until it has left or the time is over.

    Training sees the announcement, writes a checkpoint at the very step and continues on other nodes.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise InputError("which cluster? Give --address host:6379, or set RAY_ADDRESS")
    import ray
    from ray._raylet import GcsClient

    here = ray.util.get_node_ip_address()
    gcs = GcsClient(address=address)
    own = [n for n in gcs.get_all_node_info(timeout=10).values() if n.state == 0 and n.node_manager_address == here]
    if len(own) != 1:
        raise InputError(f"{len(own)} nodes of {address} have this machine's address {here}; one was expected")
    node = own[0].node_id.hex()
    command = [*RAY, "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "scldm cluster drain"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True, capture_output=True)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        nodes = gcs.get_all_node_info(timeout=10)
        if not any(n.node_id.hex() == node and n.state == 0 for n in nodes.values()):
            return f"{node[:12]} has left"
        time.sleep(1)
    return f"{node[:12]} has had its {seconds} s"
