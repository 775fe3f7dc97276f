"""The application that commands are registered in, its entry point, and what becomes of errors and signals.

Nothing here or beside it imports torch at the top: ``convexhead --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer
import typer.core
from rich.markup import escape
from typer.models import OptionInfo

from convexhead._version import __version__
from convexhead.cli.output import errors, several_processes
from convexhead.errors import ConvexHeadError, InputError
from convexhead.interrupts import interrupts

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train token heads on frozen features to a certified global optimum.\n\n"
    "Start with `convexhead demo`. With your own images: `extract`, then `fit` or `compare`, then `report`.",
)

AGAIN = "run the same command again to go on"
NOTHING = "nothing was written; run the same command again"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


class Stopped(BaseException):
    """A command that a signal ended in order; the text says what is kept and how to go on."""


Command = TypeVar("Command", bound=Callable[..., None])


def command(
    kept: str,
    *,
    of: typer.Typer = app,
    name: str | None = None,
    hidden: bool = False,
    cls: type[typer.core.TyperCommand] | None = None,
    shares: bool = False,
) -> Callable[[Command], Command]:
    """Register a command that may be ended at any moment.

    Parameters
    ----------
    kept : str
        What is kept of it then, and how to go on: a sentence with the command's arguments in braces.
    of : typer.Typer
        The application, or a group of its commands.
    name : str or None
        None: the function's.
    hidden : bool
        Whether ``--help`` leaves it out.
    cls : type or None
        How its arguments are read; None: as typer does.
    shares : bool
        Whether processes that torchrun starts share its work. Others refuse: they would do the same and write over
        each other.
    """

    def register(work: Command) -> Command:
        @functools.wraps(work)
        def run(**arguments: Any) -> None:
            interrupts.kept = kept.format(**arguments)
            if not shares and several_processes():
                raise InputError(f"{name or work.__name__} works in one process: start it without torchrun")
            try:
                work(**arguments)
            except ConvexHeadError as error:
                error.args = (name_options(str(error), options_of(work)), *error.args[1:])
                raise

        of.command(name, hidden=hidden, cls=cls)(run)
        return work

    return register


def name_options(message: str, options: dict[str, str]) -> str:
    """The ``message`` of a refusal with the options to use, where it names parameters of a Python function.

    >>> name_options("beta_ratio must be a positive number, got -1.0", {"beta_ratio": "--beta-ratio", "tol": "--tol"})
    'beta_ratio must be a positive number, got -1.0 (option --beta-ratio)'
    """
    named = []
    for parameter, option in options.items():
        # A short name may be a word of the sentence too: it is the parameter's if a value or a demand follows.
        follows = "" if "_" in parameter else r"(=| '| must )"
        if re.search(rf"(?<![\w-]){parameter}\b{follows}", message) and option not in message:
            named.append(option)
    return f"{message} (option{'s' if len(named) > 1 else ''} {', '.join(named)})" if named else message


def options_of(work: Callable[..., None]) -> dict[str, str]:
    """The options of a command by the names of its parameters: ``{"beta_ratio": "--beta-ratio"}``."""
    options = {}
    for parameter, hint in get_type_hints(work, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                given = (
                    info.default,
                    *(info.param_decls or ()),
                )  # typer keeps the first name in the place of a default
                own = [name.split("/")[0] for name in given if isinstance(name, str) and name.startswith("--")]
                options[parameter] = own[0] if own else f"--{parameter.replace('_', '-')}"
    return options


def main() -> None:
    """Entry point: errors are one line, and the exit code says what happened."""
    with interrupts.watch():
        try:
            with _notes():
                code = app(standalone_mode=False)
            sys.stdout.flush()
        except ConvexHeadError as error:
            _fail(str(error), 1)
        except BrokenPipeError:  # who reads our output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (ValueError, OSError) as error:
            _fail(str(error).splitlines()[0] if str(error) else type(error).__name__, 1)
        except Stopped as stopped:
            _say_interrupted(str(stopped))
        except SystemExit:
            raise
        except Exception as error:
            if hasattr(error, "exit_code"):  # typer's own: usage errors and Exit
                message = error.format_message() if hasattr(error, "format_message") else ""
                if message:  # none where the help was printed
                    _fail(message, 2)
                sys.exit(error.exit_code)
            raise
        if code == 130:  # typer's word for KeyboardInterrupt
            _say_interrupted(interrupts.kept or NOTHING)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What the library warns of, a line each on standard error."""
    told = set()

    def note(message: Warning | str, *_: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            errors.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = note  # type: ignore[assignment]
        yield


def _say_interrupted(kept: str) -> NoReturn:
    errors.print(f"[red]interrupted:[/] {escape(kept)}", soft_wrap=True)
    sys.exit(interrupts.code)


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(code)
