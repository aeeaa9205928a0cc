"""Sizes: one validated, frozen object that decides a run. Loaded from `profiles/NAME.json`.

A notebook's `parameters` cell names the profile and overrides single values by dotted name,
for instance {"junior.epochs": 2}. An unknown name, a wrong type or an impossible value is refused
in one line before anything runs.
"""

from __future__ import annotations

import difflib
import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from speed_core.files import NAME, NAME_RULE, UserError, read_text, without_user

FOLDER = Path(__file__).parent / "profiles"


class ConfigSection(BaseModel):
    """One section of a profile: frozen, strict (the text "1e-5" is no number) and closed (unknown names are refused)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _address(url: str) -> str:
    """The address without its "user:key@" (`files.without_user` keeps it). A query is refused: it may hold a key, and no client sends it."""
    if "?" in url or "#" in url:
        raise ValueError("an address ends before its '?' or '#'; a key goes into OPENAI_API_KEY")
    plain = without_user(url)
    try:
        parts = urlsplit(plain)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in plain
    except ValueError:
        good = False
    if url and not good:
        raise ValueError("no address as in http://host:8000/v1; write / and @ in a user's key as %2F and %40")
    return plain


Address = Annotated[str, AfterValidator(_address)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]  # what every library takes
ComputeType = Literal["auto", "float32", "bfloat16", "float16"]  # see `compute_type.choose`


class Models(ConfigSection):
    """Names that `loading.resolve` knows: hub id, local folder or package:NAME."""

    generator: str
    embedder: str
    guide: str


class Price(ConfigSection):
    """US dollars for a million tokens of one model."""

    model: str
    input: float = Field(ge=0)
    output: float = Field(ge=0)


class Teacher(ConfigSection):
    """Who answers in GPT-4o's place, who judges, and what it may cost."""

    kind: Literal["recorded", "openai"]
    judge: Literal["rubric", "llm"]
    model: str = ""
    base_url: Address = ""
    temperature: float = 1.0
    top_p: float = 1.0
    judge_temperature: float = 0.0
    concurrency: int = Field(8, ge=1)
    attempts: int = Field(1, ge=1, le=10)  # for an answer that is invalid, refused or cut
    max_output_tokens: int = Field(0, ge=0)  # of one answer; 0: the endpoint's own limit
    prices: tuple[Price, ...] = ()
    max_calls: int = Field(1000, ge=0)
    max_usd: float = Field(1.0, ge=0)  # 0: no cap of its own
    max_tokens: int = Field(0, ge=0)  # of a whole stage, input and output; 0: no cap of its own
    max_minutes: float = Field(60.0, gt=0)
    requests_per_minute: int = Field(0, ge=0)
    tokens_per_minute: int = Field(0, ge=0)
    timeout_seconds: float = Field(120.0, gt=0)
    accept_partial: bool = False  # let later stages take a data set that a budget has cut short

    def price(self) -> tuple[float, float]:
        """(input, output) in US dollars for a million tokens; a model that the table lacks costs nothing here."""
        return next(((p.input, p.output) for p in self.prices if p.model == self.model), (0.0, 0.0))

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """US dollars of so many tokens."""
        price = self.price()
        return (input_tokens * price[0] + output_tokens * price[1]) / 1e6

    def cache_key_fields(self) -> dict[str, Any]:
        """The values that decide an answer, without those that only decide its price, pace or permission."""
        of_the_answer = {"kind", "model", "base_url", "temperature", "top_p", "attempts", "max_output_tokens"}
        return self.model_dump(include=of_the_answer | {"judge", "judge_temperature"})


class Topics(ConfigSection):
    """How many topics are used (0: all), and about how many of them, the last, no data are written. `file`: topics of your own (`topics`
    says which forms); empty: the list of this repository."""

    file: str = ""
    count: int = Field(ge=0)
    held_out: int = Field(ge=1)
    max_depth: int = Field(4, ge=1)
    truncate: bool = True  # of a path deeper than `max_depth`, drop levels in the middle
    tasks_per_topic: int = Field(1, ge=1)


class Prompts(ConfigSection):
    attributes: Literal["paper", "short"]
    style: Literal["own", "faithful"] = "own"
    clone: str = ""  # folder with the authors' code, for style "faithful"


class Generation(ConfigSection):
    """How texts are sampled, and where: in one process, or by `workers` engines over Ray (`speed_core.generation.ray_engine`)."""

    engine: Literal["auto", "vllm", "transformers", "server"] = "auto"
    executor: Literal["process", "ray"] = "process"
    workers: int = Field(1, ge=1)  # with executor=ray: engines, one a GPU where there are GPUs
    ray_address: str = ""  # HOST:PORT; empty: $RAY_ADDRESS, the Ray of this machine, or one started for the run
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(ge=16)
    max_length: int = Field(ge=128)
    batch_size: int = Field(32, ge=1)
    constrained: bool = True
    attempts: int = Field(1, ge=1, le=10)  # for a text that is invalid, refused or cut
    base_url: Address = ""  # of an OpenAI-compatible server, for engine "server"
    concurrency: int = Field(64, ge=1)  # requests at once, for engine "server"
    dtype: ComputeType = "auto"


