"""The kinds of stages: the project's own commands, and a few small helpers between them.

Each kind is a config class and a function (config, folder) that writes into the folder. Kinds that
measure also return measures by prompt, {name: {"prompts", "numerators", "denominators"}}.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt

from experiments.make_demo import make
from experiments.peers import GRPOConfig, PeerConfig, dpo, grpo, rloo
from experiments.ppo import PPOConfig, ppo
from experiments.tasks import MeasureConfig, TaskConfig, make_task, measure
from experiments.tasks.constitution import judge
from rrhf_fast.data.load import load_rows
from rrhf_fast.data.rows import Draft, provided_mask
from rrhf_fast.evaluate import evaluate
from rrhf_fast.evaluate.config import EvaluateConfig
from rrhf_fast.evaluate.measures import pairs_in_order
from rrhf_fast.export import export
from rrhf_fast.export.config import ExportConfig
from rrhf_fast.iterate import iterate
from rrhf_fast.iterate.config import IterateConfig
from rrhf_fast.sample import sample
from rrhf_fast.sample.config import Policy, SampleConfig
from rrhf_fast.score import score
from rrhf_fast.score.config import ScoreConfig, ScorerConfig
from rrhf_fast.score.logprobs import LogProbs
from rrhf_fast.stages.files import write_rows
from rrhf_fast.stages.options import REMOVED, check, check_names
from rrhf_fast.stages.run_folder import pass_on
from rrhf_fast.train import train
from rrhf_fast.train.config import TrainConfig

Measures = dict[str, dict[str, list]]


@dataclass
class SelectConfig:
    """Options of `select`: which rows and responses of a file to keep, with which scores."""

    data: str
    rows: Annotated[int, Gt(0)] | None = None
    """Keep this many rows, drawn by the seed, or the first that the folds leave; default all."""
    responses: Annotated[int, Gt(0)] | None = None
    """Keep as many rows as hold this many responses in all, given `take`."""
    folds: Annotated[int, Gt(0)] | None = None
    """Split the rows into this many parts and keep part `fold` (modulo `folds`), or all others."""
    fold: int = 0
    keep: Literal["fold", "others"] = "others"
    take: dict | None = None
    """Keep this many distinct responses per source, {source: count}, in the file's order."""
    noise: Annotated[float, Ge(0)] = 0.0
    """Standard deviation of the noise added to each score."""
    round_to: Annotated[float, Gt(0)] | None = None
    """Round scores to multiples of this, which makes ties."""
    shuffle: bool = False
    """Shuffle each row's responses, so that chance decides which of several tied ones is the
    best."""
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)
        if self.responses is not None and (not self.take or self.rows is not None):
            raise ValueError("responses: needs take, excludes rows")


@dataclass
class Evaluation(EvaluateConfig):
    """Options of `evaluate`: the command's, and greedy decoding."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """0 for the one greedy answer, instead of num_samples."""

    def sampling(self, model: str, source: str | None = None) -> Policy:
        """How the samples of a model are drawn."""
        policy = super().sampling(model, source)
        if self.temperature > 0:
            return policy
        return replace(policy, method="greedy", num_responses=1, temperature=1.0)


@dataclass
class RankConfig(ScorerConfig):
    """Options of `rank`: does the model's p order held-out responses as their scores do?"""

    data: str = ""
    by_source: bool = False
    """Also measure pairs that the dataset provided, that were sampled, and mixed ones apart."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)
        if self.model_name_or_path is None or not self.data:
            raise ValueError("model_name_or_path, data: missing")


@dataclass
class RoundConfig:
    """Options of `round`: which round of an `iterate` to read the measures of."""

    iterate: str
    steps: int
    """The round that ends after this many optimizer steps; 0 for the initial model."""
    per_round: int
    """Optimizer steps per round."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """If not 1, sample again from the round's model; 0 is greedy."""

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)
        if self.per_round < 1 or self.steps % self.per_round:
            raise ValueError("steps, per_round: expected whole rounds")


@dataclass
class BestOfConfig:
    """Options of `best_of`: whose best sample per prompt to measure as if it were the only one."""

    evaluation: str

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)


@dataclass
class MakeConfig:
    """Options of `make`: the demo's model and rows at another size, see experiments.make_demo."""

    hidden_size: int
    documents: int
    train_prompts: int = 448
    layers: int = 4
    seed: int = 0

    def validate(self) -> None:
        """Raise ValueError, with the option's name, for an invalid value."""
        check(self)


