"""Push what a command made to the Hugging Face hub, by huggingface_hub.

The token is this machine's, HF_TOKEN or what `hf auth login` keeps. It is no option: options are
written to checkpoints, trackers and the history of shells.
"""

import glob
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rrhf_fast.data.checks import one_line, printed
from rrhf_fast.stages.cards import CARD, is_model_card, is_ours
from rrhf_fast.stages.outlet import say
from rrhf_fast.stages.secrets import hide, keep_secret

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo

# What a file of rows is called in its repository.
ROWS = "rows.jsonl"
# Seconds that the hub may take to answer; uploads may take longer as long as they move.
_PATIENCE = 60.0
# Answers that another try later may change.
_PASSING = (408, 429)


class HubFailed(ConnectionError):
    """The hub could not be reached, or did not take what was sent."""

    @property
    def strerror(self) -> str:
        """The message, which commands print whole, as they do the system's."""
        return str(self)


@dataclass(kw_only=True)
class HubConfig:
    """The Hugging Face hub"""

    push_to_hub: bool = False
    """Push the finished model with its card, training.png and metrics.jsonl to the hub. The token,
    of HF_TOKEN or `hf auth login`, is tried before the work begins."""
    hub_model_id: str | None = None
    """Repository to push to: OWNER/NAME, or NAME for one of yours. Default: the name of
    output_dir."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private. Default: no, unless its organisation says otherwise."""

    def repository(self) -> "Repository | None":
        """Where to push, if that was asked for. Raises ValueError for what is no name of a
        repository."""
        if not self.push_to_hub:
            return None
        if self.hub_model_id is not None:
            return Repository(_checked(self.hub_model_id, "hub_model_id"), self.hub_private_repo)
        if self.output_dir is None:
            problem = "missing (or name an output_dir, whose name it takes)"
            raise ValueError(f"hub_model_id: {problem}")
        name = Path(self.output_dir).absolute().name
        try:
            _checked(name, "output_dir")
        except ValueError:
            problem = f"missing (output_dir's {printed(name)} cannot be a repository's name)"
            raise ValueError(f"hub_model_id: {problem}") from None
        return Repository(name, self.hub_private_repo, is_named=False)


@dataclass(kw_only=True)
class DatasetHubConfig:
    """The Hugging Face hub"""

    push_to_hub: bool = False
    """Push the finished rows, with a card, as a dataset to the hub. The token, of HF_TOKEN or `hf
    auth login`, is tried before the work begins."""
    hub_dataset_id: str | None = None
    """Repository to push to: OWNER/NAME, or NAME for one of yours."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private. Default: no, unless its organisation says otherwise."""

    def repository(self) -> "Repository | None":
        """Where to push, if that was asked for. Raises ValueError for what is no name of a
        repository."""
        if not self.push_to_hub:
            return None
        if self.hub_dataset_id is None:
            raise ValueError("hub_dataset_id: missing (the repository to push to)")
        name = _checked(self.hub_dataset_id, "hub_dataset_id")
        return Repository(name, self.hub_private_repo, "dataset")


