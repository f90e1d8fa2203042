"""Writes to stored tensors: optimizers in place, ``copy_`` for all other new parameters and state.

    optim.adamw(param, grad, states.., lr, states=[..], betas=, eps=, weight_decay=, amsgrad=, maximize=)
    optim.adam(the same)          optim.sgd(.., momentum=, dampening=, weight_decay=, nesterov=, maximize=)

``states`` names the state operands as torch.optim does; results are the new parameter and each new state but ``step``, which
comes in counted up already. ``skip=`` (nothing changes) and ``scale=`` (of the gradient) are operands too. Updates that stand side by side with the same options become one call over lists: of the kernel
that a back end has made of it (deepseed.codegen.updates), else of torch's fused one. An entry is updated in its own memory (a block of a stored tensor in that tensor's) where its stored tensor has no later reader, else on a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deepseed.codegen.donation import Donation
from deepseed.codegen.expressions import DTYPES
from deepseed.codegen.updates import shared_of
from deepseed.ir.program import Arg, Op, Program, Ref

KERNELS = {"optim.adamw": "torch._fused_adamw_", "optim.adam": "torch._fused_adam_", "optim.sgd": "torch._fused_sgd_"}


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

    def optimizer(self, position: int, ops: Sequence[Op]) -> None:
        """One call. The lists are named, so that a debugger shows them."""
        first = ops[0]
        states = _words(first.kw("states", ()))
        columns = ["params", "grads", *(f"{name}s" for name in states)]
        updated = [c for c in columns if c not in ("grads", "steps")]  # one result each
        taken: set[str] = set()
        for c, column in enumerate(columns):
            result = updated.index(column) if column in updated else None
            if column == "grads" and isinstance(first.kw("scale"), Ref) and first.name not in self.kernels:
                entries = self._apart(position, ops, c)
            else:
                entries = [self._entry(position + n, op, c, result, taken) for n, op in enumerate(ops)]
            self.emit(f"{column} = [{', '.join(entries)}]")
        if first.name in self.kernels:
            self.emit(f"{self.kernels[first.name]}({', '.join([*columns, *(self.name(r.name) for r in shared_of(first).values())])})")
        else:
            self._fused(first, states)
        for c, column in enumerate(updated):
            self.emit(f"{', '.join(self.name(op.results[c]) for op in ops)}, = {column}")
        self.emit(f"del {', '.join(columns)}")

    def _fused(self, first: Op, states: Sequence[str]) -> None:
        """Of torch. (CUDA kernels read the learning rate as float32.)"""
        lr = first.args[-1]
        assert isinstance(lr, Ref)
        rate = self.name(lr.name)
        given = [f"lr={rate}.float() if {rate}.is_cuda else {rate}", f"weight_decay={_number(first, 'weight_decay')}"]
        if first.target == "optim.sgd":
            lists = ["params", "grads", "momentum_buffers" if "momentum_buffer" in states else "[]"]
            given += [f"{k}={_number(first, k)}" for k in ("momentum", "dampening")] + [f"nesterov={bool(first.kw('nesterov', False))}", "is_first_step=False"]
        else:
            most = "max_exp_avg_sqs" if "max_exp_avg_sq" in states else "[]"
            lists = ["params", "grads", "exp_avgs", "exp_avg_sqs", most, "[s.float() for s in steps]"]
            betas = first.kw("betas")
            assert isinstance(betas, tuple)
            given += [f"beta1={betas[0]!r}", f"beta2={betas[1]!r}", f"eps={_number(first, 'eps')}", f"amsgrad={bool(first.kw('amsgrad', False))}"]
        scale = first.kw("scale")
        if isinstance(scale, Ref) and first.type.dtype == "f32":  # the kernel divides, in float32
            given.append(f"grad_scale={self.name(scale.name)}.reciprocal()")
        elif isinstance(scale, Ref):
            self.emit(f"torch._foreach_mul_(grads, {self.name(scale.name)})")
        skip = first.kw("skip")
        given += [f"found_inf={self.name(skip.name)}.float()"] if isinstance(skip, Ref) else []
        given.append(f"maximize={bool(first.kw('maximize', False))}")
        self.emit(f"{KERNELS[first.target]}({', '.join(lists + given)})")

    def _apart(self, position: int, ops: Sequence[Op], column: int) -> list[str]:
        """Gradients that are scaled in place: copies of those whose memory is read once more, by another update or by the user."""
        out = []
        for n, op in enumerate(ops, position):
            ref = op.args[column]
            assert isinstance(ref, Ref)
            if (wide := self._widened(op)):  # a copy
                out.append(f"{self.name(ref.name)}{wide}.contiguous()")
                continue
            again = any(self.donation.last_use[root] > n for root in self.donation.memory(ref.name))
            out.append(f"{self.name(ref.name)}.clone(memory_format=torch.contiguous_format)" if again else f"{self.name(ref.name)}.contiguous()")
        return out

    def _entry(self, position: int, op: Op, column: int, result: int | None, taken: set[str]) -> str:
        """One tensor of a list, contiguous as the kernels want it; a copy of what must not change."""
        ref = op.args[column]
        assert isinstance(ref, Ref)
        name = self.name(ref.name)
        if result is None:
            return f"{name}{self._widened(op) if column == 1 else ''}.contiguous()"
        done = op.results[result]
        if ref.name not in taken and (self.donation.in_place(position, ref.name, done) or self.donation.in_block(position, ref.name, done)):
            taken.add(ref.name)
            return name
        return f"{name}.clone(memory_format=torch.contiguous_format)"

    def _widened(self, op: Op) -> str:
        """Torch's kernels want gradients as wide as parameters."""
        grad = op.args[1]
        assert isinstance(grad, Ref)
        narrow = self.donation.program.types[grad.name].dtype != op.type.dtype and op.name not in self.kernels
        return f".to({DTYPES[op.type.dtype]})" if narrow else ""


def run_from(position: int, p: Program) -> Sequence[Op]:
    """The updates from ``position`` on that one call can do."""
    first = p.ops[position]
    end, made = position + 1, set(first.results)
    while end < len(p.ops) and _options(p, p.ops[end]) == _options(p, first) and not any(r.name in made for r in p.ops[end].refs):
        made.update(p.ops[end].results)
        end += 1
    return p.ops[position:end]


def _options(p: Program, op: Op) -> tuple[object, ...]:
    return op.target, op.kwargs, op.args[-1], len(op.args), *(p.types[r.name].dtype for r in op.refs[:2])


def _words(value: Arg) -> tuple[str, ...]:
    return tuple(str(v) for v in value) if isinstance(value, tuple) else ()


def _number(op: Op, key: str) -> str:
    value = op.kw(key, 0.0)
    return repr(float(value)) if isinstance(value, int | float) else repr(value)
