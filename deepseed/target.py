"""What a command works on: ``path/to/file.py:name``, or ``hf:LlamaForCausalLM(num_hidden_layers=4,hidden_size=128)``.

A name in a file is a callable that returns ``model, batch`` or ``model, batch, dict(loss_fn=, optimizer=, clip_grad_norm=)``,
or such a tuple itself; ``optimizer`` is one, several, or a function of a list of parameters. A class of transformers is built small from its configuration class (``deepseed.tiny``). The same
call notation serves optimizers: ``adamw``, ``sgd(momentum=0.9)``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizers]
EXTRAS = ("loss_fn", "optimizer", "clip_grad_norm")


class TargetError(ValueError):
    """A target that cannot be read, found or called: says what, where and the fix."""


@dataclass
class Target:
    """A model with a batch, and what else its file said (None: nothing)."""

    name: str
    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None
    optimizer: Optimizers | OptimizerFactory | None = None
    clip_grad_norm: float | None = None


def load(text: str, *, meta: bool = False) -> Target:
    """The target that ``text`` names. ``meta``: an ``hf:`` model is built on the meta device, without memory for its values;
    a file builds its model as it likes. Raises TargetError."""
    if text.startswith("hf:"):
        from deepseed.tiny import tiny_model

        name, said = parse_call(text[3:], text)
        model, batch = tiny_model(name, said, meta=meta)
        return Target(text, model, batch)
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise TargetError(f"{text!r} is no target\n  fix: write path/to/file.py:name, or hf:ClassName as in hf:LlamaForCausalLM")
    return _from_file(Path(path), name, text)


def parse_call(text: str, whole: str) -> tuple[str, dict[str, Any]]:
    """``Name(a=1, b="x")`` -> ``("Name", {"a": 1, "b": "x"})``; only keyword arguments with literal values."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args and all(k.arg for k in tree.keywords):
            return tree.func.id, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise TargetError(f"cannot read {whole!r}\n  fix: write Name or Name(field=value, ...) with numbers, strings, True, False or None as values")


