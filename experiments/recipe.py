"""An experiment's YAML as a graph of stages, each identified by its inputs and options.

    title: ...                 question: ...            reading: ... (findings)
    seeds: [0, 1, 2, 3, 4]     baseline: an arm         measures: [reward, ...]
    temperatures: [1.0, 0.5, 0]                           # 0 is greedy
    stages:
      rows: {select: {data: "{demo.train}", rows: 256, seed: "{seed}"}}
      train: {train: {model_name_or_path: "{demo.model}", train_data: "{rows}"}}
      evaluate: {evaluate: {model_name_or_path: "{train}", data: "{demo.eval}", ...}}
    results: [evaluate]
    arms:
      RRHF:                                                 # the stages unchanged
      SFT: {train.rank_weight: 0}                           # changes an option of a stage
      untrained: {evaluate.model_name_or_path: "{demo.model}"}
      DPO: {train: {dpo: {train_data: "{rows}", ...}}}      # replaces a stage; null removes it

`"{name}"`, optionally followed by "/a path below it", is the output of a stage, the seed, a demo
file, or a folder given on the command line ({models}, {data}). A stage may be a string: an alias
for one of these. Only stages that some result needs are run. Instead of `arms` an experiment may
have `series` and `points`: each pair is an arm, and a series is drawn as a curve over the points.

The baseline is an arm, a series (compared at the same point) or a point (compared within the
series), or a list of these; `against` in an arm or series replaces it there.

`temperatures` (default 1 alone) repeats each result that draws samples, from the same trained
model; these stages have no temperature of their own. The measure `reward` then stands for `reward`
(at T = 1), `reward@0.5`, `reward@0` and `reward@best`, at each arm's best temperature, which is
chosen on other seeds and prompts than it is reported on. Other measures are taken at T = 1 unless
the recipe names them so: `distinct@0.5`. An arm, series or point may have only some of the
temperatures; it has no `reward@best` then.

`cost: {over: an arm, measure: reward@0.5}` adds a table of the CPU seconds behind each arm (of a
series: its last point), per reward that it gained over that arm.
"""

import copy
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from experiments.stages import KINDS, NEEDS, build_config
from experiments.tasks import MEASURES as OF_TASKS
from rrhf_fast import demo
from rrhf_fast.evaluate.report import TITLES as MEASURED

MEASURES = (
    MEASURED
    | OF_TASKS
    | {
        "perplexity": "perplexity under the initial model",
        "tokens": "tokens per sample",
        "ranking_accuracy": "ranking accuracy of the mean log-prob",
        "ranking_provided": "ranking accuracy, provided pairs",
        "ranking_sampled": "ranking accuracy, sampled pairs",
        "ranking_mixed": "ranking accuracy, mixed pairs",
    }
)
# Kinds whose option `temperature` an experiment's temperatures set.
_SAMPLING = ("evaluate", "round")
CONFIGS = Path(__file__).parent / "configs"
_REFERENCE = re.compile(r"\{([^{}]+)\}(/.*)?")
_REQUIRED = {"title", "question", "seeds", "baseline", "measures", "stages", "results"}
_KINDS = {
    **dict.fromkeys(("title", "question", "reading", "x"), str),
    **dict.fromkeys(("seeds", "measures", "results", "check", "temperatures"), list),
    **dict.fromkeys(("stages", "arms", "series", "points", "cost"), dict),
    "baseline": (str, int, float, list),
}
_EXPECTED = {
    str: "text",
    list: "a list",
    dict: "a mapping",
    _KINDS["baseline"]: "an arm, series or point, or a list of these",
}


@dataclass(frozen=True)
class Stage:
    """A unit of work. Equal stages have equal keys, also across experiments."""

    key: str
    kind: str
    options: dict = field(hash=False, compare=False)  # with references replaced by paths
    inputs: tuple["Stage", ...] = field(hash=False, compare=False)


@dataclass
class Arm:
    """One contender: its result stages per seed, or the reason why there are none."""

    name: str
    series: str | None = None
    x: float | str | None = None
    against: list[str | int | float] = field(default_factory=list)
    # Per seed, each result and the temperature of its samples.
    results: dict[int, list[tuple[Stage, float]]] = field(default_factory=dict)
    skipped: str | None = None


@dataclass
class Experiment:
    """A validated YAML file."""

    name: str
    text: dict  # the YAML
    seeds: list[int]  # all of its seeds, or fewer
    arms: list[Arm]

    def baselines_of(self, arm: Arm) -> list[str]:
        """The names of the arms to compare with."""
        names, found = {other.name for other in self.arms}, []
        for wanted in arm.against:
            places = (wanted, f"{wanted}, {arm.x}", f"{arm.series}, {wanted}")
            if name := next((name for name in places if name in names), None):
                found += [name] * (name != arm.name)
        return list(dict.fromkeys(found))

    def results(self) -> list[Stage]:
        """The result stages of all arms and seeds."""
        of_seeds = [found for arm in self.arms for found in arm.results.values()]
        return [stage for found in of_seeds for stage, _ in found]


