"""Drafts of single records, as `load_drafts` makes them."""

from rrhf_fast.data.rows import complete, draft_of


def parse_draft(record, where):
    return draft_of(complete(record, where), record, where)[0]
