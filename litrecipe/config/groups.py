"""The groups of keys a recipe is made of.

Every field is one key of a recipe; the string under a field is its documentation and feeds `--help`, the docs and
the error messages. Defaults live here and nowhere else. This file imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litrecipe.config.slurm import Slurm

Optimizer = Literal["adamw", "adamw8bit", "paged_adamw8bit", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
Decay = Literal["linear", "sqrt", "cosine", "exponential"]
Precision = Literal["32-true", "bf16-true", "bf16-mixed"]
DpoLoss = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "exo",
    "nca",
    "sppo",
    "bco",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "simpo",
    "cpo",
    "orpo",
    "kto",
]
Reference = Literal["auto", "cache", "adapter_off", "copy", "moving"]
REFERENCE_FREE: tuple[DpoLoss, ...] = ("simpo", "cpo", "orpo")
"""Losses that hold the policy to nothing."""
SORTING: frozenset[DpoLoss] = frozenset({"aot", "aot_unpaired"})
"""Losses that hold sorted values of the whole step against each other: of pairs only."""
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
DistilMethod = Literal["full", "top_k", "top_1"]
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Model:
    """Which model, and how it is loaded."""

    source: str = ""
    """A Hugging Face folder, a hub id (`org/name`), a GGUF file, a PEFT adapter folder (whose adapter is trained on), a
    run directory (its final model), or a `config.json` with `init: random`. `hub:…` lies among the recipes of the
    hub."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` loads weights; `random` builds the `config.json` of `source` from scratch."""
    inherit_layers: int | None = None
    """Only so many of the first layers of `source`, with its embedding, head and last norm: the start of a smaller
    model (Inheritune, 2404.08634)."""
    tokenizer: str | None = None
    """A folder with `tokenizer.json`, or a hub id, when it is not beside the model; also `hub:…`."""
    chat_template: str | None = None
    """A Jinja file that replaces the model's own chat template; also `hub:…`."""


@dataclass
class Adapter:
    """Low-rank adapters (peft)."""

    method: Literal["none", "lora", "dora"] = "none"
    """`none` trains all weights; `lora` (2106.09685) and `dora` (2402.09353) train an adapter."""
    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: float = 0.0
    """Dropout on the adapter's input; above 0 packed and unpacked training no longer agree exactly."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers that get an adapter."""
    rslora: bool = False
    """Rank-stabilised scaling (2312.03732)."""


@dataclass
class Quantize:
    """Quantised base weights (bitsandbytes)."""

    method: Literal["none", "nf4", "int8"] = "none"
    """`nf4` (QLoRA, 2305.14314) or `int8` (LLM.int8, 2208.07339) for the frozen base under an adapter."""
    double_quant: bool = True
    """Quantise the NF4 scales as well."""


@dataclass
class Data:
    """What is trained on."""

    train: str = ""
    """A file (.json, .jsonl, .parquet, .txt; .gz and .zst), a folder, a hub dataset id, or `toy:units?n=512&seed=0`."""
    val: str | None = None
    """Held-out data, in the same forms."""
    val_fraction: float = 0.0
    """Share of `train` held out when `val` is not given, chosen by `train.seed`."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "auto"
    """Layout of a row; `auto` recognises it by its keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other column names: `{prompt: question, completion: answer}`."""
    max_length: int = 2048
    """Longest sample in tokens; the rest is cut off the end and counted."""
    mask: Literal["assistant", "all"] = "assistant"
    """`assistant` learns the assistant's turns, `all` the whole text."""
    date: str | None = None
    """ISO date that `strftime_now` of a chat template sees, so that renders do not change from day to day."""
    cache_dir: str | None = None
    """Where tokenised data is kept (default: the user's cache folder)."""


