"""What a pass is: a function ``Program -> Program`` with a name, the facts it needs and the facts it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deepseed.ir.program import Program


class PassError(ValueError):
    """A pass that cannot do its work on this program: says what, where, the numbers and the fix."""


@dataclass(frozen=True)
class Pass:
    name: str
    run: Callable[..., Program]
    requires: frozenset[str]
    provides: frozenset[str]
    doc: str

    def __call__(self, program: Program, *args: Any, **kwargs: Any) -> Program:
        missing = self.requires - program.facts
        if missing:
            raise PassError(f"pass {self.name} needs a program that is {', '.join(sorted(missing))}; this one is {', '.join(sorted(program.facts)) or 'bare'}")
        out = self.run(program, *args, **kwargs)
        return replace(out, facts=out.facts | self.provides)


def program_pass(*, requires: set[str] = frozenset(), provides: set[str] = frozenset()) -> Callable[[Callable[..., Program]], Pass]:  # type: ignore[assignment]
    """``@program_pass(requires={"placed"}, provides={"explicit"})`` over the function that is the pass."""

    def wrap(run: Callable[..., Program]) -> Pass:
        return Pass(run.__name__, run, frozenset(requires), frozenset(provides), run.__doc__ or "")

    return wrap