class Missing(Exception):
    """A folder or library that an arm needs is missing."""


def load_experiment(
    path: Path, work: Path, roots: dict[str, Path | None], seeds: int | None = None
) -> Experiment:
    """Read, check and resolve a YAML file.

    Args:
        path: the file.
        work: the folder of the stages.
        roots: the folders for {models} and {data}.
        seeds: use only this many of the seeds; default all.

    Raises:
        ValueError: a mistake in the file, with its place.
    """
    text = read_text(path)
    experiment = Experiment(path.stem, text, text["seeds"][:seeds], [])
    for name, series, x, changes in arms_of(text):
        against = as_list(next((c["against"] for c in changes if "against" in c), text["baseline"]))
        arm = Arm(name, series, x, against)
        where = f"{path.name}: {name}"
        stages = _apply(text["stages"], changes, where)
        temperatures = _temperatures_of(changes, text["temperatures"])
        wanted = [name for name in text["results"] if stages.get(name, {}) is not None]
        try:
            for seed in experiment.seeds:
                found: dict[Stage, float] = {}
                at_1 = _Resolver(stages, seed, 1, work, roots, where)
                for temperature in temperatures:
                    resolver = _Resolver(stages, seed, temperature, work, roots, where)
                    for name in wanted:
                        stage = resolver.stage(name)
                        # The best of one answer is that answer.
                        if temperature != 0 or stage.kind != "best_of":
                            # What draws no samples is the same at each temperature.
                            same = stage == at_1.stage(name)
                            found.setdefault(stage, 1 if same else temperature)
                arm.results[seed] = list(found.items())
        except Missing as reason:
            arm.results, arm.skipped = {}, str(reason)
        experiment.arms.append(arm)
    _check_baselines(experiment, path.name)
    return experiment


def _check_baselines(experiment: Experiment, file: str) -> None:
    """Raise ValueError for a name, of those to compare with, that no arm, series or point has."""
    text = experiment.text
    names = [name for arm in experiment.arms for name in (arm.name, arm.series, arm.x)]
    known = {str(name) for name in names if name is not None}
    places = [("baseline", text["baseline"])]
    for name, _, _, changes in arms_of(text):
        places += [(f"{name}: against", c["against"]) for c in changes if "against" in c]
    for place, wanted in places:
        for name in as_list(wanted):
            if str(name) not in known:
                raise ValueError(f"{file}: {place}: {name!s:.60} is not an arm, series or point")


def _temperatures_of(changes: list[dict], every: list[float]) -> list[float]:
    """Those of one arm: of the recipe, or some of these."""
    return next((change["temperatures"] for change in changes if "temperatures" in change), every)


def as_list(value) -> list:
    """A list as it is, anything else as the only entry of one."""
    return value if isinstance(value, list) else [value]


def at(measure: str, temperature: float | str) -> str:
    """The name of a measure at a temperature, or at "best"."""
    if temperature == 1:
        return measure
    return f"{measure}@{temperature if temperature == 'best' else format(temperature, 'g')}"


def title_of(measure: str, measures: list[str]) -> str:
    """A measure in words; with its temperature where the experiment has several."""
    name, _, temperature = measure.partition("@")
    title = MEASURES[name]
    if name.startswith("ranking") or not any("@" in other for other in measures):
        return title
    words = {"": "T = 1", "0": "greedy", "best": "at its best T"}
    return f"{title}, {words.get(temperature, f'T = {temperature}')}"


def read_text(path: Path) -> dict:
    """Read the file and check its fields. Raises ValueError for a mistake."""
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: cannot be read ({error})") from error
    if not isinstance(text, dict):
        raise ValueError(f"{path.name}: expected a mapping, found {type(text).__name__}")
    if unknown := sorted(set(map(str, text)) - set(_KINDS)):
        raise ValueError(
            f"{path.name}: {unknown[0]}: no such field (of {', '.join(sorted(_KINDS))})"
        )
    text = {name: value for name, value in text.items() if value is not None}
    for name, kind in _KINDS.items():
        if name in _REQUIRED and text.get(name, "") in ("", [], {}):
            raise ValueError(f"{path.name}: {name}: missing")
        value = text.get(name)
        if name in text and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(
                f"{path.name}: {name}: expected {_EXPECTED[kind]}, found {value!r:.60}"
            )
    if ("arms" in text) == ("series" in text and "points" in text):
        raise ValueError(f"{path.name}: arms: expected arms, or series and points")
    text.setdefault("temperatures", [1])
    _check_parts(text, path.name)
    if len(text["temperatures"]) > 1:
        every = [at("reward", temperature) for temperature in [*text["temperatures"], "best"]]
        text["measures"] = [
            name for m in text["measures"] for name in (every if m == "reward" else [m])
        ]
    text["measures"] = list(dict.fromkeys(text["measures"]))
    _check_names(text, path.name)
    return text


