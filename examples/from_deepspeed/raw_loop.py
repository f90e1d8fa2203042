"""A causal language model in the plain loop: ``engine(..)``, ``engine.backward(loss)``, ``engine.step()``, with accumulation.

    deepseed --num_gpus 2 examples/from_deepspeed/raw_loop.py --deepspeed_config examples/from_deepspeed/ds_config.json --save weights
"""

import argparse

import torch
from data import report, windows
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import deepseed as deepspeed  # was: import deepspeed


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=384, max_position_embeddings=64, tie_word_embeddings=True, **sizes))


def make_loader(rows: int, rank: int, ranks: int, steps: int, rows_a_step: int) -> DataLoader:
    dataset = windows(steps * rows_a_step * ranks, 24)
    return DataLoader(dataset, batch_size=rows, sampler=DistributedSampler(dataset, ranks, rank, shuffle=False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--deepspeed_config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", help="write the trained weights into this folder")
    args = parser.parse_args()
    deepspeed.init_distributed()
    model = make_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    total = 0.0
    for batch in make_loader(micro, engine.global_rank, engine.world_size, args.steps, micro * accumulation):
        batch = {k: v.to(engine.device) for k, v in batch.items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        total += loss.item() / accumulation
        if engine.is_gradient_accumulation_boundary():
            engine.step()
            report(engine.global_steps, total, engine.get_global_grad_norm())
            total = 0.0
        else:
            engine.step()
    if args.save:
        engine.save_16bit_model(args.save, "pytorch_model.bin")


if __name__ == "__main__":
    main()
