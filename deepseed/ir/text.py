"""Programs as text, and back: ``parse(str(p)) == p``. The grammar is in docs/ir.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from deepseed.ir.layout import Layout, Owned, Partial, Split, format_dim, parse_dim
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Arg, Input, Op, Output, Program, ProgramError, Ref, Type
from deepseed.ir.schedule import format_schedule, parse_schedule

_META = (("at", "path"), ("phase", "phase"), ("line", "line"), ("origin", "origin"), ("part", "part"), ("stage", "stage"), ("kernel", "kernel"))


class ParseError(ProgramError):
    """Text that is not a program: names the line."""


# printing ---------------------------------------------------------------------------------------------------------


def format_type(t: Type, mesh: Mesh) -> str:
    return t.dtype + _laid(t, t.layout, mesh) + (" host" if t.host else "")


def format_program(p: Program) -> str:
    lines = [f"program {p.name} {p.mesh} facts({', '.join(sorted(p.facts))})"]
    lines += format_schedule(p.schedule) if p.schedule is not None else ()
    lines += [f"%{i.name} : {format_type(i.type, p.mesh)} {i.role} {_string(i.key)}" + (f" stage {i.stage}" if i.stage else "") for i in p.inputs]
    for key, op in p.origins:
        lines.append(f"origin {_string(key)} {format_op(op, p.types, p.mesh)}")
    lines += [format_op(op, p.types, p.mesh) for op in p.ops]
    for o in p.outputs:
        lines.append(f"return {_arg(o.ref, p.types, p.mesh)} {o.role} {_string(o.key)}")
    return "\n".join(lines) + "\n"


def format_op(op: Op, types: Mapping[str, Type], mesh: Mesh) -> str:
    args = [_arg(a, types, mesh) for a in op.args] + [f"{k}={_arg(v, types, mesh)}" for k, v in op.kwargs]
    results = ", ".join(f"%{r}" for r in op.results)
    out = ", ".join(format_type(t, mesh) for t in op.types)
    meta = ", ".join(f"{label}={_string(value) if isinstance(value, str) else value}" for label, name in _META if (value := getattr(op, name)))
    return f"{results} = {op.target}({', '.join(args)}) : {out} {{{meta}}}"


def _laid(t: Type, layout: Layout, mesh: Mesh) -> str:
    dims = ", ".join(format_dim(size, d, layout, mesh) for d, size in enumerate(t.shape))
    return f"[{dims}]" + "".join(f" {_partial(e)}@{axis}" for axis, e in layout.elements if isinstance(e, Partial))


def _partial(e: Partial) -> str:
    return f"owned({e.key},{e.dim},{e.of})" if isinstance(e, Owned) else e.op


def _arg(a: Arg, types: Mapping[str, Type], mesh: Mesh) -> str:
    if isinstance(a, Ref):
        return f"%{a.name}" + ("" if a.want is None else f" as {_laid(types[a.name], a.want, mesh)}")
    if isinstance(a, tuple):
        return "[" + ", ".join(_arg(x, types, mesh) for x in a) + "]"
    if isinstance(a, str):
        return _string(a)
    if a is None or isinstance(a, bool):
        return {None: "none", True: "true", False: "false"}[a]
    return repr(a)


def _string(s: str) -> str:
    return json.dumps(s, ensure_ascii=False)


# parsing ----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:(?P<ref>%[^\s,()\[\]={}:]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?(?:inf\b|nan\b|\d+(?:\.\d+)?(?:e[+-]?\d+)?))(?![\w*@])"""
    r"""|(?P<dim>\d+(?:@\w+|@\([\w,]+\))?(?:\*\d+(?:@\w+|@\([\w,]+\))?)*)|(?P<partial>(?:sum|max|owned\([^\s()]+,\d+,\d+\))@\w+)|(?P<word>[A-Za-z_][\w.]*)|(?P<punct>[()\[\]{},:=]))"""
)


class _Line:
    """One line's tokens with a cursor."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number, self.at = text, number, 0
        self.tokens: list[tuple[str, str]] = []
        pos = 0
        while pos < len(text.rstrip()):
            m = _TOKEN.match(text, pos)
            if m is None or m.end() == pos:
                raise self.error(f"cannot read {text[pos:pos + 20]!r}")
            self.tokens.append((str(m.lastgroup), m.group(str(m.lastgroup))))
            pos = m.end()

    def error(self, what: str) -> ParseError:
        return ParseError(f"line {self.number}: {what}\n  {self.text.strip()}")

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, want: str | None = None, kind: str | None = None) -> str:
        if self.at >= len(self.tokens):
            raise self.error(f"ends where {want or kind or 'more'} is expected")
        k, text = self.tokens[self.at]
        if (want is not None and text != want) or (kind is not None and k != kind):
            raise self.error(f"{text!r} where {want or kind} is expected")
        self.at += 1
        return text

    def accept(self, want: str) -> bool:
        if self.peek() == want:
            self.at += 1
            return True
        return False


def parse(text: str) -> Program:
    """The program that prints as ``text``; blank lines and lines that start with # are skipped."""
    head: tuple[str, Mesh, frozenset[str]] | None = None
    inputs: list[Input] = []
    ops: list[Op] = []
    outputs: list[Output] = []
    origins: list[tuple[str, Op]] = []
    scheduled: list[str] = []
    for number, raw in enumerate(text.split("\n"), 1):
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        if head is not None and raw.startswith(("schedule ", "lane ")):
            scheduled.append(raw)
            continue
        line = _Line(raw, number)
        if head is None:
            head = _header(line)
            continue
        mesh = head[1]
        if line.accept("return"):
            ref = _value(line, mesh)
            if not isinstance(ref, Ref):
                raise line.error("return needs a value")
            outputs.append(Output(ref, line.take(kind="word"), _unquote(line)))
        elif line.accept("origin"):
            key = _unquote(line)
            origins.append((key, _op(line, mesh)))
        else:
            first = line.take(kind="ref")[1:]
            if line.accept(":"):
                inputs.append(Input(first, _type(line, mesh), line.take(kind="word"), _unquote(line), int(line.take(kind="number")) if line.accept("stage") else 0))
            else:
                line.at -= 1
                ops.append(_op(line, mesh))
        if line.at != len(line.tokens):
            raise line.error(f"unexpected {line.peek()!r}")
    if head is None:
        raise ParseError("no program in an empty text")
    try:
        schedule = parse_schedule(scheduled) if scheduled else None
    except ValueError as error:
        raise ParseError(str(error)) from None
    return Program(head[0], head[1], tuple(inputs), tuple(ops), tuple(outputs), head[2], tuple(origins), schedule)


