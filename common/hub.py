"""Data sets on the Hugging Face hub: find their files and read them by byte ranges."""

import contextlib
import functools
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from common.cli import say

READ_AHEAD = 8 << 20  # bytes in a request when a file is read from start to end

AHEAD = 2  # requests that a worker begins before it needs their bytes
ahead: dict[tuple[str, int, int], Future] = {}  # by path, begin, stop
downloads = functools.cache(lambda: ThreadPoolExecutor(AHEAD))

moved: dict[str, str] = {}  # address of a file on the hub, and where the hub has sent us


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
        if not self.begin <= self.at < self.begin + len(self.data):
            self.fetch(self.at, self.at + max(len(buffer), READ_AHEAD))
        # fewer bytes than asked for, where they end: a buffer asks for more than its reader needs
        data = self.data[self.at - self.begin : self.at - self.begin + len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def fetch(self, begin: int, stop: int) -> None:
        """Get the bytes from begin to stop in one request; the reads that follow use them."""
        self.begin, self.data = begin, b""
        if begin < (stop := min(stop, self.size)):
            begun = ahead.pop((self.path, begin, stop), None)
            if begun and not begun.exception():
                self.data = begun.result()
            else:
                self.data = retry(lambda: self.request(begin, stop), self.retry_minutes)

    def fetch_ahead(self, begin: int, stop: int) -> None:
        """Begin the request of a later `fetch` in a thread. If it fails, `fetch` makes it again."""
        place = self.path, begin, min(stop, self.size)
        if place not in ahead:
            while len(ahead) > AHEAD:  # of units that another worker got
                ahead.pop(next(iter(ahead)))
            ahead[place] = downloads().submit(self.request, *place[1:])

    def request(self, begin: int, stop: int) -> bytes:
        """Return the bytes from begin to stop. Raises ConnectionError if trying again may help.

        The hub answers with an address on another server, good for some time. The next time that
        server is asked at once: the hub allows only 3,000 requests in five minutes.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.dataset, self.path, repo_type="dataset", revision=self.revision)
        if address := moved.get(url):
            with contextlib.suppress(ConnectionError, ValueError):
                return self.ask(address, {}, begin, stop)[0]
            moved.pop(url, None)
        data, address = self.ask(url, build_hf_headers(), begin, stop)
        if urlsplit(address).hostname != urlsplit(url).hostname:
            if len(moved) > 20:  # files that were read long ago
                moved.clear()
            moved[url] = address
        return data

    def ask(self, url: str, headers: dict[str, str], begin: int, stop: int) -> tuple[bytes, str]:
        """Return the bytes from begin to stop, and the address that sent them."""
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT  # default: 10 s without data
        from huggingface_hub.utils import get_session, hf_raise_for_status

        data, place = b"", f"bytes {begin}-{stop - 1}/"
        # no compression: a range counts the bytes that are sent
        headers = {**headers, "Range": f"bytes={begin}-{stop - 1}", "Accept-Encoding": "identity"}
        stream = functools.partial(get_session().stream, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        with hub_errors(self.dataset), stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            if response.status_code == 206:
                data, sent = response.read(), response.headers.get("Content-Range", place)
                if not sent.startswith(place):
                    raise ConnectionError(f"the hub sent {sent}, not {place} of {self.path}")
            elif response.status_code == 200:  # the whole of a small file, which has no ranges
                data = response.read()[begin:stop]
        if len(data) != stop - begin:
            raise ConnectionError(
                f"the hub sent {len(data)} of {stop - begin} bytes of {self.path}"
            )
        return data, str(response.url)


@contextlib.contextmanager
def hub_errors(dataset: str) -> Iterator[None]:
    """Turn an error of the hub's client into ConnectionError if trying again may help.

    An answer that stays the same (offline, unknown, no access) becomes a ValueError that says what
    to do.
    """
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        hint = "unset it, or name local files with --source"
        raise ValueError(f"HF_HUB_OFFLINE is set, so the hub is not used: {hint}") from None
    except HFValidationError:
        hint = "--dataset is OWNER/NAME, as in allenai/c4"
        raise ValueError(f"{dataset} is not the name of a data set on the hub: {hint}") from None
    except GatedRepoError:
        raise gated(dataset) from None
    except RepositoryNotFoundError:
        hint = "check --dataset, or set HF_TOKEN"
        raise ValueError(f"the hub has no data set {dataset}, or it is private: {hint}") from None
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


def gated(dataset: str) -> ValueError:
    """Return the error for a data set whose owner wants to be asked first."""
    from huggingface_hub.constants import ENDPOINT

    hint = f"ask for access at {ENDPOINT}/datasets/{dataset}, and set HF_TOKEN"
    return ValueError(f"{dataset} is a gated data set: {hint}")


def elsewhere(dataset: str) -> ValueError:
    """Return the error for a data set whose card names files on other servers."""
    hint = "download it, and name the files with --source"
    return ValueError(f"{dataset} has its text on another server than the hub: {hint}")


def find_dataset(dataset: str, name: str | None, split: str) -> tuple[str, list[tuple[str, int]]]:
    """Return a data set's revision, and the path and size in bytes of each file of one split.

    `name` is the configuration of the data set (None: its default). Raises ConnectionError if
    trying again may help, ValueError for what the user has to correct.
    """
    import datasets
    import httpx2
    from huggingface_hub import HfApi, HfFileSystem, get_session, set_client_factory
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    try:
        settings = {"event_hooks": get_session().event_hooks, "follow_redirects": True}
    except ImportError:
        what = "a SOCKS proxy (ALL_PROXY) needs one more package"
        raise ValueError(f"{what}: run pip install socksio, or unset it") from None
    set_client_factory(lambda: httpx2.Client(**settings, timeout=HF_HUB_DOWNLOAD_TIMEOUT))
    datasets.disable_progress_bars()
    with hub_errors(dataset):
        about = HfApi().dataset_info(dataset)
        # the full name: `wikitext` stands for Salesforce/wikitext, or for a local folder
        root = f"hf://datasets/{about.id}@{about.sha}/"
        splits = data_files(dataset, f"hf://datasets/{about.id}", name, about.sha)
        if split not in splits:
            names = ", ".join(splits)
            raise ValueError(f"{dataset} has no {split}: --split is one of {names}")
        urls = [str(url) for url in splits[split]]
        if not all(url.startswith(root) for url in urls):
            raise elsewhere(dataset)
        # `datasets` has just listed these folders, and the client remembers that: so there is no
        # request for each file, and none about more files than the hub allows (1,000)
        tree, sizes = HfFileSystem(endpoint=datasets.config.HF_ENDPOINT), {}
        for folder in {url.rpartition("/")[0] for url in urls}:
            sizes |= {f"hf://{file['name']}": file["size"] for file in tree.ls(folder)}
    return about.sha, [(url.removeprefix(root), sizes[url]) for url in urls]


def data_files(dataset: str, address: str, name: str | None, revision: str) -> dict[str, list[str]]:
    """Return the addresses of the files of each split; ValueError if `datasets` finds none."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        builder = datasets.load_dataset_builder(address, name, revision=revision)
    except ValueError:
        names = datasets.get_dataset_config_names(address, revision=revision)
        default = datasets.get_dataset_default_config_name(address, revision=revision)
        if (name or default) in names:
            raise
        what = f"no configuration {name}" if name else "several configurations"
        raise ValueError(f"{dataset} has {what}: --name is one of {', '.join(names)}") from None
    except ImportError:  # a library for another protocol than the hub's
        raise elsewhere(dataset) from None
    except DatasetNotFoundError:  # the hub knows it, but does not give its files
        raise gated(dataset) from None
    except (DataFilesNotFoundError, EmptyDatasetError):
        what = f"{dataset} has no files of a supported format"
        raise ValueError(f"{what}: choose another --dataset or --name") from None
    except FileNotFoundError as error:  # so `datasets` wraps an answer such as 503
        if "LocalEntryNotFoundError" not in str(error):
            raise
        raise ConnectionError("the hub does not answer") from None
    return builder.config.data_files or {}


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