@dataclass(frozen=True)
class Repository:
    """A repository on the hub: OWNER/NAME, or, before `check`, NAME for one of the token's user."""

    name: str
    private: bool | None = None
    kind: Literal["model", "dataset"] = "model"
    is_named: bool = True  # by the user; else by default

    def check(self) -> "Repository":
        """See whether the token may write to it, and say where the push will go; returns it with
        its full name. Creates nothing.

        Raises:
            ValueError: HF_HUB_OFFLINE is set, the hub refuses the token or the name, or what is
                there is not to be pushed to: public where a private one is wanted, or, under a
                default name, someone's work.
            HubFailed: the hub could not be asked.
        """
        with _asking(self.name) as api:
            user = api.whoami()
            name = self.name if "/" in self.name else f"{user['name']}/{self.name}"
            role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        full = replace(self, name=_checked(name, "push_to_hub"))
        if role == "read":
            raise ValueError(f"push_to_hub: the token may not write to {name} (it is one to read)")
        is_foreign = False
        with _asking(name) as api:
            found = full._find(api)
            if found is not None:
                api.auth_check(name, repo_type=self.kind, write=True)
                is_foreign = not self.is_named and full._holds_others_work(api, found)
        if is_foreign:
            problem = f"{name} is on the hub already, with a {self.kind} that is not of rrhf_fast"
            raise ValueError(f"hub_model_id: missing ({problem}; name the repository to push to)")
        is_private = self.private if found is None else found.private
        full._refuse_public(found)
        say(f"will push to {name} ({'private' if is_private else 'public'})")
        return full

    def create(self) -> None:
        """Create it, unless there is one. Raises as `check` does."""
        with _asking(self.name) as api:
            self._create(api)

    def push(self, folder: Path, files: Sequence[str]) -> None:
        """Upload these files of `folder`, those of a model, with its card, and say where they are;
        what else would change how the repository loads is removed there. A README.md in the
        repository that another program or a person wrote stays.

        Raises:
            HubFailed: the model was not pushed, or only a part; says how to repeat it.
        """
        names = pushed_files(folder, files)
        self._push({name: folder / name for name in names}, partial(self.command, folder))

    def push_rows(self, rows: Path, card: Path | None) -> None:
        """Upload a file of rows and its card, likewise."""
        files = {ROWS: rows} | ({} if card is None else {CARD: card})

        def command(names: Iterable[str]) -> str:
            words = ["hf", "upload", self.name, "--repo-type=dataset", *self._privacy()]
            return " && ".join(shlex.join([*words, str(files[name]), name]) for name in names)

        self._push(files, command)

    def _push(self, files: dict[str, Path], command: Callable[[Iterable[str]], str]) -> None:
        """`files`: by their names in the repository; `command`: what pushes those of some names."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def how() -> str:
            return f"the {self.kind} is saved; push it by: {command(files)}"

        try:
            with _asking(self.name) as api:
                self._create(api)
                found = api.repo_info(self.name, repo_type=self.kind)
                keeps_card = CARD in files and is_ours(files[CARD]) and self._has_other_card(api)
            self._refuse_public(found)
            if keeps_card:
                place = f"{CARD} of {self.name} on the hub"
                say(f"note: {place} was not written by rrhf_fast and stays")
                files = {name: path for name, path in files.items() if name != CARD}
            changes = [CommitOperationAdd(file, path) for file, path in files.items()]
            if self.kind == "model":
                stale = [name for name in _names(found) if name not in files and _is_stale(name)]
                changes += map(CommitOperationDelete, stale)
            with _asking(self.name) as api:
                result = api.create_commit(
                    self.name,
                    changes,
                    repo_type=self.kind,
                    commit_message=f"Upload a {self.kind} made by rrhf_fast",
                )
        except (ValueError, HubFailed) as error:
            raise HubFailed(f"{error}; {how()}") from error
        except KeyboardInterrupt:
            say(f"the push to {self.name} was stopped; {how()}")
            raise
        say(f"pushed to {result.repo_url}")

    def command(self, folder: Path, files: Iterable[str]) -> str:
        """The command line that pushes these files of the folder, and removes what `push` does."""
        from rrhf_fast.model.save import STALE_FILES

        # One pattern for all parts of the weights, and one for all templates.
        names = {re.sub(r"-\d{5}-of-", "-*-of-", glob.escape(file)) for file in files}
        names = {re.sub(r"^(additional_chat_templates)/.*", r"\1/*.jinja", name) for name in names}
        stale = [pattern for pattern in STALE_FILES if pattern not in names]
        words = ["hf", "upload", self.name, str(folder), ".", *self._privacy()]
        words += [f"--include={name}" for name in sorted(names)]
        return shlex.join([*words, *(f"--delete={pattern}" for pattern in stale)])

    def _privacy(self) -> list[str]:
        return ["--private"] if self.private else []

    def _create(self, api: "HfApi") -> None:
        options = {"private": self.private, "repo_type": self.kind, "exist_ok": True}
        api.create_repo(self.name, **options)
        api.auth_check(self.name, repo_type=self.kind, write=True)

    def _find(self, api: "HfApi") -> "ModelInfo | DatasetInfo | None":
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return api.repo_info(self.name, repo_type=self.kind)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:  # of the token
                raise
            return None

    def _refuse_public(self, found: "ModelInfo | DatasetInfo | None") -> None:
        """Raise ValueError if what is to be private is public already."""
        if self.private and found is not None and not found.private:
            how = "make it private on the hub, or choose another"
            raise ValueError(f"hub_private_repo: {self.name} is on the hub, and public ({how})")

    def _holds_others_work(self, api: "HfApi", found: "ModelInfo | DatasetInfo") -> bool:
        names = set(_names(found)) - {".gitattributes"}
        return bool(names) and (CARD not in names or self._has_other_card(api))

    def _has_other_card(self, api: "HfApi") -> bool:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with tempfile.TemporaryDirectory() as cache:
            try:
                file = api.hf_hub_download(self.name, CARD, repo_type=self.kind, cache_dir=cache)
            except RemoteEntryNotFoundError:
                return False
            return not is_ours(Path(file).resolve())


def pushed_files(folder: Path, files: Sequence[str]) -> list[str]:
    """Those of these files that are there, and the folder's card: nothing else of the folder."""
    names = [name for name in files if name != CARD and (folder / name).is_file()]
    return sorted(names) + [CARD] * is_model_card(folder / CARD)


