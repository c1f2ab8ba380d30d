"""The sections and keys of training configurations, with their defaults and bounds."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

AsText = Annotated[str | None, BeforeValidator(lambda v: v if v is None else str(v))]
"""A text that YAML takes for a number or a date where it is not quoted."""


MOST_WIDTH, MOST_LAYERS, MOST_PX = 8192, 128, 8192
"""Beyond the largest networks there are (ViT-22B, Dehghani et al. 2023: 6144 wide, 48 layers)."""
MOST_ROWS = 10**8


class Strict(BaseModel):
    """A section whose unknown keys are errors, and so is yes or no for what is no switch."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_switches_take_yes(cls, content: Any) -> Any:
        for key, field in cls.model_fields.items() if isinstance(content, dict) else ():
            if isinstance(content.get(key), bool) and field.annotation is not bool:
                raise ValueError(
                    f"{key} takes no yes or no; quote it if it is a name, and write {{}} for a "
                    "section's defaults"
                )
        return content


Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Section = TypeVar("Section", bound=Strict)


def divided(section: Section, heads: str, parts: int, width: str, whole: int) -> Section:
    """Refuse attention heads that do not share their width evenly."""
    if whole % parts:
        raise ValueError(
            f"{heads} = {parts} does not divide {width} = {whole}; choose one that does"
        )
    return section


class BackboneConfig(Strict):
    """A timm backbone, from its weights on the hub with `pretrained`.

    `kwargs` are further arguments of `timm.create_model`.
    """

    backbone: str
    pretrained: bool = False
    kwargs: dict[str, Any] = {}


class FactoredConfig(Strict):
    """Of a factored encoder: the side of its cells, and the transformer over a window's cells.

    A window holds a whole number of cells along its side. A map's stride that is a multiple of
    `cell_px` lets windows share them, so that each is encoded once.
    """

    cell_px: int = Field(default=64, ge=8, le=MOST_PX)
    width: int = Field(default=384, ge=4, le=MOST_WIDTH, multiple_of=4)
    layers: int = Field(default=2, ge=1, le=MOST_LAYERS)
    heads: int = Field(default=6, ge=1)


class AerialConfig(BackboneConfig):
    """The aerial tower, any backbone of timm; bands and window come from the data.

    So do the bands' `mean` and deviation `std`, unless given. With `pretrained` it begins with
    timm's weights; `kwargs` are further arguments of `timm.create_model`. `encoder: factored`
    makes the backbone an encoder of cells, which overlapping windows share in mapping.
    """

    encoder: Literal["plain", "factored"] = "plain"
    factored: FactoredConfig = FactoredConfig()
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None


class GroundConfig(BackboneConfig):
    """The ground tower, any backbone of timm, on RGB photos with ImageNet's statistics.

    Photos are seen `image_px` wide. `pretrained` and `kwargs` are as for the aerial tower.
    """

    image_px: int = Field(default=224, ge=16, le=MOST_PX)


class TextConfig(Strict):
    """The text tower: a small one trained jointly, or a frozen one that `hub` names.

    That is `hf-hub:OWNER/NAME` of the hub, or `local-dir:PATH` of a folder, as open_clip has them.
    """

    hub: str | None = None
    width: int = Field(default=128, ge=8, le=MOST_WIDTH)
    layers: int = Field(default=2, ge=1, le=MOST_LAYERS)
    heads: int = Field(default=4, ge=1)

    @field_validator("hub")
    @classmethod
    def _says_where(cls, hub: str | None) -> str | None:
        if hub and not hub.startswith(("hf-hub:", "local-dir:")):
            raise ValueError("write hf-hub:OWNER/NAME, or local-dir:PATH for a folder")
        return hub

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextConfig:
        return divided(self, "heads", self.heads, "width", self.width)


class MetadataConfig(Strict):
    """Layers for place and date, each left out of a row with probability `dropout` in training."""

    dropout: float = Field(default=0.25, ge=0, lt=1)


class ModelConfig(Strict):
    """The joint space, of `dim` dimensions, its towers, and layers for place and date if any."""

    dim: int = Field(default=512, ge=8, le=MOST_WIDTH)
    aerial: AerialConfig
    ground: GroundConfig | None = None
    text: TextConfig | None = None
    metadata: MetadataConfig | None = None


class StreamConfig(Strict):
    """Rows read as they come by, shuffled in a buffer, instead of being decoded to disk first.

    The state to go on from is saved after every `save_steps` steps, in the middle of an epoch too.
    """

    buffer_rows: int = Field(default=1000, ge=1, le=MOST_ROWS)
    save_steps: int = Field(default=1000, ge=1)


