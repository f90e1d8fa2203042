"""Two memories of a rank: the host's and the device's, in types, text and typing; and the moves between them."""

import pytest

from deepseed.check.translation import TranslationError, follow, number
from deepseed.check.typing import TypingError, check_types
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.memory import memory

MOVED = """program p mesh(dp=2) facts(lowered, placed)
%w : f32[8@dp, 4] host param "w"
%m : f32[8@dp, 4] host state "m/w"
%g : f32[8@dp, 4] batch "g"
%w.device.start = to_device.start(%w) : f32[8@dp, 4] {phase="forward"}
%w.device = wait(%w.device.start) : f32[8@dp, 4] {phase="forward"}
%d = aten.mul.Tensor(%g, %w.device) : f32[8@dp, 4] {phase="backward"}
%d.host.start = to_host.start(%d) : f32[8@dp, 4] host {phase="update"}
%d.host = wait(%d.host.start) : f32[8@dp, 4] host {phase="update"}
%m.new = aten.add.Tensor(%m, %d.host) : f32[8@dp, 4] host {phase="update"}
%w.new = aten.sub.Tensor(%w, %m.new) : f32[8@dp, 4] host {phase="update"}
return %w.new param "w"
return %m.new state "m/w"
"""


def test_the_memory_of_a_value_is_in_the_text_and_comes_back():
    p = verify(parse(MOVED))
    assert str(p) == MOVED and p.types["w"].host and not p.types["w.device"].host
    assert hash(p.types["w"]) != hash(p.types["w.device"]) and p.types["w"].on(False) == p.types["w.device"]


def test_moves_are_well_typed_and_mean_nothing():
    p = parse(MOVED)
    check_types(p)
    plain = "\n".join(line for line in MOVED.split("\n") if "start" not in line and "wait" not in line)
    plain = plain.replace("%w.device", "%w").replace("%d.host", "%d").replace(" host", "")
    follow(number(parse(plain)), p)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [("to_host.start(%d)", "to_host.start(%g)"), ("aten.sub.Tensor(%w, %m.new)", "aten.sub.Tensor(%w, %m)"), ("%g, %w.device)", "%g, %g)")],
)
def test_a_move_of_another_value_is_found(line, wrong):
    p = parse(MOVED)
    with pytest.raises(TranslationError, match="another value"):
        follow(number(p), parse(MOVED.replace(line, wrong)))


@pytest.mark.parametrize(
    ("line", "wrong", "said"),
    [
        ("%m.new = aten.add.Tensor(%m, %d.host)", "%m.new = aten.add.Tensor(%m, %d)", "%d lies on the device"),
        ("%d = aten.mul.Tensor(%g, %w.device)", "%d = aten.mul.Tensor(%g, %w)", "%w lies on the host"),
        ("to_host.start(%d) : f32[8@dp, 4] host", "to_host.start(%d) : f32[8@dp, 4]", "on the device"),
        ("to_device.start(%w) :", "to_device.start(%g) :", "%g lies on the device"),
        ("%w.device = wait(%w.device.start) : f32[8@dp, 4]", "%w.device = wait(%w.device.start) : f32[8@dp, 4] host", "%w.device lies on the host"),
    ],
)
def test_an_op_runs_in_one_memory(line, wrong, said):
    assert line in MOVED
    with pytest.raises(TypingError, match=said):
        check_types(parse(MOVED.replace(line, wrong)))


def test_ranks_exchange_what_lies_on_the_device():
    text = 'program p mesh(dp=2) facts(lowered, placed)\n%w : f32[8@dp] host param "w"\n%s = all_gather.start(%w, axis="dp") : f32[8] host {phase="forward"}\n%f = wait(%s) : f32[8] host {phase="forward"}\nreturn %f output "f"\n'
    with pytest.raises(TypingError, match=r"all_gather.start runs on the device, and %w lies on the host"):
        check_types(parse(text))


def test_memory_counts_both_memories_apart():
    m = memory(parse(MOVED))
    part = 4 * 4 * 4  # bytes of a rank's half
    assert m.peak_bytes == 3 * part  # g, w.device, d
    assert m.host_bytes == 4 * part  # w and m, the gradient and the new m, then that and the new w