def _select(config: SelectConfig, folder: Path) -> None:
    rng = np.random.default_rng(config.seed)
    with open(config.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = rng.permutation(len(rows))
    if config.folds is not None:
        here = np.arange(len(rows)) % config.folds == config.fold % config.folds
        # The split is the same for every fold.
        order = np.random.default_rng(0).permutation(len(rows))
        order = order[here if config.keep == "fold" else ~here]
    count = config.rows
    if config.responses is not None:
        count = config.responses // sum((config.take or {}).values())
    chosen = [_choose(rows[i], config, rng) for i in order[:count]]
    write_rows(folder / "rows.jsonl", chosen)


def _choose(row: dict, config: SelectConfig, rng: np.random.Generator) -> dict:
    chosen = {"prompt": row.get("prompt", row.get("query"))}
    lists = [name for name in ("responses", "scores", "sources", "finish_reasons") if name in row]
    room, keep = dict(config.take or {}), []
    for i, text in enumerate(row.get("responses", [])):
        if not text.strip() or text in [row["responses"][j] for j in keep]:
            continue
        if config.take is not None:
            source = row["sources"][i] if "sources" in row else "provided"
            name = next((name for name in room if source.startswith(name)), None)
            if not room.get(name):
                continue
            room[name] -= 1
        keep.append(i)
    chosen |= {name: [row[name][i] for i in keep] for name in lists}
    if config.shuffle:
        order = rng.permutation(len(keep))
        chosen |= {name: [chosen[name][i] for i in order] for name in lists}
    if "scores" in chosen:
        scores = np.array(chosen["scores"]) + config.noise * rng.standard_normal(len(keep))
        step = config.round_to
        chosen["scores"] = (np.round(scores / step) * step if step else scores).tolist()
    return chosen


def _sample(config: SampleConfig, folder: Path) -> None:
    sample(replace(config, output=str(folder / "rows.jsonl"), overwrite=True))


def _score(config: ScoreConfig, folder: Path) -> None:
    score(replace(config, output=str(folder / "rows.jsonl"), overwrite=True))


def _train(config: TrainConfig, folder: Path) -> None:
    output_dir = str(folder / "model")
    result = train(replace(config, output_dir=output_dir, overwrite_output_dir=True))
    assert not (result.interrupted or result.preempted)


def _export(config: ExportConfig, folder: Path) -> None:
    if not (folder / "model" / "model.safetensors").exists():
        export(replace(config, output_dir=str(folder / "model")))


def _iterate(config: IterateConfig, folder: Path) -> None:
    iterate(replace(config, output_dir=str(folder / "rounds")))


def _evaluate(config: Evaluation, folder: Path) -> Measures:
    evaluate(replace(config, output_dir=str(folder / "evaluation")))
    return _read(folder / "evaluation")


def _read(folder: Path) -> Measures:
    """The measures of an evaluation, with hashed prompts."""
    by_prompt = json.loads((folder / "by_prompt.json").read_text())
    with open(folder / "scored.jsonl", encoding="utf-8") as file:
        prompts = [_hash(json.loads(line)["prompt"]) for line in file]
    return {
        name: {"prompts": prompts, **values}
        for name, values in by_prompt.items()
        if len(values["numerators"]) == len(prompts)
    }


def _hash(prompt) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:8]


def _round(config: RoundConfig, folder: Path) -> Measures:
    round_folder = Path(config.iterate, f"round-{config.steps // config.per_round}")
    if config.temperature == 1:
        return _read(round_folder / "evaluation")
    stage = json.loads((Path(config.iterate).parent / "stage.json").read_text())
    run = build_config("iterate", stage["options"])
    model = str(round_folder / "model") if config.steps else run.model_name_or_path
    options = {"model_name_or_path": model, "reference_model_name_or_path": run.model_name_or_path}
    options |= {"data": run.eval_data, "temperature": config.temperature, "output_dir": "."}
    return _evaluate(pass_on(run, Evaluation, **options), folder)


def _best_of(config: BestOfConfig, folder: Path) -> Measures:
    return {"reward": _read(Path(config.evaluation))["best_of_n"]}