def _check_parts(text: dict, file: str) -> None:
    """Raise ValueError for a field's entry of the wrong kind."""
    seeds = text["seeds"]
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: seeds: expected different whole numbers, found {seeds}")
    for name in ("measures", "results"):
        if not all(isinstance(entry, str) for entry in text[name]):
            raise ValueError(f"{file}: {name}: expected names, found {text[name]}")
    _check_temperatures(text["temperatures"], file)
    for measure in text["measures"]:
        name, *_ = measure.partition("@")
        known = [at(name, temperature) for temperature in text["temperatures"]]
        if name not in MEASURES:
            raise ValueError(
                f"{file}: measures: {measure}: no such measure (of {', '.join(MEASURES)})"
            )
        if measure not in known:
            problem = f"no such measure at these temperatures (there are {', '.join(known)})"
            raise ValueError(f"{file}: measures: {measure}: {problem}")
    for name in ("stages", "arms", "series", "points"):
        kinds = (dict, str, type(None)) if name == "stages" else (dict, type(None))
        for key, entry in text.get(name, {}).items():
            if not isinstance(entry, kinds):
                raise ValueError(f"{file}: {name}: {key}: expected a mapping, found {entry!r:.60}")
    for key, entry in text.get("series", {}).items():
        wanted, points = (entry or {}).get("points", []), [*text["points"]]
        if not isinstance(wanted, list) or not all(point in points for point in wanted):
            raise ValueError(f"{file}: {key}: points: expected some of {points}, found {wanted}")


def _check_temperatures(found, where: str, every: list[float] | None = None) -> None:
    """Raise ValueError unless these are a recipe's temperatures, or an arm's of `every` one."""
    numbers = found if isinstance(found, list) else []
    fits = all(type(t) in (int, float) and 0 <= t < math.inf for t in numbers)
    names = {at("", t) for t in numbers} if fits else ()
    if every is None:
        expected, fits = "1, and then others, 0 for greedy", fits and numbers[:1] == [1]
    else:
        expected, fits = f"some of {every}", fits and all(t in every for t in numbers)
    if fits and len(names) < len(numbers):
        expected = "each once"
    elif fits and numbers:
        return
    raise ValueError(f"{where}: temperatures: expected {expected}, found {found}")


def _check_names(text: dict, file: str) -> None:
    """Raise ValueError for temperatures of arms, checks and costs that the recipe does not have."""
    names = [name for name, *_ in arms_of(text)]
    for name, _, _, changes in arms_of(text):
        own = _temperatures_of(changes, text["temperatures"])
        _check_temperatures(own, f"{file}: {name}", text["temperatures"])
    for check in text.get("check", []):
        if not isinstance(check, dict) or set(check) != {"better", "than", "measure"}:
            raise ValueError(f"{file}: check: expected better, than and measure, found {check}")
        if check["better"] not in names or check["than"] not in names:
            raise ValueError(f"{file}: check: expected two of {names}, found {check}")
        if check["measure"] not in text["measures"]:
            raise ValueError(f"{file}: check: {check['measure']} is not among the measures")
    if cost := text.get("cost"):
        if set(cost) != {"over", "measure"} or cost["over"] not in names:
            raise ValueError(f"{file}: cost: expected over (an arm) and measure, found {cost}")
        if cost["measure"] not in text["measures"]:
            problem = f"is not among the measures ({', '.join(text['measures'])})"
            raise ValueError(f"{file}: cost: {cost['measure']} {problem}")


def arms_of(text: dict):
    """Yield (name, series, x, changes) of every arm."""
    if "arms" in text:
        for name, changes in text["arms"].items():
            yield str(name), None, None, [changes or {}]
        return
    for series, own in text["series"].items():
        own = dict(own or {})
        points = own.pop("points", list(text["points"]))
        for x in points:
            yield f"{series}, {x}", str(series), x, [own, text["points"][x] or {}]


def _apply(stages: dict, changes: list[dict], where: str) -> dict:
    stages = copy.deepcopy(stages)
    for change in changes:
        for name, value in change.items():
            if name in ("against", "temperatures"):
                continue
            stage, *path = str(name).split(".")
            if not path:
                stages[stage] = copy.deepcopy(value)
                continue
            if stage not in stages:
                raise ValueError(f"{where}: {name}: there is no stage {stage}")
            if stages[stage] is None:  # removed in this arm
                continue
            target = _options(stages[stage])
            for step in path[:-1]:
                target = target.setdefault(step, {}) if isinstance(target, dict) else None
            if not isinstance(target, dict):
                raise ValueError(f"{where}: {name}: there are no options to change")
            if value is None:
                target.pop(path[-1], None)
            else:
                target[path[-1]] = copy.deepcopy(value)
    return stages


