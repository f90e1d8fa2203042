"""A BERT fine-tune: the script's own data loader, optimizer and scheduler; batches as long as their longest row, the last one with fewer rows.

    deepseed --num_gpus 2 examples/from_deepspeed/bert.py --deepspeed --deepspeed_config examples/from_deepspeed/ds_bert.json
"""

import argparse
from functools import partial

import torch
from data import labelled, padded, report, tokenizer
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import deepseed as deepspeed  # was: import deepspeed


def make_model(vocab: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=vocab, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))


def make_optimizer(model: BertForSequenceClassification) -> torch.optim.Optimizer:
    no_decay = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.endswith(no_decay)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if n.endswith(no_decay)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=2e-3)


def make_loader(rows: int, rank: int, ranks: int, epochs: int = 4) -> tuple[DataLoader, DistributedSampler, int]:
    """Each rank has 37 rows of 4 ranks' 148: four batches of 8 and one of 5."""
    dataset, tokens = labelled(37 * ranks), tokenizer()
    sampler = DistributedSampler(dataset, ranks, rank, seed=1)
    loader = DataLoader(dataset, batch_size=rows, sampler=sampler, collate_fn=partial(padded, tokens=tokens))
    return loader, sampler, epochs


def main() -> None:
    parser = argparse.ArgumentParser(description="BERT")
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args()
    deepspeed.init_distributed()
    model = make_model(len(tokenizer()))
    optimizer = make_optimizer(model)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=24)
    model, optimizer, _, scheduler = deepspeed.initialize(args=args, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    loader, sampler, epochs = make_loader(model.train_micro_batch_size_per_gpu(), model.global_rank, model.world_size)
    model.train()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            batch = {k: v.to(model.device) for k, v in batch.items()}
            loss = model(**batch).loss
            model.backward(loss)
            model.step()
            report(model.global_steps, loss.item(), model.get_global_grad_norm())


if __name__ == "__main__":
    main()