def _rank(config: RankConfig, folder: Path) -> Measures:
    rows, _ = load_rows(config.data, on_bad_rows="skip")
    drafts = [Draft(row.prompt, row.responses, None, None, {}, row.where) for row in rows]
    logps_of = LogProbs(config.model_name_or_path, config)(drafts)
    prompts = [_hash(row.prompt) for row in rows]
    counts: dict[str, list[tuple[int, int]]] = {}
    for row, logps in zip(rows, logps_of, strict=True):
        p, scores = np.array([values.mean() for values in logps]), np.array(row.rewards)
        counts.setdefault("ranking_accuracy", []).append(pairs_in_order(p, scores))
        if config.by_source:
            own = np.array(provided_mask(row))
            parts = [pairs_in_order(p[mask], scores[mask]) for mask in (own, ~own)]
            rest = np.subtract(pairs_in_order(p, scores), np.sum(parts, axis=0)).tolist()
            for name, pair in zip(("provided", "sampled", "mixed"), [*parts, rest], strict=True):
                counts.setdefault(f"ranking_{name}", []).append(pair)
    return {
        name: {
            "prompts": prompts,
            "numerators": [correct for correct, _ in pairs],
            "denominators": [total for _, total in pairs],
        }
        for name, pairs in counts.items()
    }


def _make(config: MakeConfig, folder: Path) -> None:
    make(
        folder / "demo",
        seed=config.seed,
        documents=config.documents,
        train_prompts=config.train_prompts,
        hidden_size=config.hidden_size,
        layers=config.layers,
    )


def _dpo(config: PeerConfig, folder: Path) -> None:
    dpo(config, folder / "model")


def _grpo(config: GRPOConfig, folder: Path) -> None:
    grpo(config, folder / "model")


def _rloo(config: GRPOConfig, folder: Path) -> None:
    rloo(config, folder / "model")


def _ppo(config: PPOConfig, folder: Path) -> None:
    ppo(config, folder / "model")


def _task(config: TaskConfig, folder: Path) -> None:
    make_task(config, folder / "task")


def _measure(config: MeasureConfig, folder: Path) -> Measures:
    prompts, measures = measure(config)
    hashes = [_hash(prompt) for prompt in prompts]
    return {name: {"prompts": hashes, **terms} for name, terms in measures.items()}


def _judge(config: ScoreConfig, folder: Path) -> None:
    with judge() as base_url:
        _score(replace(config, base_url=base_url), folder)


@dataclass(frozen=True)
class Kind:
    """A kind of stage: its options, its function, and the output that other stages refer to."""

    config: type
    run: Callable[[object, Path], Measures | None]
    output: str
    # Options that the stage sets itself.
    own: tuple[str, ...] = ()


KINDS = {
    "select": Kind(SelectConfig, _select, "rows.jsonl"),
    "sample": Kind(SampleConfig, _sample, "rows.jsonl", ("output",)),
    "score": Kind(ScoreConfig, _score, "rows.jsonl", ("output",)),
    "train": Kind(TrainConfig, _train, "model", ("output_dir",)),
    "export": Kind(ExportConfig, _export, "model", ("output_dir",)),
    "evaluate": Kind(Evaluation, _evaluate, "evaluation", ("output_dir",)),
    "iterate": Kind(IterateConfig, _iterate, "rounds", ("output_dir",)),
    "round": Kind(RoundConfig, _round, ""),
    "best_of": Kind(BestOfConfig, _best_of, ""),
    "rank": Kind(RankConfig, _rank, ""),
    "make": Kind(MakeConfig, _make, "demo"),
    "dpo": Kind(PeerConfig, _dpo, "model"),
    "grpo": Kind(GRPOConfig, _grpo, "model"),
    "rloo": Kind(GRPOConfig, _rloo, "model"),
    "ppo": Kind(PPOConfig, _ppo, "model"),
    "task": Kind(TaskConfig, _task, "task"),
    "measure": Kind(MeasureConfig, _measure, ""),
    "judge": Kind(ScoreConfig, _judge, "rows.jsonl", ("output", "base_url")),
}
# Kinds that need a further library.
NEEDS = {"dpo": "trl", "grpo": "trl", "rloo": "trl"}


def build_config(kind: str, options: dict):
    """Build and validate a stage's config. Raises ValueError for a mistake."""
    config_class, own = KINDS[kind].config, KINDS[kind].own
    if given := [name for name in own if name in options]:
        raise ValueError(f"{given[0]}: the stage sets it itself")
    check_names(config_class, options, "", dotted=False)
    for option in fields(config_class):
        has_default = option.default is not MISSING or option.default_factory is not MISSING
        if not has_default and option.name not in (*options, *own):
            raise ValueError(f"{option.name}: missing")
    kept = {name: value for name, value in options.items() if name not in REMOVED}
    config = config_class(**kept, **dict.fromkeys(own, "."))
    if hasattr(config, "validate"):
        config.validate()
    return config
