"""`python -m pipeline`, and what a job file's #! line calls.

That line finds whatever `python` comes first on the PATH. If it lacks our libraries, the repository's own .venv is used
instead. Only the standard library may be imported before that is decided.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Run the command line in an interpreter that has the dependencies."""
    lacking = [name for name in ("pydantic", "yaml", "typer", "ray") if find_spec(name) is None]
    if lacking:
        _use_venv(lacking)
    from pipeline.cli import main as run

    run()


def _use_venv(lacking: list) -> None:
    repository = Path(__file__).resolve().parents[1]
    venv = repository / ".venv"
    python = venv / "bin" / "python"
    lack = f"{sys.executable} lacks {', '.join(lacking)}"
    if python.exists() and Path(sys.prefix).resolve() != venv.resolve():
        print(f"{lack}; going on with {python}", file=sys.stderr, flush=True)
        # `pipeline` is imported from where it is now, whatever the current folder.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
        os.execv(str(python), [str(python), "-m", "pipeline", *sys.argv[1:]])
    print(f"{lack}; run `make venv` in {repository}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
