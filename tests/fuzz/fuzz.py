"""Coverage-guided fuzzing of the readers with atheris (libFuzzer): `make fuzz MINUTES=10`.

    python tests/fuzz/fuzz.py all --minutes 10 --out .fuzz   every target, one after the other
    python tests/fuzz/fuzz.py replay FILE                    one input again, with its traceback

A fault is any exception but an error of ours, a crash of the process, an input that takes 30 s, or 2 GB of memory. The
first input of every fault is kept in <out>/<target>/; later ones that fail at the same line are not. What was found and
mended goes to tests/fuzz/found/<target>/, which the default tests replay.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGETS = ("config", "h5ad", "10x", "10x-texts")
SLOWEST, MEMORY_MB = 30, 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = commands.add_parser("all")
    every.add_argument("--minutes", type=float, default=10)
    every.add_argument("--only", choices=TARGETS, action="append")
    one = commands.add_parser("one")
    one.add_argument("target", choices=TARGETS)
    one.add_argument("--seconds", type=int, required=True)
    for command in (every, one):
        command.add_argument("--out", type=Path, default=Path(".fuzz"))
    commands.add_parser("replay").add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "replay":
        return replay(args.file)
    if args.command == "one":
        return fuzz_one(args.target, args.out / args.target, args.seconds)
    return fuzz_all(args.only or TARGETS, args.out, args.minutes)


def fuzz_all(targets: tuple[str, ...], out: Path, minutes: float) -> int:
    """A process for each target, so that a crash of one is a finding and no end."""
    until = {name: minutes * 60 / len(targets) for name in targets}
    for name, seconds in until.items():
        began, last = time.monotonic(), -1.0
        while (left := seconds - (time.monotonic() - began)) > 5 and left != last:
            command = [sys.executable, __file__, "one", name, "--seconds", str(int(left)), "--out", str(out)]
            if subprocess.run(command, check=False).returncode == 0:
                break
            last = left
    found = sorted(
        p for p in out.glob("*/*") if p.is_file() and p.name.startswith(("fault-", "crash-", "timeout-", "oom-"))
    )
    for path in found:
        print(f"found: {path}\n  again: {sys.executable} {__file__} replay {path}")
    print(f"{len(found)} faults in {minutes:g} minutes; corpus and faults are in {out}")
    return 1 if found else 0


def fuzz_one(name: str, out: Path, seconds: int) -> int:
    """Fuzz in this process. Never returns: libFuzzer leaves with 0 when its time is up."""
    import atheris

    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    with atheris.instrument_imports(include=["pipeline", "scldm", "edits"]):
        import targets
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in [*targets.seeds(name), *(p.read_bytes() for p in sorted((HERE / "found" / name).glob("*")))]:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def once(data: bytes) -> None:
        try:
            targets.run(name, data)
        except Exception as error:
            keep(out, data, error)

    limits = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=20000"]
    options = [*limits, f"-artifact_prefix={out}/", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], once)
    atheris.Fuzz()
    return 0


def keep(out: Path, data: bytes, error: Exception) -> None:
    """The first input that fails at a line, and the traceback beside it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/pipeline/" in f.filename or "/scldm/" in f.filename] or list(frames)
    where = f"{type(error).__name__}-{Path(ours[-1].filename).stem}-{ours[-1].lineno}"
    path = out / f"fault-{where}"
    if not path.exists():
        path.write_bytes(data)
        path.with_name(f"said-{where}.txt").write_text("".join(traceback.format_exception(error)))
        print(f"\nfault: {where}: {str(error)[:200]!r} -> {path}", flush=True)


def replay(path: Path) -> int:
    """The target is the name of the folder."""
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import targets

    targets.run(path.resolve().parent.name, path.read_bytes())
    print(f"{path}: no fault", flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
