"""The one typed configuration tree: a YAML recipe plus dotted overrides.

Every key is a field below with its documentation under it. Unknown and duplicate keys are errors
that list the valid ones. Nothing here imports torch, so reading a configuration is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from gpc_dist import deepspeed_file
from gpc_dist.errors import UserError
from gpc_dist.names import Name
from gpc_dist.parsing import to_yaml
from gpc_dist.schema import Section, all_keys, explain, mapping, parse_overrides, read_yaml, yaml_names
from gpc_dist.shipped import shipped_folder
from gpc_dist.shown import holds_secret

LARGEST_SEED = 2**32 - 1
"""What numpy takes."""
MOST_RANKS = 1024
"""On one machine."""
_YEAR_S = 365 * 86400


class RunConfig(Section):
    name: Name = "run"
    """Name of the run: its MLflow run name and the last part of the default folder."""
    dir: Path | None = None
    """Folder the run writes; `runs/<name>` when not given."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """Seed of the prompt's start, of the data order and of everything else that is drawn."""

    @property
    def folder(self) -> Path:
        return self.dir or Path("runs") / self.name


class EncoderConfig(Section):
    path: str = "minilm"
    """Frozen encoder: a local folder, a Hub id, or `minilm` (carried by the `demo` extra)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    checksum: bool = False
    """Before training, compare the SHA-256 of the weight files with the sums in `SHA256SUMS` beside them (as
    `sha256sum` writes it) or with the Hub's."""


class TaskConfig(Section):
    name: str = "table"
    """A packaged task (boolq, cb, cola, copa, multirc, record, rte, sst2, wic, wsc; axb and axg, the diagnostics, to
    evaluate an adapter of rte), or any name for a table described by the keys below."""
    kind: Literal["classification", "choice", "regression"] = "classification"
    """Table only: what is predicted: one of the labels, one of the choices, or a number."""
    text: list[str] = Field([])
    """Table only: one or two column names, or templates such as `title: {title}`; at most one for
    kind `choice`."""
    label: str = "label"
    """Table only: the column that holds the label, the index of the right choice (from 0), or the
    number."""
    labels: list[Annotated[str, Field(coerce_numbers_to_str=True)]] | None = None
    """Table only: the label values in order; taken from the training split when not given."""
    choices: list[str] = Field([])
    """Table only, kind `choice`: the columns or templates of the candidates."""
    metric: str | None = None
    """Metric that selects the best checkpoint; the task's own when not given."""


class DataConfig(Section):
    path: str | None = None
    """Folder of JSONL/CSV/TSV/Parquet files named after their split (also as the Hub lays them out: numbered parts,
    a folder `data` or `train`, gzip), one such file (the training split), a Hub id, or `demo` (the packaged data)."""
    config: str | None = None
    """Configuration name of a Hub data set (`rte` of `super_glue`)."""
    train: str | None = None
    """Training file (in `data.path` or anywhere) or Hub split; found by its usual names when not
    given."""
    validation: str | None = None
    """Validation file (in `data.path` or anywhere) or Hub split; found by its usual names when not
    given."""
    test: str | None = None
    """Test file (in `data.path` or anywhere) or Hub split; found by its usual names when not
    given."""
    quoting: Literal["auto", "quoted", "none"] = "auto"
    """CSV and TSV only: `quoted`: double quotes stand around fields, which may then hold delimiters, line breaks and
    doubled quotes; `none`: a quote is an ordinary character, as in GLUE's files. `auto`: `quoted` for CSV; for TSV
    as the rows tell, and if they do not, training asks for this key."""
    max_length: int = Field(256, ge=8, le=1_000_000)
    """Most text tokens of a row (T), special tokens included; the longest segment is shortened."""
    holdout: float | None = Field(None, gt=0, lt=1)
    """Hold out this share of the training split and select checkpoints on it, and searches their trials, instead
    of on the validation split, which training then does not read. The same rows for every `run.seed`."""
    limit_train: int | None = Field(None, ge=1)
    """Use only so many training examples, of those not held out, drawn by `run.seed`."""
    limit_eval: int | None = Field(None, ge=1)
    """Use only the first so many examples of the validation split, or of what is held out."""


