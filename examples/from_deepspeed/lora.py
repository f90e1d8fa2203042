"""LoRA with PEFT and the HF Trainer: the base model's parameters are frozen, and only the adapter is saved.

    deepseed --num_gpus 2 examples/from_deepspeed/lora.py --deepspeed examples/from_deepspeed/ds_auto.json --output_dir out
"""

from data import PrintSteps, tokenizer, windows
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, default_data_collator, set_seed

from deepseed.hf import DeepSeedTrainer as Trainer, DeepSeedTrainingArguments as TrainingArguments  # was: from transformers import Trainer, TrainingArguments


def make_model(vocab: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **sizes))


def main() -> None:
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(make_model(len(tokenizer())), config)
    trainer = Trainer(model=model, args=training_args, train_dataset=windows(640, 24), data_collator=default_data_collator, callbacks=[PrintSteps()])
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
