"""Errors that a compiler writer makes, written by hand into the program after a pass: one edit of its text each.

The program is that of ``small`` under zero3+tp2+dp2 (``Edit.plan`` says where another is needed). ``old`` is a pattern that must be
there, ``new`` what stands in its place; ``@rank`` edits are made on that rank alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    what: str
    after: str
    old: str
    new: str
    plan: str = "zero3+tp2+dp2"
    rank: int | None = None


def _moved(name: str, before: str) -> tuple[str, str]:
    """The line that defines ``name``, moved to before the line that defines ``before``."""
    return rf"(?ms)^(%{before}[ ,].*?)^(%{name}[ ,][^\n]*\n)", r"\2\1"


NORM = r"%norm\.bwd\.native_layer_norm_backward\."

EDITS = (
    # canonicalize: decompositions
    Edit("mean over the shard's count", "canonicalize", r"(%norm\.native_layer_norm\.r1 = .*), 16\)", r"\1, 8)"),
    Edit("variance over n - 1", "canonicalize", r"(%norm\.native_layer_norm\.div\.1 = .*), 16\)", r"\1, 15)"),
    Edit("epsilon of another norm", "canonicalize", r"(%norm\.native_layer_norm\.add = .*), 1e-05\)", r"\1, 1e-06)"),
    Edit("root for its inverse", "canonicalize", r"%norm\.native_layer_norm\.r2 = aten\.rsqrt", "%norm.native_layer_norm.r2 = aten.sqrt"),
    Edit("weight and bias of a norm swapped", "canonicalize", r"(%norm\.native_layer_norm\.mul\.2 = .*)%norm\.weight\)", r"\1%norm.bias)"),
    Edit("momentum on the wrong side", "canonicalize", r"(%batch_norm\S*mul\.1 = aten\.mul\.Tensor\(%batch_norm\.running_mean), 0\.9\)", r"\1, 0.1)"),
    Edit("batch statistics over the wrong dims", "canonicalize", r"(%batch_norm\.bwd\S*\.r1 = sum\(\S*), dims=\[0, 2\]", r"\1, dims=[0, 1]"),
    Edit("softmax normalised over the queries", "canonicalize", r"(%softmax\.sum = sum\(%softmax\.exp, dims=\[)3(\].*)6, 1\]", r"\g<1>2\g<2>1, 6]"),
    Edit("softmax's gradient without its sum", "canonicalize", r"(%bwd\.softmax_backward_data = aten\.mul\.Tensor\()%bwd\.softmax_backward_data\.sub", r"\1%bwd.reshape.4"),
    Edit("swapped operands of sub", "canonicalize", r"%bwd\.softmax_backward_data\.sub = aten\.sub\.Tensor\((%\S+), (%\S+)\)", r"%bwd.softmax_backward_data.sub = aten.sub.Tensor(\2, \1)"),
    Edit("labels ignored by another number", "canonicalize", r"(%nll_loss_forward\.eq = .*), -100\)", r"\1, -99)"),
    Edit("loss normalised by rows", "canonicalize", r"(%nll_loss_forward = aten\.div\.Tensor\(%nll_loss_forward\.sum\.1), %nll_loss_forward\.r1\)", r"\1, 48)"),
    Edit("loss not negated", "canonicalize", r"(%nll_loss_forward\.sum\.1 = sum\()%nll_loss_forward\.neg", r"\1%nll_loss_forward.masked_fill.1"),
    Edit("loss's gradient without 1/n", "canonicalize", r"(%bwd\.nll_loss_backward\.neg = aten\.neg\()%bwd\.nll_loss_backward\.div", r"\1%bwd.full"),
    # canonicalize: what it should leave alone
    Edit("scale of the scores squared", "canonicalize", r"(%div = aten\.div\.Tensor\(%reshape\.5), 2\.0\)", r"\1, 4.0)"),
    Edit("mask upside down", "canonicalize", r"(%masked_fill = aten\.masked_fill\.Scalar\(%div), %bitwise_not", r"\1, %tril"),
    Edit("masked gradient let through", "canonicalize", r"(%bwd\.masked_fill = .*), 0\)", r"\1, 1)"),
    Edit("square weight not transposed", "canonicalize", r"(%proj\.permute = permute\(%proj\.weight, dims=)\[1, 0\]", r"\1[0, 1]"),
    Edit("dropout scaled by the dropped part", "canonicalize", r"(%drop\.div = .*), 0\.75\)", r"\1, 0.25)"),
    Edit("dropout keeps what it should drop", "canonicalize", r"(%drop\.bernoulli = .*)p=0\.75", r"\1p=0.25"),
    Edit("two sites draw the same mask", "canonicalize", r'site="drop#2/0"', 'site="drop/0"'),
    Edit("backward reads the other site's mask", "canonicalize", r"(%drop#2\.bwd\.mul = .*), %drop#2\.div\)", r"\1, %drop.div)"),
    Edit("tied gradient counted twice", "canonicalize", r"(%words\.bwd\.add = aten\.add\.Tensor\(%head\.bwd\.mm), %\S+\)", r"\1, %head.bwd.mm)"),
    Edit("one use of a tied weight forgotten", "canonicalize", r"%words\.bwd\.add = aten\.add\.Tensor\(.*\)( : .*)", r"%words.bwd.add = aten.neg(%head.bwd.mm)\1"),
    Edit("operands of an activation's gradient swapped", "canonicalize", r"%bwd\.gelu_backward = aten\.gelu_backward\((%\S+), (%\S+)\)", r"%bwd.gelu_backward = aten.gelu_backward(\2, \1)"),
    Edit("a gradient missing in the norm", "canonicalize", r"(%clip\.add\.4 = aten\.add\.Tensor\(%clip\.add\.3), \S+\)", r"\1, %clip.sum_of_squares.4)"),
    Edit("norm not rooted", "canonicalize", r"(%clip\.add\.13 = aten\.add\.Tensor\()%clip\.sqrt", r"\1%clip.add.12"),
    Edit("clipping by its upper bound", "canonicalize", r"(%clip\.clamp = aten\.clamp\(%clip\.reciprocal), none, 1\.0\)", r"\1, 1.0, none)"),
    Edit("a gradient not clipped", "canonicalize", r"(%norm\.weight\.grad\.mul = aten\.mul\.Tensor\(%norm\S*), %clip\.clamp\)", r"\1, 1.0)"),
    Edit("no weight decay", "canonicalize", r"(%norm\.weight\.update\.mul = .*), 0\.01\)", r"\1, 0.0)"),
    Edit("moments' rates swapped", "canonicalize", r"(%norm\.weight\.update\.pow = aten\.pow\.Scalar\()0\.9,", r"\g<1>0.999,"),
    Edit("state of another parameter", "canonicalize", r"(%norm\.weight\.update\.lerp = aten\.lerp\.Scalar\()%state\.exp_avg/norm\.weight", r"\1%state.exp_avg/norm.bias"),
    Edit("step not counted", "canonicalize", r"return %norm\.bias\.update\.add state", "return %state.step/norm.bias state"),
    Edit("running variance returned as mean", "canonicalize", r"return (%\S+)\.r3 buffer", r"return \1.r4 buffer"),
    # solve_placements
    Edit("missing partial", "solve_placements", r"(%head\.mm = .*) sum@tp", r"\1"),
    Edit("bias added on every rank of a partial sum", "solve_placements", r"(%proj\.addmm = aten\.add\.Tensor\(%proj\.addmm\.mm) as \[48@dp, 16\](.*) : f64\[48@dp, 16\]", r"\1\2 : f64[48@dp, 16] sum@tp"),
    Edit("norm of the local part only", "solve_placements", r"(%clip\.sum_of_squares\.6 = .*) sum@dp", r"\1"),
    Edit("fused blocks split as one", "solve_placements", r"%qkv\.weight as \[3\*16@tp, 16\]", "%qkv.weight as [48@tp, 16]"),
    Edit("sum declared a maximum", "solve_placements", r"(%up\.bwd\.mm\.1 = .*) sum@dp", r"\1 max@dp"),
    Edit("batch cut over the wrong axis", "solve_placements", r"%1 : i64\[8@dp, 6\]", "%1 : i64[8@tp, 6]"),
    Edit("a wish forgotten", "solve_placements", r"%head\.bwd\.reshape\.1 as \[8@dp, 6, 16\]", "%head.bwd.reshape.1"),
    # insert_reshards
    Edit("reshard along another dimension", "insert_reshards", r"(%add\.1\.tp2 = reshard\(%add\.1\) : f64\[8@dp, )6, 16@tp\]", r"\g<1>6@tp, 16]"),
    Edit("reshard of another value", "insert_reshards", r"(%norm\.bias\.whole_dp = reshard\()%norm\.bias", r"\1%norm.weight"),
    Edit("updated parameter returned before its update", "insert_reshards", r"return %up\.weight\.update\.add\.2 param", "return %up.weight param"),
    Edit("stale gather", "insert_reshards", r"reshard\(%up\.weight\.update\.add\.2\)", "reshard(%up.weight.dp0)", "zero1+dp2"),
    # lower_reshards
    Edit("collective over the wrong axis", "lower_reshards", r'(%head\.mm\.whole_tp\.start = .*axis=")tp', r"\1dp"),
    Edit("gather for a reduction", "lower_reshards", r"(%qkv\.bwd\.mm\.whole_tp\.start = )all_reduce", r"\1all_gather"),
    Edit("reduction without scatter", "lower_reshards", r"(%down\.bwd\.mm\.1\.dp0\.start = )reduce_scatter", r"\1all_reduce"),
    Edit("local cut for a reduction", "lower_reshards", r"(?m)^%up\.bwd\.mm\.1\.dp0\.start = reduce_scatter\.start(.*)\n((?:.*\n)*?)%up\.bwd\.mm\.1\.dp0 = wait\(.*?\)", r"\2%up.bwd.mm.1.dp0 = shard\1"),
    Edit("wait for another collective", "lower_reshards", r"(%norm\.bias\.whole_dp = wait\()%norm\.bias", r"\1%norm.weight"),
    Edit("missing wait", "lower_reshards", r"(%head\.bwd\.mm = .*|%log_softmax\.amax = amax\()%head\.mm\.whole_tp,", r"\1%head.mm.whole_tp.start,"),
    Edit("missing collective of the norm", "lower_reshards", r"(%clip\.sqrt = aten\.sqrt\()%\S+\)", r"\1%clip.add.12)"),
    # schedule_collectives
    Edit("two members of a bucket swapped", "schedule_collectives", r"(?m)^(.*)%norm\.weight\.whole_dp\.start, %norm\.bias\.whole_dp\.start(.* = all_gather)", r"\1%norm.bias.whole_dp.start, %norm.weight.whole_dp.start\2"),
    Edit("a member of a bucket sent twice", "schedule_collectives", r"(all_gather\.start\(.*%norm\.weight, )%norm\.bias", r"\1%norm.weight"),
    Edit("a bucket over the wrong group", "schedule_collectives", r'(%places\.weight\.whole_dp\.start, .*axis=")dp', r"\1tp"),
    Edit("used before it arrives", "schedule_collectives", *_moved(r"norm\.native_layer_norm\.mul\.2", r"norm\.weight\.whole_dp")),
    Edit("backward reads another layer's gathered weight", "schedule_collectives", r"(%up\.bwd\.mm = aten\.mm\(%up\.bwd\.reshape, )%up\.weight\.whole_dp\.1", r"\1%down.permute"),
    # group_kernels
    Edit("epsilon of the update", "group_kernels", r"(%norm\.bias\.update\.add\.2, .*)eps=1e-08", r"\1eps=1e-07"),
    Edit("decay dropped by the kernel", "group_kernels", r"(%proj\.weight\.update\.add\.2, .*)weight_decay=0\.01", r"\1weight_decay=0.0"),
    Edit("moments swapped", "group_kernels", r'(%proj\.weight\.update\.add\.2, .*)"exp_avg", "exp_avg_sq"', r'\1"exp_avg_sq", "exp_avg"'),
    Edit("clipping dropped by the kernel", "group_kernels", r"(%qkv\.bias\.update\.add\.2, .*), scale=%clip\.clamp", r"\1"),
    Edit("update with the old step", "group_kernels", r"(%norm\.weight\.update\.add\.2, .* = optim\.adamw\(.*)%norm\.weight\.update\.add,", r"\1%state.step/norm.weight,"),
    Edit("gradient of another parameter", "group_kernels", r"(%norm\.weight\.update\.add\.2, .* = optim\.adamw\(%norm\.weight, %\S*)r1\.dp0", r"\1r2.dp0"),
    Edit("softmax without logarithm", "group_kernels", r"%log_softmax = aten\._log_softmax", "%log_softmax = aten._softmax"),
    Edit("softmax along another dimension", "group_kernels", r"(%softmax = aten\._softmax\(%masked_fill, )-1", r"\g<1>-2"),
    Edit("gradient of another parameter returned", "group_kernels", r"return %norm\.bwd\.native_layer_norm_backward\.r1 grad", "return %norm.bwd.native_layer_norm_backward.r2 grad"),
    # localize
    Edit("slice one too far", "localize", r"(%slice\.1 = .*)start=8", r"\1start=9"),
    Edit("slice at the global start", "localize", r"(%slice\.2 = .*)start=16", r"\1start=8"),
    Edit("mask of rank 0 on every rank", "localize", r"(%drop\.bernoulli = .*index=\[\[\[2, )1", r"\g<1>0"),
    Edit("mask computed from local indices", "localize", r"(%drop\.bernoulli = .*?), index=.*?\]\]\]\)", r"\1)"),
    Edit("collectives in another order on one rank", "localize", rf"(?m)^({NORM}r1\.dp0\.tp0\.shard_tp .*\n(?:.*\n)*?)({NORM}r2\.dp0\.tp0\.shard_tp .*\n{NORM}r2\.dp0\.tp0\.start .*\n)", r"\2\1", rank=1),
    Edit("a collective left out on one rank", "localize", r"(?m)^(%up\.bwd\.reshape\.2\.whole_tp\.start) = all_reduce\.start\((%\S+), .*?\)( : .*)\n", r"\1 = aten.neg(\2)\3" + "\n", rank=1),
    Edit("another loss returned on one rank", "localize", r"return %nll_loss_forward loss", "return %clip.sqrt loss", rank=1),
)  # fmt: skip