@dataclass
class Dpo:
    """Direct preference optimisation and its kin."""

    loss: DpoLoss = "sigmoid"
    """`sigmoid` (DPO), `cdpo` (the same with `label_smoothing`), `robust`, `hinge`, `ipo`, `exo`, `nca`, `sppo`, `bco`,
    `aot`, `aot_unpaired`, `apo_zero`, `apo_down`, `discopop`, `sigmoid_norm` (per token; try a beta of 5), without a
    reference `simpo`, `cpo`, `orpo`, and `kto`, which also learns from single answers with a label."""
    mix: dict[str, float] = field(default_factory=dict)
    """Several losses with their weights instead of `loss`: `{sigmoid: 0.8, bco: 0.2}`."""
    beta: float = 0.1
    """How much a log-ratio counts; higher keeps the policy closer to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round (`cdpo`, `robust` and `exo` need it above 0)."""
    nll_coef: float | None = None
    """Weight of the mean negative log-likelihood of the chosen tokens (Llama 3: 0.2; default 1 for `cpo` and `orpo`,
    else 0)."""
    gamma: float = 0.5
    """`simpo`: the margin that chosen must have over rejected."""
    length_normalize: bool = True
    """`ipo`: log-probabilities per token, as its authors ran it, rather than sums."""
    ld_alpha: float = 1.0
    """How much tokens beyond the shorter answer's length count (LD-DPO): 1 wholly, 0 not at all."""
    divergence: Divergence = "reverse_kl"
    """What holds the policy to the reference (f-DPO): `reverse_kl`, `forward_kl`, `js` or `alpha`."""
    divergence_alpha: float = 0.5
    """`alpha`: between reverse KL (0) and forward KL (1)."""
    mask_format_tokens: bool = False
    """Leave special tokens (end of turn, headers) out of the preference loss, not of the NLL (Llama 3)."""
    weighting: bool = False
    """Weigh each pair by how likely its answers are to come from the policy (WPO)."""
    desirable_weight: float = 1.0
    """`kto`: weight of good answers."""
    undesirable_weight: float = 1.0
    """`kto`: weight of bad answers."""
    reference: Reference = "auto"
    """What the policy is held to: the model it starts from, as `cache` (log-probabilities computed once and kept on
    disk), `adapter_off` (the base under a fresh adapter), `copy` (a frozen one); or `moving`, a copy that follows the
    policy (TR-DPO). `auto` is `cache` wherever that is possible, but for fsdp."""
    ref_alpha: float = 0.6
    """`moving`: at an update the reference becomes ref_alpha times the policy and the rest itself (1: hard updates)."""
    ref_every: int = 1
    """`moving`: steps between updates (with ref_alpha 1 try 512)."""


@dataclass
class Distil:
    """Learning from a teacher: what it says at each place, besides the token that stands there."""

    teacher: str | None = None
    """A language model with the same tokenizer, in any form that `model.source` takes; it stays as it is. In a stage of
    a pretraining null: without it."""
    method: DistilMethod = "full"
    """What of the teacher is learnt: `full`, its distribution over the whole vocabulary (Gemma 2, 2408.00118); `top_k`,
    its `top_k` likeliest tokens and how much is left for all others; `top_1`, its likeliest token (AFM, 2407.21075)."""
    alpha: float | None = None
    """Weight of the tokens of the data; the teacher has the rest (default: 0, and 0.1 for `top_1`)."""
    temperature: float = 1.0
    """Divides the logits of both for what is learnt of the teacher (1503.02531); not those of the data's tokens."""
    top_k: int = 64
    """`top_k`: how many tokens."""
    cache: bool = False
    """Ask the teacher once, and keep its answers on disk for all epochs and runs (`top_k` and `top_1`): about six
    bytes for each of the k tokens at each place (eight from a vocabulary of 65,537 on)."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """How the teacher's weights are quantised."""


@dataclass
class Reward:
    """The reward model's loss (Bradley-Terry)."""

    margin: bool = False
    """Ask for the margin that a row tells (`margin`, or the difference of its scores) between its answers (Llama 2)."""
    soft_labels: bool = False
    """Take a row's margin, from 0 to 1, for how sure it is: chosen is better with probability (1 + margin) / 2."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be labelled the wrong way round."""
    centering_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)², which holds rewards near 0 (try 0.01)."""
    sft_coef: float = 0.0
    """Weight of the mean NLL of the chosen answers' tokens. Above 0 it trains one transformer with a language model's
    head and a score, for `ppo.layout` hydra (2309.00754)."""
    demonstrations: str | None = None
    """Conversations on which mean and spread of the reward are measured and kept beside the weights (default: the
    chosen answers of `data.train`)."""
    measured: int = 256
    """At most this many of them."""


@dataclass
class Router:
    """What the routers of mixtures of experts are held to; other models have none."""

    aux_loss_coef: float | None = None
    """Weight of the loss that keeps experts equally busy, E Σ f_e P_e (default: that of the model's config.json; 0
    under an adapter, which leaves routers as they are)."""
    balance: Literal["hf", "layer"] = "hf"
    """`hf` takes the experts' shares over all layers together, as transformers does; `layer` is the mean over layers,
    which then cannot make up for each other. Either is the number of chosen experts where all are used alike."""
    z_loss_coef: float = 0.0
    """Weight of the mean logsumexp(router logits)² over tokens and layers (ST-MoE: 0.001)."""


@dataclass
class Optim:
    """The optimizer."""

    name: Optimizer = "adamw"
    """`adamw` (fused), `adamw8bit` and `paged_adamw8bit` (bitsandbytes), or `sgd`."""
    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates; the first is the momentum of `sgd`."""
    eps: float = 1e-8
    """Adam's epsilon."""
    adam_style: Literal["torch", "tf"] = "torch"
    """`tf` keeps epsilon out of the bias correction, as PPO's first programs did; matters from 1e-5 on."""
    weight_decay: float = 0.0
    """Weight decay on matrices, decoupled from the gradient (`sgd` adds it to the gradient); vectors (norms, biases,
    DoRA magnitudes) are left alone."""