def _names(found: "ModelInfo | DatasetInfo") -> list[str]:
    return [file.rfilename for file in found.siblings or []]


def _is_stale(name: str) -> bool:
    """Whether a file of an earlier push would change what a repository loads as."""
    from rrhf_fast.model.save import STALE_FILES

    depth = name.count("/")
    return any(p.count("/") == depth and fnmatchcase(name, p) for p in STALE_FILES)


def hub_name(name: str, kind: str = "model") -> str | None:
    """The name of a model (or dataset) if it is one of the hub, which the hub's cache shows; None
    for files, folders and what is in memory."""
    from huggingface_hub import constants

    cached = os.path.join(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
    # Unlike Path's, these take what is too long for a name.
    return name if not os.path.exists(name) and os.path.isdir(cached) else None


def public_names(names: Iterable[str | None], kind: str = "model") -> list[str]:
    """Those of the names that anyone may read on the hub, as it says itself; others are nobody
    else's business."""
    from huggingface_hub import HfApi

    found = []
    for name in dict.fromkeys(filter(None, names)):
        try:
            if os.path.exists(_checked(name, "")):
                continue
            with _quiet(), _impatient():
                if HfApi(token=False).repo_info(name, repo_type=kind).private is False:
                    found.append(name)
        except Exception:  # no name, unknown to those without a token, or no answer
            continue
    return found


def public_name(name: str) -> str:
    """A model's name as others may read it: that on the hub if it is public, or none."""
    return name if public_names([name]) else "a model that is not public"


def refuse_local_base(base: str) -> None:
    """Raise ValueError for adapters of a model that others do not have: adapters name their base,
    here a folder of this machine."""
    try:
        _checked(base, "")
    except ValueError:
        is_local = True
    else:
        is_local = os.path.exists(base)
    if is_local:
        how = "name the base by its name on the hub, or push the merged model by "
        how += "rrhf_fast.export --merge true --push_to_hub true"
        raise ValueError(f"push_to_hub: adapters of a local model are of no use elsewhere ({how})")


def _checked(name: str, option: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        expected = "letters, digits, - _ . and at most one /, as in OWNER/NAME"
        raise ValueError(f"{option}: expected {expected}, found {printed(name)}") from None
    return name


@contextmanager
def _asking(name: str) -> Iterator["HfApi"]:
    """An interface to the hub. What goes wrong inside, with the repository `name`, becomes a
    ValueError if it is the user's mistake, else a HubFailed."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from rrhf_fast import __version__

    if constants.is_offline_mode():
        problem = "HF_HUB_OFFLINE is set (unset it, or leave push_to_hub out)"
        raise ValueError(f"push_to_hub: {problem}")
    token = get_token()
    if token is None:
        raise ValueError("push_to_hub: no token (set HF_TOKEN, or log in by: hf auth login)")
    keep_secret(token)
    try:
        with _quiet(), _impatient():
            yield HfApi(token=token, library_name="rrhf_fast", library_version=__version__)
    except HfHubHTTPError as error:
        status, said = error.response.status_code, hide(error.server_message or "")
        said = f" ({one_line(said)})" if said else ""
        if status == 401:
            problem = f"the hub refuses the token{said}; set another HF_TOKEN, or hf auth login"
        elif status == 403:
            problem = f"the token may not write to {name}{said}"
        else:
            problem = f"the hub answers {status} for {name}{said}"
        is_mistake = 400 <= status < 500 and status not in _PASSING
        raise (ValueError if is_mistake else HubFailed)(f"push_to_hub: {problem}") from error
    except Exception as error:  # of the transport, whose types differ between versions
        said = one_line(hide(f"{type(error).__name__}: {error}"))
        raise HubFailed(f"push_to_hub: the hub cannot be used ({said})") from error


@contextmanager
def _impatient() -> Iterator[None]:
    """Inside, huggingface_hub gives up on a hub that takes connections and never answers."""
    from huggingface_hub.utils import _http, set_client_factory

    before = _http._GLOBAL_CLIENT_FACTORY  # the user's, perhaps

    def with_limits():
        client = before()
        client.timeout = _PATIENCE
        return client

    set_client_factory(with_limits)
    try:
        yield
    finally:
        set_client_factory(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, huggingface_hub reports neither retries nor what it thinks of a card, and shows bars
    on terminals only."""
    from huggingface_hub import utils
    from huggingface_hub.utils import logging

    before, had_bars = logging.get_verbosity(), not utils.are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if had_bars:
            utils.enable_progress_bars()
