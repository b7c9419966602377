"""Show what the model will see: `--show_tokens` prints rows token by token."""

from rrhf_fast.data.load import load_rows
from rrhf_fast.data.tokenise import TokenisedQuery, tokenise_rows
from rrhf_fast.model.decoder import load_tokenizer, max_positions
from rrhf_fast.model.sharded import empty_model
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.summary import counted, warnings


def shown_rows(config: TrainConfig) -> str:
    """The first `config.show_tokens` training rows as text. Raises the ValueErrors of `train`."""
    rows, report = load_rows(
        config.train_data,
        use_responses=config.use_responses,
        stop_strings=config.stop_strings,
        **config.reading(),
    )
    name, code = config.model_name_or_path, {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(name, **code)
    window = max_positions(empty_model(name, **code)) or config.max_length
    queries, _ = tokenise_rows(
        rows if config.on_bad_rows == "skip" else rows[: config.show_tokens],
        tokenizer,
        report,
        max_length=min(config.max_length, window),
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
        chat_template_kwargs=config.chat_template_kwargs,
        on_bad_rows=config.on_bad_rows,
    )
    shown = [_shown(query, tokenizer) for query in queries[: config.show_tokens]]
    shown += report.lines("train_data")
    prompts = report.warnings()  # which are among the lines
    shown += [f"{name}: {text}" for name, text in warnings(report).items() if name not in prompts]
    if report.unused:
        shown.append(f"unused fields: {counted(report.unused)}")
    return "\n\n".join(shown)


def _shown(query: TokenisedQuery, tokenizer) -> str:
    lines = [f"{query.row.where}: prompt, {len(query.prompt_ids)} tokens, not learned"]
    lines += _indented(tokenizer.decode(query.prompt_ids))
    for i, (ids, score) in enumerate(zip(query.response_ids, query.row.rewards, strict=True)):
        lines.append(f"responses[{i}], score {score:g}, {len(ids)} tokens, learned")
        # Each token is decoded alone; a letter whose bytes span several tokens appears broken.
        lines += _indented("".join(f"[{tokenizer.decode([token])}]" for token in ids))
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    """Indent a text's lines; line ends are made visible."""
    lines = text.replace("\n", "\u23ce\n").split("\n")
    return [f"    {line}" for line in lines if line]
