"""The rows of a run in tokens: made once per host, shared by its ranks."""

import socket
from dataclasses import dataclass
from pathlib import Path

import transformers

from rrhf_fast.data.corpus import Corpus
from rrhf_fast.data.fill import Findings, Recipe
from rrhf_fast.data.split import hold_out
from rrhf_fast.stages.token_cache import Entry, open_entry, tokenised
from rrhf_fast.train.config import TrainConfig
from rrhf_fast.train.distributed import World
from rrhf_fast.train.given import Given


@dataclass
class Corpora:
    """Queries in tokens, and what became of the rows."""

    train: Corpus
    held_out: Corpus | None
    findings: Findings
    seconds: float | None  # that tokenising took; None if all was in the cache

    @property
    def sides(self) -> tuple[Corpus, Corpus | None]:
        """The training queries, and the held-out ones if there are any."""
        return self.train, self.held_out


def read_corpora(
    config: TrainConfig,
    given: Given,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
    world: World,
) -> Corpora:
    """Read training rows and held-out rows. All ranks must call.

    Raises:
        ValueError: a source, a row, the tokenizer or the cache cannot be used.
    """
    recipe = Recipe(
        **config.reading(),
        use_responses=config.use_responses,
        stop_strings=config.stop_strings,
        max_length=max_length,
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    names = ["train_dataset", *(["eval_dataset"] if config.eval_data is not None else [])]
    corpora, findings, seconds = [], Findings(), []
    for name in names:
        rows = given.rows(name, config)
        sources = rows if isinstance(rows, list) else [rows]
        corpus, of_rows, took = _once_per_host(sources, tokenizer, recipe, config, world)
        corpora.append(corpus)
        findings.add(of_rows)
        seconds += [] if took is None else [took]
    train, held_out = corpora[0], corpora[1] if len(corpora) > 1 else None
    if config.eval_fraction > 0:
        kept, held = hold_out(train.index["prompt_key"], config.eval_fraction, config.seed)
        train, held_out = train.pick(kept), train.pick(held)
    return Corpora(train, held_out, findings, sum(seconds) if seconds else None)


def _once_per_host(
    sources: list,
    tokenizer: transformers.PreTrainedTokenizerBase,
    recipe: Recipe,
    config: TrainConfig,
    world: World,
) -> tuple[Corpus, Findings, float | None]:
    """The first rank of each host tokenises the rows, or finds them tokenised; all open them."""
    hosts = world.gather(_host())
    first = hosts.index(hosts[world.rank])
    entry: Entry | None = None
    with world.together():
        if first == world.rank:
            options = {"folder": config.data_cache_dir, "num_proc": config.dataset_num_proc}
            entry = tokenised(sources, tokenizer, recipe, **options)
    places = world.gather(None if entry is None else (entry.folder, entry.seconds))
    folder, seconds = places[first]
    with world.together():
        corpus, findings = open_entry(folder)
    if entry is not None:
        entry.close()
    return corpus, findings, seconds


def _host() -> str:
    """A name of this machine, which containers on two machines do not share."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}"
