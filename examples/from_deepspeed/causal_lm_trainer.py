"""A causal language model with the HF Trainer: command line of HfArgumentParser, rows of unequal length padded a batch, evaluation, saving, resuming.

    deepseed --num_gpus 2 examples/from_deepspeed/causal_lm_trainer.py --deepspeed examples/from_deepspeed/ds_auto.json --output_dir out
"""

from dataclasses import dataclass, field

from data import PrintSteps, paragraphs, tokenizer
from transformers import DataCollatorForLanguageModeling, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

from deepseed.hf import DeepSeedTrainer as Trainer, DeepSeedTrainingArguments as TrainingArguments  # was: from transformers import Trainer, TrainingArguments


@dataclass
class ModelArguments:
    hidden_size: int = field(default=32, metadata={"help": "Width of the randomly initialised Llama."})
    num_layers: int = field(default=2, metadata={"help": "Its layers."})


@dataclass
class DataArguments:
    rows: int = field(default=640, metadata={"help": "Paragraphs to train on."})
    block_size: int = field(default=32, metadata={"help": "Tokens of the longest row."})


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    tokens = tokenizer()
    rows = [tokens(text, truncation=True, max_length=data_args.block_size) for text in paragraphs()[: data_args.rows + 32]]
    sizes = {"intermediate_size": 2 * model_args.hidden_size, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), hidden_size=model_args.hidden_size, num_hidden_layers=model_args.num_layers, **sizes))
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows[32:],
        eval_dataset=rows[:32],
        processing_class=tokens,
        data_collator=DataCollatorForLanguageModeling(tokens, mlm=False, pad_to_multiple_of=8),
        callbacks=[PrintSteps()],
    )
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(f"eval loss {metrics['eval_loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
