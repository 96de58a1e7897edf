"""The tab that computes the memory of a model."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]


def test_the_calculator_shows_memory_and_cards(visit, url):
    page = visit()
    page.page.get_by_role("tab", name="Footprint").click()
    page.page.locator("#cards tr").first.wait_for()

    def shown() -> SimpleNamespace:
        rows = page.page.locator("#cards tr").all()
        fits = {
            row.locator("td").first.inner_text().split("\n")[0]: "fits" in row.get_attribute("class").split()
            for row in rows
        }
        return SimpleNamespace(total=page.page.locator("#total").inner_text(), fits=fits)

    for size, form, context, count in [("qwen2.5-3b", "bfloat16", 4096, 1), ("qwen2.5-72b", "q4_k_m", 32768, 4)]:
        page.page.get_by_label("Qwen2.5 of").select_option(size)
        page.page.get_by_label("Weights").select_option(form)
        page.page.get_by_label("Context, tokens").fill(str(context))
        page.page.get_by_label("Sequences", exact=True).fill(str(count))
        query = {"size": size, "quantize": form, "context": context, "sequences": count}
        expected = httpx.get(f"{url}/footprint", params=query).json()
        total = f"{expected['bytes']['total'] / 1e9:.2f} GB"
        page.page.get_by_text(total, exact=True).first.wait_for()
        assert shown().fits == {f"{card['memory'] >> 30} GB": card["fits"] for card in expected["cards"]}
    page.page.get_by_label("Context, tokens").fill("99999999")
    page.page.get_by_text("Context, tokens:").wait_for()
    assert page.page.locator("#result").is_hidden()
    page.page.get_by_label("Context, tokens").fill("4096")
    page.page.locator("#result").wait_for()