class Lora(ConfigSection):
    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Training(ConfigSection):
    """One fine-tuning run. `batch` is the global batch, in examples (prompts with all their pairs for DPO). With `save_steps` a
    training that was interrupted goes on from a checkpoint."""

    examples: int = Field(ge=1)
    epochs: float = Field(gt=0)
    lr: float = Field(gt=0)
    batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    max_length: int = Field(ge=32)
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    save_steps: int = Field(0, ge=0)
    dtype: ComputeType = "auto"
    lora: Lora | None

    @model_validator(mode="after")
    def _split(self) -> Training:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}; change one of them")
        return self

    def cache_key_fields(self) -> dict[str, Any]:
        """The values that decide the weights, by dotted name."""
        return {k: v for k, v in dotted(self).items() if k != "save_steps"}


class Processes(ConfigSection):
    """How many processes train a generator or an embedding model together (`speed_core.models.launch`); no result depends on it.
    `fsdp` splits a model over the GPUs. `accelerate`: a configuration file of accelerate's, for DeepSpeed or anything else."""

    processes: int = Field(0, ge=0)  # 0: one a visible GPU; one without a GPU
    accelerate: str = ""
    fsdp: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Processes:
        if self.accelerate and self.fsdp:
            raise ValueError("fsdp is true and accelerate names a file; say it in the file, and set fsdp to false")
        return self


class Senior(Training):
    """DPO on the first `examples` usable pairs. `batch` counts prompts; `share` reads a prompt once for all its completions,
    `row_tokens` packs several prompts into a row."""

    beta: float = Field(0.1, gt=0)
    prompts: int = Field(ge=1)
    candidates: int = Field(ge=2)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    share: bool = True
    row_tokens: int | None = Field(None, ge=64)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _smoothed(self) -> Senior:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing: has no meaning with loss 'ipo'; set it to 0")
        return self


class Synthesis(ConfigSection):
    count: int = Field(ge=4)
    evaluation_prompts: int = Field(ge=4)


class Curate(ConfigSection):
    threshold: float = Field(0.7, gt=0, lt=1)
    permutations: int = Field(128, ge=16)
    shingle: int = Field(3, ge=1)
    overlap_words: int = Field(8, ge=3)


class Embedding(Training):
    """Contrastive fine-tuning. `examples` caps the synthetic records used; `pooling` is that of a decoder. Negatives come from the whole
    `batch`, whatever `micro_batch`, which is how many texts are embedded at a time; `gradient_checkpointing` saves memory too."""

    temperature: float = Field(0.02, gt=0)
    margin: float = 0.0
    guided: bool = True
    pooling: Literal["last", "mean"] = "last"
    gradient_checkpointing: bool = False

    def cache_key_fields(self) -> dict[str, Any]:
        """As for every training, and without the value that changes memory alone."""
        return {k: v for k, v in super().cache_key_fields().items() if k != "gradient_checkpointing"}


class Evaluation(ConfigSection):
    tasks: tuple[str, ...] = ("offline",)
    size: Literal["smoke", "quarter", "half", "tiny", "full"] = "tiny"
    bootstrap: int = Field(1000, ge=100)
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(512, ge=16)


class Student(ConfigSection):
    """Notebook 07b: encoders cut from the guide, trained with and without guidance on the seed data."""

    layers: tuple[int, ...] = (1, 4)
    seeds: tuple[Seed, ...] = (0, 1, 2)
    examples: int = Field(320, ge=4)
    epochs: float = Field(2, gt=0)
    batch: int = Field(64, ge=2)
    lr: float = Field(2e-4, gt=0)


