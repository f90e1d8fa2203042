"""Writes to stored tensors: torch's fused optimizers in place, ``copy_`` for all other new parameters and state.

An optimizer op updates a group of parameters at once; its tensor operands are tuples, one entry a parameter, and its results
are the new values in the same order, list by list (all new parameters, then all new first moments, …):

    optim.adamw(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1=, beta2=, weight_decay=, eps=, amsgrad=, maximize=)
    optim.adam(the same)
    optim.sgd(params, grads, momentum_buffers, lr, momentum=, dampening=, weight_decay=, nesterov=, maximize=)

``max_exp_avg_sqs`` is empty without amsgrad, ``momentum_buffers`` without momentum. ``steps`` come in as they were before the
update and out increased by one. An entry is updated in place where its stored tensor has no later reader, else on a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepseed.codegen.donation import Donation
from deepseed.ir.program import Arg, Op, Ref


@dataclass(frozen=True)
class Kernel:
    """A fused optimizer of torch: its operand lists in order, and which of them it updates (the op's results)."""

    function: str
    lists: tuple[str, ...]
    updated: tuple[str, ...]
    scalars: tuple[str, ...]


_ADAM_LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
_ADAM_UPDATED = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
_ADAM_SCALARS = ("beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize")
OPTIMIZERS = {
    "optim.adamw": Kernel("torch._fused_adamw_", _ADAM_LISTS, _ADAM_UPDATED, _ADAM_SCALARS),
    "optim.adam": Kernel("torch._fused_adam_", _ADAM_LISTS, _ADAM_UPDATED, _ADAM_SCALARS),
    "optim.sgd": Kernel(
        "torch._fused_sgd_",
        ("params", "grads", "momentum_buffers"),
        ("params", "momentum_buffers"),
        ("weight_decay", "momentum", "dampening", "nesterov", "maximize"),
    ),
}


@dataclass
class Update:
    """Emits the writes of one program."""

    donation: Donation
    name: Callable[[str], str]
    emit: Callable[[str], None]

    def after(self, position: int) -> None:
        """The copies into stored tensors that are due after the op at ``position``."""
        for stored, at in self.donation.written.items():
            if at == position:
                new = self.donation.stored[stored].ref.name
                new += ".copy" if new in self.donation.copied else ""
                self.emit(f"{self.name(stored)}.copy_({self.name(new)})")

    def optimizer(self, position: int, op: Op) -> None:
        """One fused update. The lists are named, so that a debugger shows them."""
        kernel = OPTIMIZERS[op.target]
        lists = {label: _refs(arg) for label, arg in zip(kernel.lists, op.args, strict=False)}
        results = iter(op.results)
        seen: set[str] = set()
        after: list[str] = []
        for label in kernel.lists:
            values = lists[label]
            entries = [self.name(v) for v in values]
            if label in kernel.updated:
                new = [next(results) for _ in values]
                for i, (value, result) in enumerate(zip(values, new, strict=True)):
                    if value in seen or not self.donation.in_place(position, value, result):
                        entries[i] += ".clone()"
                    seen.add(value)
                if new:
                    after.append(f"{', '.join(map(self.name, new))}, = {label}")
            self.emit(f"{label} = [{', '.join(entries)}]")
        lr = op.args[len(kernel.lists)]
        assert isinstance(lr, Ref)
        scalars = ", ".join([f"lr={self.name(lr.name)}", *(f"{k}={_number(op, k)}" for k in kernel.scalars)])
        state = "max_exp_avg_sqs, [s.float() for s in steps]" if "steps" in kernel.lists else "momentum_buffers"
        moments = "exp_avgs, exp_avg_sqs, " if "steps" in kernel.lists else ""
        if "steps" in kernel.lists:
            self.emit("torch._foreach_add_(steps, 1)")
        else:
            scalars += ", is_first_step=False"
        self.emit(f"{kernel.function}(params, grads, {moments}{state}, {scalars})")
        for line in after:
            self.emit(line)
        self.emit(f"del {', '.join(kernel.lists)}")


def _refs(arg: Arg) -> tuple[str, ...]:
    items = arg if isinstance(arg, tuple) else () if arg is None else (arg,)
    return tuple(item.name for item in items if isinstance(item, Ref))


_DEFAULTS: dict[str, Arg] = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0}


def _number(op: Op, key: str) -> str:
    value = op.kw(key, _DEFAULTS.get(key, False))
    return repr(value if isinstance(value, bool) else float(value))  # type: ignore[arg-type]
