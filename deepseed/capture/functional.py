"""The recorded graph without in-place ops, its tensor constants as inputs.

An in-place op on a tensor that no other node views is rewritten where it stands (``div_`` on dropout's fresh mask). Any other
mutation (a slice that is written to, a buffer) sends the whole graph once more through torch's own functionalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from deepseed.capture.guards import storages
from deepseed.capture.metadata import Where
from deepseed.capture.trace import tagged


@dataclass(frozen=True)
class Flat:
    """A functional graph: its placeholders are the given inputs, then ``constants``; its output is one flat tuple."""

    graph: fx.Graph
    constants: tuple[Tensor, ...]
    outputs: tuple[Any, ...]  # fx nodes, or Python values where an output is none


def functional(module: fx.GraphModule, fakes: Sequence[Tensor], mode: FakeTensorMode) -> Flat:
    """``module`` (placeholders for ``fakes``) without mutation, tensor constants lifted to inputs behind ``fakes``."""
    constants = _constants(module)
    graph = module.graph
    typed = all("val" in n.meta for n in graph.nodes if n.op == "call_function")
    if not fakes or not typed or not _rewritten(graph, mode):
        return _replayed(module, fakes, constants, mode)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for name in constants:
        uses = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
        with graph.inserting_after(last):
            last = graph.placeholder(name.replace(".", "_"))
        last.meta.update(uses[0].meta)
        for n in uses:
            n.replace_all_uses_with(last)
            graph.erase_node(n)
    return Flat(graph, tuple(constants.values()), _outputs(graph))


def as_inputs(module: fx.GraphModule, after: int, count: int) -> None:
    """Make placeholders, behind the first ``after``, of the nodes that the last ``count`` outputs are, and drop these outputs."""
    if not count:
        return
    graph = module.graph
    end = next(n for n in graph.nodes if n.op == "output")
    values = list(end.args[0])
    last = [n for n in graph.nodes if n.op == "placeholder"][after - 1]
    for n in values[-count:]:
        with graph.inserting_after(last):
            last = graph.placeholder(f"tangent_{n.name}")
        last.meta.update(n.meta)
        n.replace_all_uses_with(last)
        graph.erase_node(n)
    end.args = (type(end.args[0])(values[:-count]),)
    module.recompile()


def _constants(module: fx.GraphModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for n in module.graph.nodes:
        if n.op == "get_attr":
            value: Any = module
            for part in str(n.target).split("."):
                value = getattr(value, part)
            found[str(n.target)] = value
    return found


def _outputs(graph: fx.Graph) -> tuple[Any, ...]:
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


# in place -----------------------------------------------------------------------------------------------------------


def _rewritten(graph: fx.Graph, mode: FakeTensorMode) -> bool:
    """Turn every in-place op into its functional form, if that is safe for all of them; else touch nothing.

    Safe: no earlier node that shares the written storage is an input, or is used again later.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for n in graph.nodes:
        for s in storages(n):
            sharing.setdefault(s, []).append(n)
    forms: dict[fx.Node, OpOverload] = {}
    for n in graph.nodes:
        if not isinstance(n.target, OpOverload) or not n.target._schema.is_mutable:
            continue
        before = [m for s in storages(n) for m in sharing[s] if order[m] < order[n]]
        form = _form(n, mode)
        if form is None or any(m.op != "call_function" or any(order[u] > order[n] for u in m.users) for m in before):
            return False
        forms[n] = form
    for n, form in forms.items():
        n.target = form
    return True


def _form(n: fx.Node, mode: FakeTensorMode) -> OpOverload | None:
    """``aten.div.Scalar`` for ``aten.div_.Scalar``, if it takes the same arguments and gives the same dtype and shape."""
    assert isinstance(n.target, OpOverload)
    arguments = n.target._schema.arguments
    name, overload = n.target.overloadpacket.__name__, n.target._overloadname
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if not name.endswith("_") or written != [arguments[0].name] or n.target.namespace != "aten":
        return None
    form = getattr(getattr(torch.ops.aten, name[:-1], None), overload, None)
    if not isinstance(form, OpOverload) or _signature(form) != _signature(n.target):
        return None
    args: Any = fx.node.map_arg(n.args, lambda m: m.meta["val"])
    kwargs: Any = fx.node.map_arg(n.kwargs, lambda m: m.meta["val"])
    with mode:
        result = form(*args, **kwargs)
    old = n.meta["val"]
    return form if (result.dtype, result.shape) == (old.dtype, old.shape) else None


def _signature(op: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments]


# replay -------------------------------------------------------------------------------------------------------------


class _Replay(fx.Interpreter):
    """Runs the recorded graph, showing each node's place while its ops run."""

    def __init__(self, module: fx.GraphModule, constants: Mapping[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.constants = constants
        self.where = Where()

    def run_node(self, n: fx.Node) -> Any:
        self.where = n.meta.get("where", Where())
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constants[target]


def _replayed(module: fx.GraphModule, fakes: Sequence[Tensor], constants: Mapping[str, Tensor], mode: FakeTensorMode) -> Flat:
    interpreter = _Replay(module, {})

    def run(*given: Tensor) -> Any:
        interpreter.constants = dict(zip(constants, given[len(fakes) :], strict=True))
        return interpreter.run(*given[: len(fakes)])

    def replay(*flat: Tensor) -> Any:
        with tagged(lambda: interpreter.where):
            return torch.func.functionalize(run, remove="mutations")(*flat)

    with torch.no_grad():
        lifted = [mode.from_tensor(c.detach()) for c in constants.values()]
        out = make_fx(replay, tracing_mode="fake")(*[f.detach() for f in fakes], *lifted)
    return Flat(out.graph, tuple(constants.values()), _outputs(out.graph))
