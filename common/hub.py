"""Data sets on the Hugging Face hub: find their files and read them by byte ranges."""

import contextlib
import functools
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from common.cli import say

READ_AHEAD = 8 << 20  # bytes in a request when a file is read from start to end


class HubFile(io.RawIOBase):
    """A file on the hub, read by byte ranges: nothing is kept on disk."""

    def __init__(self, dataset: str, revision: str, path: str, size: int, retry_minutes: float):
        self.dataset, self.revision, self.path, self.size = dataset, revision, path, size
        self.retry_minutes = retry_minutes
        self.at = 0  # position of the next read
        self.begin, self.data = 0, b""  # the last bytes fetched, and where they start

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        stop = min(self.size, self.at + len(buffer))
        if not self.begin <= self.at <= stop <= self.begin + len(self.data):
            self.fetch(self.at, max(stop, self.at + READ_AHEAD))
        data = self.data[self.at - self.begin : stop - self.begin]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def fetch(self, begin: int, stop: int) -> None:
        """Get the bytes from begin to stop in one request; the reads that follow use them."""
        self.begin, self.data = begin, b""
        if begin < (stop := min(stop, self.size)):
            self.data = retry(lambda: self.request(begin, stop), self.retry_minutes)

    def request(self, begin: int, stop: int) -> bytes:
        """Return the bytes from begin to stop. Raises ConnectionError if trying again may help."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT  # default: 10 s without data
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        data = b""
        url = hf_hub_url(self.dataset, self.path, repo_type="dataset", revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{stop - 1}"}
        stream = functools.partial(get_session().stream, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        with hub_errors(), stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            if response.status_code == 206:
                data = response.read()
        if len(data) != stop - begin:
            raise ConnectionError(
                f"the hub sent {len(data)} of {stop - begin} bytes of {self.path}"
            )
        return data


@contextlib.contextmanager
def hub_errors() -> Iterator[None]:
    """Turn an error of the hub's client into ConnectionError if trying again may help.

    An answer that stays the same (offline, unknown, no access) becomes a ValueError that says what
    to do.
    """
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        hint = "unset it, or name local files with --source"
        raise ValueError(f"HF_HUB_OFFLINE is set, so the hub is not used: {hint}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            raise ConnectionError(f"the hub answers {status}") from None
        raise ValueError(f"{error}: check --dataset, or set HF_TOKEN") from None
    except RuntimeError as error:  # the data set is a Python script, which `datasets` refuses
        raise ValueError(f"{error}: choose another --dataset") from None
    except (httpx2.TransportError, LocalEntryNotFoundError, json.JSONDecodeError) as error:
        what = str(error) or type(error).__name__
        raise ConnectionError(f"the hub does not answer ({what})") from None


def find_dataset(dataset: str, name: str | None, split: str) -> tuple[str, list[tuple[str, int]]]:
    """Return a data set's revision, and the path and size in bytes of each file of one split.

    `name` is the configuration of the data set (None: its default).
    """
    import datasets
    import httpx2
    from huggingface_hub import HfApi, get_session, set_client_factory
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    settings = {"event_hooks": get_session().event_hooks, "follow_redirects": True}
    set_client_factory(lambda: httpx2.Client(**settings, timeout=HF_HUB_DOWNLOAD_TIMEOUT))
    datasets.disable_progress_bars()
    with hub_errors():
        revision = HfApi().dataset_info(dataset).sha
        builder = datasets.load_dataset_builder(dataset, name, revision=revision)
        splits = builder.config.data_files or {}
        if split not in splits:
            names = ", ".join(splits)
            raise ValueError(f"{dataset} has no {split}: --split is one of {names}")
        paths = [str(url).split(f"@{revision}/", 1)[1] for url in splits[split]]
        files = HfApi().get_paths_info(dataset, paths, revision=revision, repo_type="dataset")
    sizes = {file.path: file.size for file in files}
    return revision, [(path, sizes[path]) for path in paths]


def retry(call: Callable[[], Any], minutes: float) -> Any:
    """Return call(); while it raises ConnectionError or TimeoutError, call it again.

    The pauses grow from 0.5 s to 60 s. After `minutes` it raises ConnectionError.
    """
    give_up, pause = None, 0.5
    while True:
        try:
            return call()
        except (ConnectionError, TimeoutError) as error:
            if not minutes:
                raise
            give_up = give_up or time.monotonic() + 60 * minutes
            if (left := give_up - time.monotonic()) < pause:
                raise ConnectionError(f"{error}, tried for {minutes:g} minutes") from None
            say(f"{error}: trying again in {pause:g} s, for {left / 60:.0f} minutes more")
            time.sleep(pause)
            pause = min(60, 2 * pause)
