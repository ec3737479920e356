"""The playground in a real browser: headless Chromium, driven by ChromeDriver."""

from __future__ import annotations

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from bitstrata.nn import bits_state
from bitstrata.plans import Plan

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="Chromium and ChromeDriver are not installed (Debian: chromium, chromium-driver)",
    ),
]

FLAGS = [
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "window-size=1100,900"),
]
PROMPT = "<|endoftext|>class Node: # <b>&amp;</b>\n"  # markup must show as the text that it is
SECONDS = 30
TOKENS = 24


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page, ready; afterwards the browser must have nothing to complain about."""
    open_page(browser, server.url)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture
def written(alone, tokenizer):
    """written(bits) -> the texts of the tokens that the model by itself continues PROMPT with."""
    return lambda bits: [tokenizer.decode([token]) for token in alone(PROMPT, bits, TOKENS)]


def open_page(browser, address):
    browser.get(address)
    wait(browser, lambda: find(browser, "#run").is_enabled() or texts(browser, "#agreement.error"))


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def wait(browser, condition):
    WebDriverWait(browser, SECONDS, poll_frequency=0.05).until(lambda _: condition())


def fill(browser, selector, value):
    field = find(browser, selector)
    field.clear()
    field.send_keys(value)


def ask(browser, tokens=TOKENS):
    fill(browser, "#prompt", PROMPT)
    fill(browser, "#tokens", str(tokens))
    find(browser, "#run").click()


def finished(browser):
    wait(browser, lambda: find(browser, "#agreement").text and not find(browser, "#stop").is_enabled())


def answer(browser, side):
    """The new text of a side, as it is and not as it is laid out."""
    return texts(browser, f"#{side} .answer span:not(.prompt)")


def texts(browser, selector):
    """In one step: the page replaces its elements while it streams."""
    script = "return [...document.querySelectorAll(arguments[0])].map((item) => item.textContent).join('')"
    return browser.execute_script(script, selector)


@pytest.mark.parametrize("together", [False, True])
def test_two_precisions_answer_side_by_side(page, server, written, together):
    if together:
        find(page, "#together").click()
    ask(page)
    finished(page)
    low, high = written(2), written(4)
    assert answer(page, "left") == "".join(low)
    assert answer(page, "right") == "".join(high)
    assert texts(page, "#left .prompt") == PROMPT
    most = min(len(low), len(high))
    same = next((at for at in range(most) if low[at] != high[at]), most)
    assert 0 < same < TOKENS, "the precisions must differ somewhere for this test to see it"
    assert f"The first {same} of {max(len(low), len(high))} tokens agree" in find(page, "#agreement").text
    for side, tokens in (("left", low), ("right", high)):
        assert texts(page, f"#{side} .differs") == "".join(tokens[same:])
        assert find(page, f"#{side} .count").text == str(len(tokens))
        assert float(find(page, f"#{side} .speed").text) > 0
    cards = {card["id"].rpartition(":")[2]: card for card in server.get("/v1/models").json["data"]}
    for side, bits, tokens in (("left", "2", low), ("right", "4", high)):
        expected = cards[bits]["bytes_per_token"] * len(tokens)
        assert read_bytes(find(page, f"#{side} .bytes").text) == pytest.approx(expected, rel=0.01)
    wait(page, lambda: "places" in find(page, "#agreement").text)
    before = server.post("/tokenize", {"prompt": PROMPT}).json["tokens"]
    after = server.post("/tokenize", {"prompt": "".join(high), "add_special_tokens": False}).json["tokens"]
    body = {"prompt": before + after, "max_tokens": 0, "echo": True, "logprobs": 1}
    likeliest = []
    for bits in (2, 4):
        found = server.post("/v1/completions", {**body, "bits": bits}).json["choices"][0]["logprobs"]["top_logprobs"]
        likeliest.append([max(one, key=one.get) for one in found[len(before) :]])
    alike = sum(one == other for one, other in zip(*likeliest, strict=True))
    assert same < alike < len(after)
    assert f"likeliest at {alike} of {len(after)} places" in find(page, "#agreement").text


def read_bytes(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_a_moved_slider_answers_again(page, written):
    ask(page)
    finished(page)
    slider = find(page, "#left .slider")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert find(page, "#left .bits").text == "3 bits"
    expected = "".join(written(3))
    wait(page, lambda: answer(page, "left") == expected)
    finished(page)
    slider.send_keys(Keys.END)  # now both at the highest
    wait(page, lambda: find(page, "#agreement").text.startswith(f"All {len(written(4))} tokens agree."))
    assert answer(page, "left") == answer(page, "right") == "".join(written(4))


def test_a_slider_moved_on_the_way_leaves_one_after_the_other(page):
    ask(page, tokens=900)
    wait(page, lambda: len(answer(page, "left")) > 10)
    find(page, "#left .slider").send_keys(Keys.ARROW_RIGHT)
    wait(page, lambda: len(answer(page, "left")) < 10)
    wait(page, lambda: len(answer(page, "left")) > 40)
    assert answer(page, "right") == "", "the right side still waits for the left one"
    find(page, "#stop").click()


def test_plans_are_on_the_sliders(browser, serving, model):
    layers = bits_state(model).layers
    plan = Plan({layer: 3 if "mlp" in layer else 2 for layer in layers}, name="thrifty")
    with serving(plans={"thrifty": plan}) as server:
        open_page(browser, server.url)
        find(browser, "#left .slider").send_keys(Keys.ARROW_RIGHT)  # between 2 and 3 bits
        assert find(browser, "#left .bits").text == "thrifty"
        ask(browser, tokens=4)
        finished(browser)
        body = {"prompt": PROMPT, "model": "small:thrifty", "max_tokens": 4, "temperature": 0}
        assert answer(browser, "left") == server.post("/v1/completions", body).json["choices"][0]["text"]


@pytest.mark.parametrize(("bias", "said"), [("\n", "Nothing but white space."), ("<|endoftext|>", "An empty answer.")])
def test_an_answer_that_shows_nothing_is_said(page, tokenizer, bias, said):
    """The page asks as always; what it sends is changed on its way, so that the model cannot but say this."""
    (token,) = tokenizer.encode(bias)
    page.execute_script(
        """
        const send = window.fetch, token = arguments[0];
        window.fetch = (path, options) => {
          if (!String(path).endsWith("completions")) return send(path, options);
          const body = { ...JSON.parse(options.body), logit_bias: { [token]: 100 } };
          return send(path, { ...options, body: JSON.stringify(body) });
        };
        """,
        token,
    )
    ask(page, tokens=4)
    finished(page)
    for side in ("left", "right"):
        assert texts(page, f"#{side} .remark") == said


def test_it_fits_a_phone(page):
    page.set_window_size(500, 800)  # Chromium makes no window narrower than this
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        ask(page)
        finished(page)
        wide = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1] == 320
        left, right = (find(page, f"#{side}").rect for side in ("left", "right"))
        assert right["y"] > left["y"] + left["height"] - 1, "one below the other"
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.set_window_size(1100, 900)


def test_stop_ends_both(page):
    ask(page, tokens=900)
    wait(page, lambda: len(answer(page, "left")) > 10)
    find(page, "#stop").click()
    wait(page, lambda: not find(page, "#stop").is_enabled())
    before = answer(page, "left"), answer(page, "right")
    assert before[1] == "", "the right side waits for the left one"
    ask(page, tokens=4)
    finished(page)
    assert answer(page, "right")
    assert len(answer(page, "left")) < len(before[0])


def test_what_the_server_refuses_is_shown(browser, server):
    open_page(browser, server.url)
    browser.execute_script("document.querySelector('#prompt').value = 'word '.repeat(20000)")
    find(browser, "#run").click()
    wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".answer .error")) == 2)
    assert "leaves no room in the model's context" in find(browser, "#left .error").text
    browser.get_log("browser")  # the refusals


def test_nothing_comes_from_elsewhere(page, server):
    ask(page, tokens=4)
    finished(page)
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded, "the page has asked for something"
    assert all(name.startswith(server.url) for name in loaded), loaded


def test_a_model_with_a_chat_template_is_asked_as_a_chat(browser, chat_server):
    open_page(browser, chat_server.url)
    ask(browser)
    finished(browser)
    body = {"messages": [{"role": "user", "content": PROMPT}], "bits": 2, "max_tokens": TOKENS, "temperature": 0}
    reply = chat_server.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert answer(browser, "left") == reply != ""
    assert texts(browser, "#left .prompt") == "", "an answer to a message does not go on where that ends"


def test_a_key_is_asked_for(browser, serving):
    with serving(api_key="open sesame") as locked:
        open_page(browser, locked.url)
        assert "key" in find(browser, "#agreement").text.lower()
        assert not find(browser, "#run").is_enabled()
        fill(browser, "#key", "open sesame" + Keys.TAB)
        wait(browser, lambda: find(browser, "#run").is_enabled())
        ask(browser, tokens=4)
        finished(browser)
        assert answer(browser, "right")
    browser.get_log("browser")  # the 401
