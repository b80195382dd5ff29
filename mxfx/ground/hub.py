"""Whether the Hugging Face hub can be reached: its client tries for a minute, aloud, where there is no network.

Nothing bounds those tries (``HF_HUB_ETAG_TIMEOUT`` bounds one), so who wants something of the hub asks here first, and
takes what its cache holds where no connection is made.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

#: Of any client that huggingface_hub was built on: no connection was made. A hub that answers late is reached.
_NO_CONNECTION = {"ConnectError", "ConnectionError", "ConnectTimeout", "ProxyError"}
#: Seconds before a second try, for a network that is just coming up; and for which an answer holds.
_PAUSE, _HOLDS = 1.0, 60.0
#: What was found, and when.
_found: list[tuple[float, str | None]] = []


@contextlib.contextmanager
def reached() -> Iterator[str | None]:
    """Libraries in here look at the hub's cache alone where the hub cannot be reached: gives why, None where it can."""
    from huggingface_hub import constants

    away, before = unreachable(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or away is not None
    try:
        yield away
    finally:
        constants.HF_HUB_OFFLINE = before


def unreachable() -> str | None:
    """Why nothing can come from the hub, as a clause; None where it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps this process from the hub"
    if not _found or time.monotonic() - _found[-1][0] > _HOLDS:
        said = _refused(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
        if said is not None:
            time.sleep(_PAUSE)
            said = _refused(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
        _found[:] = [(time.monotonic(), None if said is None else f"{constants.ENDPOINT} cannot be reached ({said})")]
    return _found[-1][1]


def _refused(url: str, timeout: float) -> str | None:
    """Why no connection is made, through the hub client's own session: with its proxies and certificates."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(url, timeout=timeout)
    except Exception as error:
        if _NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
            return str(error) or type(error).__name__
    return None
