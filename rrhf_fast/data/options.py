"""How files of rows are read: options that every command but export has."""

from dataclasses import dataclass
from typing import Any, Literal

from rrhf_fast.data.columns import Columns, parse_paths


@dataclass
class RowsConfig:
    """Reading files of rows"""

    on_bad_rows: Literal["error", "skip"] = "error"
    """error: stop at the first bad row. skip: leave out bad responses, and rows with fewer than two
    good ones, and count both by kind."""
    columns: dict[str, str] | str | None = None
    """Where to find the fields of rows in a layout that is not recognised: JMESPath expressions by
    field, such as {prompt: question, responses: answers[].text, scores: answers[].rating}."""
    group_by: str | None = None
    """Join rows of one response each, {prompt, response, score}, that are equal in this field, such
    as prompt. Keeps all rows in memory."""
    apply_chat_template: bool = False
    """Treat a prompt that is a string as a message of the user, so that it goes through the chat
    template. For instruct models."""

    def reading(self) -> dict[str, Any]:
        """These options as arguments of load_rows and load_drafts. Raises ValueError, with the
        option's name, for columns or a field name that cannot be used."""
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


# These options for rows that another stage wrote.
OWN_FORMAT = {"columns": None, "group_by": None, "apply_chat_template": False}
