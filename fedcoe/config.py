"""params.yaml <-> typed, documented, validated settings.

One pydantic model a section. Unknown keys are errors, so that a
misspelt setting never trains with its default in silence.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from fedcoe.data.untrusted import one_line
from fedcoe.errors import FedCoEError
from fedcoe.methods.settings import MethodSettings, settings_for
from fedcoe.models.experts import EXPERTS

MAX_YAML = 100_000
"""Longest parameter file, in characters."""
MAX_ALIASES = 20
MAX_SAID = 4
"""Mistakes that are named; the rest are counted."""
MAX_NORM = 2.0**12
"""An update at least this long is always left out: exact sums hold no more."""
FAULTS = ("dropout", "timeout", "nan", "inf", "wrong_shape", "exploding", "stale", "duplicate")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataSettings(Section):
    name: str = Field("mnist5k", description="Dataset that `fedcoe fetch` builds into data/.")


class PartitionSettings(Section):
    """How the training split is dealt out to clients (design: `fedcoe.data.partition`)."""

    scheme: Literal["dirichlet", "pathological", "iid", "natural"] = Field(
        "dirichlet", description="How samples are dealt; natural = the data's own clients"
    )
    clients: int = Field(20, ge=2, description="Seen and new clients together (natural: read off)")
    new_clients: float = Field(
        0.2, ge=0.0, lt=1.0, description="Fraction of clients held out of training entirely"
    )
    new_clients_by: Literal["random", "feature_group", "label_mix"] = Field(
        "random",
        description="Who is held out: random; one whole feature group; a region of label mixes",
    )
    alpha: float = Field(
        0.1, gt=0.0, allow_inf_nan=False, description="Dirichlet concentration; smaller = more skew"
    )
    classes_per_client: int = Field(2, ge=1, description="Classes per client (pathological)")
    feature_skew: Literal["none", "rotation", "inversion", "blur"] = Field(
        "none", description="A fixed transform per client group, on top of any scheme"
    )
    feature_groups: int = Field(
        4, ge=2, le=4, description="Number of groups (rotation <= 4, inversion 2, blur <= 4)"
    )
    min_samples: int = Field(10, ge=4, description="Fewest samples a client may have")
    validation: float = Field(0.15, gt=0.0, lt=1.0, description="Share of a client's samples")
    test: float = Field(0.25, gt=0.0, lt=1.0, description="Share of a client's samples")
    seed: int = Field(0, ge=0, lt=2**32, description="Root of the partition's streams")

    @model_validator(mode="after")
    def _possible(self) -> "PartitionSettings":
        if self.validation + self.test >= 0.95:
            raise ValueError("validation + test must leave at least 5 % for training")
        if self.new_clients_by == "feature_group" and self.feature_skew == "none":
            raise ValueError("new_clients_by: feature_group needs a feature_skew other than none")
        if self.feature_skew == "inversion" and self.feature_groups != 2:
            raise ValueError("feature_skew: inversion has exactly 2 groups; set feature_groups: 2")
        if self.scheme != "natural" and self.seen_clients < 1:
            raise ValueError("new_clients leaves no seen client to train on")
        return self

    @property
    def held_out(self) -> int:
        """Number of new clients among `clients`."""
        return round(self.clients * self.new_clients)

    @property
    def seen_clients(self) -> int:
        return self.clients - self.held_out


class ModelSettings(Section):
    name: str = Field("cnn4", description="Architecture of all experts: " + ", ".join(EXPERTS))

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in EXPERTS:
            raise ValueError(f"no such model; there are: {', '.join(EXPERTS)}")
        return name


class TrainSettings(Section):
    rounds: int = Field(30, ge=1, le=100_000, description="Rounds of training")
    cohort: float = Field(1.0, gt=0.0, le=1.0, description="Fraction of seen clients per round")
    local_epochs: int = Field(
        1, ge=1, le=1000, description="Times a client goes through its images in a round"
    )
    batch_size: int = Field(
        50,
        ge=1,
        le=65_536,
        description="Images a step; a client that has fewer takes one step an epoch",
    )
    lr: float = Field(0.02, gt=0.0, le=10.0, description="Peak client learning rate")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "cosine", description="Whether the learning rate falls to 0 over the rounds"
    )
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="Client SGD momentum")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="Of the client's SGD")
    clip_norm: float = Field(10.0, ge=0.0, description="Gradient norm limit; 0 = no limit")
    augment: Literal["none", "crop", "crop_flip"] = Field(
        "none", description="Random crop after padding by 1/8 of the side, and horizontal flip"
    )
    quorum: Fraction = Field(0.5, description="Least share of a cohort whose updates must be valid")
    max_update_norm: float = Field(
        0.0,
        ge=0.0,
        le=MAX_NORM,
        description=f"Longer updates are left out; 0 = only those beyond {MAX_NORM:g}, the most "
        "that is summed exactly",
        exclude_if=lambda value: value == 0.0,
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Root of every stream but the partition's")


class FaultSettings(Section):
    """Simulated client faults: probabilities for each client and round, at most one at a time.

    All are off. Docs/reliability.md says what happens to each; `fedcoe.faults` does it.
    """

    dropout: Fraction = Field(0.0, description="Never answers")
    timeout: Fraction = Field(0.0, description="Answers after the deadline")
    nan: Fraction = Field(0.0, description="One number of what it sends is NaN")
    inf: Fraction = Field(0.0, description="One number of what it sends is infinite")
    wrong_shape: Fraction = Field(0.0, description="Its updates are one parameter short")
    exploding: Fraction = Field(0.0, description="Its updates are a million times too long")
    stale: Fraction = Field(0.0, description="Its updates say they are of the round before")
    duplicate: Fraction = Field(0.0, description="Sends its updates twice")
    attack: Literal["none", "sign_flip", "scale"] = Field(
        "none", description="What attackers make of their updates: -1 or `attack_scale` times them"
    )
    attackers: Fraction = Field(
        0.2, description="Share of seen clients that attack, the same ones in every round"
    )
    attack_scale: float = Field(
        10.0, ge=-1e6, le=1e6, description="Times their update is what attackers send (scale)"
    )
    attack_statistics: bool = Field(
        False, description="Attackers do the same to the targets of a gate update's statistics"
    )

    @model_validator(mode="after")
    def _possible(self) -> "FaultSettings":
        total = math.fsum(getattr(self, name) for name in FAULTS)
        if total > 1.0:
            raise ValueError(f"probabilities of faults add up to {total:g}, more than 1")
        return self


class PrivacySettings(Section):
    """Client-level differential privacy (docs/privacy.md); `fedcoe.privacy` does it."""

    epsilon: float = Field(
        0.0, ge=0.0, le=1e6, description="Most any client's data may show after all rounds; 0 = off"
    )
    delta: float = Field(
        1e-4, ge=1e-6, le=0.1, description="Below one over the number of seen clients"
    )
    clip: float = Field(
        1.0, gt=0.0, le=1024.0, description="A client's update in a round is shortened to this"
    )
    gate_share: float = Field(
        0.2, gt=0.0, lt=1.0, description="Of the budget, for the statistics of gate updates"
    )
    correlation_share: float = Field(
        0.1, gt=0.0, lt=1.0, description="Of the budget, for label mixes and losses (FedCoE)"
    )
    noise: Literal["seeded", "secure"] = Field(
        "seeded",
        description="seeded repeats a run but protects nobody from who knows the seed; secure "
        "draws from the operating system",
    )

    @model_validator(mode="after")
    def _possible(self) -> "PrivacySettings":
        if round(self.delta, 6) != self.delta:
            raise ValueError(f"delta = {self.delta:g}: six digits at most, as metrics are written")
        if self.gate_share + self.correlation_share > 0.95:
            raise ValueError("gate_share + correlation_share must leave 5 % for expert updates")
        return self


class EvaluateSettings(Section):
    every: int = Field(5, ge=1, description="Evaluate each this many rounds, and at the end")
    batch_size: int = Field(1000, ge=1, description="Images at once, where nothing is trained")


class ColdStartSettings(Section):
    em_steps: int = Field(50, ge=1, le=10_000, description="EM steps for the label prior")
    few_shot_epochs: int = Field(
        2, ge=0, le=1000, description="Epochs of the fine-tuning reference row; 0 = leave it out"
    )


class RuntimeSettings(Section):
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto = GPUs where torch can use any, else the processor",
        exclude_if=lambda value: value == "auto",
    )
    engine: Literal["auto", "sequential", "vectorized"] = Field(
        "auto",
        description="One model after another, or many at once; auto = vectorized on GPUs",
    )
    workers: int = Field(0, ge=0, le=512, description="Worker processes; 0 = one a core or GPU")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto = bf16 where the device multiplies it natively"
    )


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Searched(Section):
    """What `fedcoe tune` tries for one setting: numbers from low to high, or choices."""

    low: Finite | None = None
    high: Finite | None = None
    log: bool = Field(False, description="Search the logarithm")
    step: Finite | None = Field(None, gt=0.0)
    choices: tuple[Any, ...] = ()

    @model_validator(mode="after")
    def _possible(self) -> "Searched":
        if self.choices:
            if self.model_fields_set - {"choices"}:
                raise ValueError("give low and high, or choices, not both")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give {low: ..., high: ...} or {choices: [...]}")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} must be less than high = {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low > 0 and no step")
        return self


class TuneSettings(Section):
    """The search of `fedcoe tune`; nothing that trains reads it."""

    trials: int = Field(20, ge=1, le=100_000, description="Trials to finish, pruned ones included")
    objective: Literal[
        "global_nll", "global_accuracy", "personalized_nll", "personalized_accuracy"
    ] = Field("global_nll", description="Validation figure of the last round to make best")
    rounds: int = Field(0, ge=0, le=100_000, description="Rounds a trial; 0 = `train.rounds`")
    pruner: Literal["median", "none"] = Field(
        "median", description="Stop trials that are worse than the median at the same round"
    )
    warmup_rounds: int = Field(5, ge=0, description="No trial is pruned before this round")
    startup_trials: int = Field(
        6, ge=1, description="Trials before the search looks at the earlier ones, or prunes"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Root of the search's own streams")
    space: dict[str, Searched] = Field(
        {},
        description="Keys of `model`, `method`, `train`, each with `{low, high}` (and `log: true`, "
        "or `step`) or `{choices: [...]}`",
    )


class Settings(Section):
    """The whole of params.yaml."""

    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings = ModelSettings()
    method: SerializeAsAny[MethodSettings] = Field(default_factory=lambda: settings_for({}))
    train: TrainSettings = TrainSettings()
    # Left out of dumps when off, as all that came later: keys of older results stay as they were.
    faults: FaultSettings = Field(
        FaultSettings(), exclude_if=lambda value: value == FaultSettings()
    )
    privacy: PrivacySettings = Field(
        PrivacySettings(), exclude_if=lambda value: value == PrivacySettings()
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    cold_start: ColdStartSettings = ColdStartSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    # In no dump: what is trained, and every key made of it, does not depend on the search.
    tune: TuneSettings = Field(default=TuneSettings(), exclude=True)

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        return settings_for(value) if isinstance(value, Mapping) else value

    def fingerprint(self, *sections: str) -> str:
        """16 hex digits naming these sections' values (all but `tune` if none is given)."""
        return fingerprint_of(self.model_dump(mode="json", include=set(sections) or None))


