"""Writes to stored tensors: optimizers in place, ``copy_`` for all other new parameters and state.

    optim.adamw(param, grad, states.., lr, states=[..], betas=, eps=, weight_decay=, amsgrad=, maximize=)
    optim.adam(the same)          optim.sgd(.., momentum=, dampening=, weight_decay=, nesterov=, maximize=)
    optim.pointwise(param, states.., grad, numbers.., operands=[..], numbers=[..], body=[..], results=[..])         any other, see deepseed.ir.updates

``states`` names the state operands as torch.optim does; results are the new parameter and each new state but ``step``, which
comes in counted up already. ``skip=`` (nothing changes) and ``scale=`` (of the gradient) are operands too. Updates that stand side by side with the same options become one call over lists: of the kernel
that a back end has made of it (deepseed.codegen.updates), else of torch's fused one. An entry is updated in its own memory (a block of a stored tensor in that tensor's) where its stored tensor has no later reader, else on a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deepseed.codegen.donation import Donation
from deepseed.codegen.expressions import DTYPES
from deepseed.codegen.updates import Formula, formula, name_of
from deepseed.ir.program import Op, Program, Ref
from deepseed.ir.updates import POINTWISE, formula_of, operands_of, place_of, updated_of

FUSED = {"optim.adamw": "torch._fused_adamw_", "optim.adam": "torch._fused_adam_", "optim.sgd": "torch._fused_sgd_"}
UPDATES = (*FUSED, POINTWISE)


@dataclass
class Update:
    """Emits the writes of one program. ``kernels``: the function of an update, by the update's name."""

    donation: Donation
    name: Callable[[str], str]
    emit: Callable[[str], None]
    kernels: Mapping[str, str]
    done: set[str] = field(default_factory=set)  # stored tensors that are written already

    def waited(self, position: int, op: Op) -> bool:
        """Write what a collective brings straight into its stored tensor, where it is a new value that nothing else reads; whether that was done."""
        donation = self.donation
        stored = next((s for s, at in donation.written.items() if at == position and donation.stored[s].ref.name == op.name), None)
        if op.target != "wait" or stored is None or len(donation.program.uses[op.name]) > 1:
            return False
        self.done.add(stored)
        self.emit(f"{self.name(op.name)} = rt.wait_into({self.name(op.refs[0].name)}, {self.name(stored)})")
        return True

    def after(self, position: int) -> None:
        """The copies into stored tensors that are due after the op at ``position``."""
        for stored, at in self.donation.written.items():
            if at == position and stored not in self.done:
                new = self.donation.stored[stored].ref.name
                new += ".copy" if new in self.donation.copied else ""
                self.emit(f"{self.name(stored)}.copy_({self.name(new)})")

    def together(self, position: int) -> Sequence[Op]:
        """The updates from ``position`` on that ``optimizer`` makes one call of."""
        return [op for run in self._runs(position) for op in run]

    def _runs(self, position: int) -> list[Sequence[Op]]:
        p = self.donation.program
        return call_from(position, p) if p.ops[position].name in self.kernels else [run_from(position, p)]

    def optimizer(self, position: int) -> None:
        """One call. The lists are named, so that a debugger shows them."""
        p, runs = self.donation.program, self._runs(position)
        changed = self._changed(position, [op for run in runs for op in run])
        given, after, lists = list[str](), list[str](), list[str]()
        for n, ops in enumerate(runs):
            f = formula(p, ops)
            columns = [self._list(f"{name}s{f'_{n}' if n else ''}") for name in f.each]
            column_of = dict(zip(f.each, columns, strict=True))
            for name, column in zip(f.each, columns, strict=True):
                self.emit(f"{column} = [{', '.join(self._entries(position, ops, f, name, changed))}]")
            position += len(ops)
            given += [*columns, *(self.name(r.name) for r in shared_of(ops[0], f))]
            after += [f"{', '.join(self.name(op.results[c]) for op in ops)}, = {column_of[name]}" for c, name in enumerate(f.updated)]
            lists += columns
        first = runs[0][0]
        if first.name in self.kernels:
            self.emit(f"{self.kernels[first.name]}({', '.join(given)})")
        elif first.target in FUSED:
            self._fused(first, column_of)
        else:
            self.emit(f"ops.optim.in_place({f.kind!r}, {f.each!r}, {f.shared!r}, {dict(f.options)!r})({', '.join(given)})")
        for line in after:
            self.emit(line)
        self.emit(f"del {', '.join(lists)}")

    def _list(self, word: str) -> str:
        """A name that no value has."""
        return self.name(f"{word} " if word in self.donation.program.types else word)

    def _changed(self, position: int, ops: Sequence[Op]) -> dict[str, str]:
        """Of each old value that is updated in its own memory, the new one."""
        out: dict[str, str] = {}
        for n, op in enumerate(ops, position):
            for name, result in zip(updated_of(op), op.results, strict=True):
                old = op.args[operands_of(op).index(name)]
                assert isinstance(old, Ref)
                if old.name not in out and (self.donation.in_place(n, old.name, result) or self.donation.in_block(n, old.name, result)):
                    out[old.name] = result
        return out

    def _entries(self, position: int, ops: Sequence[Op], f: Formula, name: str, changed: Mapping[str, str]) -> list[str]:
        """A list of the call: contiguous tensors, as the kernels want them; copies of what must not change, and of what the call changes elsewhere, for it has no order."""
        out, memory = list[str](), frozenset[str]().union(*(self.donation.roots[old] for old in changed))
        for n, op in enumerate(ops, position):
            ref = op.args[operands_of(op).index(name)]
            assert isinstance(ref, Ref)
            value, copied = self.name(ref.name), f"{self.name(ref.name)}.clone(memory_format=torch.contiguous_format)"
            if name in f.updated:
                out.append(value if changed.get(ref.name) == op.results[f.updated.index(name)] else copied)
                continue
            scaled = name == "grad" and "scale" in f.shared and op.name not in self.kernels  # in place, by torch
            again = scaled and any(self.donation.last_use[root] > n for root in self.donation.memory(ref.name))
            wide = f".to({DTYPES[op.type.dtype]})" if name == "grad" and op.target in FUSED and op.name not in self.kernels and self.donation.program.types[ref.name].dtype != op.type.dtype else ""
            out.append(copied if not wide and (again or self.donation.roots[ref.name] & memory) else f"{value}{wide}.contiguous()")
        return out

    def _fused(self, first: Op, lists_of: Mapping[str, str]) -> None:
        """Of torch; ``lists_of``: the name of each list. (CUDA kernels read the learning rate as float32.)"""
        lr = first.args[-1]
        assert isinstance(lr, Ref)
        rate = self.name(lr.name)
        given = [f"lr={rate}.float() if {rate}.is_cuda else {rate}", f"weight_decay={_number(first, 'weight_decay')}"]
        if first.target == "optim.sgd":
            lists = [lists_of["param"], lists_of["grad"], lists_of.get("momentum_buffer", "[]")]
            given += [f"{k}={_number(first, k)}" for k in ("momentum", "dampening")] + [f"nesterov={bool(first.kw('nesterov', False))}", "is_first_step=False"]
        else:
            lists = [*(lists_of[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq")), lists_of.get("max_exp_avg_sq", "[]"), f"[s.float() for s in {lists_of['step']}]"]
            betas = first.kw("betas")
            assert isinstance(betas, tuple)
            given += [f"beta1={betas[0]!r}", f"beta2={betas[1]!r}", f"eps={_number(first, 'eps')}", f"amsgrad={bool(first.kw('amsgrad', False))}"]
        scale = first.kw("scale")
        if isinstance(scale, Ref) and first.type.dtype == "f32":  # the kernel divides, in float32
            given.append(f"grad_scale={self.name(scale.name)}.reciprocal()")
        elif isinstance(scale, Ref):
            self.emit(f"torch._foreach_mul_({lists_of['grad']}, {self.name(scale.name)})")
        skip = first.kw("skip")
        given += [f"found_inf={self.name(skip.name)}.float()"] if isinstance(skip, Ref) else []
        given.append(f"maximize={bool(first.kw('maximize', False))}")
        self.emit(f"{FUSED[first.target]}({', '.join(lists + given)})")


def run_from(position: int, p: Program) -> Sequence[Op]:
    """The updates from ``position`` on that have one formula."""
    first = p.ops[position]
    end, made = position + 1, set(first.results)
    while end < len(p.ops) and p.ops[end].target in UPDATES and formula_of(p, p.ops[end]) == formula_of(p, first) and not any(r.name in made for r in p.ops[end].refs):
        made.update(p.ops[end].results)
        end += 1
    return p.ops[position:end]


def call_from(position: int, p: Program) -> list[Sequence[Op]]:
    """The runs from ``position`` on that one kernel updates: of parameter groups with options of their own, of several optimizers."""
    first, out, made = p.ops[position], list[Sequence[Op]](), set[str]()
    while position < len(p.ops) and (op := p.ops[position]).target in UPDATES and place_of(op) == place_of(first):
        run = run_from(position, p)
        if any(r.name in made for each in run for r in each.refs):
            break
        out.append(run)
        made.update(r for each in run for r in each.results)
        position += len(run)
    return out


@dataclass(frozen=True)
class Call:
    """Of one kernel: a formula of each run of updates; ``on_host``: in the host's memory."""

    runs: tuple[Sequence[Op], ...]
    formulas: tuple[Formula, ...]
    on_host: bool

    @property
    def name(self) -> str:
        return name_of(self.formulas) + ("_on_host" if self.on_host else "")


def calls_of(p: Program) -> Iterator[Call]:
    """All updates of a program, as kernels do them."""
    done = 0
    for n, op in enumerate(p.ops):
        if op.target in UPDATES and n >= done:
            runs = call_from(n, p)
            done = n + sum(map(len, runs))
            yield Call(tuple(runs), tuple([formula(p, run) for run in runs]), op.type.host)


def shared_of(op: Op, f: Formula) -> list[Ref]:
    """What all tensors of its call read."""
    named = dict(zip(operands_of(op), op.args, strict=False))
    return [r for name in f.shared if isinstance(r := named.get(name, op.kw(name)), Ref)]


def _number(op: Op, key: str) -> str:
    value = op.kw(key, 0.0)
    return repr(float(value)) if isinstance(value, int | float) else repr(value)