class DataConfig(Strict):
    """Where training data comes from: a paired data set, imagery, or both.

    `background` is a number of places drawn from the imagery, at random or in proportion to the
    raster of sampling effort that `bias` names, or a file of places. With `background_kind:
    target-group` places where the group was recorded stand in for it, one per quarter of a window:
    of the file of records `target_group`, or of the data set. Both kinds are always evaluated. Rows
    of `withheld` taxa are never seen. `window_px` is the side of the model's window: without a data
    set it must be given; of larger chips, training sees random crops and mapping the middle.

    Of `imagery` that is a STAC collection the area is that of the data set, and `datetime`, `query`
    and `first` choose scenes as they do when chips are cut.

    `covariates` are environmental rasters that heads read beside the embedding, at the middle of
    each window, as `FILE` or `NAME=FILE`; those that `categorical` names hold classes. With
    `location` easting and northing are two more.

    `dataset` is a folder or an address such as `hf://datasets/andyvhuynh/NatureMultiView`, of which
    `split` names the files to take, `one_per_observation`, `supervised` and `percent` the rows
    (columns `rs_classification`, `supervised`, `finetune_*percent`). `taxonomy` is a table of
    iNaturalist's taxon numbers, for lineages.
    """

    dataset: str | None = None
    split: str | None = None
    taxonomy: str | None = None
    one_per_observation: bool = False
    supervised: bool = False
    percent: float | None = None
    stream: StreamConfig | None = None
    imagery: str | None = None
    datetime: AsText = None
    query: list[str] = []
    first: Literal["newest", "least-cloudy"] = "newest"
    window_px: int | None = Field(default=None, ge=8, le=MOST_PX)
    background: Annotated[int, Field(ge=1, le=MOST_ROWS)] | str = 10_000
    background_kind: Literal["random", "target-group"] = "random"
    bias: str | None = None
    target_group: str | None = None
    withheld: list[str] = []
    covariates: list[str] = []
    categorical: list[str] = []
    location: bool = False

    @property
    def inputs(self) -> list[str]:
        """Files, folders and addresses that are read."""
        named = (self.dataset, self.taxonomy, self.imagery, self.background, self.bias)
        covariates = (part for c in self.covariates for part in (c, c.partition("=")[2]) if part)
        return [path for path in (*named, self.target_group, *covariates) if isinstance(path, str)]

    @model_validator(mode="after")
    def _background_is_drawn_one_way(self) -> DataConfig:
        if self.bias is not None and (
            isinstance(self.background, str) or self.background_kind == "target-group"
        ):
            raise ValueError(
                "bias says where a number of background places is drawn; leave it out, or give a "
                "number as background, of kind random"
            )
        return self


def _not_streamed(data: DataConfig) -> DataConfig:
    if data.stream is not None:
        raise ValueError(
            "only stage pretrain streams; leave data.stream out, and download the data"
        )
    return data


DecodedConfig = Annotated[DataConfig, AfterValidator(_not_streamed)]

OF_HEADS = ("background_kind", "bias", "target_group", "covariates", "categorical", "location")
LABELLED = ("dataset", "taxonomy", "one_per_observation", "supervised", "withheld", "window_px")


def _reads(stage: str, name: str, keys: Container[str]) -> AfterValidator:
    def refuse(section: Section) -> Section:
        for key, value in section:
            if key not in keys and value != type(section).model_fields[key].default:
                where = ", it is for stage finetune" if key in OF_HEADS else ""
                raise ValueError(f"stage {stage} does not read {name}.{key}{where}; leave it out")
        return section

    return AfterValidator(refuse)


SeenConfig = Annotated[
    DataConfig, _reads("pretrain", "data", set(DataConfig.model_fields) - set(OF_HEADS))
]
LabelledConfig = Annotated[DecodedConfig, _reads("classify", "data", LABELLED)]


class OptimConfig(Strict):
    """AdamW with linear warm-up, for the share `warmup` of all steps, and cosine decay.

    `batch_size` is of each device. With `chunk_size` a contrastive batch is embedded so many rows
    at a time and each chunk's activations are computed again in the backward pass (gradient
    caching, Gao et al. 2021), so that only the embeddings of the whole batch are in memory.
    """

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=256, ge=2, le=MOST_ROWS)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    chunk_size: int | None = Field(default=None, ge=1)


