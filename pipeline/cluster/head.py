"""A Ray head on this machine that takes jobs: behind a token, its job server on the loopback address.

Ray's other ports listen on all addresses, whatever it is told; they too take nothing without the token.

Started as a session of its own whose first process is remembered with the time of its birth, so that `stop` ends that
and what it started, and never another Ray of this machine (`ray stop` ends them all).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.connect import REPOSITORY
from pipeline.cluster.submit import FINAL, STOP_WAIT, STOP_WAIT_SECONDS
from pipeline.core.files import write_json_atomic
from scldm.errors import InputError

START_SECONDS = 120
TRIES = 3
# Ray gives its own processes 30 s, which no setting changes; a busy machine needs longer, less so with warm files.
SLOW = ("timed out during startup", "Timed out waiting for node info")
STARTED = "Ray runtime started"  # in its log; the job server answers before that
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Head:
    """A head that was started."""

    pid: int
    born: float  # of the process, as the system says: a pid is used again
    root: str
    port: int
    dashboard_port: int
    log: str

    @property
    def submit_address(self) -> str:
        return f"http://{LOOPBACK}:{self.dashboard_port}"


def state_file() -> Path:
    return Path.home() / ".scldm" / "cluster.json"


def start(*, root: Path | None, port: int, dashboard_port: int, temp_dir: Path | None, arguments: list[str]) -> Head:
    """Start a head and wait until it has run a job.

    Args:
        root: Where jobs run; default: this folder if it has jobs/, else the repository.
        arguments: More of `ray start`, for example --num-cpus=8.
    """
    if (running := find()) is not None:
        raise InputError(f"a head runs already (process {running.pid}, {running.submit_address}): scldm cluster stop")
    _check_ports({"--port": port, "--dashboard-port": dashboard_port})
    token = ensure_token()
    secret = token.read_text().strip() if token is not None else os.environ["RAY_AUTH_TOKEN"]
    root = (root or (Path.cwd() if Path("jobs").is_dir() else REPOSITORY)).resolve()
    log = state_file().with_name("cluster.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", "--include-dashboard=true"]
    command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"]
    command += [f"--temp-dir={temp_dir}"] if temp_dir else []
    # Ray's own choices are fixed ports: beside another Ray of this machine the agent would run no job, without a word,
    # and the client server, which nothing here uses and no option turns off, would end the head.
    command += [f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}", *arguments]
    for tries_left in reversed(range(TRIES)):
        head, process = _launch(command, root, token, log, port=port, dashboard_port=dashboard_port)
        if (trouble := _trouble(head, process, secret)) is None:
            return head
        stop(force=True)
        if not tries_left or not any(slow in trouble for slow in SLOW):
            raise InputError(trouble)
        print("Ray did not come up in the 30 s that it gives itself (a loaded machine?); once more", flush=True)
    raise AssertionError("unreachable: the last try returns or raises")


def _launch(
    command: list[str], root: Path, token: Path | None, log: Path, *, port: int, dashboard_port: int
) -> tuple[Head, subprocess.Popen[Any]]:
    """The head's process, remembered before anything else can go wrong."""
    import psutil

    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=root, env=_environment(token), stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    head = Head(
        pid=process.pid, born=psutil.Process(process.pid).create_time(), root=str(root), port=port,
        dashboard_port=dashboard_port, log=str(log),
    )  # fmt: skip
    write_json_atomic(state_file(), asdict(head))
    return head, process


def _environment(token: Path | None) -> dict[str, str]:
    """Of the head and, through it, of all jobs. No address of another cluster, and the python that runs this."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    env.update(RAY_AUTH_MODE="token", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    env.setdefault(STOP_WAIT, str(STOP_WAIT_SECONDS))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if token is not None:
        env["RAY_AUTH_TOKEN_PATH"] = str(token)
    return env


def ensure_token() -> Path | None:
    """The file with the token, made if there is none; None where RAY_AUTH_TOKEN holds it."""
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


def _trouble(head: Head, process: subprocess.Popen[Any], token: str) -> str | None:
    """None once the head has run a job; else what is wrong with it."""
    until, ready = time.monotonic() + START_SECONDS, False
    while not ready:
        if process.poll() is not None or time.monotonic() > until:
            end = "ended" if process.poll() is not None else f"runs no job after {START_SECONDS} s"
            tail = "\n".join(Path(head.log).read_text(errors="replace").splitlines()[-15:])
            return f"the head {end}; {head.log} ends with:\n{tail}"
        time.sleep(0.5)
        ready = STARTED in Path(head.log).read_text(errors="replace") and _runs_a_job(head, token, until)
    return None


def _runs_a_job(head: Head, token: str, until: float) -> bool:
    """Whether `true` ends well as a job. The job server answers before there is an agent to run what it takes."""
    name = f"scldm-ready-{secrets.token_hex(3)}"
    jobs, body = f"{head.submit_address}/api/jobs/", json.dumps({"entrypoint": "true", "submission_id": name}).encode()
    status = None
    try:
        _ask("POST", jobs, token, body)
        while status not in FINAL and time.monotonic() < until:
            time.sleep(0.5)
            status = json.loads(_ask("GET", f"{jobs}{name}", token))["status"]
        _ask("DELETE", f"{jobs}{name}", token)
    except OSError:  # an error of HTTP is one: asked again until the time is over
        return False
    return status == "SUCCEEDED"


def _ask(method: str, url: str, token: str, body: bytes | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return bytes(response.read())


# ---- stopping ------------------------------------------------------------------------------------------------------
def find() -> Head | None:
    """The head that was started here, if it lives."""
    import psutil

    try:
        head = Head(**json.loads(state_file().read_text()))
        alive = abs(psutil.Process(head.pid).create_time() - head.born) < 0.01
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    except (TypeError, ValueError) as error:
        raise InputError(f"{state_file()} is not as this version writes it; delete it if no head runs") from error
    return head if alive else None


def stop(*, force: bool) -> str:
    """End the head that `start` started, and nothing else. Jobs that run are in the way unless forced."""
    import psutil

    head = find()
    if head is None:
        state_file().unlink(missing_ok=True)
        return "no head runs that `scldm cluster start` started"
    if not force and (running := _running_jobs(head)):
        raise InputError(f"jobs run: {', '.join(running)}; scldm stop each of them first, or give --force")
    own = psutil.Process(head.pid)
    family = [own, *own.children(recursive=True)]
    own.terminate()
    _, left = psutil.wait_procs(family, timeout=30)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=10)
    state_file().unlink(missing_ok=True)
    return f"stopped the head of {head.submit_address} ({len(family)} processes)"


def _running_jobs(head: Head) -> list[str]:
    from pipeline.cluster.submit import client

    with client(head.submit_address) as jobs:
        return [j.submission_id for j in jobs.list_jobs() if j.status.value not in FINAL]


# ---- leaving a cluster ---------------------------------------------------------------------------------------------
def drain(*, address: str | None, seconds: int) -> str:
    """Tell the cluster that this node goes in so many seconds, and wait until it is left or the time is over.

    Training sees the notice, writes a checkpoint at the very step and goes on elsewhere.
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
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "scldm cluster drain"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True, capture_output=True)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        nodes = gcs.get_all_node_info(timeout=10)
        if not any(n.node_id.hex() == node and n.state == 0 for n in nodes.values()):
            return f"{node[:12]} is left"
        time.sleep(1)
    return f"{node[:12]} has had its {seconds} s"
