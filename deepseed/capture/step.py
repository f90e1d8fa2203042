"""``capture``: from model, batch and optimizer to a Program with everything that the runtime needs to feed it."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module

from deepseed.capture.attributes import MISSING, Reads, short
from deepseed.capture.batch import DTYPES, BatchSpec, Call, rebuild, tensors, type_of
from deepseed.capture.convert import Emitter, convert, kept_inputs, live, reachable
from deepseed.capture.errors import CaptureError
from deepseed.capture.functional import Flat, as_inputs, functional
from deepseed.capture.gradients import SCALE, LossScale, ready, reduced
from deepseed.capture.guards import Guard, Read, Reader
from deepseed.capture.masks import name_constant_masks
from deepseed.capture.metadata import Tracker, Where
from deepseed.capture.options import Optimizers
from deepseed.capture.recorder import Recorder
from deepseed.capture.state import StateSlot
from deepseed.capture.structure import Structure, slots
from deepseed.capture.switches import switched
from deepseed.capture.trace import record
from deepseed.capture.update import update
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import PACKED, SHOWN, Output, Program, Ref
from deepseed.ir.verify import verify

Want = Literal["step", "loss_and_grads", "loss", "forward", "module"]
FORWARD = ("forward", "loss")  # without a backward
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class Captured:
    """A captured step and what feeds it. Values are looked up by the keys of the program's inputs."""

    program: Program
    constants: dict[str, Tensor]
    guards: tuple[Guard, ...]
    reads: Reads  # the Python values that the model read, and those that it writes
    structure: Structure
    batch: BatchSpec
    parameters: dict[str, nn.Parameter]
    aliases: dict[str, str]  # further name of a tied parameter -> its first name
    buffers: dict[str, Tensor]
    state: dict[str, StateSlot]
    hyper: dict[str, Callable[[], float]]
    options: dict[str, Any]  # what the program has of the optimizer's options (``fixed_options``), e.g. "betas/0"
    moved: frozenset[str]  # options that are inputs of the program, e.g. "momentum/0"
    unused: tuple[str, ...]  # trainable parameters that the loss does not depend on: no gradient, no update
    seed: int
    output: Any = None  # want="forward" or "module": the model's output with keys in place of tensors
    differentiable: tuple[str, ...] = ()  # want="module": the outputs that have a tangent, in the order of the output

    def rebuild_output(self, values: Mapping[str, Tensor]) -> Any:
        """The model's output in its own form, from the tensors by key."""
        return rebuild(self.output, values)


@dataclass(frozen=True)
class _Source:
    role: str
    key: str
    fake: Tensor