def fingerprint_of(values: Any) -> str:
    """16 hex digits naming a JSON-able value."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_settings(path: str | Path = "params.yaml", overrides: Sequence[str] = ()) -> Settings:
    """Read and check a parameter file.

    Args:
        path: YAML file (1.2; duplicate keys are refused).
        overrides: `section.key=value` strings that win over the file, values in YAML.

    Raises:
        FedCoEError: one line per mistake: file, key, value, what is allowed.
    """
    path = Path(path)
    values = read_yaml(path, "run this where params.yaml is")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise FedCoEError(f"{path}: must be a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and section and dot and name):
            raise FedCoEError(f"override {override!r}: write section.key=value")
        target = values.setdefault(section, {})
        if not isinstance(target, dict):
            raise FedCoEError(f"override {override!r}: {path}: {section} is not a section")
        try:
            target[name] = _load_yaml(text)
        except Exception as error:
            raise FedCoEError(f"override {override!r}: {one_line(error)}") from None
    given = {override.partition("=")[0].strip() for override in overrides}
    return validate_settings(values, str(path), given)


def load_profile(path: str | Path, name: str) -> list[str]:
    """Settings that a profile stands for, as overrides of `load_settings`.

    Args:
        path: YAML file of profile names, each a mapping of section.key to value.
        name: of the profile.

    Raises:
        FedCoEError: no such file or profile, or not of this form.
    """
    profiles = read_yaml(path, "the repository has one to copy")
    if not isinstance(profiles, dict) or not all(isinstance(v, dict) for v in profiles.values()):
        raise FedCoEError(f"{path}: must map profile names to section.key: value")
    if name not in profiles:
        raise FedCoEError(
            f"{path}: no profile {name!r}; there are: {', '.join(map(str, profiles))}"
        )
    return [f"{key}={json.dumps(value)}" for key, value in profiles[name].items()]


def validate_settings(
    values: Mapping[str, Any], source: str, given: Collection[str] = ()
) -> Settings:
    """Check a mapping of sections.

    Args:
        source: names it in errors.
        given: keys that came by `-S`, not from there.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        said = [_describe(source, item, given) for item in found[:MAX_SAID]]
        more = [f"and {len(found) - MAX_SAID} more"] if len(found) > MAX_SAID else []
        raise FedCoEError("; ".join(said + more)) from None


