"""Run somebody's training program with `gemma_accel.auto` in effect, without an edit.

    python -m gemma_accel.run train.py --its --own --arguments
    accelerate launch -m gemma_accel.run train.py --its --own --arguments
    gemma-accel run trl sft --its --own --arguments

The program runs as ``__main__``, as Python itself would run it: its arguments, its folder at the
head of ``sys.path``, its exit code, its traceback. Processes that it starts through `accelerate
launch` (as ``trl sft`` does) run this way too.
"""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import os
import runpy
import shutil
import sys
import types
import warnings
import zipfile
from importlib.machinery import SourceFileLoader
from types import TracebackType
from typing import Any, NoReturn

__all__ = ["main"]

_USAGE = """\
usage: gemma-accel run [-m] PROGRAM [ARGUMENT ...]

PROGRAM is a script (train.py), a module (-m package.train) or an installed command (trl).
Everything after it is its own.
"""

# Launchers that start the script in processes of their own, which an import here does not reach.
_OUTSIDE_IN = {
    "torchrun": "torchrun -m gemma_accel.run train.py",
    "torch.distributed.run": "python -m torch.distributed.run -m gemma_accel.run train.py",
    "torch.distributed.launch": "python -m torch.distributed.run -m gemma_accel.run train.py",
    "accelerate.commands.launch": "accelerate launch -m gemma_accel.run train.py",
    "deepspeed": "deepspeed --module gemma_accel.run train.py",
}

# As Python starts a program; `exec`, and so runpy, would put the module's dictionary there.
_BUILTINS = {"__builtins__": builtins}


def main(argv: list[str] | None = None) -> None:
    """Run the program that ``argv`` (default: the command line's arguments) names.

    Whatever the program raises goes on to the caller, `SystemExit` included.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(_say(_USAGE, 0 if arguments else 2))
    if arguments[0] == "-m":
        if len(arguments) == 1:
            sys.exit(_say(_USAGE, 2))
        _run_module(arguments[1], arguments[2:])
    elif os.path.isfile(arguments[0]) or os.path.isfile(os.path.join(arguments[0], "__main__.py")):
        _run_script(arguments[0], arguments[1:])
    else:
        _run_command(arguments[0], arguments[1:])


def _run_script(path: str, arguments: list[str]) -> None:
    if os.path.isdir(path) or zipfile.is_zipfile(path) or path.endswith(".pyc"):
        _take_over([path, *arguments], os.path.abspath(path))
        runpy.run_path(path, _BUILTINS, run_name="__main__")
        return
    _take_over([path, *arguments], os.path.dirname(os.path.realpath(path)))
    # not by runpy, which takes `__main__` away again before threads and exit handlers are through
    program = types.ModuleType("__main__")
    where = os.path.join(os.getcwd(), path)  # as Python does, dots and all
    vars(program).update(
        __file__=where,
        __cached__=None,
        __loader__=SourceFileLoader("__main__", where),
        **_BUILTINS,
    )
    sys.modules["__main__"] = program
    with open(path, "rb") as source:
        code = compile(source.read(), where, "exec", dont_inherit=True)
    exec(code, vars(program))


def _run_module(name: str, arguments: list[str]) -> None:
    _refuse_launcher(name)
    _take_over([name, *arguments], os.getcwd())
    runpy.run_module(name, _BUILTINS, run_name="__main__", alter_sys=True)


def _run_command(name: str, arguments: list[str]) -> NoReturn:
    _refuse_launcher(name)
    found = importlib.metadata.entry_points(group="console_scripts", name=name)
    if not found:
        hint = f"Leave {name} out: the script runs in this Python.\n" * name.startswith("python")
        what = f"there is no file {name!r}, and no installed command of that name written in Python"
        sys.exit(_say(f"gemma-accel run: {what}.\n{hint}{_USAGE}", 2))
    command = shutil.which(name) or name
    _take_over([command, *arguments], os.path.dirname(os.path.realpath(command)))
    sys.exit(next(iter(found)).load()())


def _take_over(argv: list[str], folder: str) -> None:
    """Make ``sys`` what the program expects; only then import: its folder decides what is found."""
    sys.argv[:] = argv
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder
    import gemma_accel.auto  # noqa: F401 - the import is the act

    _accelerate_children()
    _show_only_the_program()


def _refuse_launcher(name: str) -> None:
    if name in _OUTSIDE_IN:
        what = "starts processes of its own, which this would not reach. Put it outside:"
        sys.exit(_say(f"gemma-accel run: {name} {what}\n  {_OUTSIDE_IN[name]}\n", 2))


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr if code else sys.stdout, end="")
    return code


def _accelerate_children() -> None:
    """Let `accelerate launch`, called in this process, start this module with the script to run.

    TRL's command line takes `launch_command` by name when it is imported: this must come before.
    """
    from accelerate.commands import launch

    stock = launch.launch_command

    @functools.wraps(stock)
    def launch_command(args: Any) -> Any:
        _rewrite(args)
        return stock(args)

    launch.launch_command = launch_command


def _rewrite(args: Any) -> None:
    """Turn the launch of a script into the launch of this module with the script."""
    if args.no_python:
        warnings.warn(
            f"accelerate launch --no_python starts {args.training_script!r} by itself: it will run "
            "without gemma_accel, unless it imports gemma_accel.auto.",
            UserWarning,
            stacklevel=3,
        )
        return
    if args.module and args.training_script == "gemma_accel.run":
        return
    script = ["-m", args.training_script] if args.module else [args.training_script]
    args.training_script_args = [*script, *args.training_script_args]
    args.training_script, args.module = "gemma_accel.run", True


def _show_only_the_program() -> None:
    """An uncaught exception shows the program's own frames alone, as it does without this module.

    The exception is not caught: it propagates, and Python decides the exit code as always.
    """
    show = sys.excepthook

    def show_program(
        kind: type[BaseException], error: BaseException, tb: TracebackType | None
    ) -> None:
        frames = _program_frames(tb)
        show(kind, error.with_traceback(frames), frames)

    sys.excepthook = show_program


def _program_frames(tb: TracebackType | None) -> TracebackType | None:
    """What lies below this module's frames and runpy's; nothing where the program never ran."""
    rest, inside = tb, False
    while rest is not None:
        if rest.tb_frame.f_code.co_filename == __file__:
            inside = True
        elif inside and rest.tb_frame.f_globals.get("__name__") != "runpy":
            return rest
        rest = rest.tb_next
    return None if inside else tb


if __name__ == "__main__":
    main()
