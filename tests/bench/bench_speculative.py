"""What prompt lookup saves: steps and CPU seconds with and without, on text that repeats itself and on text that does not; the outputs are compared token for token.

    python tests/bench/bench_speculative.py path/to/model [--draft 8]
"""

from __future__ import annotations

import argparse
import time

import torch

from deepseed.inference.engine import Engine

CODE = '''def area_of_circle(radius):
    return 3.14159 * radius * radius


def area_of_square(side):
    return side * side


def area_of_triangle(base, height):
    return base * height / 2
'''
PROMPTS = {
    "code to be repeated with a name changed": f"Rewrite this Python file. Rename radius to r and change nothing else.\n\n{CODE}\nThe new file:\n\n",
    "a passage to be quoted": "The ship sailed at dawn with forty men and a cargo of salt. The captain had never seen the southern islands, but he had a map.\n\nQuote the passage above word for word:\n\n",
    "an open question": "Why is the sky blue? Explain it to a child.\n\n",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = Engine(args.model, dtype="fp32", cache="64MiB", prefix=False)
    fast = Engine(args.model, dtype="fp32", cache="64MiB", prefix=False, speculative="lookup", draft=args.draft)
    for name, text in PROMPTS.items():
        prompt = plain.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        said, figures = [], []
        for engine in (plain, fast):
            steps, began = engine.steps, time.process_time()
            said.append(engine.generate(prompt, max_tokens=args.tokens)[0].token_ids)
            figures.append((engine.steps - steps, time.process_time() - began))
        (a, x), (b, y) = figures
        print(f"{name}: {len(said[0])} tokens in {a} steps, {x:.2f} s; with drafts {b} steps, {y:.2f} s ({a / b:.2f}x fewer, {x / y:.2f}x as fast); {'the same tokens' if said[0] == said[1] else 'OTHER TOKENS'}", flush=True)


if __name__ == "__main__":
    main()