def capture(
    model: Any,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: Optimizers = None,
    clip_grad_norm: float | None = None,
    want: Want | None = None,
    grads: bool = False,
    compute: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    loss_scale: LossScale | None = None,
    moving: Collection[str] = (),
    wide: bool = False,
    seed: int = 0,
    towards: Collection[str] = (),
    pending: bool = False,
) -> Captured:
    """One step of ``model`` on batches like ``batch`` as a Program (mesh of one device, facts {captured}).

    ``batch``: a mapping is passed as keywords, a tuple or list as arguments, anything else as the one argument. The loss is
    ``loss_fn(model, batch)``, else the ``loss`` of the model's output. ``moving``: optimizer options that become inputs, as ``lr`` is. ``wide``:
    floats that the model, the loss or the optimizer creates, or casts to, are float64 (for a verification). ``want``: ``step`` (needs ``optimizer``; the default with
    one), ``loss_and_grads`` (the default without), ``loss``, ``forward`` (all tensors of the model's output), ``module``: these, and from an input of role
    ``tangent`` for each of them that can be differentiated the gradients of parameters and of the batch entries ``towards``. ``grads``: also the
    gradients, before clipping. ``pending``: a module's wait for an update of their own (``capture_update``). ``compute``: parameters and batch are cast to this dtype for forward and backward; what is stored and updated keeps its own. ``reduce``: gradients
    are reduced in this dtype, else as the backward makes them. ``loss_scale``: of a step. ``clip_grad_norm``: global 2-norm, as ``torch.nn.utils.clip_grad_norm_``. The model may be on the
    meta device; its training flag and ``requires_grad`` flags count as they are. Raises CaptureError.
    """
    want = want or ("step" if optimizer is not None else "loss_and_grads")
    if want == "step" and optimizer is None:
        raise CaptureError('want="step" needs an optimizer', fix='pass optimizer=, or want="loss_and_grads"')
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    spec, structure = BatchSpec.of(batch), Structure(model)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    hooked = next((n for n, p in parameters.items() if want not in FORWARD and (p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))), "")
    if hooked:
        raise CaptureError(f"parameter {hooked!r} has a hook on its gradient, which a compiled step does not run", fix="remove it; scale or mask in the loss, or in the optimizer")
    loss_scale = loss_scale if want == "step" else None
    scaled = loss_scale.initial if loss_scale is not None and not loss_scale.moves else SCALE if loss_scale is not None else None
    given = (model, batch, loss_fn, want, parameters, buffers, compute, wide, scaled, frozenset(towards))
    traced = _Traced(*given)
    if structure.changed():  # its first call has put hooks on modules, and noted that: they stay where they are, and so does what was noted
        for write in traced.python.writes:
            if write.before is MISSING:
                write.apply()
        structure, traced = Structure(model), _Traced(*given)
    if traced.python.writes:
        _check_settles(traced.python, lambda: _Traced(*given).python)
    e = Emitter()
    refs = {(s.role, s.key): e.input(type_of(s.fake), s.role, s.key) for s in traced.sources}
    constants: dict[str, Tensor] = {}
    lifted = [_constant(e, c, constants) for c in traced.flat.constants]
    values = convert(traced.flat.graph, [*refs.values(), *lifted], traced.flat.outputs, e, traced.phases())
    named = dict(zip(traced.names, values, strict=True))
    outputs: list[Output] = []
    e.where = Where()
    gradients = reduced(e, {key: v for (role, key), v in named.items() if role == "grad" and isinstance(v, Ref)}, None if wide or reduce is None else DTYPES[reduce])
    for (role, key), v in named.items():
        if role in ("loss", *SHOWN) and isinstance(v, Ref):
            outputs.append(Output(v, role, key))
    slots = {slot.key: slot for slot in loss_scale.slots()} if loss_scale is not None else {}
    known = {key: refs.get(("state", key)) or e.input(slot.type, "state", key) for key, slot in slots.items()}
    limit = None if clip_grad_norm is None else float(clip_grad_norm)
    final, more = ready(e, gradients, limit if want not in FORWARD else None, loss_scale, known)
    outputs += more
    if grads or want in ("loss_and_grads", "module"):
        role = "pending" if pending else "grad"
        outputs += [Output(final.unscaled(e, key), role, key) for key in gradients]
    written = {name: v if isinstance(v := named["param", name], Ref) else refs["param", name] for name in parameters}  # by forward, or as it came in
    done = update(e, optimizer if want == "step" else None, parameters, written, final, moving, wide)
    outputs += done.outputs
    updated = {o.key for o in outputs if o.role == "param"}
    for (role, key), v in named.items():  # what forward wrote into; a parameter is updated from there
        if isinstance(v, Ref) and (role == "buffer" or (role == "param" and key not in updated)) and v != refs[role, key]:
            outputs.append(Output(final.unless_skipped(e, v, refs[role, key], key), role, key))
    whole = Program(want, Mesh(()), tuple(e.inputs), live(e.ops, [o.ref for o in outputs]), tuple(outputs))
    ops = live(name_constant_masks(whole).ops, [o.ref for o in outputs])
    inputs = kept_inputs(e.inputs, ops, outputs, ("param", "buffer", "batch", "tangent"))
    kept = {op.origin for op in ops}
    guards = tuple(_guard(r, traced.mode, spec, constants) for r in traced.reads)
    needed = {i.key for p in (*(g.program.inputs for g in guards), inputs) for i in p if i.role == "constant"}
    program = Program(want, Mesh(()), inputs, ops, tuple(outputs), frozenset({"captured", *([PACKED] if any(op.target == "paged_attention" for op in ops) else [])}), tuple((k, o) for k, o in done.origins.items() if k in kept))
    return Captured(
        verify(program), {key: t for key, t in constants.items() if key in needed}, guards, traced.python, structure,
        spec, parameters, aliases(model), buffers, slots | done.state, done.hyper, done.options, done.moved,
        tuple(n for n, p in parameters.items() if p.requires_grad and n not in gradients) if want not in FORWARD else (), seed, traced.output, tuple(traced.tangents),
    )  # fmt: skip


