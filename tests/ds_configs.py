"""Config files as people have them, each with what must become of it: the plan for 8 ranks, or the keys that are rejected, or an error.

The shapes are those that DeepSpeed's examples and tests, Accelerate's and the Trainer's documentation count most.
"""

from __future__ import annotations

from typing import Any

ADAM = {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}}
FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
CPU = {"device": "cpu", "pin_memory": True}
STAGE3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 5e8,
    "stage3_param_persistence_threshold": 1e6, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip

# name -> (config, plan on 8 ranks)
PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "train batch alone": ({"train_batch_size": 16}, "zero0+dp8"),
    "micro batch alone": ({"train_micro_batch_size_per_gpu": 2}, "zero0+dp8"),
    "accumulation follows": ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}, "zero0+dp8+mb4"),
    "accumulation said": ({"train_batch_size": 64, "gradient_accumulation_steps": 2}, "zero0+dp8+mb2"),
    "all three": ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, "zero0+dp8+mb2"),
    "cifar": ({"train_batch_size": 16, "steps_per_print": 2000, "optimizer": ADAM, "scheduler": WARMUP, "wall_clock_breakdown": False}, "zero0+dp8"),
    "cifar fp16 zero": ({"train_batch_size": 16, "gradient_clipping": 1.0, "prescale_gradients": False, "optimizer": ADAM, "scheduler": WARMUP, "fp16": {**FP16, "fp16_master_weights_and_grads": False, "initial_scale_power": 15}, "zero_optimization": {"stage": 0, "allgather_partitions": True, "reduce_scatter": True, "allgather_bucket_size": 50000000, "reduce_bucket_size": 50000000, "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": False}}, "zero0+dp8+fp16"),
    "bing bert": ({"train_batch_size": 4096, "train_micro_batch_size_per_gpu": 32, "steps_per_print": 100, "prescale_gradients": False, "optimizer": {"type": "Adam", "params": {"lr": 6e-3, "betas": [0.9, 0.99], "weight_decay": 0.01}}, "gradient_clipping": 1.0, "wall_clock_breakdown": False, "fp16": {"enabled": True, "loss_scale": 0}}, "zero0+dp8+mb16+fp16"),
    "squad": ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.0, "bias_correction": True}}, "gradient_clipping": 1.0, "fp16": {"enabled": True}}, "zero0+dp8+fp16"),
    "megatron zero1": ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}, "fp16": {"enabled": True, "initial_scale_power": 12}}, "zero1+dp8+fp16"),
    "megatron zero2": ({"train_batch_size": 64, "gradient_accumulation_steps": 8, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8}, "fp16": FP16}, "zero2+dp8+mb8+fp16"),
    "zero3": ({"train_batch_size": 8, "zero_optimization": STAGE3}, "zero3+dp8"),
    "zero3 bf16": ({"train_batch_size": 8, "zero_optimization": STAGE3, "bf16": {"enabled": True}}, "zero3+dp8+bf16"),
    "old name of bf16": ({"train_batch_size": 8, "bfloat16": {"enabled": True}}, "zero0+dp8+bf16"),
    "zero1 bf16": ({"train_batch_size": 8, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "zero1+dp8+bf16"),
    "zero2 offload": ({"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_optimizer": CPU}}, "zero2+dp8+offload(optimizer)"),
    "zero2 cpu_offload": ({"train_batch_size": 8, "zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero2+dp8+offload(optimizer)"),
    "zero3 offload both": ({"train_batch_size": 8, "zero_optimization": {**STAGE3, "offload_optimizer": CPU, "offload_param": CPU}}, "zero3+dp8+offload(optimizer,params)"),
    "zero3 offload params": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "zero3+dp8+offload(params)"),
    "zero3 old offload": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}}, "zero3+dp8+offload(optimizer,params)"),
    "infinity": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local", "buffer_count": 4, "pipeline_read": True}, "offload_param": {"device": "nvme", "nvme_path": "/local", "buffer_size": 1e8}}, "aio": {"block_size": 262144, "queue_depth": 32}}, "zero3+dp8+offload(optimizer,params,disk=/local)"),
    "offload to none": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, "zero3+dp8"),
    "tensor parallel": ({"train_batch_size": 8, "tensor_parallel": {"autotp_size": 4}, "zero_optimization": {"stage": 1}}, "zero1+dp2+tp4"),
    "ulysses": ({"train_batch_size": 8, "sequence_parallel_size": 2, "zero_optimization": {"stage": 3}}, "zero3+dp4+sp2"),
    "pipeline": ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "pipeline": {"stages": 4, "partition": "uniform"}}, "zero0+dp2+pp4+mb8"),
    "pipeline and zero2": ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "pipeline": {"stages": 2}, "zero_optimization": {"stage": 2}}, "zero2+dp4+pp2+mb2"),
    "activation checkpointing": ({"train_batch_size": 8, "activation_checkpointing": {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 4}}, "zero0+dp8+remat"),
    "activation checkpointing off": ({"train_batch_size": 8, "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}}, "zero0+dp8"),
    "checkpoints on the host": ({"train_batch_size": 8, "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}}, "zero0+dp8+remat+offload(activations)"),
    "grad accum in fp32": ({"train_batch_size": 8, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "zero0+dp8+bf16+grads(fp32)"),
    "communication in fp32": ({"train_batch_size": 8, "fp16": {"enabled": True}, "communication_data_type": "fp32"}, "zero0+dp8+fp16+grads(fp32)"),
    "grad accum as computed": ({"train_batch_size": 8, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "zero0+dp8+bf16"),
    "deepcompile": ({"train_batch_size": 8, "zero_optimization": {"stage": 3}, "compile": {"deepcompile": True}}, "zero3+dp8"),
    "universal checkpoint": ({"train_batch_size": 8, "checkpoint": {"load_universal": True}}, "zero0+dp8"),
    "untested optimizer": ({"train_batch_size": 8, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "optimizer": {"type": "RMSprop", "params": {"lr": 1e-3}}}, "zero1+dp8"),
    "lion": ({"train_batch_size": 8, "optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, "zero0+dp8"),
    "muon": ({"train_batch_size": 8, "optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}, "zero0+dp8"),
    "adagrad": ({"train_batch_size": 8, "optimizer": {"type": "Adagrad", "params": {"lr": 1e-2}}}, "zero0+dp8"),
    "sgd": ({"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}}, "zero0+dp8"),
    "torch adam": ({"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True, "adam_w_mode": False}}}, "zero0+dp8"),
    "cosine": ({"train_batch_size": 8, "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}}}, "zero0+dp8"),
    "decay": ({"train_batch_size": 8, "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10, "warmup_max_lr": 1e-3}}}, "zero0+dp8"),
    "no clipping": ({"train_batch_size": 8, "gradient_clipping": 0.0}, "zero0+dp8"),
    "profilers": ({"train_batch_size": 8, "flops_profiler": {"enabled": True, "profile_step": 1}, "comms_logger": {"enabled": True}, "tensorboard": {"enabled": True, "output_path": "logs"}, "wandb": {"enabled": False}, "csv_monitor": {"enabled": False}}, "zero0+dp8"),
    "switched off": ({"train_batch_size": 8, "amp": {"enabled": False}, "elasticity": {"enabled": False}, "autotuning": {"enabled": False}, "curriculum_learning": {"enabled": False}, "nebula": {"enabled": False}, "progressive_layer_drop": {"enabled": False}}, "zero0+dp8"),
    "numbers as text": ({"train_batch_size": "16", "zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8", "allgather_bucket_size": "2e8"}, "optimizer": {"type": "AdamW", "params": {"lr": "5e-5"}}}, "zero2+dp8"),
    "zero as a switch": ({"train_batch_size": 8, "zero_optimization": True}, "zero1+dp8"),
    "zero++ off": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "mics_shard_size": -1}}, "zero3+dp8"),
}  # fmt: skip

# name -> (config, keys that are rejected)
REJECTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "apex": ({"train_batch_size": 8, "amp": {"enabled": True, "opt_level": "O1"}}, ("amp",)),
    "zero++": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8, "zero_quantized_gradients": True}}, ("zero_optimization.zero_quantized_weights", "zero_optimization.zero_hpz_partition_size", "zero_optimization.zero_quantized_gradients")),
    "mics": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "mics_shard_size": 4}}, ("zero_optimization.mics_shard_size",)),
    "compression": ({"train_batch_size": 8, "compression_training": {"weight_quantization": {}}}, ("compression_training",)),
    "sparse attention": ({"train_batch_size": 8, "sparse_attention": {"mode": "fixed"}}, ("sparse_attention",)),
    "autotuning": ({"train_batch_size": 8, "autotuning": {"enabled": True}}, ("autotuning",)),
    "elasticity": ({"train_batch_size": 8, "elasticity": {"enabled": True}}, ("elasticity",)),
    "curriculum": ({"train_batch_size": 8, "curriculum_learning": {"enabled": True}}, ("curriculum_learning",)),
    "layer drop": ({"train_batch_size": 8, "progressive_layer_drop": {"enabled": True, "theta": 0.5}}, ("progressive_layer_drop",)),
    "partial offload": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.4}}}, ("zero_optimization.offload_optimizer.ratio",)),
    "sparse gradients": ({"train_batch_size": 8, "sparse_gradients": True}, ("sparse_gradients",)),
    "hybrid engine": ({"train_batch_size": 8, "hybrid_engine": {"enabled": True}}, ("hybrid_engine",)),
}  # fmt: skip

# name -> (config, what the message says)
WRONG: dict[str, tuple[Any, str]] = {
    "typo at the top": ({"zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'?"),
    "typo inside": ({"train_batch_size": 8, "zero_optimization": {"stages": 3}}, "did you mean 'zero_optimization.stage'?"),
    "in the wrong place": ({"train_batch_size": 8, "stage": 3}, "it belongs into 'zero_optimization'"),
    "stage auto": ({"train_batch_size": 8, "zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"'),
    "batch auto": ({"train_batch_size": "auto"}, "filled in by the HF Trainer"),
    "clipping auto": ({"train_batch_size": 8, "gradient_clipping": "auto"}, "gradient_clipping: \"auto\""),
    "lr auto": ({"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr: \"auto\""),
    "offloaded params at stage 2": ({"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO stage 3"),
    "unknown optimizer": ({"train_batch_size": 8, "optimizer": {"type": "AdamX"}}, "unknown optimizer.type 'AdamX': did you mean"),
    "1-bit": ({"train_batch_size": 8, "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 400}}}, "compresses what is sent"),
    "fp16 and bf16": ({"train_batch_size": 8, "fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bfloat16 and fp16 modes cannot be simultaneously enabled"),
    "no batch": ({"zero_optimization": {"stage": 1}}, "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided"),
    "accumulation alone": ({"gradient_accumulation_steps": 2}, "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided"),
    "a triangle that is none": ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, "train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size 8 != 3 * 2 * 8"),
    "batch 0": ({"train_batch_size": 0}, "Train batch size: 0 has to be greater than 0"),
    "tp that does not divide": ({"train_batch_size": 8, "tensor_parallel": {"autotp_size": 3}}, "tp3 = 3 does not divide 8 ranks"),
    "nvme without a path": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, '"nvme_path"'),
    "a device that is none": ({"train_batch_size": 8, "zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, "'none', 'cpu' or 'nvme'"),
    "unknown scheduler": ({"train_batch_size": 8, "scheduler": {"type": "OneCycleLRR"}}, "unknown scheduler.type"),
    "no object": ("[1, 2]{", "line 1"),
    "duplicate keys": ('{"train_batch_size": 8, "train_batch_size": 16}', "Found duplicate keys in DeepSpeed config: train_batch_size"),
    "no file": ("nowhere.json", "is no file, no JSON and no base64"),
}  # fmt: skip
