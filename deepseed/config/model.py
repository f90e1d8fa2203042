"""Every key of ds_config.json that real files have, with its type, its verdict and a note: one line a key.

Names, defaults and meanings are DeepSpeed's (deepspeed/runtime/config.py, zero/config.py, 0.19). A key that this file does not have is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from deepseed.config.fields import SUPPORTED, Count, Flag, Kind, Number, Says, Section, mapped, rejected, unless_off

ALWAYS = mapped("always so: the passes put collectives into buckets and overlap them")
NOTHING = mapped("no effect: nothing here needs it")
CODEGEN = ("python", "cpp", "inductor", "triton", "auto")  # words of codegen= in deepseed.compile
REPORT = mapped("no effect on training: step.explain() counts this")


def _device(v: Any) -> tuple[Kind, str]:
    if v == "nvme":
        return "mapped", "offload(.., disk=nvme_path) in the plan"
    return ("supported", "") if v in ("cpu", "none", None) else ("rejected", f"the device {v!r} is unknown: cpu, nvme or none")


DEVICE = Says("supported", of=_device)


class OffloadOptimizer(Section):
    device: Annotated[Literal["none", "cpu", "nvme"] | None, DEVICE] = "none"
    nvme_path: Annotated[str | None, mapped("offload(.., disk=PATH) in the plan")] = None
    pin_memory: Annotated[Flag, mapped("host memory is pinned wherever there is a GPU")] = False
    buffer_count: Annotated[Count, NOTHING] = 4
    pipeline_read: Annotated[Flag, mapped("transfers are always ahead of their use")] = False
    pipeline_write: Annotated[Flag, mapped("transfers are always ahead of their use")] = False
    fast_init: Annotated[Flag, NOTHING] = False
    ratio: Annotated[Number, Says("supported", of=lambda v: ("supported", "") if v == 1 else ("rejected", "all of the optimizer's state goes to the host, or none; use budget(BYTES) to move only what must"))] = 1.0
    super_offload: Annotated[Flag, unless_off("SuperOffload is not carried out; device cpu with overlap is")] = False
    cpuadam_cores_perc: Annotated[Number, NOTHING] = 0.9


class OffloadParam(Section):
    device: Annotated[Literal["none", "cpu", "nvme"] | None, DEVICE] = "none"
    nvme_path: Annotated[str | None, mapped("offload(.., disk=PATH) in the plan")] = None
    pin_memory: Annotated[Flag, mapped("host memory is pinned wherever there is a GPU")] = False
    buffer_count: Annotated[Count, NOTHING] = 5
    buffer_size: Annotated[Count, NOTHING] = 100_000_000
    max_in_cpu: Annotated[Count, NOTHING] = 1_000_000_000


WINDOW = mapped("how far parameters are gathered ahead follows from the schedule of collectives")


class Zero(Section):
    stage: Annotated[Literal[0, 1, 2, 3], SUPPORTED] = 0
    contiguous_gradients: Annotated[Flag, ALWAYS] = True
    reduce_scatter: Annotated[Flag, Says("mapped", of=lambda v: ("mapped", "always so") if v else ("rejected", "gradients that are split are reduce-scattered; leave the key out"))] = True
    reduce_bucket_size: Annotated[Count, ALWAYS] = 500_000_000
    use_multi_rank_bucket_allreduce: Annotated[Flag, NOTHING] = True
    allgather_partitions: Annotated[Flag, ALWAYS] = True
    allgather_bucket_size: Annotated[Count, ALWAYS] = 500_000_000
    overlap_comm: Annotated[Flag | None, ALWAYS] = None
    load_from_fp32_weights: Annotated[Flag, mapped("master weights are always saved and loaded exactly")] = True
    elastic_checkpoint: Annotated[Flag, mapped("always so: a checkpoint loads under any plan and number of ranks")] = False
    offload_param: Annotated[OffloadParam | None, SUPPORTED] = None
    offload_optimizer: Annotated[OffloadOptimizer | None, SUPPORTED] = None
    sub_group_size: Annotated[Count, NOTHING] = 1_000_000_000
    cpu_offload_param: Annotated[Flag | None, mapped('as "offload_param": {"device": "cpu"}')] = None
    cpu_offload_use_pin_memory: Annotated[Flag | None, mapped("host memory is pinned wherever there is a GPU")] = None
    cpu_offload: Annotated[Flag | None, mapped('as "offload_optimizer": {"device": "cpu"}')] = None
    prefetch_bucket_size: Annotated[Count, WINDOW] = Field(50_000_000, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: Annotated[Count, mapped("a tiny parameter stays whole where that is cheaper; explain names it")] = Field(100_000, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: Annotated[Count, mapped("a tiny parameter stays whole where that is cheaper; explain names it")] = Field(2**63 - 1, alias="stage3_model_persistence_threshold")
    max_live_parameters: Annotated[Count, WINDOW] = Field(1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: Annotated[Count, WINDOW] = Field(1_000_000_000, alias="stage3_max_reuse_distance")
    gather_16bit_weights_on_model_save: Annotated[Flag, mapped("whole weights are saved whenever they are asked for")] = Field(False, alias="stage3_gather_16bit_weights_on_model_save")
    stage3_gather_fp16_weights_on_model_save: Annotated[Flag, mapped("whole weights are saved whenever they are asked for")] = False
    module_granularity_threshold: Annotated[Count, NOTHING] = Field(0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: Annotated[Flag, NOTHING] = Field(False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: Annotated[Flag, NOTHING] = Field(False, alias="stage3_allgather_sequential")
    partition_stream_chunk_size: Annotated[Count, mapped("a model on the meta device is read shard by shard")] = Field(0, alias="stage3_partition_stream_chunk_size")
    ignore_unused_parameters: Annotated[Flag, mapped("a parameter that the loss does not reach has the gradient zero and is named")] = True
    legacy_stage1: Annotated[Flag, NOTHING] = False
    round_robin_gradients: Annotated[Flag, NOTHING] = False
    zero_hpz_partition_size: Annotated[Count, unless_off("ZeRO++'s second partition is not carried out; zero3 without it is", (0, 1))] = 1
    zero_quantized_weights: Annotated[Flag, unless_off("ZeRO++ quantizes what is sent, which changes numbers; use bf16")] = False
    zero_quantized_nontrainable_weights: Annotated[Flag, unless_off("ZeRO++ quantizes weights, which changes numbers; use bf16")] = False
    zero_quantized_gradients: Annotated[Flag, unless_off('ZeRO++ quantizes what is sent, which changes numbers; use "communication_data_type": "bf16"')] = False
    zeropp_loco_param: Annotated[dict[str, Any] | None, unless_off("LoCo needs quantized gradients, which are not carried out")] = None
    mics_shard_size: Annotated[Count, unless_off("MiCS is not carried out; zero3 over all data-parallel ranks is", (-1, 0))] = -1
    mics_hierarchical_params_gather: Annotated[Flag, unless_off("MiCS is not carried out; zero3 over all data-parallel ranks is")] = False
    memory_efficient_linear: Annotated[Flag, NOTHING] = True
    pipeline_loading_checkpoint: Annotated[Flag, NOTHING] = False
    override_module_apply: Annotated[Flag, NOTHING] = True
    log_trace_cache_warnings: Annotated[Flag, NOTHING] = False
    enable_sanity_checks: Annotated[Flag, mapped("always so: every pass is checked")] = False
    save_muon_momentum_buffer_in_memory: Annotated[Flag, NOTHING] = False
    leaf_module: Annotated[dict[str, Any] | None, mapped("no effect: modules are no units here")] = None
    zenflow: Annotated[dict[str, Any] | None, unless_off("ZenFlow updates some weights late, which changes numbers; offload_optimizer with overlap does not")] = None


class Fp16(Section):
    enabled: Annotated[Flag, SUPPORTED] = False
    loss_scale: Annotated[Number, SUPPORTED] = 0
    initial_scale_power: Annotated[Count, SUPPORTED] = 16
    loss_scale_window: Annotated[Count, SUPPORTED] = 1000
    hysteresis: Annotated[Count, SUPPORTED] = 2
    consecutive_hysteresis: Annotated[Flag, SUPPORTED] = False
    min_loss_scale: Annotated[Number, SUPPORTED] = 1
    auto_cast: Annotated[Flag, mapped("a batch's floats are cast where the model meets them")] = False
    fused_mode: Annotated[Flag, NOTHING] = True
    fp16_master_weights_and_grads: Annotated[Flag, unless_off("master weights stay fp32: half precision loses small updates")] = False


class Bf16(Section):
    enabled: Annotated[Flag, SUPPORTED] = False
    immediate_grad_update: Annotated[Flag, NOTHING] = True
    check_grad_overflow: Annotated[Flag, mapped("bf16 has the range of fp32: nothing is skipped")] = False
    bf16_master_weights_and_grads: Annotated[Flag, unless_off("master weights stay fp32: bf16 loses small updates")] = False
    bf16_optimizer_states: Annotated[Flag, unless_off("optimizer state stays fp32: bf16 loses small updates")] = False


COMPRESSED = ("freeze_step", "cuda_aware", "comm_backend_name", "var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")
NO_OPTIMIZER: dict[str, str] = {  # names in lower case -> why not, and what instead
    "onebitadam": "it compresses what is sent, which changes numbers; use AdamW with bf16",
    "zerooneadam": "it compresses what is sent, which changes numbers; use AdamW with bf16",
    "onebitlamb": "it compresses what is sent, which changes numbers; use AdamW with bf16",
    "lamb": "torch has no Lamb; give one to initialize(optimizer=..)",
    "muadam": "give muP's optimizer to initialize(optimizer=..)",
    "muadamw": "give muP's optimizer to initialize(optimizer=..)",
    "musgd": "give muP's optimizer to initialize(optimizer=..)",
}
NO_SCHEDULER: dict[str, str] = {"OneCycle": "its momentum's cycle is not carried out; use torch's OneCycleLR or CyclicLR as the type, or WarmupCosineLR"}


def _option(key: str, value: Any) -> tuple[Kind, str]:
    """Of an optimizer: what becomes of the option ``key``."""
    if key in COMPRESSED:
        return "rejected", "it belongs to 1-bit optimizers, which compress what is sent; use AdamW without it"
    if key == "bias_correction":
        return "mapped", "as torch's Adam does" if value else "Adam without it"
    if key == "fp32_optimizer_states":
        return ("mapped", "always so") if value else ("rejected", "optimizer state stays fp32: bf16 loses small updates")
    notes = {"max_grad_norm": "as gradient_clipping", "torch_adam": "torch's Adam steps in any case", "set_grad_none": "no effect: nothing here needs it", "ns_method": "the iteration is the standard one, in bf16"}
    return ("mapped", notes[key]) if key in notes else ("supported", "")


class OptimizerSection(Section):
    type: Annotated[str, Says("supported", of=lambda v: ("rejected", NO_OPTIMIZER[v.lower()]) if v.lower() in NO_OPTIMIZER else ("supported", ""))]
    params: Annotated[dict[str, Any], Says("supported", each=_option)] = Field(default_factory=dict)
    legacy_fusion: Annotated[Flag, NOTHING] = False


class SchedulerSection(Section):
    type: Annotated[str | None, Says("supported", of=lambda v: ("rejected", NO_SCHEDULER[v]) if v in NO_SCHEDULER else ("supported", ""))] = None
    params: Annotated[dict[str, Any], Says("supported", each=lambda key, value: ("supported", ""))] = Field(default_factory=dict)


class ActivationCheckpointing(Section):
    partition_activations: Annotated[Flag, mapped("remat in the plan; activations are split by tp and sp as they are")] = False
    contiguous_memory_optimization: Annotated[Flag, NOTHING] = False
    cpu_checkpointing: Annotated[Flag, mapped("offload(activations) in the plan")] = False
    number_checkpoints: Annotated[Count | None, mapped("remat in the plan; how many layers' inputs are kept follows from the graph")] = None
    synchronize_checkpoint_boundary: Annotated[Flag, NOTHING] = False
    profile: Annotated[Flag, REPORT] = False
    use_reentrant: Annotated[Flag, NOTHING] = True


class DataTypes(Section):
    grad_accum_dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, SUPPORTED] = None


class TensorParallelSizes(Section):
    tp_size: Annotated[Count, SUPPORTED] = 1
    tp_grain_size: Annotated[Count, NOTHING] = 1
    mpu: Annotated[Any, unless_off("groups of ranks are the plan's: tpN, ppN, spN")] = None
    tp_group: Annotated[Any, unless_off("groups of ranks are the plan's: tpN, ppN, spN")] = None


class TensorParallel(Section):
    autotp_size: Annotated[Count, SUPPORTED] = 0
    tp_size: Annotated[Count, SUPPORTED] = 1
    enabled: Annotated[Flag, NOTHING] = True
    tp_overlap_comm: Annotated[Flag, ALWAYS] = False
    tensor_parallel: Annotated[TensorParallelSizes | None, SUPPORTED] = Field(None, alias="tp")
    dtype: Annotated[Any, mapped("bf16 or fp16 of the file say it")] = None
    injection_policy_tuple: Annotated[Any, mapped("no effect: what is split follows from the graph, no names are needed")] = None
    keep_module_on_host: Annotated[Flag, mapped("a model on the meta device is read shard by shard")] = False
    replace_with_kernel_inject: Annotated[Flag, mapped("kernels are made from the graph")] = Field(False, alias="kernel_inject")
    preset_model: Annotated[str | None, NOTHING] = None
    partition_config: Annotated[dict[str, Any] | None, mapped("no effect: what is split follows from the graph, no names are needed")] = None


class Pipeline(Section):
    stages: Annotated[Count, SUPPORTED] = 1
    partition: Annotated[str, mapped("stages are cut in balance; pp4(cut=[..]) in a plan says where")] = "best"
    seed_layers: Annotated[Flag, NOTHING] = False
    activation_checkpoint_interval: Annotated[Count, Says("mapped", of=lambda v: ("mapped", "remat in the plan") if v else ("mapped", "off, as it is here"))] = 0
    pipe_partitioned: Annotated[Flag, NOTHING] = True
    grad_partitioned: Annotated[Flag, NOTHING] = True
    use_reentrant: Annotated[Flag, NOTHING] = True


class CheckpointSection(Section):
    tag_validation: Annotated[str, mapped("all ranks must name one tag: always so")] = "Warn"
    load_universal: Annotated[Flag, mapped("always so: a checkpoint loads under any plan and number of ranks")] = False
    use_node_local_storage: Annotated[Flag, unless_off("every rank writes into one folder that all see")] = False
    parallel_write: Annotated[dict[str, Any] | None, mapped("always so: every rank writes its own part")] = None
    writer: Annotated[dict[str, Any] | None, Says("mapped", of=lambda v: ("supported", "written while training goes on") if (v or {}).get("decoupled") else NOTHING.about(v))] = None


class Compile(Section):
    deepcompile: Annotated[Flag, mapped("always so: the whole step is compiled")] = False
    enabled: Annotated[Flag, mapped("always so: the whole step is compiled")] = False
    backend: Annotated[Any, Says("mapped", of=lambda v: ("supported", "codegen= of deepseed.compile") if v in CODEGEN else NOTHING.about(v))] = None
    kwargs: Annotated[dict[str, Any] | None, NOTHING] = None
    free_activation: Annotated[Flag, mapped("always so: a value ends with its last use")] = False
    offload_activation: Annotated[Flag, mapped("offload(activations) in the plan")] = False
    offload_opt_states: Annotated[Flag, mapped("offload(optimizer) in the plan")] = False
    double_buffer: Annotated[Flag, NOTHING] = True
    symmetric_memory: Annotated[Flag, NOTHING] = False
    debug_log: Annotated[Flag, mapped("DEEPSEED_DUMP=dir writes the program after each pass")] = False
    offload_parameters: Annotated[Flag, mapped("offload(params) in the plan")] = False
    free_activation_threshold: Annotated[Count, NOTHING] = 10 * 2**20
    offload_activation_pin_memory: Annotated[Flag, mapped("host memory is pinned wherever there is a GPU")] = True
    keep_int_input_tensors: Annotated[Flag, NOTHING] = True
    keep_all_input_tensors: Annotated[Flag, NOTHING] = False
    sync_before_reduce: Annotated[Flag, NOTHING] = False
    sync_after_reduce: Annotated[Flag, NOTHING] = False
    sync_before_allgather: Annotated[Flag, NOTHING] = False
    sync_after_allgather: Annotated[Flag, NOTHING] = False
    passes: Annotated[list[str] | None, mapped("the plan decides which passes have work")] = None


class TensorBoardSection(Section):
    enabled: Annotated[bool, SUPPORTED] = False
    output_path: Annotated[str, SUPPORTED] = ""
    job_name: Annotated[str, SUPPORTED] = "DeepSpeedJobName"


class CsvSection(Section):
    enabled: Annotated[bool, SUPPORTED] = False
    output_path: Annotated[str, SUPPORTED] = ""
    job_name: Annotated[str, SUPPORTED] = "DeepSpeedJobName"


class WandbSection(Section):
    enabled: Annotated[bool, SUPPORTED] = False
    group: Annotated[str | None, SUPPORTED] = None
    team: Annotated[str | None, SUPPORTED] = None
    project: Annotated[str, SUPPORTED] = "deepspeed"


class CommsLogger(Section):
    enabled: Annotated[bool, mapped("counts and bytes of each program's collectives, told when it is compiled; step.explain() has more")] = False
    verbose: Annotated[Flag, NOTHING] = False
    prof_all: Annotated[Flag, mapped("always so: all collectives are counted")] = True
    prof_ops: Annotated[list[str] | None, mapped("all collectives are counted")] = None
    debug: Annotated[Flag, NOTHING] = False


class FlopsProfiler(Section):
    enabled: Annotated[bool, mapped("flops of each program's matrix products, by phase and module, told at profile_step")] = False
    profile_step: Annotated[Count, SUPPORTED] = 1
    module_depth: Annotated[Count, SUPPORTED] = -1
    top_modules: Annotated[Count, SUPPORTED] = 1
    detailed: Annotated[Flag, mapped("step.explain() has the details")] = True
    recompute_fwd_factor: Annotated[Number, mapped("what is computed again is counted as it stands in the program")] = 0.0
    output_file: Annotated[str | None, mapped("no effect: it is logged; deepseed explain -> a file")] = None


Switch = dict[str, Any]  # a section that is a switch with details


def switched(note: str) -> Says:
    """Rejected where the section is enabled."""
    off = "off, as it is here"
    return Says("rejected", note, lambda v: ("mapped", off) if v is None or v is False or (isinstance(v, dict) and not v.get("enabled", bool(v))) else ("rejected", note))


class Config(Section):
    """The whole file."""

    train_batch_size: Annotated[Count | None, SUPPORTED] = None
    train_micro_batch_size_per_gpu: Annotated[Count | None, SUPPORTED] = None
    gradient_accumulation_steps: Annotated[Count | None, SUPPORTED] = None
    gradient_clipping: Annotated[Number, SUPPORTED] = 1.0
    steps_per_print: Annotated[Count | None, SUPPORTED] = None
    wall_clock_breakdown: Annotated[Flag, SUPPORTED] = False
    zero_optimization: Annotated[Zero, SUPPORTED] = Field(default_factory=lambda: Zero.model_validate({}))
    fp16: Annotated[Fp16, SUPPORTED] = Field(default_factory=Fp16)
    bf16: Annotated[Bf16, SUPPORTED] = Field(default_factory=Bf16)
    bfloat16: Annotated[Bf16 | None, mapped('the old name of "bf16"')] = None
    optimizer: Annotated[OptimizerSection | None, SUPPORTED] = None
    scheduler: Annotated[SchedulerSection | None, SUPPORTED] = None
    tensor_parallel: Annotated[TensorParallel, SUPPORTED] = Field(default_factory=lambda: TensorParallel.model_validate({}))
    sequence_parallel_size: Annotated[Count, SUPPORTED] = 1
    pipeline: Annotated[Pipeline, SUPPORTED] = Field(default_factory=Pipeline)
    data_types: Annotated[DataTypes, SUPPORTED] = Field(default_factory=DataTypes)
    communication_data_type: Annotated[str | None, mapped("grads(fp32) or grads(bf16) in the plan")] = None
    seq_parallel_communication_data_type: Annotated[str | None, NOTHING] = None
    checkpoint: Annotated[CheckpointSection, SUPPORTED] = Field(default_factory=CheckpointSection)
    activation_checkpointing: Annotated[ActivationCheckpointing, mapped("remat in the plan")] = Field(default_factory=ActivationCheckpointing)
    compile: Annotated[Compile, mapped("always so: the whole step is compiled")] = Field(default_factory=Compile)
    dataloader_drop_last: Annotated[Flag, SUPPORTED] = False
    zero_allow_untested_optimizer: Annotated[Flag, mapped("always so: any optimizer whose step can be traced is allowed")] = False
    zero_force_ds_cpu_optimizer: Annotated[Flag, mapped("torch's own optimizers run on the host")] = True
    prescale_gradients: Annotated[Flag, mapped("no effect on the result: gradients are the mean over the whole batch")] = False
    gradient_predivide_factor: Annotated[Number, mapped("no effect on the result: gradients are the mean over the whole batch")] = 1.0
    gradient_allreduce_op: Annotated[str, Says("mapped", of=lambda v: ("mapped", "always so") if v == "mean" else ("rejected", "gradients are the mean over the whole batch; scale the loss"))] = "mean"
    managed_gradient_accumulation: Annotated[Flag, Says("mapped", of=lambda v: ("mapped", "always so") if v else ("rejected", "the step is one program with its accumulation; deepseed.compile(model, plan) keeps a loop of your own"))] = True
    fp32_allreduce: Annotated[Flag, mapped('as "communication_data_type": "fp32"')] = False
    torch_autocast: Annotated[Switch | None, switched("autocast goes by lists of modules; use bf16 or fp16")] = None
    log_level: Annotated[str | None, NOTHING] = None
    sparse_gradients: Annotated[Flag, unless_off("gradients of embeddings are dense; leave it out")] = False
    disable_allgather: Annotated[Flag, NOTHING] = False
    cuda_visible_devices: Annotated[Any, mapped("no effect: deepseed --include localhost:0,2, or CUDA_VISIBLE_DEVICES")] = None
    dump_state: Annotated[Flag, REPORT] = False
    memory_breakdown: Annotated[Flag, SUPPORTED] = False
    vocabulary_size: Annotated[Count | None, NOTHING] = None
    graph_harvesting: Annotated[Flag, NOTHING] = False
    use_data_before_expert_parallelism: Annotated[Flag, mapped("order(..) in the plan")] = False
    seed: Annotated[Count | None, SUPPORTED] = None
    flops_profiler: Annotated[FlopsProfiler, SUPPORTED] = Field(default_factory=lambda: FlopsProfiler.model_validate({}))
    comms_logger: Annotated[CommsLogger, SUPPORTED] = Field(default_factory=lambda: CommsLogger.model_validate({}))
    tensorboard: Annotated[TensorBoardSection, SUPPORTED] = Field(default_factory=TensorBoardSection)
    csv_monitor: Annotated[CsvSection, SUPPORTED] = Field(default_factory=CsvSection)
    wandb: Annotated[WandbSection, SUPPORTED] = Field(default_factory=WandbSection)
    comet: Annotated[Switch | None, switched("comet is not written to; use tensorboard, wandb or csv_monitor, or a writer of your own in engine.monitor.writers")] = None
    monitor_config: Annotated[Switch | None, mapped("no effect, as in DeepSpeed: tensorboard, wandb and csv_monitor stand at the top")] = None
    amp: Annotated[Switch | None, switched("Apex's mixed precision is not carried out; use bf16 or fp16")] = None
    sparse_attention: Annotated[Switch | None, rejected("the attention is the model's own; give the model a sparse one")] = None
    compression_training: Annotated[Switch | None, rejected("compression changes the model; compress it beforehand")] = None
    quantize_training: Annotated[Switch | None, switched("quantized training changes numbers; quantize the model afterwards")] = None
    autotuning: Annotated[Switch | None, switched("no autotuner; deepseed explain prices a plan without running it")] = None
    elasticity: Annotated[Switch | None, switched("the number of ranks is fixed within a run; a checkpoint goes on with any other")] = None
    curriculum_learning: Annotated[Switch | None, switched("a curriculum is the data loader's; shapes are compiled as they come")] = None
    data_efficiency: Annotated[Switch | None, switched("data sampling is the data loader's")] = None
    progressive_layer_drop: Annotated[Switch | None, switched("dropping layers changes the model; write it into its forward")] = None
    eigenvalue: Annotated[Switch | None, switched("no eigenvalues are computed; loss_and_grads gives gradients")] = None
    hybrid_engine: Annotated[Switch | None, switched("generation is an engine of its own")] = None
    nebula: Annotated[Switch | None, switched("checkpoints are written by the ranks; leave it out")] = None
    datastates_ckpt: Annotated[Switch | None, switched("checkpoints are written by the ranks; leave it out")] = None
    aio: Annotated[Switch | None, mapped("how a disk is read is not tuned by hand")] = None
    zenflow: Annotated[Switch | None, rejected("ZenFlow updates some weights late, which changes numbers; offload_optimizer with overlap does not")] = None
    expert_parallel: Annotated[Switch | None, switched("write epN into a plan: experts are found in the graph")] = None
    comms_config: Annotated[Switch | None, REPORT] = None
    mpu: Annotated[Any, rejected("groups of ranks are the plan's: tpN, ppN, spN")] = None

    @field_validator("zero_optimization", mode="before")
    @classmethod
    def _old_form(cls, value: Any) -> Any:
        """``true`` was once stage 1."""
        return {"stage": int(value)} if isinstance(value, bool) else value