def optimizer_factory(text: str) -> OptimizerFactory | None:
    """``adamw``, ``sgd(lr=0.1, momentum=0.9)``: a class of torch.optim by its name, case ignored; ``none`` is None. Parameters
    that the class refuses (Muon takes matrices only) go to an AdamW beside it."""
    name, said = parse_call(text, text)
    if name.lower() == "none":
        return None
    known = {n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    known.pop("optimizer", None)
    cls = known.get(name.lower())
    if cls is None:
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        raise TargetError(f"torch.optim has no optimizer {name!r}{f'; did you mean {near[0]}?' if near else ''}\n  fix: one of {', '.join(sorted(known))}, none")

    def takes(parameter: nn.Parameter) -> bool:
        try:
            cls([parameter], **said)
        except ValueError:
            return False
        return True

    def make(parameters: Iterable[nn.Parameter]) -> Optimizers:
        given = list(parameters)
        if not given:
            raise TargetError(f"--optimizer {text}: the model has no parameters\n  fix: give it parameters to train")
        try:
            taken = [p for p in given if takes(p)]
            if len(taken) == len(given) or not taken:
                return cls(given, **said)
            own = {id(p) for p in taken}
            return [cls(taken, **said), torch.optim.AdamW([p for p in given if id(p) not in own])]
        except (TypeError, ValueError) as error:
            raise TargetError(f"--optimizer {text}: {error}\n  fix: give options that torch.optim.{cls.__name__} takes") from None

    return make


def like(optimizers: Optimizers, model: nn.Module) -> OptimizerFactory:
    """Makes optimizers of the same classes, groups and options for the parameters of another copy of ``model``, in its order."""
    position = {id(p): n for n, p in enumerate(model.parameters())}

    def one(optimizer: torch.optim.Optimizer, given: list[nn.Parameter]) -> torch.optim.Optimizer:
        cls: Any = type(optimizer)
        groups = [{**group, "params": [given[position[id(p)]] for p in group["params"]]} for group in optimizer.param_groups]
        made: torch.optim.Optimizer = cls(groups)
        return made

    def make(parameters: Iterable[nn.Parameter]) -> Optimizers:
        given = list(parameters)
        return one(optimizers, given) if isinstance(optimizers, torch.optim.Optimizer) else [one(o, given) for o in optimizers]

    return make


def own_factory(found: Target) -> OptimizerFactory:
    """Makes optimizers like the target's, which it has, for the parameters of another copy of its model. What is made raises TargetError where a function of the target's makes none."""
    given = found.optimizer
    if isinstance(given, torch.optim.Optimizer) or not callable(given):
        assert given is not None
        return like(given, found.model)

    def make(parameters: Iterable[nn.Parameter]) -> Optimizers:
        fix = "fix: optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), of the list of the model's parameters"
        try:
            made = given(list(parameters))
        except Exception as error:
            raise TargetError(f"{found.name}: its function optimizer raised {raised(error)}\n  {fix}") from error
        if not _are_optimizers(made):
            raise TargetError(f"{found.name}: its function optimizer gives {_said(made)}, no optimizer of torch.optim\n  {fix}")
        return made

    return make


def raised(error: BaseException) -> str:
    """Class and first line of what other code raised."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")


def _from_file(path: Path, name: str, text: str) -> Target:
    if not path.is_file():
        fix = "give a path that is there, as seen from this folder" if path.suffix == ".py" else "write path/to/file.py:name, or hf:ClassName"
        raise TargetError(f"no file {path}{'' if path.is_absolute() else f' in {Path.cwd()}'} (target {text!r})\n  fix: {fix}")
    module = _import(path)
    if not hasattr(module, name):
        near = get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1, cutoff=0.4)
        raise TargetError(f"{path} has no {name!r}\n  fix: " + (f"did you mean {path}:{near[0]}?" if near else f"name a function of {path} that returns model, batch"))
    found = getattr(module, name)
    made = found
    if callable(found) and not isinstance(found, nn.Module):
        try:
            made = found()
        except (Exception, SystemExit) as error:
            raise TargetError(f"calling {name}() at {_where(path, error)} raised {raised(error)}\n  fix: make {name}() of {path} run by itself") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise TargetError(
            f"{text} gives {_said(made)}, not a model and a batch\n"
            "  fix: return model, batch or model, batch, dict(loss_fn=..., optimizer=..., clip_grad_norm=...)"
        )
    extras = made[2] if len(made) == 3 else {}
    if not isinstance(extras, Mapping) or set(extras) - set(EXTRAS):
        unknown = f"this one has {', '.join(sorted(map(repr, set(extras) - set(EXTRAS))))}" if isinstance(extras, Mapping) else f"this is {_said(extras)}"
        raise TargetError(f"{text}: the third value is a dict with {', '.join(EXTRAS)}; {unknown}\n  fix: leave it out")
    target = Target(text, made[0], made[1], **extras)
    if wrong := _wrong(target):
        raise TargetError(f"{text}: {wrong}")
    return target


def _wrong(t: Target) -> str:
    """What of a file's model and words is not what they are for, with the fix."""
    if isinstance(t.model, torch.jit.ScriptModule):
        return "its model is a script of torch.jit, whose code is not Python\n  fix: give the module that it was made from"
    if "_parameters" not in vars(t.model):
        return f"{type(t.model).__name__} does not call nn.Module's __init__\n  fix: super().__init__() first in its own"
    if t.loss_fn is not None:
        try:
            inspect.signature(t.loss_fn).bind(t.model, t.batch)
        except TypeError as error:
            return f"loss_fn is called as loss_fn(model, batch), and this is {_said(t.loss_fn)}: {error}\n  fix: loss_fn=lambda model, batch: model(batch).mean(), or leave it out where the model's output has a loss"
        except ValueError:  # of what is not written in Python nothing is known
            pass
    clip = t.clip_grad_norm
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip >= 0):
        return f"clip_grad_norm is {clip!r}, no norm\n  fix: a number above 0; 0 or None: no clipping"
    optimizer: Any = t.optimizer
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer)):
        return ""
    if not _are_optimizers(optimizer):
        return f"optimizer is {_said(optimizer)}, no optimizer of torch.optim\n  fix: torch.optim.AdamW(model.parameters()), a list of such, or lambda parameters: torch.optim.AdamW(parameters)"
    own, groups = {id(p) for p in t.model.parameters()}, [g for o in (optimizer if isinstance(optimizer, list | tuple) else [optimizer]) for g in o.param_groups]
    updated = [p for g in groups for p in g["params"]]
    if strange := sum(id(p) not in own for p in updated):
        return f"{strange} of the {len(updated)} parameters of its optimizer are none of its model's\n  fix: make the optimizer of the model that is returned"
    return ""


def _are_optimizers(made: Any) -> bool:
    return isinstance(made, torch.optim.Optimizer) or (isinstance(made, list | tuple) and bool(made) and all(isinstance(o, torch.optim.Optimizer) for o in made))


def _import(path: Path) -> Any:
    """The file as a module of its own name; the modules beside it can be imported."""
    name = f"_deepseed_target_{path.stem}_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path} is no Python file\n  fix: write path/to/file.py:name, or hf:ClassName")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    beside = str(path.resolve().parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        fix = f"make `python {path}` run by itself" if isinstance(error, Exception) else 'leave only under if __name__ == "__main__":'
        raise TargetError(f"importing {_where(path, error)} raised {raised(error)}\n  fix: {fix}") from error
    return module


def _where(path: Path, error: BaseException) -> str:
    """The last line of a file that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    return f"{path}:{frames[-1].lineno}" if frames else f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else str(path)


def _said(made: Any) -> str:
    return f"a tuple of {', '.join(type(m).__name__ for m in made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
