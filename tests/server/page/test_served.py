"""What the server sends to a browser: the page with its policy, and the numbers of the calculator."""

from __future__ import annotations

import re

import httpx
import pytest
from support.servers import serving

from qwenkern.config import FAMILY
from qwenkern.footprint.cards import CARDS
from qwenkern.footprint.case import case_of
from qwenkern.server.settings import Settings

pytestmark = pytest.mark.xdist_group("browser")


def test_nothing_but_the_page_may_run(url):
    found = httpx.get(url)
    policy = dict(part.split(" ", 1) for part in found.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert found.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"(src|href)=[\"'](?!#|data:)|@import|url\(|innerHTML|eval\(", found.text)


def test_a_browser_that_has_the_page_is_told_so(url):
    tag = httpx.get(url).headers["etag"]
    again = httpx.get(url, headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(url, headers={"If-None-Match": '"another"'}).status_code == 200


def test_the_footprint_is_that_of_the_command_line(url):
    found = httpx.get(f"{url}/footprint?size=qwen2.5-7b&quantize=int4&context=32768&sequences=2").json()
    case = case_of(FAMILY["qwen2.5-7b"], "cuda", quantize="int4", context=32768, sequences=2)
    assert {**found, "choices": None} == {**case.described("qwen2.5-7b", CARDS), "choices": None}
    assert [each["name"] for each in found["choices"]["size"]] == list(FAMILY)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("size=/etc/passwd", "size is '/etc/passwd'; expected one of qwen2.5-0.5b"),
        ("context=0", "context is 0; expected a whole number from 1 to 32768"),
        ("context=1e3", "context is '1e3'; expected a whole number"),
        ("sequences=99999999", "sequences is 99999999"),
        ("colour=red", "query has 'colour'"),
    ],
)
def test_what_the_footprint_does_not_know_is_refused(url, query, message):
    found = httpx.get(f"{url}/footprint?{query}")
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


def test_the_page_needs_no_key_and_its_figures_do(model):
    with serving(model, Settings(api_keys=("secret",))) as url:
        assert httpx.get(url).status_code == 200
        assert httpx.get(f"{url}/footprint").status_code == 401
