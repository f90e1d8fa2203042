"""Is this text a program? Names, order, roles, layouts that fit their shapes. Layouts against rules is deepseed.check.typing.

Invariants:
1. every value has one definition, before its uses;
2. every layout fits its shape and the mesh (axes exist, divide, do not overlap);
3. roles and phases are known; an output param, buffer or state has an input of the same key, dtype and shape;
4. once explicit, no use wants another layout than the value has; once lowered, no reshard is left;
5. the result of ``*.start`` is used by ``wait`` only, and ``wait`` waits for nothing else;
6. once staged, every value is there when and where it is read (deepseed.ir.staged);
7. ops of one ``kernel`` stand side by side, run at one time and place, on the device, and none of them is a collective or moves a value.
"""

from __future__ import annotations

from deepseed.ir.layout import LayoutError, check
from deepseed.ir.program import INPUT_ROLES, ITEMSIZE, OUTPUT_ROLES, PHASES, Op, Program, ProgramError, Ref, Type
from deepseed.ir.staged import check_staged

_OUTSIDE = ("reshard", "wait", "send", "transfer", "accumulate", "collect", "shard", "summand", "share")  # of any kernel


def verify(p: Program) -> Program:
    """``p`` itself; raises ProgramError with the op's name, path and the numbers that disagree."""
    defined: dict[str, Type] = {}
    fitting: set[Type | int] = set()  # types that were found well formed, and the ids of these objects
    pending: set[str] = set()
    for i in p.inputs:
        _define(p, defined, i.name, i.type, f"input {i.role} {i.key!r}", fitting)
        if i.role not in INPUT_ROLES:
            raise ProgramError(f"%{i.name}: unknown role {i.role!r}")
    lowered = "lowered" in p.facts
    for op in p.ops:
        target, results, types = op.target, op.results, op.types
        if op.phase not in PHASES:
            raise ProgramError(f"{_where(op)}: unknown phase {op.phase!r}")
        if len(results) != len(types) or not results:
            raise ProgramError(f"{_where(op)}: {len(results)} results but {len(types)} types")
        waits = target == "wait"
        for ref in op.refs:
            name = ref.name
            if name not in defined or ref.want is not None:
                _use(p, defined, ref, op)
            if (name in pending) is not waits:
                if waits:
                    raise ProgramError(f"{_where(op)}: waits for %{name}, which is no collective that was started")
                raise ProgramError(f"{_where(op)}: uses %{name}, a collective that was started but not waited for")
        if lowered and target == "reshard":
            raise ProgramError(f"{_where(op)}: a reshard in a lowered program")
        for name, type_ in zip(results, types, strict=False):
            if name in defined or id(type_) not in fitting:
                _define(p, defined, name, type_, op, fitting)
            defined[name] = type_
        if target.endswith(".start"):
            pending.update(results)
    p.__dict__.setdefault("types", defined)  # they need not be collected once more
    inputs = {(i.role, i.key): i for i in p.inputs}
    for o in p.outputs:
        where = f"output {o.role} {o.key!r}"
        if o.role not in OUTPUT_ROLES:
            raise ProgramError(f"{where}: unknown role {o.role!r}")
        _use(p, defined, o.ref, where)
        if o.ref.name in pending:
            raise ProgramError(f"{where}: returns %{o.ref.name}, a collective that was started but not waited for")
        if o.role in ("param", "buffer", "state"):
            source = inputs.get((o.role, o.key))
            if source is None:
                raise ProgramError(f"{where}: no input with this role and key")
            new = defined[o.ref.name]
            made = next((op for op in p.ops if o.ref.name in op.results), None) if new != source.type else None
            where += f", {_where(made)}" if made is not None else f", %{o.ref.name}"
            if (new.dtype, new.shape) != (source.type.dtype, source.type.shape):
                raise ProgramError(f"{where}: {new.dtype}{list(new.shape)} for an input of {source.type.dtype}{list(source.type.shape)}")
            if "explicit" in p.facts and new.layout != source.type.layout:
                raise ProgramError(f"{where}: comes back as {new.layout.elements}, was stored as {source.type.layout.elements}")
    _check_kernels(p)
    if "staged" in p.facts and "local" not in p.facts and any(op.part for op in p.ops):
        check_staged(p)
    return p


def _check_kernels(p: Program) -> None:
    done: set[str] = set()
    before: Op | None = None
    for op in p.ops:
        if op.kernel:
            if before is not None and before.kernel == op.kernel:
                if (op.part, op.stage, op.phase) != (before.part, before.stage, before.phase):
                    raise ProgramError(f"{_where(op)}: {op.phase} {op.part} of stage {op.stage} in the kernel {op.kernel!r}, which is {before.phase} {before.part} of stage {before.stage}")
            elif op.kernel in done:
                raise ProgramError(f"{_where(op)}: the kernel {op.kernel!r} goes on behind %{before.name if before is not None else ''}, which is no part of it")
            done.add(op.kernel)
            if op.target in _OUTSIDE or op.target.endswith(".start") or op.target.startswith("optim.") or any(t.host for t in op.types):
                raise ProgramError(f"{_where(op)}: in the kernel {op.kernel!r}, which cannot {'reach the host' if op.types[0].host else 'send, wait or move values'}")
        before = op


def _define(p: Program, defined: dict[str, Type], name: str, t: Type, where: Op | str, fitting: set[Type | int]) -> None:
    if name in defined:
        raise ProgramError(f"{_where(where)}: %{name} is defined twice")
    if t not in fitting:
        if t.dtype not in ITEMSIZE:
            raise ProgramError(f"{_where(where)}: %{name} has unknown dtype {t.dtype!r}")
        try:
            check(t.shape, t.layout, p.mesh)
        except LayoutError as error:
            raise ProgramError(f"{_where(where)}: %{name}: {error}") from None
        fitting.add(t)
    fitting.add(id(t))
    defined[name] = t


def _use(p: Program, defined: dict[str, Type], ref: Ref, where: Op | str) -> None:
    if ref.name not in defined:
        raise ProgramError(f"{_where(where)}: uses %{ref.name} before its definition")
    if ref.want is not None:
        if "explicit" in p.facts:
            raise ProgramError(f"{_where(where)}: wants %{ref.name} in another layout than it has, in an explicit program")
        try:
            check(defined[ref.name].shape, ref.want, p.mesh)
        except LayoutError as error:
            raise ProgramError(f"{_where(where)}: wants %{ref.name}: {error}") from None


def _where(op: Op | str) -> str:
    if isinstance(op, str):
        return op
    return f"{', '.join(f'%{r}' for r in op.results) or 'no result'} = {op.target}" + (f" at {op.path}" if op.path else "") + (f" ({op.line})" if op.line else "")