class _Traced:
    """The functional graph of forward, loss and gradients; ``names``: (role, key) of each of its outputs."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn | None,
        want: Want,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        compute: torch.dtype | None,
        wide: bool,
        scale: float | str | None,
        towards: frozenset[str],
    ) -> None:
        """``scale``: of the loss; a number, or the key of the state that holds it. ``towards``: batch entries whose gradients are wanted."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.names: list[tuple[str, str]] = []
        self.output: Any = None
        self.tangents: dict[str, Tensor] = {}  # by output, as the trace made them
        trainable = [n for n, p in parameters.items() if p.requires_grad and want not in FORWARD]
        with self.mode:
            self.sources = [_Source("param", n, torch.empty(p.shape, dtype=p.dtype, requires_grad=n in trainable)) for n, p in parameters.items()]
            self.sources += [_Source("buffer", n, torch.empty(b.shape, dtype=b.dtype)) for n, b in buffers.items()]
            self.sources += [_Source("batch", n, torch.empty(t.shape, dtype=t.dtype, requires_grad=n in towards)) for n, t in tensors(batch).items()]
            self.sources += [_Source("state", scale, torch.empty((), dtype=torch.float32))] if isinstance(scale, str) else []
            self.sources += [_Source("rng", "rng", torch.empty(2, dtype=torch.int64))]
        keys = [(s.role, s.key) for s in self.sources]

        real: dict[int, Tensor] = {}
        held: list[Tensor] = []  # keeps the ids of ``real``

        def step(*flat: Tensor) -> list[Any]:
            given = dict(zip(keys, flat, strict=True))
            real.update({id(given["param", key]): p for key, p in parameters.items()})
            held.extend(flat)
            swapped = slots(model, {key: _cast(given["param", key], compute) for key in parameters} | {key: given["buffer", key].clone() for key in buffers})
            inner = rebuild(batch, {key: _cast(t, compute) for (role, key), t in given.items() if role == "batch"})
            found: dict[tuple[str, str], Any] = {}
            with _reparametrize_module(model, swapped):
                if want == "forward":
                    with torch.no_grad():
                        result = call(model, inner)
                    self.output = rebuild(result, {key: key for key in tensors(result)})
                    found = {("output", key): t for key, t in tensors(result).items()}
                elif want == "loss":
                    with torch.no_grad():
                        found = {("loss", "loss"): _loss(model, inner, loss_fn, trained=False)}
                elif want == "module":
                    result = call(model, inner)
                    self.output = rebuild(result, {key: key for key in tensors(result)})
                    found = {("output", key): t for key, t in tensors(result).items()}
                    tracker.backward = True
                    slopes = {key: t for key, t in tensors(result).items() if t.requires_grad}
                    self.tangents = {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in slopes.items()}
                    ends = [("grad", key, swapped[key]) for key in trainable] + [("batch_grad", key, given["batch", key]) for key in sorted(towards)]
                    ends = ends if slopes else []
                    got = torch.autograd.grad([*slopes.values()], [t for _, _, t in ends], [*self.tangents.values()], allow_unused=True) if ends else ()
                    found |= {(role, key): g for (role, key, _), g in zip(ends, got, strict=True)}
                else:
                    loss = _loss(model, inner, loss_fn)
                    tracker.backward = True
                    found["loss", "loss"] = loss
                    wanted = [swapped[key] for key in trainable]  # as narrow as they are computed
                    start = None if scale is None else (given["state", scale] if isinstance(scale, str) else torch.full((), scale)).to(loss.dtype)
                    got = torch.autograd.grad(loss, wanted, start, allow_unused=True) if wanted else ()
                    found |= {("grad", key): g for key, g in zip(trainable, got, strict=True)}
            lost = next((key for key in parameters if swapped[key] is not given["param", key] and swapped[key]._version), None)
            if lost is not None:
                raise CaptureError(f"forward writes into parameter {lost!r}, which is computed in {DTYPES[swapped[lost].dtype]}: the stored one would not change",
                                   fix="write into it outside of forward, or use a plan without a precision word")  # fmt: skip
            found |= {("param", key): given["param", key] for key in parameters} | {("buffer", key): swapped[key] for key in buffers}
            self.names = list(found)
            return [*(v.detach() if isinstance(v, Tensor) else v for v in found.values()), *self.tangents.values()]

        tracker = Tracker(model)
        reader = Reader(tracker, keys, tensors(batch))
        recorder = Recorder(model, loss_fn)
        with switched(model), recorder.on(), torch.enable_grad():
            before = _drawn()
            module = record(step, [s.fake for s in self.sources], len(keys) - 1, tracker, reader, wide)
            for source, was, now in zip(("random", "numpy.random"), before, _drawn(), strict=True):
                if was != now:
                    raise CaptureError(
                        f"the forward or the loss of {type(model).__name__} draws from Python's {source}: once, when it is captured, and never again",
                        fix="draw with torch.rand, whose numbers are new at every step; a branch on them must be a torch.where",
                    )
        _check_leaks(model, real, recorder)
        self.python = recorder.reads()
        self.reads: list[Read] = reader.reads
        with self.mode:
            made = [_Source("tangent", key, torch.empty(t.shape, dtype=t.dtype)) for key, t in self.tangents.items()]
        as_inputs(module, len(self.sources), len(made))
        self.sources += made
        self.flat: Flat = functional(module, [s.fake for s in self.sources], self.mode)

    def phases(self) -> dict[fx.Node, str]:
        """Forward is what loss, outputs and buffers need, and what was traced outside autograd's backward."""
        wanted = reachable(v for v, (role, _) in zip(self.flat.outputs, self.names, strict=True) if role not in ("grad", "batch_grad"))
        return {
            n: "backward" if n.meta.get("where", Where()).backward and n not in wanted else "forward"
            for n in self.flat.graph.nodes if n.op == "call_function"
        }  # fmt: skip