@dataclass
class Schedule:
    """The learning rate over the run."""

    name: ScheduleName = "cosine"
    """`cosine`, `linear`, `constant`, or `wsd` (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """`wsd`: steps of the final decay (default: a tenth of the run); the others decay over the whole run."""
    decay: Decay = "linear"
    """`wsd`: the curve of its decay; `sqrt` is 1 - √x, `exponential` halves every `half_life_steps`."""
    half_life_steps: int | None = None
    """`exponential`: steps in which the rate halves."""
    min_lr_ratio: float = 0.0
    """The final rate as a share of the peak."""


@dataclass
class Train:
    """How long, and in what portions. A step is one optimizer step."""

    max_steps: int | None = None
    """Stop after this many steps."""
    epochs: float | None = None
    """Stop after this many passes over the data (default 1 when neither `max_steps` nor `max_tokens` is set)."""
    max_tokens: int | None = None
    """Stop after this many tokens."""
    max_time: str | None = None
    """Stop, saved, after this wall-clock time: `90s`, `30m`, `2h`, `01:30:00`."""
    global_batch_size: int = 8
    """Samples (conversations, pairs, prompts) of one step, over all ranks."""
    micro_batch_tokens: int = 4096
    """Tokens of one forward pass; changes memory and speed, never the gradient."""
    grad_clip: float | None = 1.0
    """Largest gradient norm; null switches clipping off."""
    seed: int = 0
    """Seeds initialisation, data order and sampling."""


@dataclass
class Eval:
    """Evaluation while training."""

    every: int | None = None
    """Steps between evaluations on `data.val` (null: only at the end)."""
    tasks: list[str] = field(default_factory=list)
    """Tasks for `litrecipe evaluate`: built-ins (`name:file`), lm-eval names, or a folder of lm-eval YAML."""
    limit: int | None = None
    """At most this many samples a task."""


@dataclass
class Checkpoint:
    """Saving and resuming."""

    every: int | None = 100
    """Steps between checkpoints (null: only when stopped and at the end)."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""
    asynchronous: bool = False
    """Write them while the training goes on, from a copy of weights and optimizer in memory."""
    resume: str | None = None
    """`auto` continues the newest complete checkpoint of `out_dir`, if any; or a checkpoint folder."""


@dataclass
class Log:
    """What is told, and where."""

    every: int = 1
    """Steps between lines of metrics.jsonl and of the loggers."""
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])
    """Loggers besides metrics.jsonl."""
    project: str = "litrecipe"
    """Project (W&B) or experiment (MLflow) name."""


