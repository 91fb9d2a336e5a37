"""`python -m pipeline`, what a job file's #! line calls, and the console script `scldm`.

A #! line finds whatever `python` comes first on the PATH. If it lacks our libraries, another one is used: that of the
Ray node which runs this job, or the repository's own .venv. Until then only the standard library may be imported.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("pydantic", "yaml", "typer", "ray")
OURS = "scldm.api.model"  # in the __init__.py of our package
CHOSEN = "SCLDM_PYTHON_CHOSEN"  # one change of interpreter is enough; two could go on for ever


def main() -> None:
    """Run the command line in an interpreter that has the dependencies."""
    _refuse_another_scldm()
    if lacking := _lacking():
        use_another_python(f"{sys.executable} lacks {', '.join(lacking)}")
    from pipeline.cli.app import main as run

    run()


def console() -> None:
    """The console script. It belongs to one interpreter, so none is looked for; the model alone has no command line."""
    _refuse_another_scldm()
    if lacking := _lacking():
        print(
            f"the command line needs {', '.join(lacking)}, which `pip install scldm-census` leaves out: "
            "in a checkout of this project pip install '.[pipeline]', or make venv",
            file=sys.stderr,
        )
        sys.exit(2)
    from pipeline.cli.app import main as run

    run()


def _refuse_another_scldm() -> None:
    """End if `import scldm` would find upstream's package, which has the same name. Nothing of it is imported."""
    found = find_spec("scldm")
    if found is None or found.origin is None or OURS in Path(found.origin).read_text(errors="replace"):
        return
    print(
        f"{found.origin} is not of this project: upstream's distribution, `scldm`, has a package of the same name, and "
        "its files were installed over ours or come first. Uninstall both (pip uninstall scldm-census scldm), and give "
        "each an environment of its own",
        file=sys.stderr,
    )
    sys.exit(2)


def _lacking() -> list[str]:
    return [name for name in NEEDED if find_spec(name) is None]


def use_another_python(lack: str) -> None:
    """Replace this process, or say what to do."""
    candidates = [ray_python(), REPOSITORY / ".venv" / "bin" / "python"]
    python = next((str(p) for p in candidates if p is not None and p.exists()), None)
    if python is None or python == sys.executable or CHOSEN in os.environ:
        print(f"{lack}; run `make venv` in {REPOSITORY}, or put the right python first on the PATH", file=sys.stderr)
        sys.exit(2)
    print(f"{lack}; going on with {python}", file=sys.stderr, flush=True)
    # `pipeline` is imported from where it is now, whatever the current folder.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    os.environ[CHOSEN] = python
    os.execv(python, [python, "-m", "pipeline", *sys.argv[1:]])


def ray_python() -> Path | None:
    """The interpreter of the Ray node that started this job, from its raylet's command line; None elsewhere.

    A job's entrypoint runs in a plain shell: where `ray start` was called by its full path, its python is not on PATH.
    """
    pid = os.getppid()
    while pid > 1:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            return None
        for argument in arguments:
            if argument.startswith("--python_worker_command="):
                return Path(shlex.split(argument.partition("=")[2])[0])
        pid = int(parent)
    return None


if __name__ == "__main__":
    main()
