"""What is looked at: the page, and counts in Prometheus' format."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from megatron_grit.inference.model import GritModel
from megatron_grit.serving.app import create_app
from megatron_grit.serving.metrics import BOUNDS
from megatron_grit.serving.service import Service
from tests.unit.serving.test_server import CHAT, EMBEDDINGS, QUESTION

NAME = 'tiny<b>"'


@pytest.fixture
def client(model: GritModel) -> Iterator[TestClient]:
    with TestClient(create_app(Service(model, NAME)), raise_server_exceptions=False) as client:
        yield client


def series(text: str) -> dict[str, float]:
    """Values by name and labels; the text is of the format, and each family is told of before its values."""
    found: dict[str, float] = {}
    family = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if head := re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) .+", line):
            family = head[2]
            continue
        value = re.fullmatch(r'([a-z_]+)\{((?:[a-z]+="[^"\\\n]*",?)*)\} (\d+(?:\.\d+)?(?:e-\d+)?)', line)
        assert value, line
        assert re.sub("_(bucket|sum|count)$", "", value[1]) == family, line
        assert f"{value[1]}{{{value[2]}}}" not in found
        found[f"{value[1]}{{{value[2]}}}"] = float(value[3])
    return found


def test_metrics_count_what_was_done(client: TestClient) -> None:
    read = client.post(EMBEDDINGS, json={"input": ["a", "b"]}).json()["usage"]["prompt_tokens"]
    chat = client.post(CHAT, json={"messages": [QUESTION], "max_tokens": 3}).json()["usage"]
    client.post(EMBEDDINGS, json={})
    for path in ("/one", "/another", '/with"quotes'):
        client.get(path)
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found, prefix = series(answer.text), "megatron_grit"
    assert found[f'{prefix}_requests_total{{route="{EMBEDDINGS}",status="200"}}'] == 1
    assert found[f'{prefix}_requests_total{{route="{EMBEDDINGS}",status="400"}}'] == 1
    assert found[f'{prefix}_requests_total{{route="other",status="404"}}'] == 3
    assert found[f'{prefix}_tokens_total{{kind="prompt"}}'] == read + chat["prompt_tokens"]
    assert found[f'{prefix}_tokens_total{{kind="generated"}}'] == chat["completion_tokens"] > 0
    buckets = [
        found[f'{prefix}_request_seconds_bucket{{route="{EMBEDDINGS}",le="{end}"}}'] for end in (*BOUNDS, "+Inf")
    ]
    assert buckets == sorted(buckets) and buckets[-1] == 2
    assert found[f'{prefix}_request_seconds_count{{route="{EMBEDDINGS}"}}'] == 2
    assert 0 < found[f'{prefix}_request_seconds_sum{{route="{EMBEDDINGS}"}}'] < 60
    for kind in ("embed", "generate"):
        assert found[f'{prefix}_requests_waiting{{kind="{kind}"}}'] == 0
        assert found[f'{prefix}_requests_running{{kind="{kind}"}}'] == 0
        assert found[f'{prefix}_device_seconds_total{{kind="{kind}"}}'] > 0


def test_the_page_runs_nothing_but_its_own(client: TestClient, model: GritModel) -> None:
    answer = client.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in str(policy)
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    # Nothing is fetched, no handler or style stands in an attribute, and text comes in as text.
    assert not re.search(r"\b(src|href|style|on[a-z]+)\s*=", answer.text.partition("<script>")[0])
    assert not re.search(r"//|innerHTML|{{", answer.text)
    assert "tiny&lt;b&gt;&quot;" in answer.text and NAME not in answer.text
    for path in re.findall(r'"(/v1/[a-z/]+)"', answer.text):
        assert client.post(path, json={}).status_code == 400
    assert "<div hidden>" in answer.text
    with TestClient(create_app(Service(model, NAME), keys=[b"long-enough"])) as other:
        assert "hidden>" not in other.get("/").text