def _options(stage) -> dict | None:
    """The mapping inside {kind: {option: value}}."""
    return next(iter(stage.values()), None) if isinstance(stage, dict) else None


class _Resolver:
    """The stages of one arm, seed and temperature."""

    def __init__(
        self, stages: dict, seed: int, temperature: float, work: Path, roots: dict, where: str
    ):
        self._stages, self._seed, self._temperature = stages, seed, float(temperature)
        self._work, self._roots, self._where = work, roots, where
        self._made: dict[str, Stage | None] = {}

    def stage(self, name: str) -> Stage:
        if name in self._made:
            if self._made[name] is None:
                raise ValueError(f"{self._where}: {name}: depends on itself")
            return self._made[name]
        text = self._stages.get(name)
        if not isinstance(text, dict) or len(text) != 1 or next(iter(text)) not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(f"{self._where}: {name}: expected a stage, one of {kinds}")
        self._made[name] = None
        (kind, options), inputs = next(iter(text.items())), []
        if not isinstance(options, dict):
            raise ValueError(f"{self._where}: {name}: expected options, found {options!r:.60}")
        if kind in _SAMPLING:
            if "temperature" in options:
                problem = "temperature: the recipe's temperatures set it"
                raise ValueError(f"{self._where}: {name}: {problem}")
            options = options | {"temperature": self._temperature}
        if kind in NEEDS and find_spec(NEEDS[kind]) is None:
            raise Missing(f"{NEEDS[kind]} is not installed")
        paths, identity = self._resolve(options, inputs)
        try:
            config = build_config(kind, copy.deepcopy(paths))
        except ValueError as error:
            raise ValueError(f"{self._where}: {name}: {error}") from error
        identity = _with_defaults(identity, asdict(config))
        key = hashlib.sha256(json.dumps([kind, identity], sort_keys=True).encode()).hexdigest()[:16]
        self._made[name] = Stage(key, kind, paths, tuple(inputs))
        return self._made[name]

    def _resolve(self, value, inputs: list[Stage]):
        """Return (the stage's options, the identity of these options)."""
        if isinstance(value, dict):
            both = {name: self._resolve(item, inputs) for name, item in value.items()}
            return {k: v[0] for k, v in both.items()}, {k: v[1] for k, v in both.items()}
        if isinstance(value, list):
            both = [self._resolve(item, inputs) for item in value]
            return [given for given, _ in both], [identity for _, identity in both]
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            is_file = isinstance(value, str) and "/" in value and Path(value).exists()
            return value, _content(Path(value)) if is_file else value
        name, below = match[1], match[2] or ""
        if name == "seed":
            return self._seed, self._seed
        if isinstance(self._stages.get(name), str):
            return self._resolve(self._stages[name] + below, inputs)
        if name in self._stages:
            stage = self.stage(name)
            if stage not in inputs:
                inputs.append(stage)
            output = self._work / stage.key / KINDS[stage.kind].output
            return f"{output}{below}", f"{stage.key}{below}"
        path = self._file(name, below)
        return str(path), _content(path)

    def _file(self, name: str, below: str) -> Path:
        built_in = {
            "demo.model": demo.MODEL_DIR,
            "demo.train": demo.TRAIN_FILE,
            "demo.eval": demo.EVAL_FILE,
            "here": CONFIGS,
        }
        if name in built_in:
            return Path(f"{built_in[name]}{below}")
        if name not in self._roots:
            raise ValueError(f"{self._where}: {{{name}}} is not a stage, file or seed")
        if self._roots[name] is None:
            raise Missing(f"--{name} is not given")
        path = Path(f"{self._roots[name]}{below}")
        if not path.exists():
            raise Missing(f"--{name} has no {below.lstrip('/')}")
        return path


def _with_defaults(given, options):
    """Add the options left at their defaults to a stage's identity: defaults may change."""
    if isinstance(given, dict) and isinstance(options, dict):
        both = {name: _with_defaults(value, options.get(name)) for name, value in given.items()}
        return options | both
    if isinstance(given, list) and isinstance(options, list) and len(given) == len(options):
        return [_with_defaults(*pair) for pair in zip(given, options, strict=True)]
    return given


@cache
def _content(path: Path) -> str:
    """A hash of a file, or of all files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    content = hashlib.sha256()
    for file in files:
        if file.is_file():
            content.update(f"{file.relative_to(path)}\n".encode())
            with open(file, "rb") as opened:
                content.update(hashlib.file_digest(opened, "sha256").digest())
    return content.hexdigest()