class AdapterConfig(Section):
    method: Literal["gpc", "prompt-tuning", "deep-prompt", "linear-probe", "fine-tuning"] = "gpc"
    """`gpc`: prompt and cell; `prompt-tuning`: prompt alone; `deep-prompt`: a fresh prompt at every layer;
    `linear-probe`: no prompt; `fine-tuning`: no prompt, and the whole encoder is trained (stages 0 to 2, without
    dropout, as for the other methods): the ceiling to compare them with."""
    prompt_tokens: int = Field(20, ge=1, le=10_000)
    """Prompt tokens (P) put before the text; not used by `linear-probe` and `fine-tuning`."""
    first_layer: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0
    """Layer before which the prompt enters, counted from 0, or a share of the layers such as 0.5. The layers below see
    the text alone: nothing of a step depends on them, and no gradient goes through them (docs/method.md). Not used by
    `fine-tuning`, nor by `linear-probe` but with `head_layers: mix`."""
    prompt_init: Literal["vocab", "text", "labels", "uniform"] = "vocab"
    """Start of the prompt: what enters `first_layer` (before layer 0: the embeddings) of frequent tokens, of
    `prompt_text` or of the label words; or uniform noise of that size."""
    prompt_text: str | None = None
    """The sentence whose embeddings start the prompt with `prompt_init: text`."""
    prompt_mlp: int | None = Field(None, ge=1, le=65_536)
    """Reparametrisation: the prompts are what an MLP of this width, with a skip connection, makes of trained vectors
    (docs/method.md); the vectors themselves when not given."""
    init_from: str | None = Field(None, min_length=1)
    """Start from another adapter on the same encoder, a folder or a Hub id: what fits of its prompt, cell and head
    (docs/method.md); the rest starts as the other keys say. A run that resumes does not read it again."""
    cell: Literal["recurrent", "gated", "residual"] = "recurrent"
    """Rule that writes the next layer's prompt from the encoded and the previous prompt state. `residual` starts as
    prompt tuning: the safer choice where nothing is known (docs/method.md)."""
    cell_rank: int | None = Field(None, ge=1, le=65_536)
    """Rank of the cell's units; full `[H, H]` matrices when not given."""
    cell_per_layer: bool = False
    """A cell of its own for every layer instead of the one global cell (ablation)."""
    cell_units: Literal["both", "remember", "forget"] = "both"
    """The cell's units: both, or one of them alone (ablation)."""
    cell_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers, counted from 0, after which the cell acts. When not given, every layer from `first_layer` on whose prompt
    states are read: all but the last, and where `pooling` reads the prompt that one too."""
    cell_norm: bool = True
    """The cell works on states divided by their root mean square and what it writes is brought back to the encoded
    prompt's, so that its learning rate does not depend on the scale of the encoder's states."""
    cell_scale: Literal["none", "prompt", "text"] = "prompt"
    """Scale of what the cell writes: as it comes; or each position brought to the root mean square of the encoded
    prompt state it replaces (`prompt`), or to the mean one of its row's text states (`text`)."""
    pooling: Literal["mean", "first", "prompt", "prompt-first"] = "mean"
    """What the head reads: the mean of the text states, the first text token's state, or in the last layer the mean of
    the prompt's states or the first of them (as BERT's and RoBERTa's own heads under PEFT)."""
    head_hidden: bool = False
    """The head has a layer of the encoder's width, with tanh, before its linear map, as BERT's pooler and RoBERTa's
    head."""
    head_layers: Literal["last", "mix"] = "last"
    """What the head reads of the text: the states of the last layer, or a mix, with trained weights, of the pooled
    states that enter `first_layer` and of those after each layer from there on (docs/method.md)."""

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.prompt_init == "text" and not self.prompt_text:
            raise ValueError("adapter.prompt_init 'text' needs adapter.prompt_text")
        if self.reads_prompt and not self.has_prompt:
            raise ValueError(
                f"adapter.pooling '{self.pooling}' needs a prompt, which adapter.method '{self.method}' lacks"
            )
        if self.reads_prompt and self.head_layers == "mix":
            raise ValueError(
                f"adapter.head_layers 'mix' reads the text, and adapter.pooling '{self.pooling}' does not"
            )
        if self.init_from is not None and self.trains_encoder:
            raise ValueError(
                "adapter.init_from needs a frozen encoder: adapter.method 'fine-tuning' changes what an adapter was "
                "trained on"
            )
        layers = self.cell_layers
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise ValueError(
                f"adapter.cell_layers {layers} must name at least one layer, each once; without a cell it is "
                "adapter.method prompt-tuning"
            )
        return self

    def entry_layer(self, layers: int) -> int:
        """k: the first of `layers` layers that depends on what is trained; `layers` if none does, because only a head
        is trained."""
        if self.trains_encoder:
            return 0
        return self._first_of(layers) if self.has_prompt else layers

    def read_from(self, layers: int) -> int:
        """The first of `layers` layers whose incoming states the head reads; `layers` if it reads the last alone."""
        if self.head_layers == "last":
            return layers
        return 0 if self.trains_encoder else self._first_of(layers)

    def _first_of(self, layers: int) -> int:
        """`first_layer` as a number."""
        if isinstance(self.first_layer, int):
            return self.first_layer
        # rounded first, because a tenth of ten layers can come out slightly below one
        return math.floor(round(self.first_layer * layers, 6))

    @property
    def entry(self) -> int | float | str:
        """The same for adapters that read the same states, in every encoder."""
        if self.trains_encoder:
            return self.method
        if self.has_prompt:
            return self.first_layer
        mixed = f" from {self.first_layer}" if self.head_layers == "mix" else ""
        return f"{self.method}, {self.pooling}{mixed}"

    @property
    def has_prompt(self) -> bool:
        return self.method not in ("linear-probe", "fine-tuning")

    @property
    def reads_prompt(self) -> bool:
        """Whether the head reads the prompt's states."""
        return self.pooling in ("prompt", "prompt-first")

    @property
    def trains_encoder(self) -> bool:
        return self.method == "fine-tuning"


_Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    steps: int | None = Field(None, ge=1, le=10**9)
    """Optimizer steps, instead of `epochs`."""
    epochs: float | None = Field(None, gt=0, le=10**6)
    """Passes over the training split; 10 when neither this nor `steps` is given."""
    batch_size: int = Field(32, ge=1, le=10**6)
    """Examples per step over all ranks."""
    batch_tokens: int | None = Field(None, ge=1, le=10**9)
    """Token budget per step over all ranks (padded text tokens) instead of `batch_size`."""
    class_weights: Literal["none", "balanced"] = "none"
    """Classification only. `balanced`: the loss of an example is multiplied by N / (C n), with N training examples of C
    classes and n of its own class, so that rare classes count as much as frequent ones. Evaluation is not weighted."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """`adamw`, or `adafactor` as Lester et al. (2021) use it (set lr 0.3 and a constant schedule)."""
    lr: float = Field(1e-2, gt=0)
    """Peak learning rate of the prompt, and of the head unless it is given its own."""
    cell_lr: float = Field(1e-3, gt=0)
    """Learning rate of the cell: lower, because its matrices act at every layer and prompt position."""
    mlp_lr: float = Field(1e-3, gt=0)
    """Learning rate of the MLP that makes the prompts (`adapter.prompt_mlp`): lower than theirs, as the cell's is."""
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of the head; `lr` when not given."""
    encoder_lr: float = Field(2e-5, gt=0)
    """Learning rate of the encoder, with `adapter.method: fine-tuning`."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Bound on the gradient norm of the adapter; no clipping when null."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup: float = Field(0.06, ge=0, le=10**9)
    """Warm-up: a share of all steps below 1, otherwise a number of steps."""
    eval_every: int | None = Field(None, ge=1)
    """Evaluate every so many steps; after each epoch (and at the end) when not given."""
    eval_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens of one evaluation batch per rank."""
    save_every: int | None = Field(None, ge=1)
    """Save the training state every so many steps; at every evaluation when not given."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep beside the best one."""
    log_every: int = Field(10, ge=1)
    """Log the training loss and speed every so many steps."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better metric."""
    nonfinite_patience: int = Field(3, ge=1)
    """Consecutive steps with a non-finite loss (each one skipped) after which training ends."""
    resume: bool = True
    """Go on from the newest complete checkpoint in the run's folder, if there is one."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs exclude each other: give one of them")
        return self


PLANNED = ("zero_stage", "offload_param", "hpz", "activation_checkpointing", "micro_batch_tokens")
"""What `engine.plan: auto` chooses."""


class EngineConfig(Section):
    ranks: int | Literal["auto"] = "auto"
    """Processes to start on this machine; `auto` is one per GPU, or one without GPUs. Ignored under
    `srun` and `torchrun`, which bring their own."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: everything on every rank; 1, 2: the trained group's optimizer state and gradients are
    partitioned; 3: the encoder is sharded as well."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen encoder: `auto` is bf16 on a GPU that has it, else fp32. What is trained is
    always fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; `auto` takes the GPUs when there are any."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Stage 3: where the shard of the frozen encoder rests between uses."""
    nvme_path: Path | None = None
    """Folder on a local NVMe drive for `offload_param: nvme`."""
    hpz: bool = False
    """Stage 3 on several machines: the ranks of each keep a second shard, of an encoder that they share among
    themselves, so that gathering stays inside a machine (DeepSpeed's hpZ)."""
    plan: Literal["none", "auto"] = "none"
    """`auto`: the planner chooses `zero_stage`, `offload_param`, `hpz`, `activation_checkpointing` and
    `micro_batch_tokens` for the devices at hand (see `gpc-dist plan`); those keys must then not be given."""
    quantize: Literal["none", "int8"] = "none"
    """Keep the frozen layers' matrices as int8: at stages 0 to 2 with a scale for each output feature; at stage 3 the
    shards, which travel as int8 too, with a scale for each 256 values (DeepSpeed's Mixed-Precision ZeRO++)."""
    token_table: Literal["device", "host"] = "device"
    """Where the frozen table of token embeddings lies, whole: on the device, or mapped from its file on the
    host, which sends the rows that a batch needs."""
    state_cache: Literal["auto", "disk", "memory", "none"] = "auto"
    """With `adapter.first_layer` above 0, and for `linear-probe`: where the text states that enter that layer are kept,
    computed once. `disk`: in the folder `GPC_DIST_CACHE`, for all runs (see `gpc-dist cache`); `memory`: for this run,
    in memory that the ranks of a machine share; `none`: every pass computes them; `auto`: the first that has room, and
    `none` for training data of which the run reads less than half."""
    compile: bool = False
    """Compile the encoder's layers with `torch.compile`; the first steps are slower; stages 0 to 2."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again in the backward pass."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Most padded tokens (prompt included) a rank runs at once; a step that holds more is
    accumulated over several passes. CPU ranks also split a step where that saves padding."""
    ds_config: str | None = None
    """A DeepSpeed JSON of your own: its path (docs/deepspeed.md says what becomes of each of its keys); or a packaged
    regime, which stands for the keys above: zero0, zero1, zero2, zero3, zero3-hpz, zero3-offload-cpu,
    zero3-offload-nvme, zero3-quantized."""
    timeout_s: int = Field(1800, ge=1, le=_YEAR_S)
    """Seconds a collective may wait for another rank before the job ends."""

    @field_validator("ranks")
    @classmethod
    def _check_ranks(cls, given: int | Literal["auto"]) -> int | Literal["auto"]:
        if given != "auto" and not 1 <= given <= MOST_RANKS:
            raise ValueError(f"give auto, or a number from 1 to {MOST_RANKS}")
        return given

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError("engine.offload_param needs engine.zero_stage 3")
        if self.hpz and self.zero_stage != 3:
            raise ValueError("engine.hpz needs engine.zero_stage 3")
        if self.offload_param == "nvme" and (self.hpz or self.quantize != "none"):
            raise ValueError(
                "engine.offload_param 'nvme' needs engine.hpz false and engine.quantize none: DeepSpeed swaps plain "
                "shards alone; offload to the CPU works with both"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "engine.compile needs engine.zero_stage 0, 1 or 2: ZeRO-3 swaps weights under the graph"
            )
        if self.offload_param == "nvme" and self.nvme_path is None:
            raise ValueError("engine.offload_param 'nvme' needs engine.nvme_path")
        given = [f"engine.{key}" for key in (*PLANNED, "ds_config") if key in self.model_fields_set]
        if self.plan == "auto" and given:
            raise ValueError(
                f"engine.plan 'auto' chooses for itself what {', '.join(given)} would fix: leave out one or the other"
            )
        return self