def _header(line: _Line) -> tuple[str, Mesh, frozenset[str]]:
    line.take("program")
    name = line.take(kind="word")
    line.take("mesh")
    axes = _positions(line)
    at = _positions(line) if line.accept("at") else ()
    line.take("facts")
    line.take("(")
    facts: list[str] = []
    while not line.accept(")"):
        facts.append(line.take(kind="word"))
        line.accept(",")
    return name, Mesh(axes, at), frozenset(facts)


def _positions(line: _Line) -> tuple[tuple[str, int], ...]:
    """``(dp=2, tp=4)``"""
    line.take("(")
    pairs: list[tuple[str, int]] = []
    while not line.accept(")"):
        axis = line.take(kind="word")
        line.take("=")
        pairs.append((axis, int(line.take(kind="number"))))
        line.accept(",")
    return tuple(pairs)


def _op(line: _Line, mesh: Mesh) -> Op:
    results = [line.take(kind="ref")[1:]]
    while line.accept(","):
        results.append(line.take(kind="ref")[1:])
    line.take("=")
    target = line.take(kind="word")
    line.take("(")
    args: list[Arg] = []
    kwargs: list[tuple[str, Arg]] = []
    while not line.accept(")"):
        if line.kind() in ("word", "number") and line.at + 1 < len(line.tokens) and line.tokens[line.at + 1][1] == "=":
            key = line.take()
            line.take("=")
            kwargs.append((key, _value(line, mesh)))
        else:
            args.append(_value(line, mesh))
        line.accept(",")
    line.take(":")
    types = [_type(line, mesh)]
    while line.accept(","):
        types.append(_type(line, mesh))
    if len(types) != len(results):
        raise line.error(f"{len(results)} results but {len(types)} types")
    line.take("{")
    meta: dict[str, Any] = {"phase": ""}
    labels = dict(_META)
    while not line.accept("}"):
        label = line.take(kind="word")
        line.take("=")
        if label not in labels:
            raise line.error(f"unknown attribute {label!r}")
        meta[labels[label]] = int(line.take(kind="number")) if label == "stage" else _unquote(line)
        line.accept(",")
    return Op(tuple(results), target, tuple(args), tuple(types), tuple(kwargs), **meta)


def _type(line: _Line, mesh: Mesh) -> Type:
    dtype = line.take(kind="word")
    shape, layout = _dims(line, mesh)
    return Type(dtype, shape, layout, line.accept("host"))


def _dims(line: _Line, mesh: Mesh) -> tuple[tuple[int, ...], Layout]:
    line.take("[")
    shape: list[int] = []
    elements: dict[str, Split | Partial | None] = {}
    while not line.accept("]"):
        if line.kind() not in ("dim", "number"):
            raise line.error(f"{line.peek()!r} where a dimension is expected")
        size, found = parse_dim(line.take(), len(shape), mesh)
        elements.update(found)
        shape.append(size)
        line.accept(",")
    while line.kind() == "partial":
        op, _, axis = line.take().rpartition("@")
        owned = op.removeprefix("owned(").removesuffix(")").rsplit(",", 2)
        elements[axis] = Owned("sum", int(owned[1]), owned[0], int(owned[2])) if len(owned) == 3 else Partial(op)
    return tuple(shape), Layout.of(**elements)


def _value(line: _Line, mesh: Mesh) -> Arg:
    kind = line.kind()
    if kind == "ref":
        name = line.take()[1:]
        return Ref(name, _dims(line, mesh)[1]) if line.accept("as") else Ref(name)
    if kind == "string":
        return _unquote(line)
    if kind == "number":
        text = line.take()
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    if kind == "word" and line.peek() in ("none", "true", "false", "inf", "nan"):
        return {"none": None, "true": True, "false": False, "inf": float("inf"), "nan": float("nan")}[line.take()]
    line.take("[")
    items: list[Arg] = []
    while not line.accept("]"):
        items.append(_value(line, mesh))
        line.accept(",")
    return tuple(items)


def _unquote(line: _Line) -> str:
    return str(json.loads(line.take(kind="string")))
