"""What the command line says of options that cannot be, before a model is read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from deepseed.cli import app
from deepseed.serve.bench import Load, Sent, report


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cache", "1x"], ["--cache", "'1x' is no amount", "fix: such as --cache 64MiB"]), (["--max-body", "lots"], ["--max-body", "'lots' is no amount"]), (["--max-unread", "-1"], ["--max-unread"]),
        (["--host", "nowhere.invalid"], ["nowhere.invalid", "fix: a --host of this machine"]), (["--host", "192.0.2.1"], ["192.0.2.1", "fix: a --host of this machine"]),
        (["--plan", "dp2+pp2"], ["splits over pp2", "a server has replicas (dp)"]), (["--plan", "pp2"], ["splits over pp2"]),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options: list[str], says: list[str]) -> None:
    done = CliRunner().invoke(app, ["serve", "/there/is/no/model", *options])
    assert done.exit_code == 2 and all(s in done.output for s in says), done.output


@pytest.mark.parametrize("plan", ["tp1", "tp2", "dp2"])
def test_a_taken_port_is_seen_before_the_model_is_read(plan: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = str(there.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", "/there/is/no/model", "--plan", plan, "--port", port])
    assert done.exit_code == 2 and f"127.0.0.1:{port}: Address already in use\n  fix: another --port" in done.output


def test_where_the_result_cannot_go_is_said_before_it_is_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", "--base-url", "http://127.0.0.1:9", "-o", str(tmp_path / "no" / "x.json")])
    assert done.exit_code == 2 and "x.json" in done.output and "does not answer" not in done.output


def test_peaks_of_a_measurement() -> None:
    sent = [Sent(1, 3, 0.5, 1.5, [0.2, 0.8], 10.0), Sent(1, 2, 0.1, 0.2, [0.1], 11.4), Sent(1, 0, error="gone", start_time=10.0)]
    found = report(sent, 2.0, Load(num_prompts=3), "m")
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"], found["tokenizer_id"]) == (3.0, 2, "m")  # in the second second: one of the first, two of the second
