"""Removal of many objects of a bucket: few requests, and whatever the answers are, all gone or one line."""

import pytest

from data_prep.store import s3 as s3_store
from data_prep.store.store import open_store
from model.common.errors import UserError
from tests.helpers.s3 import Fault

KEYS = [f"old/{number}" for number in range(7)]


@pytest.fixture
def store(s3, proxy, monkeypatch):
    monkeypatch.setenv("LI_DIT_RETRY_SECONDS", "12")  # a stall is then noticed after 1.2 s
    monkeypatch.setattr(s3_store, "PAGE_KEYS", 3)
    store = open_store(s3)
    for key in (*KEYS, "new/0"):
        store.put(key, b"data")
    proxy.requests.clear()
    yield store
    store.close()


def requests(proxy):
    """Return the numbers of requests that remove many objects and one."""
    methods = [method for method, _, _ in proxy.requests]
    return methods.count("POST"), methods.count("DELETE")


def answer(*entries):
    """Return a fault that answers once without asking the endpoint."""
    body = f"<DeleteResult>{''.join(entries)}</DeleteResult>".encode()
    return Fault("answer", "POST", times=1, answer=(200, [("Content-Type", "application/xml")], body))


def test_a_request_removes_a_page_of_objects(store, proxy):
    store.delete_many(KEYS)
    assert requests(proxy) == (3, 0)
    assert list(store.list("")) == ["new/0"]
    # those that are not there are no error, and none is a request
    store.delete_many([*KEYS, "never/there"])
    store.delete_many([])
    assert requests(proxy) == (6, 0)


@pytest.mark.parametrize(
    "do", ["503", "500", "reset", "short", "lose_answer", "flip", "flip_upload", "stall"]
)
def test_faults_are_survived(store, proxy, do):
    proxy.faults = [Fault(do, "POST", times=2)]
    store.delete_many(KEYS)
    assert proxy.faults[0].hits == 2
    assert list(store.list("")) == ["new/0"]


def test_an_endpoint_without_that_request_gets_one_per_object(store, proxy, caplog):
    refusal = b"<Error><Code>NotImplemented</Code><Message>request</Message></Error>"
    proxy.faults = [Fault("answer", "POST", answer=(501, [], refusal))]
    store.delete_many(KEYS)
    assert requests(proxy) == (3, 7)
    assert list(store.list("")) == ["new/0"]
    assert "removing objects one by one" in caplog.text


def test_objects_that_an_answer_leaves_out_are_removed_by_themselves(store, proxy):
    store.delete(KEYS[1])
    key = f"{store._prefix}{KEYS[1]}"
    proxy.faults = [
        answer(f"<Deleted><Key>{key}</Key></Deleted>", "<Error><Code>InternalError</Code></Error>"),
        answer(),
    ]
    proxy.requests.clear()
    store.delete_many(KEYS)
    assert requests(proxy) == (3, 2 + 3)
    assert list(store.list("")) == ["new/0"]


def test_a_refusal_is_one_line(store, proxy):
    refused = f"<Error><Key>{store._prefix}{KEYS[0]}</Key><Code>AccessDenied</Code></Error>"
    for faults in ([Fault("403", "POST")], [answer(refused), Fault("403", "DELETE")]):
        proxy.faults = faults
        with pytest.raises(UserError, match="check the credentials") as error:
            store.delete_many(KEYS)
        assert str(error.value).isprintable()
    proxy.faults = []
    assert len(list(store.list("old/"))) == len(KEYS)
