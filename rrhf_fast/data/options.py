"""How files of rows are read: options that every command has."""

from dataclasses import dataclass
from typing import Any, Literal

from rrhf_fast.data.columns import Columns, parse_paths


@dataclass
class RowsConfig:
    """How files of rows are read: the same options for every command."""

    on_bad_rows: Literal["error", "skip"] = "error"
    """Stop at the first bad row, or leave out bad responses, and rows with fewer than two good
    ones, and count both by kind."""
    columns: dict[str, str] | str | None = None
    """Where the fields of a row are, for layouts that are not known: JMESPath expressions by field,
    such as {prompt: question, responses: answers[].text, scores: answers[].rating}."""
    group_by: str | None = None
    """Join rows of one response each, {prompt, response, score}, that are equal in this field, such
    as prompt; keeps all rows in memory."""
    apply_chat_template: bool = False
    """Turn string prompts into a user's message, for the chat template."""

    def reading(self) -> dict[str, Any]:
        """These options as arguments of load_rows and load_drafts. Raises ValueError, with the
        option's name, for what cannot work."""
        columns = parse_paths(self.columns)
        Columns(columns)
        if self.group_by is not None and not self.group_by.strip():
            raise ValueError("group_by: expected the name of a field, found nothing")
        return {
            "on_bad_rows": self.on_bad_rows,
            "columns": columns,
            "group_by": self.group_by,
            "apply_chat_template": self.apply_chat_template,
        }


# These options for rows that a stage of our own wrote.
OWN_FORMAT = {"columns": None, "group_by": None, "apply_chat_template": False}
