"""A process whose import of TileDB-SOMA was interrupted can still use it."""

import subprocess
import sys
import textwrap

import pytest

# A finder is asked for every module: when the import asks for one in its middle, the process is interrupted as Ray does
# it when it cancels a task. Then the same process imports again, as the next task would.
INTERRUPTED = """
    import _thread, sys

    class Interrupt:
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                sys.meta_path.remove(self)
                _thread.interrupt_main()
            return None

    sys.meta_path.insert(0, Interrupt())
    seen = []
    try:
        {statement}
    except KeyboardInterrupt:
        seen.append("interrupted")
    try:
        {statement}
        seen.append(soma.Experiment.__name__)
    except AttributeError as error:
        seen.append(str(error))
    print("; ".join(seen))
"""


def printed(module: str, statement: str) -> str:
    code = textwrap.dedent(INTERRUPTED).format(module=module, statement=statement)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["somacore.query", "tiledbsoma._collection"])
def test_an_interrupt_waits_for_the_end_of_the_import(module):
    assert printed(module, "from pipeline.data.soma.library import soma") == "interrupted; Experiment"


def test_without_the_wait_the_process_would_keep_half_of_the_library():
    assert printed("somacore.query", "import tiledbsoma as soma") == (
        "interrupted; module 'somacore' has no attribute 'collection'"
    )


def test_other_threads_import_without_touching_signals():
    code = (
        "import threading, signal; before = signal.getsignal(signal.SIGINT)\n"
        "t = threading.Thread(target=lambda: __import__('pipeline.data.soma.library')); t.start(); t.join()\n"
        "import sys; print('tiledbsoma' in sys.modules, signal.getsignal(signal.SIGINT) is before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True"]
