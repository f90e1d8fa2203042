"""Supervised fine-tuning with TRL: SFTTrainer on prompts and completions, the loss on the completion's tokens alone.

    deepseed --num_gpus 2 examples/from_deepspeed/trl_sft.py --deepspeed examples/from_deepspeed/ds_auto.json --output_dir out
"""

from data import PrintSteps, paragraphs, tokenizer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from deepseed.hf import DeepSeedArguments, DeepSeedMixin


class Arguments(DeepSeedArguments, SFTConfig):
    """Their ``--deepspeed FILE`` is DeepSeed's."""


class Trainer(DeepSeedMixin, SFTTrainer):
    """On a compiled plan."""


def make_dataset(rows: int) -> Dataset:
    """The beginning of a paragraph is the prompt, the next words are the completion."""
    words = [text.split() for text in paragraphs() if len(text.split()) > 8][:rows]
    return Dataset.from_list([{"prompt": " ".join(w[:3]), "completion": " " + " ".join(w[3:8])} for w in words])


def main() -> None:
    (training_args,) = TrlParser((Arguments,)).parse_args_and_config()
    set_seed(training_args.seed)
    tokens = tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokens), max_position_embeddings=128, pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, **sizes)
    trainer = Trainer(model=LlamaForCausalLM(config), args=training_args, train_dataset=make_dataset(640), processing_class=tokens, callbacks=[PrintSteps()])
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