class Study(ConfigSection):
    """Notebooks 07b to 11: the guided-loss students, size of each ablation data set, sizes of the scaling points.

    `seeds` counts from the run's own seed: every embedding model is trained once for each. `sweep_seeds`: the first of
    them, when the points of a sweep (`paper_sweeps.SWEEPS`) are to be trained with fewer. `generator_seeds`: the run's seed in each
    further training of the generators (`repeats`).
    """

    ablation_examples: int = Field(ge=4)
    arms: tuple[Literal["jr", "jr_re", "sr", "sr_re", "base", "teacher"], ...] = (
        "jr", "jr_re", "sr", "sr_re", "base", "teacher",
    )  # fmt: skip
    scaling: tuple[int, ...]
    seeds: tuple[Seed, ...] = (0,)
    sweep_seeds: tuple[Seed, ...] | None = None
    generator_seeds: tuple[Seed, ...] = (10, 20)
    student: Student = Student()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _sizes(self) -> Study:
        if len(self.scaling) < 2 or list(self.scaling) != sorted(set(self.scaling)):
            raise ValueError(f"scaling {list(self.scaling)}: give at least two sizes in rising order")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: give at least one, each once")
        if self.sweep_seeds is not None and self.sweep_seeds != self.seeds[: len(self.sweep_seeds) or None]:
            raise ValueError(f"sweep_seeds {list(self.sweep_seeds)}: not the first of seeds {list(self.seeds)}")
        if len(set(self.generator_seeds)) != len(self.generator_seeds):
            raise ValueError(f"generator_seeds {list(self.generator_seeds)}: give each once")
        return self


class Profile(ConfigSection):
    name: str = Field(pattern=f"^{NAME}$")
    description: str
    hardware: str
    minutes: float | None = None
    seed: Seed = 0
    data_seed: Seed = 0
    models: Models
    teacher: Teacher
    topics: Topics
    prompts: Prompts
    seeds: int = Field(ge=4)
    generation: Generation
    junior: Training
    senior: Senior
    revisor: Training
    synthesis: Synthesis
    curate: Curate
    embedding: Embedding
    evaluation: Evaluation
    study: Study
    training: Processes = Processes()  # type: ignore[call-arg]
    sources: dict[str, str] = {}  # where the value of a dotted name, or of all below it, comes from


def names() -> list[str]:
    """Profiles that ship with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def _raw(name: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a profile over those of the one that it extends; `below`: the profiles that extend this one."""
    path = FOLDER / f"{name}.json" if name in names() else Path(name)
    try:
        there = name in names() or (name.endswith(".json") and path.is_file())
    except OSError:  # a name that is too long for any file
        there = False
    if not there:
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise UserError(f"profile {name[:80]!r}: unknown{hint} use one of {', '.join(names())} or a path to a .json file")
    name = name if name in names() else str(path.resolve())
    if name in below:
        raise UserError(f"profile {below[0]!r}: extends itself ({' -> '.join([*below, name])}); take one 'extends' away")
    try:
        data = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"profile {path}: not JSON ({error}); correct the file") from None
    if not isinstance(data, dict):
        raise UserError(f"profile {path}: holds {type(data).__name__}, not an object with the values; see profiles/tiny.json")
    for section, name_of_file in (("topics", "file"), ("training", "accelerate")):
        part = data.get(section)
        if isinstance(part, dict) and isinstance(given := part.get(name_of_file), str):
            with suppress(OSError, ValueError):  # of a profile of one's own, beside it
                part[name_of_file] = str(found.resolve()) if (found := path.parent / given).is_file() else given
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"profile {path}: 'extends' is {str(parent)[:40]}; give the name of one profile")
    with suppress(OSError):
        if parent not in names() and (path.parent / parent).is_file():
            parent = str(path.parent / parent)
    return _merge(_raw(parent, (*below, name)), data)


def _merge(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested values: {"junior": {"lr": 1}} -> {"junior.lr": 1}."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= dotted(inner, f"{prefix}{key}.")
    return out


def load(name: str = "tiny", overrides: dict[str, Any] | None = None) -> Profile:
    """The profile `name` (or a .json file) with `overrides` by dotted name applied.

    Raises UserError that names the parameter, the rule and what to do.
    """
    try:
        data = _raw(name)
        known = dotted(_validate(name, data))
    except RecursionError:
        raise UserError(f"profile {name!r}: nested too deeply; a profile has three levels") from None
    for key, value in (overrides or {}).items():
        if key not in known and not any(k.startswith(f"{key}.") for k in known):
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; names are {', '.join(list(known)[:6])} ..."
            raise UserError(f"parameter {key!r}: profile {name!r} has no such value{hint}")
        part = data
        *parents, leaf = key.split(".")
        for step in parents:
            part = part.setdefault(step, {})
            if not isinstance(part, dict):
                raise UserError(f"parameter {key!r}: {step!r} is switched off in profile {name!r}")
        part[leaf] = value
    return _validate(name, data)


def _validate(name: str, data: dict[str, Any]) -> Profile:
    try:
        # JSON mode: lists become tuples, but numbers stay numbers and text stays text.
        return Profile.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "values"
        got = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        own = str(first.get("ctx", {}).get("error", "")) if first["type"] == "value_error" else first["msg"].lower()
        said = f"it takes {NAME_RULE}" if first["type"] == "string_pattern_mismatch" else own
        raise UserError(f"parameter {where!r} of profile {name!r}: {said}{got[:120]}; correct it") from None
