"""Keys of endpoints: kept out of messages, rows and logs, whatever an endpoint repeats."""

import logging
import re

_SHOWN = "[key]"
# One pattern per secret of this process: a key may come back from another endpoint than its own.
_patterns: dict[str, re.Pattern] = {}


def keep_secret(secret: str) -> None:
    """Have `hide` take the secret out of every text from now on. Those of less than 8 characters
    belong to local servers, are not secret, and are found in any text."""
    if len(secret) >= 8 and secret not in _patterns:
        _patterns[secret] = re.compile(r"\s*".join(map(_spellings, secret)))


def _spellings(letter: str) -> str:
    """Pattern of a character: as it is, or escaped, also twice, as in JSON, Python, HTML or a
    URL."""
    code = f"(?i:{ord(letter):02x})"
    # At most four backslashes: the search takes quadratic time if there may be any number.
    html = rf"&\#(?:0{{0,5}}{ord(letter)}|[xX]0{{0,5}}{code});"
    return rf"(?:\\{{0,4}}{re.escape(letter)}|%{code}|\\{{1,4}}(?:u00|x){code}|{html})"


def hide(text: str) -> str:
    """The text with each secret replaced by "[key]", also if it is escaped, or broken over lines.

    Apply it before the text is shortened: what is left of a secret would not be found.
    """
    for pattern in tuple(_patterns.values()):
        text = pattern.sub(_SHOWN, text)
    return text


def repeats_secret(text: str) -> bool:
    """Whether the text holds a secret. Words that serve as keys of local servers, such as
    not-needed, may stand in any text: a key has digits, or 16 characters or more."""
    keys = (key for key in _patterns if len(key) >= 16 or any(map(str.isdigit, key)))
    return any(_patterns[key].search(text) for key in keys)


class _Hide(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (hidden := hide(text)) != text:
            record.msg, record.args = hidden, ()
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            record.exc_info, record.exc_text = None, hide(trace)
        return True


def hide_in_logs(*names: str) -> None:
    """Take secrets out of what the loggers of these names record."""
    for name in names:
        logger = logging.getLogger(name)
        if _HIDE not in logger.filters:
            logger.addFilter(_HIDE)


_HIDE = _Hide()
