"""What all tests share. No network, one seed, models of a few thousand weights."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before torch and transformers are imported
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

with warnings.catch_warnings():  # transformers imports hqq where it is installed, which has torch use deprecated parts
    warnings.simplefilter("ignore", DeprecationWarning)
    import transformers.cache_utils  # noqa: F401

if not torch.cuda.is_available():  # before triton is imported: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.browser import Watched, chromium
from tests.tiny import byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


N_THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # here, so that fixtures of all scopes compute the same to the last bit


@pytest.fixture(autouse=True)
def _threads(request):
    """Tiny models gain nothing from a second thread; on a busy CPU it costs ten times the time in waiting."""
    torch.set_num_threads(N_THREADS if request.node.get_closest_marker("embedded") else 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama():
    """A tiny Llama; tests leave it as they found it."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The same with a chat template."""
    return byte_tokenizer(chat=True)


@pytest.fixture(scope="session")
def model_directory(llama, tokenizer, tmp_path_factory):
    """The tiny Llama and its tokenizer, saved as a user would."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")  # while it runs, this thread has an event loop, in which others' asyncio.run would fail
def browser():
    """Headless Chromium."""
    with chromium() as launched:
        yield launched


@pytest.fixture
def chromium_page(browser):
    """Opens tabs: ``chromium_page(**context)``; fails the test if one of them complained."""
    tabs = []

    def open_tab(**context):
        tabs.append(Watched(browser, **context))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.context.close()
    assert [complaint for tab in tabs for complaint in tab.complaints] == []
