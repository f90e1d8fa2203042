"""A mistake of the user's on the command line is answered by its message alone and exit code 2; ``DEEPSEED_DEBUG=1`` shows where it was found."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from deepseed.runtime.refusals import named

P = ParamSpec("P")
R = TypeVar("R")


class UsageError(ValueError):
    """Options that do not go together, or name something unknown."""


def friendly(command: Callable[P, R]) -> Callable[P, R]:
    """DeepSeed's own errors and missing files as a message on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, RuntimeError, OSError) as error:
            ours = type(error).__module__.split(".")[0] == "deepseed" or isinstance(error, OSError)
            if not ours or os.environ.get("DEEPSEED_DEBUG", "0") not in ("", "0"):
                raise
            typer.echo(f"deepseed: {named(error) if isinstance(error, OSError) else error}", err=True)
            raise typer.Exit(2) from None

    return run