def _describe(source: str, item: Any, given: Collection[str]) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "(top level)"
    source = "-S" if key in given else f"{source}:"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown key; remove it or mend the spelling"
    if item["type"] == "model_type":
        message = "must be a section of keys and values; fill it in or remove it"
    value = "" if isinstance(item["input"], Mapping | BaseModel) else f" = {item['input']!r}"
    return f"{source} {one_line(key + value)}: {one_line(message)}"


def read_yaml(path: str | Path, missing: str) -> Any:
    """What a YAML file of the user's holds.

    Args:
        missing: what to do where there is no such file.

    Raises:
        FedCoEError: no such file, or not readable as YAML.
    """
    try:
        return _load_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedCoEError(f"{path}: no such file; {missing}") from None
    except Exception as error:  # what YAML makes of dates and numbers raises anything
        raise FedCoEError(f"{path}: not readable as YAML: {one_line(error)}") from None


def _load_yaml(text: str) -> Any:
    if len(text) > MAX_YAML:
        raise ValueError(f"has more than {MAX_YAML} characters")
    # Twenty lines of aliases of aliases can stand for a billion values.
    if len(re.findall(r"\*[^\s,\[\]{}*]", text)) > MAX_ALIASES:
        raise ValueError(f"has more than {MAX_ALIASES} aliases (*name)")
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
