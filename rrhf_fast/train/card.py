"""The card of a trained model, README.md in its folder."""

from dataclasses import asdict, fields

from rrhf_fast.model.config import LossConfig
from rrhf_fast.stages.cards import ModelCard, counted, described, shown_options
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.prepare import Run, datasets_of
from rrhf_fast.train.result import TrainResult, compared


def model_card(run: Run, result: TrainResult) -> ModelCard:
    """The card of the model that a run saved."""
    config = run.config
    names = {f.name for f in fields(LossConfig)}
    options, defaults = asdict(config), asdict(TrainConfig())
    sources = [config.train_data] if isinstance(config.train_data, str) else config.train_data or []
    base = config.model_name_or_path
    return ModelCard(
        base=base if ("model", base) in run.nameable else None,
        kind=described(run.model.lm) + ", its weights in 4 bits" * config.load_in_4bit,
        has_adapters=config.use_peft,
        name=config.hub_model_id if config.push_to_hub else None,
        options={
            name: value
            for name, value in shown_options(options, defaults).items()
            if name not in names
        },
        loss={name: value for name, value in options.items() if name in names},
        data=_data(run, sources),
        datasets=[name for name in datasets_of(sources) if ("dataset", name) in run.nameable],
        figures=compared(result),
        state=_state(run, result),
    )


def _state(run: Run, result: TrainResult) -> str:
    took = "stopped early after" if result.interrupted else "took"
    state = f"Training {took} {counted(result.steps, 'step')}."
    if result.stalled:
        state += " It ended since held-out rows showed no more progress (early_stopping_patience)."
    if result.best_step is None:
        return state
    metric = run.config.metric_for_best_model.removeprefix("eval_")
    return f"{state} The model is that of step {result.best_step}, the best by held-out {metric}."


def _data(run: Run, sources: list[str]) -> list[str]:
    counts = run.train.queries.index["num_responses"]
    few, many = int(counts.min()), int(counts.max())
    each = str(few) if few == many else f"{few} to {many}"
    rows, responses = counted(len(counts), "row"), counted(int(counts.sum()), "response")
    lines = [f"{rows} to train on with {responses}, {each} each"]
    if run.held_out is not None:
        lines.append(f"{counted(len(run.held_out.queries), 'row')} held out")
    named = [name for name in datasets_of(sources) if ("dataset", name) in run.nameable]
    has_others = not sources or any(s.split(":")[0] not in named for s in sources)
    others = ["rows that are not public" if named else "local rows"] if has_others else []
    return [*lines, f"from {' and '.join([', '.join(named)] * bool(named) + others)}"]
