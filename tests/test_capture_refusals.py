"""What capture turns into guards, and what it refuses: each message says what, where and the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepseed
from deepseed.capture import BatchError, CaptureError, capture
from deepseed.ops import evaluate

X, MASK = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)


class Model(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.inner = Inner(body)

    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        return self.inner(x, **rest)


class Inner(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.w, self.body = nn.Parameter(torch.ones(3)), body
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        return self.body(self, x, **rest)


def loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).sum()


def masked(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    if mask.all():
        return x * self.w
    return x * self.w * mask[:, None]


@pytest.mark.parametrize("full", [True, False])
def test_a_branch_on_the_batch_is_a_guard(full: bool) -> None:
    mask = MASK.clone()
    mask[0] = full
    c = capture(Model(masked), {"x": X, "mask": mask}, loss_fn=loss)
    (guard,) = c.guards
    assert guard.value is full and guard.path == "inner" and guard.line.startswith("test_capture_refusals.py:")
    (inp,) = guard.program.inputs
    assert (inp.role, inp.key) == ("batch", "mask")
    for value in (True, False):
        other = MASK.clone()
        other[1] = value
        (found,) = evaluate(guard.program, {inp.name: other}).values()
        assert bool(found) is value


def test_in_place_changes_before_a_read_count() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        y = x.clone()
        y[0].fill_(5.0)
        return x * self.w * (2.0 if y.max().item() == 5.0 else 3.0)

    (guard,) = capture(Model(body), {"x": X.clamp(max=1.0)}, loss_fn=loss).guards
    assert guard.value == 5.0
    (inp,) = guard.program.inputs
    (found,) = evaluate(guard.program, {inp.name: X.clamp(max=1.0)}).values()
    assert float(found) == 5.0


def test_equal_and_constants() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0])
        if torch.equal(x, x + 1) or scale.sum().item() != 6.0 or int(torch.arange(4).max()) != 3:
            return x
        return x * self.w * scale

    c = capture(Model(body), {"x": X}, loss_fn=loss)
    assert [g.value for g in c.guards] == [False]
    assert [tuple(t.shape) for t in c.constants.values()] == [(3,)]


def test_a_guard_may_use_a_constant_tensor() -> None:
    weights = torch.tensor([1.0, 2.0, 4.0])
    c = capture(Model(lambda self, x: x * self.w if (x * weights).sum() > -1e9 else x), {"x": X}, loss_fn=loss)
    (guard,) = c.guards
    given = {i.name: c.constants[i.key] if i.role == "constant" else X for i in guard.program.inputs}
    assert len(given) == 2 and bool(*evaluate(guard.program, given).values()) is guard.value is True


def test_embeddings_with_unsupported_options() -> None:
    for option in ({"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(CaptureError, match="an embedding with"):
            capture(nn.Sequential(nn.Embedding(5, 4, **option)), torch.tensor([1, 2]), loss_fn=lambda model, batch: model(batch).sum())


def test_errors_of_the_model_say_where() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        return (x * self.w) @ x

    with pytest.raises(RuntimeError) as error:
        capture(Model(body), {"x": X}, loss_fn=loss)
    assert any("last op at inner, test_capture_refusals.py" in note for note in error.value.__notes__)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda self, x: x * self.w if self.w.sum() > 0 else x, "depends on param 'inner.w'"),
        (lambda self, x: x * self.w if self.scale.sum() > 0 else x, "depends on buffer 'inner.scale'"),
        (lambda self, x: x * self.w if torch.rand(()) > 0.5 else x, "depends on random numbers"),
        (lambda self, x: (x * self.w)[x > 0].sort().values, "sort of x[mask], whose size depends on data"),
        (lambda self, x: (x * self.w) * x.nonzero().shape[0], "the shape of the result of aten.nonzero.default depends on data"),
        (lambda self, x: x * self.w * x.unique().sum(), "depends on data"),
        (lambda self, x: x * self.w * torch.poisson(torch.ones(4)), "draws random numbers"),
    ],
)  # fmt: skip
def test_refusals_name_place_and_cure(body: Any, what: str) -> None:
    with pytest.raises(CaptureError) as error:
        capture(Model(body), {"x": X}, loss_fn=loss)
    text = str(error.value)
    assert what in text and "at inner" in text and "test_capture_refusals.py:" in text and "fix:" in text


def test_losses_that_are_none() -> None:
    model = Model(lambda self, x: x * self.w)
    with pytest.raises(CaptureError, match=r"loss of Model is f32\[4, 3\], not one float"):
        capture(model, {"x": X})
    with pytest.raises(CaptureError, match="gave no loss"):
        capture(model, {"x": X}, loss_fn=lambda model, batch: None)  # type: ignore[arg-type, return-value]
    model.requires_grad_(False)
    with pytest.raises(CaptureError, match="depends on no trainable parameter"):
        capture(model, {"x": X}, loss_fn=loss)


def test_a_tensor_stored_on_the_module_is_refused() -> None:
    def body(self: Any, x: Tensor) -> Tensor:
        self.last = x * 2
        return x * self.w

    with pytest.raises(CaptureError, match=r"Inner\.last(.|\n)*at inner"):
        capture(Model(body), {"x": X}, loss_fn=loss)


def test_optimizers_that_do_not_trace() -> None:
    model = Model(lambda self, x: x * self.w)
    with pytest.raises(CaptureError, match="LBFGS cannot be traced"):
        capture(model, {"x": X}, loss_fn=loss, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(CaptureError, match="1 of the 1 parameters of AdamW are not among the model's 1"):
        capture(model, {"x": X}, loss_fn=loss, optimizer=torch.optim.AdamW(nn.Linear(2, 2, bias=False).parameters()))
    with pytest.raises(CaptureError, match="needs an optimizer"):
        capture(model, {"x": X}, loss_fn=loss, want="step")


def test_batches_that_do_not_fit() -> None:
    c = capture(Model(lambda self, x, flag: x * self.w if flag else x), {"x": X, "flag": True}, loss_fn=loss)
    assert set(c.batch.flatten({"x": X + 1, "flag": True})) == {"x"}
    for batch, what in [
        ({"x": X}, "missing flag"),
        ({"x": X, "flag": True, "y": X}, "unexpected y"),
        ({"x": X, "flag": False}, "True when captured, False now"),
        ({"x": X[:2], "flag": True}, r"f32\[2, 3\], captured as f32\[4, 3\]"),
        ({"x": X.double(), "flag": True}, r"f64\[4, 3\], captured as f32\[4, 3\]"),
    ]:
        with pytest.raises(BatchError, match=what):
            c.batch.flatten(batch)


def test_lines_are_the_users_where_torch_was_imported_through_a_link(tmp_path: Path) -> None:
    """As from an environment that is a link to another one."""
    (tmp_path / "libraries").symlink_to(Path(torch.__file__).parent.parent)
    (tmp_path / "mine.py").write_text(
        "import torch, deepseed\n"
        "class Branches(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) if self.weight.sum() > 0 else x\n"
        "model = Branches(2, 2)\n"
        "step = deepseed.compile(model, 'zero0', optimizer=torch.optim.SGD(model.parameters()), loss_fn=lambda m, b: m(b['x']).sum())\n"
        "step({'x': torch.ones(2, 2)})\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "libraries"), str(Path(deepseed.__file__).parent.parent)])}
    done = subprocess.run([sys.executable, str(tmp_path / "mine.py")], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1 and "depends on param 'weight'" in done.stderr and "mine.py:4\n" in done.stderr, done.stderr
