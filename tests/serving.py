"""A tiny model with a tokenizer of its own, behind a real socket of this process."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.inference_models import varied

TEXT = ["the quick brown fox jumps over the lazy dog", 'a "list" of {numbers}: 1, 2, 3 and so on', "once upon a time there was a small model that said what it knew"] * 3
TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t['function']['name'] }}\n{% endfor %}{% for m in messages %}{% if m['role'] == 'tool' and not m.get('tool_call_id') %}{{ raise_exception('a tool without a call') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def model(text: Any, positions: int = 256) -> Any:
    made = varied("LlamaForCausalLM", vocab_size=len(text), max_position_embeddings=positions)
    made.generation_config.eos_token_id = text.eos_token_id
    return made


class Running:
    """A server that listens; ``engine`` is its own, and free blocks are counted there."""

    def __init__(self, server: Any, port: int, uv: Any, thread: threading.Thread) -> None:
        self.server, self.port, self.uv, self.thread = server, port, uv, thread
        self.engine = server.worker.engine
        self.url = f"http://127.0.0.1:{port}"

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def error(self, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST") -> tuple[int, dict[str, Any]]:
        """Status and error object of a request that fails."""
        status, said, data = self.send(method, path, body, headers)
        assert said["content-type"].startswith("application/json"), data
        found = json.loads(data)
        assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
        return status, found["error"]

    def settled(self, seconds: float = 30.0) -> None:
        """Wait until nobody is there; all blocks must be back."""
        until = time.monotonic() + seconds
        pool = self.engine.scheduler.pool
        while not (self.engine.idle and self.server.taken == 0 and pool.free == pool.count and not self.server.worker._of):
            assert time.monotonic() < until, f"{pool.count - pool.free} blocks are held, {self.server.taken} places are taken, {self.engine.scheduler.usage()}"
            time.sleep(0.01)
        pool.check()
        assert not self.engine._requests


@contextmanager
def running(engine: Any, limits: Any = None, api_key: str | None = None, drain: float = 5.0) -> Iterator[Running]:
    from deepseed.serve.app import Server
    from deepseed.serve.run import Serving, bound

    listening = bound("127.0.0.1", 0)
    listening.listen(2048)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # else the kernel takes megabytes that nobody reads
    server = Server(engine, "tiny", limits, api_key)
    uv = Serving(server, drain, log_level="error")
    thread = threading.Thread(target=uv.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Running(server, listening.getsockname()[1], uv, thread)
    finally:
        uv.should_exit = True
        thread.join(30)
        listening.close()