NO_SECRET = (
    "with a password would be kept in files and shown in process lists: give it in the environment variable "
    "MLFLOW_TRACKING_URI; or leave the password out and, for a server, give MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD"
)
"""What to say of a URI on a command line or in a file."""


class TrackingConfig(Section):
    enabled: bool = True
    """Record the run in MLflow; `metrics.jsonl` is written either way."""
    uri: str | None = None
    """MLflow tracking URI, without a password; MLFLOW_TRACKING_URI, or else the SQLite file `mlflow.db` beside the
    run's folder, when not given."""
    experiment: str = "gpc-dist"
    """MLflow experiment."""
    group: str | None = None
    """Tag that holds runs together: the seeds of one setting, the members of one job array."""
    finish_timeout_s: int = Field(120, ge=0, le=_YEAR_S)
    """Seconds to wait at the end for MLflow to take what is left; `gpc-dist sync` does it later."""

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, given: str | None) -> str | None:
        if given and holds_secret(given):
            raise ValueError(f"a URI {NO_SECRET}")
        return given


class Config(Section):
    run: RunConfig = RunConfig()
    encoder: EncoderConfig = EncoderConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not self.adapter.trains_encoder:
            return self
        engine, needs = self.engine, "adapter.method 'fine-tuning' needs"
        if engine.offload_param != "none":
            raise ValueError(f"{needs} engine.offload_param none: the shards are trained where they are used")
        if engine.zero_stage > 0 and self.train.optimizer != "adamw":
            raise ValueError(
                f"{needs} train.optimizer adamw with engine.zero_stage {engine.zero_stage}: {self.train.optimizer} "
                "needs rows and columns, and ZeRO partitions flat"
            )
        if engine.quantize != "none":
            raise ValueError(f"{needs} engine.quantize none: int8 weights cannot be trained")
        if engine.hpz:
            raise ValueError(f"{needs} engine.hpz false: second shards are of weights that stay as they are")
        if engine.token_table != "device":
            raise ValueError(f"{needs} engine.token_table device: the table is trained as well")
        if engine.plan != "none":
            raise ValueError(f"{needs} engine.plan none: the planner counts with a frozen encoder")
        return self

    def dump(self) -> dict[str, Any]:
        """The tree as plain JSON values, every default filled in; it builds this configuration again."""
        tree = self.model_dump(mode="json")
        if self.engine.plan == "auto":
            for key in (*PLANNED, "ds_config"):
                del tree["engine"][key]  # open until the planner has chosen
        return tree

    def to_yaml(self) -> str:
        return to_yaml(self.dump())