@dataclass
class Fabric:
    """Devices and precision (Lightning Fabric)."""

    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it runs."""
    devices: int | Literal["auto"] = "auto"
    """Processes of one node (on CPU `auto` is 1)."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """`ddp` copies the model, `fsdp` (FSDP2) shards it; `auto` is ddp when there are several processes, and fsdp with
    tensor parallelism."""
    tensor_parallel: int = 1
    """Processes that compute one copy of the model together, each with some heads, some of each MLP's width and some
    tokens of the vocabulary: a divisor of the number of processes. They talk four times a layer: keep them on one node.
    """
    precision: Precision = "32-true"
    """`32-true`, `bf16-true`, or `bf16-mixed` (fp32 weights, bf16 arithmetic)."""
    compile: bool = False
    """torch.compile the decoder blocks."""
    hardware: Literal["here", "a100-80", "h100", "h200"] = "here"
    """What `--dry_run` reckons with: this machine, or nodes of eight such GPUs (or `devices`) with NVLink and a network
    adapter each, which need not be there."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    reshard_after_forward: bool = True
    """`fsdp`: let go of each block after its forward pass and gather it again for the backward pass; false keeps all
    blocks between the two: a third less communication, and the whole model on every rank meanwhile."""
    cpu_offload: bool = False
    """`fsdp`: keep weights, gradients and the optimizer in main memory, which also takes its step there, and bring each
    block to the GPU when it works: slow, and the last resort."""
    param_dtype: Literal["auto", "bfloat16"] = "auto"
    """`fsdp` under `bf16-mixed`: `bfloat16` gathers all weights in bf16, with half the communication and memory; norms
    and residual stream are bf16 then, too. `auto` gathers them as they are stored."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """`fsdp`: in what the gradients of ranks are added up."""
    gather_to_sample: bool = False
    """`fsdp`: every rank holds the whole policy while it samples, which is many times faster where there is room;
    otherwise each block is gathered for every token."""

    @property
    def is_sharded(self) -> bool:
        """Whether processes share a model, none of which holds all of it."""
        return self.strategy == "fsdp" or self.tensor_parallel > 1


@dataclass
class Generate:
    """How text is sampled."""

    max_new_tokens: int = 256
    """Longest answer in tokens (the default, where the model's context leaves so many)."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    stop: list[str] = field(default_factory=list)
    """Strings that end an answer."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass
class TrainingRecipe:
    """What every verb that trains has."""

    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    quantize: Quantize = field(default_factory=Quantize)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    fabric: Fabric = field(default_factory=Fabric)
    slurm: Slurm = field(default_factory=Slurm)
    out_dir: str = "runs"
    """Run directory: recipe, metrics, checkpoints and the final model."""
    schema_version: int = 1
    """Version of these keys; older recipes are migrated when they are read."""


@dataclass
class FinetuneRecipe(TrainingRecipe):
    """Supervised fine-tuning: full, LoRA or DoRA, on a plain or quantised base."""

    router: Router = field(default_factory=Router)
    out_dir: str = "runs/finetune"
    distil: Distil = field(default_factory=Distil)


@dataclass
class GentleOptim(Optim):
    """The optimizer."""

    lr: float = 1e-5
    """Peak learning rate (an adapter takes about ten times that of all weights)."""


@dataclass
class DpoRecipe(TrainingRecipe):
    """Preference optimisation: DPO and its kin, full, LoRA or DoRA, on a plain or quantised base."""

    optim: GentleOptim = field(default_factory=GentleOptim)
    out_dir: str = "runs/dpo"
    dpo: Dpo = field(default_factory=Dpo)


@dataclass
class RewardRecipe(TrainingRecipe):
    """A reward model: a language model with a scalar head, full, LoRA or DoRA, on a plain or quantised base."""

    optim: GentleOptim = field(default_factory=GentleOptim)
    out_dir: str = "runs/reward"
    reward: Reward = field(default_factory=Reward)


@dataclass
class DataRecipe(TrainingRecipe):
    """Any recipe that trains, of which the data is looked at."""

    distil: Distil = field(default_factory=Distil)
    dpo: Dpo = field(default_factory=Dpo)
    reward: Reward = field(default_factory=Reward)


@dataclass
class EvaluateRecipe:
    """Measure a model on tasks."""

    model: Model = field(default_factory=Model)
    quantize: Quantize = field(default_factory=Quantize)
    fabric: Fabric = field(default_factory=Fabric)
    slurm: Slurm = field(default_factory=Slurm)
    generate: Generate = field(default_factory=Generate)
    tasks: list[str] = field(default_factory=list)
    """lm-eval names, a folder of lm-eval YAML, or built-ins: `perplexity:FILE`, `exact_match:FILE`, and
    `preference:FILE`, which alone takes reward models too."""
    reference: str | None = None
    """`preference`: the model that a policy's implicit reward is measured against (default: an adapter's base)."""
    beta: float = 0.1
    """`preference`: the beta of a policy's implicit reward."""
    limit: int | None = None
    """At most this many samples a task."""
    num_fewshot: int | None = None
    """Examples before the question (default: as the task says)."""
    batch_tokens: int = 8192
    """Tokens of one forward pass."""
    log_samples: bool = False
    """Write every sample with its result beside the table."""
    out: str | None = None
    """JSON file for the results."""
    schema_version: int = 1
    """Version of these keys."""


@dataclass
class GenerateRecipe:
    """Answer one prompt, or talk (`litrecipe chat`)."""

    model: Model = field(default_factory=Model)
    quantize: Quantize = field(default_factory=Quantize)
    fabric: Fabric = field(default_factory=Fabric)
    generate: Generate = field(default_factory=Generate)
    prompt: str | None = None
    """What the user says (`-` reads standard input)."""
    system: str | None = None
    """System message."""
    raw: bool = False
    """Continue the prompt as plain text, without the chat template."""
    schema_version: int = 1
    """Version of these keys."""