def _drawn() -> tuple[object, object]:
    """The states of Python's and NumPy's global generators."""
    numpy: Any = sys.modules.get("numpy")  # nobody can draw from what was never imported
    state = numpy.random.get_state(legacy=False) if numpy is not None else None
    return random.getstate(), state and (state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"])


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.to(dtype) if dtype is not None and t.is_floating_point() else t


def call(model: Any, batch: Any) -> Any:
    """``model(**batch)``, ``model(*batch)`` or ``model(batch)``; both of the first two for a ``Call``."""
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn | None, trained: bool = True) -> Tensor:
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    else:
        result = call(model, batch)
        loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result if isinstance(result, Tensor) else None)
    name = type(model).__name__
    if not isinstance(loss, Tensor):
        raise CaptureError(f"{name} gave no loss (got {type(loss).__name__})", fix="put labels into the batch, or pass loss_fn(model, batch) -> scalar tensor")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise CaptureError(f"the loss of {name} is {DTYPES.get(loss.dtype)}{list(loss.shape)}, not one float", fix="reduce it: loss.mean() or loss.sum()")
    if trained and not loss.requires_grad:
        raise CaptureError(f"the loss of {name} depends on no trainable parameter", fix="set requires_grad on the parameters to train, and compute the loss with grad enabled")
    return loss.reshape(())


def aliases(model: nn.Module) -> dict[str, str]:
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != name}


def _constant(e: Emitter, value: Tensor, constants: dict[str, Tensor]) -> Ref:
    if value.numel() == 1:
        return e.full(value.item(), type_of(value))
    t = value.detach().cpu().contiguous()
    raw = t.reshape(-1).view(torch.uint8).numpy().tobytes()
    key = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode() + raw).hexdigest()[:16]
    constants[key] = t
    known = next((i for i in e.inputs if i.role == "constant" and i.key == key), None)
    return Ref(known.name) if known is not None else e.input(type_of(t), "constant", key)


def _guard(read: Read, mode: FakeTensorMode, spec: BatchSpec, constants: dict[str, Tensor]) -> Guard:
    e = Emitter(where=read.where)
    types = [spec.types[key] for key in read.keys]
    with mode:
        fakes = [torch.empty(t.shape, dtype=_TORCH[t.dtype]) for t in types]
    flat = functional(read.module, fakes, mode)
    inputs = [e.input(t, "batch", key) for t, key in zip(types, read.keys, strict=True)]
    lifted = [_constant(e, c, constants) for c in flat.constants]
    (out,) = convert(flat.graph, [*inputs, *lifted], flat.outputs, e)
    assert isinstance(out, Ref)
    program = Program("guard", Mesh(()), tuple(e.inputs), live(e.ops, [out]), (Output(out, "output", "value"),), frozenset({"captured"}))
    return Guard(verify(program), read.value, read.where.path, read.where.line)


def _check_settles(once: Reads, trace_again: Callable[[], Reads]) -> None:
    """A value that is made once (a cache) is the same from the second step on; refuse one that each step changes and reads."""
    for write in once.writes:
        write.apply()
    try:
        twice = trace_again()
    finally:
        for write in once.writes:
            write.undo()
    for write in once.writes:
        more = next((w for w in twice.writes if w.holder is write.holder and w.name == write.name), None)
        if more is not None:
            path, _, name = write.path.rpartition(".")
            raise CaptureError(
                f"the forward reads {name!r} of {type(write.holder).__name__} and changes it each time: {short(write.before)}, {short(write.after)}, "
                f"{short(more.after)}; each step would be another program",
                path=path, line=write.line, fix=f"keep it in a buffer: self.register_buffer({name!r}, torch.tensor(...)); or count outside of the forward",
            )  # fmt: skip


def _check_leaks(model: nn.Module, real: Mapping[int, Tensor], recorder: Recorder) -> None:
    """Give back parameters that a module cached while it ran on fakes, and what each forward computes anew (a weight under a norm);
    refuse any other fake tensor left on a module."""
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, FakeTensor) and id(value) in real:
                setattr(module, attribute, real[id(value)])
            elif isinstance(value, (list, dict)):
                for key, held in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    if isinstance(held, FakeTensor) and id(held) in real:
                        value[key] = real[id(held)]
            value = vars(module)[attribute]
            left = [*value.values()] if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(v, FakeTensor) for v in left) and not recorder.give_back(module, attribute):
                raise CaptureError(
                    f"the model stores a tensor of its forward on itself ({type(module).__name__}.{attribute}), so steps would depend on one another",
                    path=name, fix="return the tensor, or register it as a buffer",
                )  # fmt: skip
