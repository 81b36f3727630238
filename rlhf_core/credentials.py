"""No credential in a store's URL, and none in a message.

Credentials come from the environment, a profile or the machine's role. What a storage client says in an error may repeat them
or what is derived from them (access key ids, signatures, session tokens), so every message of the store passes `scrub`.
"""

import os
import re

from rlhf_core.errors import ConfigError

VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY_ID")
SHORTEST = 4  # a shorter value is no secret, and to remove it would garble words
KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")
FIELD = re.compile(
    r"((?:Credential|Signature|AWSAccessKeyId|Security-Token|SecretAccessKey|SessionToken)['\"]?\s*[=:]\s*['\"]?)[^&\s,'\"<>]+",
    re.IGNORECASE,
)
USER_INFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]*@", re.IGNORECASE)
REMOVED = "(removed)"


def scrub(text: str) -> str:
    """The text without credentials: those of the environment, key ids of AWS, signatures, user parts of URLs."""
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, f"({name})")
    return USER_INFO.sub(rf"\1{REMOVED}@", KEY_ID.sub(REMOVED, FIELD.sub(rf"\1{REMOVED}", text)))


def refuse_credentials(url: str) -> None:
    """ConfigError, which does not repeat them, if a store's URL holds credentials."""
    scheme, separator, rest = url.partition("://")
    place = rest.partition("/")[0]
    # A secret may contain "/", so that the "@" comes later; only an ARN may have a colon in a bucket's place.
    if separator and scheme not in ("file", "memory") and ("@" in place or (":" in place and place[:4] != "arn:")):
        raise ConfigError(
            f"store: the {scheme}:// URL holds credentials, which would be written into records and logs; give "
            f"{scheme}://bucket/prefix alone, and the credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
            "environment, by a profile or by the machine's role"
        )
