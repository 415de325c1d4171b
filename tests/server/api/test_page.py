"""The built-in page: whole in the package, under a strict policy, with nothing of another host, and open to all."""

import re

import pytest

from server.api.page import FILES, FOLDER

pytestmark = pytest.mark.anyio


async def test_the_page_and_all_that_it_names_come_without_a_key(connect, make_model):
    async with connect(make_model(), api_key="sesame") as client:
        page = await client.get("/")
        names = set(re.findall(r'(?:src|href)="/web/([^"]+)"', page.text))
        for name in FILES:
            answer = await client.get(f"/web/{name}")
            assert answer.status_code == 200
            names |= set(re.findall(r'from "\./([^"]+)"', answer.text))
        refused = [(await client.get(path)).status_code for path in ("/web/none.js", "/web/..%2fapp.py", "/v1/models")]
        unknown = await client.get("/web/none.js", headers={"authorization": "Bearer sesame"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert names | {"index.html"} == FILES == {file.name for file in FOLDER.iterdir()}
    assert (refused, unknown.status_code) == ([401, 401, 401], 404)


async def test_its_policy_allows_nothing_inline_and_no_other_host(connect, make_model):
    async with connect(make_model()) as client:
        policy = (await client.get("/")).headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert (directives["default-src"], directives["script-src"], directives["style-src"]) == (
        "'none'",
        "'self'",
        "'self'",
    )
    assert "unsafe" not in policy and "http" not in policy
    for name in FILES:
        text = (FOLDER / name).read_text()
        outside = set(re.findall(r"https?://[^\s\"']+", text)) - {"http://www.w3.org/2000/svg"}
        assert not outside, f"{name} names {outside}"
        assert not re.search(r"\bstyle=|\bon[a-z]+=|<script>|innerHTML|localStorage|sessionStorage", text), name