class TrainerConfig(Strict):
    """What is handed to Lightning's Trainer; `workers` processes read images, or this one alone.

    Precision `auto` is bfloat16 where the device computes in it and the network stays stable.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: str = "auto"
    workers: int = Field(default=0, ge=0, le=1024)


def _on_one_device(trainer: TrainerConfig, what: str, *precisions: str) -> TrainerConfig:
    """Refuse what only Lightning does."""
    if trainer.devices not in ("auto", "1", 1):
        raise ValueError(f"{what} on one device; leave trainer.devices out")
    if trainer.precision not in ("auto", *precisions):
        known = " or ".join(("auto", *precisions))
        raise ValueError(f"{what} with trainer.precision {known}; set that, or leave it out")
    return trainer


ConstantRateConfig = Annotated[
    OptimConfig, _reads("classify", "optim", ("epochs", "batch_size", "lr", "weight_decay"))
]
OneDeviceConfig = Annotated[
    TrainerConfig,
    AfterValidator(
        lambda trainer: _on_one_device(trainer, "stage classify trains", "bf16-mixed", "32-true")
    ),
]


class MaskedConfig(Strict):
    """Masked image modelling (He et al. 2022): `mask_ratio` of patches hidden, the decoder's size.

    Method mae hides patches of one `view`. With `standardise` the pixels to paint are standardised
    patch by patch; BirdSAT paints them as they are.
    """

    view: Literal["aerial", "ground"] = "aerial"
    standardise: bool = True
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    decoder_dim: int = Field(default=512, ge=4, le=MOST_WIDTH, multiple_of=4)
    decoder_depth: int = Field(default=8, ge=1, le=MOST_LAYERS)
    decoder_heads: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> MaskedConfig:
        return divided(self, "decoder_heads", self.decoder_heads, "decoder_dim", self.decoder_dim)


class AerialViewConfig(Strict):
    """Photometric jitter of aerial windows; crops follow from `data.window_px`, turns are always.

    `jitter` is the standard deviation of the common gain in nats.
    """

    jitter: float = Field(default=0.2, ge=0)


class GroundViewConfig(Strict):
    """Random views of ground photos.

    `smallest` is the least share of the photo's area that a crop keeps, `hue` the largest turn of
    the hue as a share of the circle, `blur` the share of photos that are blurred.
    """

    smallest: float = Field(default=0.5, gt=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    blur: float = Field(default=0.0, ge=0, le=1)


class ViewsConfig(Strict):
    """Random views in training."""

    aerial: AerialViewConfig = AerialViewConfig()
    ground: GroundViewConfig = GroundViewConfig()


class ContrastiveConfig(Strict):
    """Which pairs of a batch attract, repel or are left out of CRISP's loss.

    `same_place`: other photos of the same coordinates are left out, or positives too; then rows of
    one place are kept together in batches. `same_taxon`: a photo and a window of the same taxon but
    of two places repel, or are left out.
    """

    same_place: Literal["ignored", "positive"] = "ignored"
    same_taxon: Literal["negative", "ignored"] = "negative"


class CrossViewConfig(Strict):
    """Weights and choices of CVE-MAE and CVM-MAE (Sastry et al. 2024, BirdSAT).

    CVE-MAE: `contrastive` loss of both views and `reconstruction` of photos, beside an aerial
    encoder that starts from the model in `aerial_init`, if given, and is frozen unless
    `freeze_aerial` is false. CVM-MAE: `matching` of pairs and `reconstruction` of both views; the
    negative of each photo is the likeliest of the `negatives` windows that stand next to its own
    in the batch.
    """

    contrastive: float = Field(default=0.3, ge=0)
    matching: float = Field(default=1.0, ge=0)
    reconstruction: float = Field(default=1.0, ge=0)
    freeze_aerial: bool = True
    aerial_init: str | None = None
    negatives: int = Field(default=1, ge=1)


class ValidationConfig(Strict):
    """Spatial cross-validation before the final fit, and calibration where a prevalence is stated.

    `method` makes the folds: whole blocks of `block_m` metres; `kmeans` regions; or `knndm`, which
    tests as far from training as the imagery's places are from the records. Training windows that
    overlap a test window are left out. `prevalence` is the share of places where a taxon is
    present, one for all or by name.
    `surveys` is a table of presence and absence (lon, lat, taxon, present), which probabilities
    are calibrated on instead, at places that share no window with a presence.
    """

    method: Literal["blocks", "kmeans", "knndm"] = "blocks"
    folds: int = Field(default=5, ge=2)
    block_m: float | None = Field(default=None, gt=0)
    prevalence: Share | dict[str, Share] | None = None
    surveys: str | None = None
    calibration: Literal["platt", "isotonic"] = "platt"

    @model_validator(mode="after")
    def _blocks_have_a_side(self) -> ValidationConfig:
        if self.method == "blocks" and self.block_m is None:
            raise ValueError("folds by blocks need block_m, the side of a block in metres")
        return self


class HeadConfig(Strict):
    """Heads fitted to their optimum on embeddings, and on covariates where there are any.

    `loss`: assume-negative (Cole et al. 2023, SINR), normalised Poisson (DeepMaxent) or infinitely
    weighted logistic regression (Fithian & Hastie 2013). The penalty is chosen on spatial folds
    within the training data.
    """

    loss: Literal["assume_negative", "poisson", "weighted_logistic"] = "assume_negative"


class PretrainConfig(Strict):
    """Stage one: a joint space from paired views, or features from images of one view.

    Methods are CRISP, MAE of one view, and BirdSAT's CVE-MAE and CVM-MAE.
    """

    stage: Literal["pretrain"]
    method: Literal["crisp", "mae", "cve_mae", "cvm_mae"] = "crisp"
    seed: Seed = 0
    data: SeenConfig
    model: ModelConfig
    masked: MaskedConfig = MaskedConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    crossview: CrossViewConfig = CrossViewConfig()
    views: ViewsConfig = ViewsConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()


class FinetuneConfig(Strict):
    """Stage two: learned embeddings of taxa, from presences against background.

    It begins from the model in the folder `init`. A presence weighs `positive_weight` times an
    assumed absence, by default as many times as there are taxa (Cole et al. 2023); `align` weighs
    the loss that keeps photos and names of the records near their windows. With `head`, or with
    covariates, heads are fitted anew once the encoder is fine-tuned. With `freeze_encoder` too
    nothing else is trained, on one device.
    """

    stage: Literal["finetune"]
    init: str
    seed: Seed = 0
    data: DecodedConfig
    positive_weight: float | None = Field(default=None, gt=0)
    align: float = Field(default=1.0, ge=0)
    freeze_encoder: bool = False
    head: HeadConfig | None = None
    validation: ValidationConfig | None = None
    views: ViewsConfig = ViewsConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _heads_alone_are_fitted_on_one_device(self) -> FinetuneConfig:
        if self.freeze_encoder and (self.head or self.data.covariates or self.data.location):
            _on_one_device(self.trainer, "heads on a frozen encoder are fitted", "32-true")
        return self


class SplitsConfig(Strict):
    """Three ways: files named by split, as the hub has them, or whole blocks of `block_m` metres.

    Blocks go by tenths: seven to training, one to validation, two to testing.
    """

    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    block_m: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _names_differ(self) -> SplitsConfig:
        if len({self.train, self.validation, self.test}) < 3:
            raise ValueError("train, validation and test must name three splits; name others")
        return self


class ClassifyConfig(Strict):
    """Naming the taxon of a place from its photo, its window or both, with few labels or many.

    Every combination of `views`, `modes` and `percent` is trained, stopped when the
    species-averaged top-1 of the validation rows has not risen for `patience` epochs, and tested
    once. A taxon is frequent from `frequent_from` training observations on and rare below
    `common_from` (the many-, medium- and few-shot classes of Liu et al. 2019). `init` is a model,
    or several by name. Probes, which leave the encoder as it is, learn with rate `probe_lr`;
    `augment` are the random views of fine-tuning.
    """

    stage: Literal["classify"]
    init: str | dict[str, str]
    seed: Seed = 0
    data: LabelledConfig
    splits: SplitsConfig = SplitsConfig()
    views: list[Literal["ground", "aerial", "both"]] = Field(
        default=["ground", "aerial", "both"], min_length=1
    )
    modes: list[Literal["probe", "finetune"]] = Field(default=["probe", "finetune"], min_length=1)
    percent: list[float] = Field(
        default=[0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 100.0], min_length=1
    )
    frequent_from: int = Field(default=100, ge=1)
    common_from: int = Field(default=20, ge=1)
    patience: int = Field(default=5, ge=1)
    probe_lr: float = Field(default=1e-2, gt=0)
    augment: ViewsConfig = ViewsConfig()
    optim: ConstantRateConfig = OptimConfig()
    trainer: OneDeviceConfig = TrainerConfig()

    @model_validator(mode="after")
    def _compares_something(self) -> ClassifyConfig:
        if not self.init:
            raise ValueError("init names no model; give a folder, or several by name")
        return self


AnyConfig = PretrainConfig | FinetuneConfig | ClassifyConfig
Config = Annotated[AnyConfig, Field(discriminator="stage")]
STAGES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "classify": ClassifyConfig}