def recipe_names() -> list[str]:
    return yaml_names(shipped_folder("recipes"))


def load(recipe: str, overrides: dict[str, str] | None = None) -> Config:
    """The configuration of a packaged recipe or a YAML file, with dotted overrides on top.

    Args:
        recipe: packaged name (`rte`) or path of a YAML file.
        overrides: dotted key -> value, as given on the command line (see `schema.parse_value`).

    Raises:
        UserError: unknown recipe, invalid YAML, unknown or duplicate key, value out of range, or a DeepSpeed file that
            is refused or contradicts another key.
    """
    return build(recipe_tree(recipe), overrides)


def recipe_tree(recipe: str) -> Any:
    """What a packaged recipe or a YAML file says, for `build` or `apply` to check."""
    return read_yaml("recipe", recipe, shipped_folder("recipes"))[1]


def build(tree: dict[str, Any], overrides: dict[str, str] | None = None) -> Config:
    """The configuration of a nested mapping with dotted overrides on top; raises `UserError`."""
    return apply(tree, parse_overrides(overrides or {}, all_keys(Config)))


RIVALS = {"train.steps": "train.epochs", "train.epochs": "train.steps"}
"""Keys that exclude each other: the one given last, on the command line, wins."""


def apply(tree: dict[str, Any], values: Mapping[str, Any]) -> Config:
    """The configuration of a nested mapping with the values of dotted keys on top, and with what `engine.ds_config`
    decides; raises `UserError`.

    The mapping stays as it is.
    """
    if not isinstance(tree, dict):
        raise UserError("a recipe is a mapping of sections: " + ", ".join(Config.model_fields))
    tree = {
        section: dict(held or {}) if isinstance(held, dict | None) else held for section, held in tree.items()
    }
    for key, value in values.items():
        section, _, name = key.partition(".")
        tree[section] = mapping(section, tree.get(section)) | {name: value}
        if key in RIVALS and RIVALS[key] not in values:
            tree[section].pop(RIVALS[key].partition(".")[2], None)
    if values.get("engine.plan") == "auto":
        # as much for what a recipe fixes and a plan asked for on the command line chooses
        for name in (*PLANNED, "ds_config"):
            if f"engine.{name}" not in values:
                tree["engine"].pop(name, None)
    engine = tree.get("engine")
    if isinstance(engine, dict) and engine.get("plan") != "auto" and isinstance(engine.get("ds_config"), str):
        tree["engine"] = deepspeed_file.with_file(engine)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, all_keys(Config))) from None


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Warm-up in steps: `train.warmup` is a share of `total` below 1, a count otherwise."""
    return math.ceil(config.warmup * total) if config.warmup < 1 else int(config.warmup)
