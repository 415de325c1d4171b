"""Keys, host names, other sites' pages and limits for each caller."""

import pytest

from server.api.access import Access, CallLimits
from server.api.errors import ApiError
from server.api.gate import MAX_HELD_BYTES, BodyRoom
from server.settings import SettingsError

pytestmark = pytest.mark.anyio

COMPLETION = {"model": "tiny", "prompt": "one", "max_tokens": 20, "temperature": 0}


async def test_each_of_several_keys_opens_every_route_and_no_other_does(connect, make_model, tmp_path):
    (tmp_path / "keys").write_text("# two of them\nsecond\n\n  third\n")
    async with connect(make_model(), api_key=("first",), api_key_file=tmp_path / "keys") as client:
        described = client.app.openapi()["paths"]
        paths = {(method.upper(), path) for path, methods in described.items() for method in methods}
        paths |= {
            ("POST", "/nowhere"),
            ("GET", "/openapi.json"),
            ("GET", "/v1//models"),
            ("GET", "/metrics/"),
            ("GET", "/health/"),
            ("PUT", "/v1/models/x"),
        }
        assert {path for _, path in paths} >= {"/v1/completions", "/v1/models", "/version"}
        for method, path in paths:
            for key in ("", "secon", "# two of them", "First"):
                answer = await client.request(method, path, headers={"authorization": f"Bearer {key}"})
                expected = 401 if path.strip("/") != "health" else 200
                assert answer.status_code == expected, (method, path)
        for headers in ({"authorization": "Bearer first"}, {"x-api-key": "second"}, {"authorization": "Bearer third"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("content", ["", "# none\n\n", "two words\n", "schlüssel\n"])
def test_a_key_file_never_leaves_the_server_open(make_settings, tmp_path, content):
    (tmp_path / "keys").write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"api_key_file .*keys"):
        Access(make_settings(api_key_file=tmp_path / "keys"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200), ("127.0.0.1", 200), ("127.8.9.1:80", 200), ("[::1]:8000", 200), ("LOCALHOST.", 200),
        ("mine.example", 200), ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("evil.example:127", 403),
        ("0.0.0.0", 403), ("", 403), ("[::2]", 403),
    ],
)  # fmt: skip
async def test_on_loopback_the_host_must_be_ours(connect, make_model, host, status):
    async with connect(make_model(), allowed_hosts=("mine.example",)) as client:
        for path in ("/health", "/v1/models"):
            answer = await client.get(path, headers={"host": host})
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"


async def test_where_others_reach_the_server_any_host_is_taken(connect, make_model):
    async with connect(make_model(), host="0.0.0.0") as client:
        assert (await client.get("/health", headers={"host": "my.lan"})).status_code == 200


async def test_other_sites_are_kept_out_unless_they_are_listed(connect, make_model):
    friend, foe = "https://friend.example", "https://foe.example"
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with connect(make_model()) as client:
        answer = await client.get("/health", headers={"origin": friend})
        assert "access-control-allow-origin" not in answer.headers
        assert (await client.options("/v1/completions", headers=ask | {"origin": friend})).status_code == 405
    async with connect(make_model(), cors_origins=(friend,), api_key=("k",)) as client:
        asked = await client.options("/v1/completions", headers=ask | {"origin": friend})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, friend)
        assert "access-control-allow-credentials" not in asked.headers
        assert (await client.options("/v1/completions", headers=ask | {"origin": foe})).status_code == 400
        for origin, status in ((friend, 200), (foe, 403)):
            headers = {"origin": origin, "sec-fetch-site": "cross-site", "authorization": "Bearer k"}
            answer = await client.post("/v1/completions", json=COMPLETION, headers=headers)
            assert answer.status_code == status


async def test_every_answer_says_what_browsers_may_do_with_it(connect, make_model):
    async with connect(make_model()) as client:
        for path in ("/health", "/nowhere", "/v1/completions"):
            headers = (await client.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]


async def test_a_caller_over_its_rate_is_told_when_to_come_back(connect, make_model):
    async with connect(make_model(), rate_limit=2, api_key=("a", "b")) as client:
        one, other = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}
        answers = [await client.get("/v1/models", headers=one) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
        assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        assert (await client.get("/v1/models", headers=other)).status_code == 200
        assert (await client.get("/health", headers=one)).status_code == 200


def test_a_bucket_fills_evenly_and_open_requests_are_counted():
    now = [0.0]
    limits = CallLimits(6, 2, lambda: now[0])

    def taken() -> int:
        count = 0
        try:
            while True:
                with limits.hold("a"):
                    count += 1
        except ApiError:
            return count

    assert taken() == 6
    now[0] += 25
    assert taken() == 2
    now[0] += 1e9
    with limits.hold("a"), limits.hold("a"):
        with pytest.raises(ApiError, match="2 requests of this caller are open"), limits.hold("a"):
            pass
        with limits.hold("b"):
            assert limits.callers["a"].num_open == 2
    assert limits.callers["a"].num_open == 0


def test_callers_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr("server.api.access.MAX_CALLERS", 10)
    limits = CallLimits(1, None, lambda: 0.0)
    for number in range(100):
        with limits.hold(str(number)):
            pass
    assert len(limits.callers) == 10


async def test_bodies_of_all_requests_share_bounded_memory(connect, make_model):
    room = BodyRoom(10)
    room.take(10)
    with pytest.raises(ApiError, match="holds 10 bytes") as full:
        room.take(1)
    assert (full.value.status_code, full.value.headers["Retry-After"]) == (429, "1")
    async with connect(make_model()) as client:
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
        gate = next(each for each in client.app.user_middleware if each.cls.__name__ == "Gate")
        assert gate.kwargs["access"].digests == []
    assert MAX_HELD_BYTES >= 32 * 2**20, "the largest body fits"
