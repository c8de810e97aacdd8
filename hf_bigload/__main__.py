"""Run an unchanged program with the plugin on, as python itself would run it:

    python -m hf_bigload [OPTIONS] SCRIPT [ARGS]        a file, a folder or zip with a __main__.py, or - for stdin
    python -m hf_bigload [OPTIONS] -m MODULE [ARGS]
    python -m hf_bigload [OPTIONS] -c CODE [ARGS]

Options end where the program begins. Processes that the program forks have the plugin on too; ones it spawns start
afresh, and call `hf_bigload.enable()` themselves.
"""

from __future__ import annotations

import argparse
import builtins
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from hf_bigload import __version__, plugin, settings
from hf_bigload.errors import DeviceMapError

_OPTIONS_WITH_VALUE = ("--device-map", "--max-memory", "--offload-folder")

Program = Callable[[], object]


def main(argv: Sequence[str]) -> None:
    """Turn the plugin on as the options say, then become the program that follows them. Exits 2 for bad usage."""
    own, program = split_options(list(argv))
    parser = _parser()
    options = parser.parse_args(own)
    try:
        start = _prepare_program(program)
        plugin.enable(
            device_map=None if options.device_map is None else settings.parse_device_map(options.device_map),
            max_memory=settings.parse_max_memory(",".join(options.max_memory)) if options.max_memory else None,
            offload_folder=options.offload_folder,
            explain=options.explain,
        )
    except (DeviceMapError, _UsageError) as error:
        parser.error(str(error))
    _run(start)


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the program with its arguments: whatever those are, they are none of our business."""
    at = 0
    while at < len(argv) and (argv[at].startswith("--") or argv[at] == "-h"):
        at += 2 if argv[at] in _OPTIONS_WITH_VALUE else 1
    return argv[:at], argv[at:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_bigload",
        usage="%(prog)s [OPTIONS] (SCRIPT | - | -m MODULE | -c CODE) [ARGS ...]",
        description="Run a program, as python would, with hf_bigload on: its from_pretrained(device_map=...) calls are "
        "planned for the memory there is, loaded and dispatched by hf_bigload.",
        allow_abbrev=False,
    )
    parser.add_argument("--device-map", metavar="MAP", help="for calls that give none: auto, cpu, 0, or a map in JSON")
    parser.add_argument(
        "--max-memory",
        metavar="KEY=SIZE",
        action="append",
        help="a budget for calls that give none, such as 0=10GiB or cpu=30GiB; KEY is an accelerator's index, cpu, "
        "disk or mps (repeatable)",
    )
    parser.add_argument("--offload-folder", metavar="FOLDER", help="where converted weights go, unless a call says so")
    parser.add_argument("--explain", action="store_true", default=None, help="print the plan of every load to stderr")
    parser.add_argument("--version", action="version", version=f"hf_bigload {__version__}")
    return parser


class _UsageError(Exception):
    """A command line that names no program."""


def _prepare_program(program: list[str]) -> Program:
    """Set up `sys.argv`, `sys.path[0]` and `__main__` for the program; what is returned runs it."""
    if not program:
        raise _UsageError("no program to run: give a SCRIPT, -m MODULE or -c CODE")
    first, *arguments = program
    if first[:2] not in ("-m", "-c"):
        if first.startswith("-") and first != "-":
            raise _UsageError(f"unrecognized option: {first}")
        return _prepare_stdin(arguments) if first == "-" else _prepare_script(first, arguments)
    option, value = first[:2], first[2:]
    if not value:
        if not arguments:
            raise _UsageError(f"{option} needs an argument")
        value = arguments.pop(0)
    return _prepare_module(value, arguments) if option == "-m" else _prepare_code(value, arguments)


def _prepare_module(name: str, arguments: list[str]) -> Program:
    sys.argv = ["-m", *arguments]
    _new_main()
    return lambda: _run_module_as_main(name)


def _prepare_code(text: str, arguments: list[str]) -> Program:
    sys.argv = ["-c", *arguments]
    _replace_path0("")
    main_module = _new_main(__loader__=BuiltinImporter)
    return lambda: exec(compile(text, "<string>", "exec", dont_inherit=True), vars(main_module))


def _prepare_stdin(arguments: list[str]) -> Program:
    sys.argv = ["-", *arguments]
    _replace_path0("")
    main_module = _new_main(__loader__=BuiltinImporter)
    if sys.stdin.isatty():
        return lambda: _converse(main_module)
    return lambda: exec(compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True), vars(main_module))


def _converse(main_module: ModuleType) -> None:
    import code  # not needed before, and a name that people give their own files

    code.interact(local=vars(main_module), exitmsg="")


def _prepare_script(given: str, arguments: list[str]) -> Program:
    sys.argv = [given, *arguments]
    path = os.path.abspath(given)
    if pkgutil.get_importer(path) is not None:  # a folder or a zip file
        if _path0_is_ours():
            del sys.path[0]
        sys.path.insert(0, path)
        _new_main()
        return lambda: _run_module_as_main("__main__", alter_argv=False)
    _replace_path0(os.path.dirname(os.path.realpath(path)))
    loader = (SourcelessFileLoader if path.endswith(".pyc") else SourceFileLoader)("__main__", path)
    main_module = _new_main(__loader__=loader, __file__=path, __cached__=None)
    return lambda: exec(_script_code(loader), vars(main_module))


def _script_code(loader: SourceFileLoader | SourcelessFileLoader) -> CodeType:
    try:
        if isinstance(loader, SourcelessFileLoader):
            compiled = loader.get_code("__main__")
            assert compiled is not None, "get_code returns None for built-in modules only"
            return compiled
        source = loader.get_data(loader.path)
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {loader.path!r}: {reason}", file=sys.stderr)
        sys.exit(2)
    return compile(source, loader.path, "exec", dont_inherit=True)


def _run_module_as_main(name: str, alter_argv: bool = True) -> None:
    """What the interpreter itself calls for `-m`. The public `run_module` takes `__main__` away when it returns, but
    threads and exit handlers of the program may live on."""
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _new_main(**attributes: Any) -> ModuleType:
    """The module that the program runs in, with nothing of ours in it."""
    main_module = ModuleType("__main__")
    vars(main_module).update(attributes, __builtins__=builtins)
    sys.modules["__main__"] = main_module
    return main_module


def _path0_is_ours() -> bool:
    """Whether python put the current folder first when it started us (not so with -P and -I)."""
    return not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))


def _replace_path0(folder: str) -> None:
    if _path0_is_ours():
        sys.path[0] = folder


def _run(start: Program) -> None:
    try:
        start()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - it is the program's, and python reports every kind
        _report_and_exit(error)


def _report_and_exit(error: BaseException) -> NoReturn:
    """End as python does after an uncaught exception, with a traceback that begins in the program."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals is globals():
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
