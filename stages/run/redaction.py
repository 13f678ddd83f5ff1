"""Secrets stay where they were given: what is written to manifests, logs and traceback files passes through here first."""
import os
import re
from typing import Any

STARS = "***"
SECRET_NAMES = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)  # of environment variables
SHORTEST = 8  # a shorter value of such a variable would black out ordinary words
# Userinfo of an address, query arguments that carry keys, authorization headers, and keys known by their form.
PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"), STARS),
    (re.compile(r"([?&](?:access_token|api_?key|key|token|password|secret|sig|signature)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{STARS}"),
    (re.compile(r"(\bBearer\s+)[A-Za-z0-9._~+/=-]{8,}"), rf"\1{STARS}"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"), STARS))


def redacted(text: str) -> str:
    """The text with secrets as ***: by their form, and the values of environment variables named like keys."""
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and SECRET_NAMES.search(name):
            text = text.replace(value, STARS)
    return text


def without_secrets(data: Any) -> Any:
    """`redacted` of every text in lists and mappings."""
    if isinstance(data, str):
        return redacted(data)
    if isinstance(data, dict):
        return {key: without_secrets(value) for key, value in data.items()}
    return [without_secrets(value) for value in data] if isinstance(data, list | tuple) else data
