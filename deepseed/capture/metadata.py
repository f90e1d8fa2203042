"""Where an op comes from: module path, phase and source line, for forward *and* backward ops.

Global module hooks keep the stack of module calls. Autograd gives every forward op a sequence number, and while backward runs
the current node has its forward op's number: that joins the two. A module that is called again (weights shared between
layers) gets ``#2`` behind its name; a call repeated by activation checkpointing gets the name of the call that it repeats.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from deepseed.capture.errors import CaptureError

_OWN = str(Path(__file__).parent.parent) + "/"  # as frames have it: where it was imported from, which may be behind a link
_TORCH = str(Path(torch.__file__).parent) + "/"
_FUNCTORCH = str(Path(torch.__file__).parent.parent / "functorch") + "/"
_STEP = _OWN + "capture/step.py"
_skipped: dict[str, bool] = {}


@dataclass(frozen=True)
class Where:
    path: str = ""
    line: str = ""
    backward: bool = False


@dataclass(eq=False)
class Call:
    """One call of one module. ``name`` is the module's, ``text`` is unique among calls."""

    module: int
    name: str
    text: str
    parent: Call | None
    draws: int = 0
    children: dict[int, list[Call]] = field(default_factory=dict)
    repeats: Call | None = None  # the forward call that checkpointing repeats here
    cursor: dict[int, int] = field(default_factory=dict)


def source_line() -> str:
    """``train.py:12``, the innermost frame outside torch and deepseed, within the captured step; else empty."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _STEP:
            return ""
        skip = _skipped.get(name)
        if skip is None:
            skip = _skipped[name] = name.startswith((_OWN, _TORCH, _FUNCTORCH, "<")) or "/contextlib.py" in name
        if not skip:
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Tracker:
    """``with Tracker(model).on(): ...``; ``here()`` at any op, ``site()`` at a random one."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(m): name for name, m in model.named_modules()}
        self.base = Call(0, "", "", None)
        self.stack: list[Call] = []
        self.last = Where()
        self.backward = False  # set once the loss is known: what follows outside autograd's nodes seeds them
        self._taken: dict[str, int] = {"loss_fn": 1}
        self._forward: dict[int, tuple[Call, str]] = {}  # autograd sequence number -> call, line

    @contextmanager
    def on(self) -> Iterator[Tracker]:
        enter = register_module_forward_pre_hook(lambda module, args: self._enter(module))
        leave = register_module_forward_hook(lambda module, args, result: self._leave(module), always_call=True)
        try:
            yield self
        finally:
            enter.remove()
            leave.remove()

    def here(self) -> Where:
        self.last = self._here()
        return self.last

    def _here(self) -> Where:
        node = torch._C._current_autograd_node()
        if node is None:
            call, line = self.stack[-1] if self.stack else self.base, source_line()
            self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, (call, line))
            return Where(call.text, line, self.backward)
        if self.stack:
            return Where(self.stack[-1].text, source_line(), True)
        call, line = self._origin(node)
        return Where(call.text, line, True)

    def site(self) -> str:
        """The stable name of the random draw that happens here: module call and index within it."""
        if self.stack:
            call = self.stack[-1]
        elif torch._C._current_autograd_node() is None:
            call = self.base
        else:
            where = self.here()
            raise CaptureError(
                "a random op in a checkpointed function, outside any module, cannot be given the name of its first draw",
                path=where.path, line=where.line, fix="put the random op (dropout) into a module that the checkpointed function calls",
            )  # fmt: skip
        call.draws += 1
        return f"{call.text if call is not self.base else 'loss_fn'}/{call.draws - 1}"

    def _origin(self, node: Any) -> tuple[Call, str]:
        return self._forward.get(node._sequence_nr(), (self.base, ""))

    def _enter(self, module: nn.Module) -> None:
        node = torch._C._current_autograd_node()
        parent = self.stack[-1] if self.stack else self.base
        known = None
        if node is not None:
            known = self._repeated(id(module), parent if self.stack else self._origin(node)[0])
        if known is not None:
            self.stack.append(Call(id(module), known.name, known.text, parent, repeats=known))
            return
        name = self.names.get(id(module), type(module).__name__)
        inside = name.startswith(parent.name + ".") if parent.name else True
        text = (parent.text + "." if parent.text else "") + name[len(parent.name) + 1 if parent.name else 0 :] if inside else name
        text = text.rstrip(".")
        n = self._taken[text] = self._taken.get(text, 0) + 1
        call = Call(id(module), name, text if n == 1 else f"{text}#{n}", parent)
        parent.children.setdefault(id(module), []).append(call)
        self.stack.append(call)

    def _repeated(self, module: int, near: Call) -> Call | None:
        """The forward call of ``module`` that is repeated inside ``near`` (itself a repetition, or where backward stands)."""
        if near.repeats is not None:
            calls = near.repeats.children.get(module, [])
            n = near.cursor[module] = near.cursor.get(module, 0) + 1
            return calls[n - 1] if n <= len(calls) else None
        at: Call | None = near
        while at is not None:
            if at.module == module:
                return at
            if module in at.children:
                return at.children[module][0]
            at = at.parent
        return None

    def _leave(self, module: nn.Module) -> None:
        if self.stack and self.stack[-1].module == id(module):
            self.stack.pop()
