"""`python -m hf_bigload PROGRAM` does what `python PROGRAM` does, with the plugin on."""

from __future__ import annotations

import os
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

REPORT = """
import sys
from {module} import helper
print(__name__, globals().get("__file__"), __package__, getattr(__spec__, "name", None), helper.value)
print(sys.argv, repr(sys.path[0]), sys.modules["__main__"].__dict__ is globals())
"""

AFTERLIFE = """
import atexit, pickle, threading, time
def late(): print("late", pickle.loads(pickle.dumps(late)) is late)
def linger():
    threading.main_thread().join()
    late()
threading.Thread(target=linger).start()
atexit.register(late)
"""

SPAWN = """
import multiprocessing
def square(number): return number * number
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [1, 2, 3]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with every kind of program in it."""
    folder = tmp_path_factory.mktemp("programs")
    programs = {
        "report.py": REPORT.format(module="tools"),
        "tools/__init__.py": "",
        "tools/helper.py": "value = 42",
        "package/__init__.py": "",
        "package/__main__.py": REPORT.format(module="."),
        "package/helper.py": "value = 43",
        "application/__main__.py": REPORT.format(module="nested"),
        "application/nested/__init__.py": "",
        "application/nested/helper.py": "value = 44",
        "sub/report.py": REPORT.format(module="nested"),
        "sub/nested/__init__.py": "",
        "sub/nested/helper.py": "value = 45",
        "fail.py": "def work():\n    raise RuntimeError('mine')\nwork()\n",
        "chain.py": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError('after')\n",
        "group.py": "class Stop(BaseException): pass\nraise Stop('unusual')\n",
        "syntax.py": "x ==\n",
        "latin.py": "# -*- coding: latin-1 -*-\nprint(ascii('\xe9'))\n",
        "code.py": "import sys\nsys.exit(7)\n",
        "message.py": "import sys\nsys.exit('that is all')\n",
        "hook.py": "import sys\nsys.excepthook = lambda kind, error, tb: print('hooked', kind.__name__)\n1 / 0\n",
        "afterlife.py": AFTERLIFE,
        "spawn.py": SPAWN,
    }
    for name, source in programs.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(source, encoding="latin-1")
    zipapp.create_archive(folder / "application", folder / "application.pyz")
    (folder / "link.py").symlink_to(folder / "sub" / "report.py")
    return folder


def python(folder: Path, *arguments: str, stdin: str = "", **variables: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one run in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_BIGLOAD")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "program",
    [
        ["report.py", "one", "--explain", "-m", "two", "--", "-c"],
        ["sub/report.py"],
        ["link.py"],
        ["application", "--version"],
        ["application.pyz", "one"],
        ["-m", "package", "--explain"],
        ["-mpackage", "--max-memory", "x"],
        ["-m", "sub.missing"],
        ["-c", "import sys; print(sys.argv, repr(sys.path[0]), __name__, __spec__)", "-m", "--help"],
        ["-cprint(1)"],
        ["missing.py"],
        ["sub"],
        ["fail.py"],
        ["-m", "fail"],
        ["chain.py"],
        ["group.py"],
        ["syntax.py"],
        ["latin.py"],
        ["code.py"],
        ["-m", "code"],
        ["message.py"],
        ["hook.py"],
        ["afterlife.py"],
        ["spawn.py"],
    ],
    ids=" ".join,
)
def test_a_program_runs_as_under_python(folder: Path, program: list[str]) -> None:
    assert python(folder, "-m", "hf_bigload", *program) == python(folder, *program)


def test_a_program_is_read_from_stdin_as_under_python(folder: Path) -> None:
    program = "import sys\nprint(sys.argv, repr(sys.path[0]), __name__)\n1 / 0\n"
    plain = python(folder, "-", "--explain", stdin=program)
    assert python(folder, "-m", "hf_bigload", "-", "--explain", stdin=program) == plain


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is new in Python 3.11")
@pytest.mark.parametrize("program", [["-c", "import sys; print(sys.path)"], ["application"]], ids=" ".join)
def test_safe_path_is_kept(folder: Path, program: list[str]) -> None:
    assert python(folder, "-P", "-m", "hf_bigload", *program) == python(folder, "-P", *program)


def test_the_options_are_the_settings_of_the_program(folder: Path) -> None:
    program = (
        "import sys; from hf_bigload import plugin, settings; now = settings.current(); "
        "print(plugin.is_enabled(), now.device_map, now.max_memory, now.offload_folder, now.explain, sys.argv)"
    )
    options = ["--max-memory", "0=1KiB", "--device-map", "auto", "--max-memory=cpu=2KB", "--offload-folder", "x"]
    status, out, _ = python(folder, "-m", "hf_bigload", *options, "--explain", "-c", program, "--explain")
    assert (status, out) == (0, "True auto {0: 1024, 'cpu': 2000} x True ['-c', '--explain']\n")


def test_the_environment_gives_what_the_options_do_not(folder: Path) -> None:
    program = (
        "from hf_bigload import settings; now = settings.current(); print(now == settings.Settings(0, explain=True))"
    )
    variables = {"HF_BIGLOAD_EXPLAIN": "1", "HF_BIGLOAD_DEVICE_MAP": "auto"}
    _, out, _ = python(folder, "-m", "hf_bigload", "--device-map", "0", "-c", program, **variables)
    assert out == "True\n"


def test_a_program_that_loads_nothing_never_imports_torch(folder: Path) -> None:
    _, out, _ = python(folder, "-m", "hf_bigload", "-c", "import sys; print('torch' in sys.modules)")
    assert out == "False\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no program to run"),
        (["--explain"], "no program to run"),
        (["-m"], "-m needs an argument"),
        (["-c"], "-c needs an argument"),
        (["-x", "report.py"], "unrecognized option: -x"),
        (["--budget", "1", "report.py"], "unrecognized arguments: --budget"),
        (["--max-memory"], "expected one argument"),
        (["--max-memory", "gpu=1GiB", "report.py"], "'gpu'"),
        (["--max-memory", "cpu=1GiB", "--max-memory", "cpu=2GiB", "report.py"], "'cpu' twice"),
        (["--device-map", "{", "report.py"], "not a device map"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_is_explained_and_runs_nothing(folder: Path, arguments: list[str], problem: str) -> None:
    status, out, err = python(folder, "-m", "hf_bigload", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("usage: python -m hf_bigload [OPTIONS]")
    assert problem in err


def test_version_and_help_do_not_need_a_program(folder: Path) -> None:
    status, out, _ = python(folder, "-m", "hf_bigload", "--version")
    assert status == 0
    assert out.startswith("hf_bigload ")
    for option in ("-h", "--help"):
        status, out, _ = python(folder, "-m", "hf_bigload", option)
        assert status == 0
        assert "--max-memory KEY=SIZE" in out
