import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch import Tensor

from trueward import objectives
from trueward.data.formats import Completion, Prompt
from trueward.evaluate.judges import (
    TEMPLATE,
    ChatJudge,
    JudgeError,
    JudgeReport,
    function_judge,
    parse_verdict,
    reward_judge,
)
from trueward.evaluate.winrate import win_rate
from trueward.posterior import RewardPosterior

SECRET = "sk-very-secret-0123456789"

# --- Rewards and functions ----------------------------------------------------------------------


def lengths(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
    return torch.tensor([float(len(completion)) for completion in completions])


def test_reward_judge_prefers_the_higher_reward_and_halves_ties() -> None:
    verdicts = reward_judge(lengths)(["p"] * 3, ["aa", "a", "b"], ["a", "aaa", "c"])
    assert verdicts.tolist() == [1.0, 0.0, 0.5]


def test_soft_reward_judge_gives_bradley_terry_probabilities() -> None:
    verdicts = reward_judge(lengths, soft=True)(["p"] * 2, ["aaa", "a"], ["a", "b"])
    assert verdicts.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0.5])


def test_reward_judge_compares_the_objective_s_reward() -> None:
    posterior = RewardPosterior(torch.tensor([[5.0, -5.0], [0.0, -1.0]]))
    judge = reward_judge(lambda prompts, completions: posterior, objective=objectives.worst_case)
    assert judge(["p"], ["a"], ["b"]).tolist() == [0.0]
    judge = reward_judge(lambda prompts, completions: posterior)
    assert judge(["p"], ["a"], ["b"]).tolist() == [1.0]


def test_function_judge_calls_the_function_on_each_triple() -> None:
    judge = function_judge(lambda prompt, a, b: {"p": 0.25, "q": True}[prompt])
    assert judge(["q", "p"], ["a", "b"], ["c", "d"]).tolist() == [1.0, 0.25]


def test_function_judge_refuses_what_is_no_probability() -> None:
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\], got .* for pair 1"):
            function_judge(lambda prompt, a, b, bad=bad: bad)(["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="2 prompts, 1 and 1 completions"):
        function_judge(lambda prompt, a, b: 1.0)(["p", "q"], ["a"], ["b"])


# --- Parsing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1", 1.0),
        (" 2\n", 0.0),
        ("tie", 0.5),
        ("Tie.", 0.5),
        ("**1**", 1.0),
        ("__2__", 0.0),
        ('"2"', 0.0),
        ("Response 1", 1.0),
        ("Response 2 is better.", 0.0),
        ("Answer: 2", 0.0),
        ("Verdict: tie", 0.5),
        ("It's a tie.", 0.5),
        ("The better response is 2.", 0.0),
        ("2 is the better response.", 0.0),
        ("First, 2 errs where 1 does not.\nSo:\n\nFinal verdict: [[1]]", 1.0),
        ("", None),
        ("\n", None),
        ("12", None),
        ("1/2", None),
        ("1 or 2", None),
        ("3", None),
        ("1 is worse than 2", None),
        ("1 is worse", None),
        ("2 is not better", None),
        ("I would say 1 of 10", None),
        ("necktie", None),
        ("tied", None),
        ("I cannot judge this.", None),
        ("1\nbut I am not sure", None),
    ],
)
def test_parse_verdict(text: str, verdict: float | None) -> None:
    assert parse_verdict(text) == verdict


# --- A chat endpoint ----------------------------------------------------------------------------


@dataclass
class Endpoint:
    """A chat server on this machine that answers as `reply` says."""

    url: str = ""
    reply: Callable[[int, dict], tuple[int, object]] = lambda count, body: (200, "1")
    headers: dict[str, str] = field(default_factory=dict)  # sent with errors
    requests: list[tuple[str, dict, dict]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0
    most_at_once: int = 0


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append((self.path, dict(self.headers), body))
                count = len(state.requests)
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                status, answer = state.reply(count, body)
            finally:
                with state.lock:
                    state.at_once -= 1
            if status == 0:  # hang up without an answer
                return
            if isinstance(answer, str) and status == 200:
                answer = {
                    "choices": [{"message": {"role": "assistant", "content": answer}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 3},
                }
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in state.headers.items() if status != 200 else ():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()


def judge_of(endpoint: Endpoint, **changes: object) -> ChatJudge:
    settings = {
        "base_url": endpoint.url,
        "model": "tiny",
        "backoff": 0.001,
        "timeout": 10.0,
        "max_concurrency": 1,
    }
    return ChatJudge(**{**settings, **changes})


def shown(body: dict) -> tuple[str, str]:
    """The two completions in the order in which the request shows them."""
    text = body["messages"][0]["content"]
    first = text.split("[Response 1]\n")[1].split("\n[End of response 1]")[0]
    second = text.split("[Response 2]\n")[1].split("\n[End of response 2]")[0]
    return first, second


def prefers_longer(count: int, body: dict) -> tuple[int, str]:
    first, second = map(len, shown(body))
    return 200, "tie" if first == second else "1" if first > second else "2"


def test_both_orders_are_asked_and_agree(endpoint: Endpoint) -> None:
    endpoint.reply = prefers_longer
    judge = judge_of(endpoint)
    verdicts = judge(["p"] * 3, ["long one", "x", "same"], ["short", "longer", "size"])
    assert verdicts.tolist() == [1.0, 0.0, 0.5]
    assert [shown(body) for _, _, body in endpoint.requests] == [
        ("long one", "short"),
        ("short", "long one"),
        ("x", "longer"),
        ("longer", "x"),
        ("same", "size"),
        ("size", "same"),
    ]
    report = judge.report()
    assert (report.pairs, report.calls, report.retries, report.unparsable) == (3, 6, 0, 0)
    assert (report.order_disagreement, report.first_shown_wins) == (0.0, 0.5)


def test_request_is_a_chat_completion(endpoint: Endpoint) -> None:
    judge_of(endpoint, base_url=endpoint.url + "/")(["why?"], ["because"], ["so"])
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 64)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert message["content"] == TEMPLATE.format(
        prompt="why?", completion_1="because", completion_2="so"
    )
    judge_of(endpoint, max_tokens=0, temperature=0.5)(["p"], ["a"], ["b"])
    assert "max_tokens" not in endpoint.requests[-1][2]
    assert endpoint.requests[-1][2]["temperature"] == 0.5


def test_placeholders_inside_texts_are_left_alone(endpoint: Endpoint) -> None:
    judge_of(endpoint)(["{completion_1}"], ["{completion_2} {x}"], ["{prompt}"])
    assert shown(endpoint.requests[0][2]) == ("{completion_2} {x}", "{prompt}")
    assert "[Prompt]\n{completion_1}\n" in endpoint.requests[0][2]["messages"][0]["content"]


def test_turns_of_a_conversation_keep_their_roles(endpoint: Endpoint) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    judge_of(endpoint, template="{prompt}|{completion_1}|{completion_2}")(
        [prompt, [{"role": "user", "content": "Hi"}]],
        ["a", [{"role": "assistant", "content": "b"}]],
        ["c", "d"],
    )
    contents = [body["messages"][0]["content"] for _, _, body in endpoint.requests]
    assert contents[0] == "system: Be brief.\n\nuser: Hi|a|c"
    assert contents[3] == "Hi|d|b"


def test_position_bias_is_cancelled_and_reported(endpoint: Endpoint) -> None:
    endpoint.reply = lambda count, body: (200, "1")  # whatever is shown first
    judge = judge_of(endpoint)
    assert judge(["p"] * 4, list("abcd"), list("efgh")).tolist() == [0.5] * 4
    assert (judge.report().order_disagreement, judge.report().first_shown_wins) == (1.0, 1.0)
    endpoint.reply = lambda count, body: (200, "2")
    second = judge_of(endpoint)
    assert second(["p"], ["a"], ["b"]).tolist() == [0.5]
    assert (second.report().order_disagreement, second.report().first_shown_wins) == (1.0, 0.0)


def test_a_win_in_one_order_and_a_tie_in_the_other_is_three_quarters(endpoint: Endpoint) -> None:
    endpoint.reply = lambda count, body: (200, "1" if shown(body)[0] == "a" else "tie")
    judge = judge_of(endpoint)
    assert judge(["p"], ["a"], ["b"]).tolist() == [0.75]
    assert (judge.report().order_disagreement, judge.report().first_shown_wins) == (1.0, 0.75)


def test_answers_without_a_verdict_count_as_half_and_are_reported(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    # Pair 1: no verdict at all. Pair 2: "2" with b shown first, so a is better in that order.
    endpoint.reply = lambda count, body: (200, "2" if count == 4 else "Both are bananas.")
    judge = judge_of(endpoint)
    assert judge(["p"] * 2, ["a", "a"], ["b", "b"]).tolist() == [0.5, 0.75]
    report = judge.report()
    assert (report.unparsable, report.parsed, report.pairs_parsed_twice) == (3, 1, 0)
    assert report.order_disagreement is None
    assert report.first_shown_wins == 0.0
    assert "3 of 4 answers" in caplog.text


def test_an_answer_without_text_has_no_verdict(endpoint: Endpoint) -> None:
    refusal = {"choices": [{"message": {"role": "assistant", "content": None}}], "usage": None}
    endpoint.reply = lambda count, body: (200, refusal)
    judge = judge_of(endpoint)
    assert judge(["p"], ["a"], ["b"]).tolist() == [0.5]
    assert (judge.report().unparsable, judge.report().calls_without_usage) == (2, 2)


def test_tokens_and_cost_are_summed(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint, price_per_million_input=2.0, price_per_million_output=10.0)
    judge(["p"] * 3, ["a"] * 3, ["b"] * 3)
    report = judge.report()
    assert (report.prompt_tokens, report.completion_tokens) == (600, 18)
    assert report.cost == pytest.approx((600 * 2 + 18 * 10) / 1e6)
    assert report.calls_without_usage == 0
    assert (report + report - report) == report


@pytest.mark.parametrize("status", [408, 429, 500, 503, 0])
def test_failures_that_pass_are_tried_again(endpoint: Endpoint, status: int) -> None:
    endpoint.reply = lambda count, body: (status, {}) if count <= 2 else (200, "1")
    judge = judge_of(endpoint)
    assert judge(["p"], ["a"], ["b"]).tolist() == [0.5]
    assert (judge.report().retries, judge.report().calls) == (2, 2)
    assert len(endpoint.requests) == 4


def test_answers_that_are_no_chat_completion_are_tried_again(endpoint: Endpoint) -> None:
    broken = [b"<html>", {"choices": []}, [], {"choices": [{"message": "1"}]}]
    endpoint.reply = lambda count, body: (200, broken[count - 1] if count <= 4 else "1")
    judge = judge_of(endpoint)
    assert judge(["p"], ["a"], ["b"]).tolist() == [0.5]
    assert judge.report().retries == 4


def test_retries_end(endpoint: Endpoint) -> None:
    endpoint.reply = lambda count, body: (429, {})
    judge = judge_of(endpoint, retries=2)
    with pytest.raises(JudgeError, match=r"failed 3 times, the last time with: HTTP 429\."):
        judge(["p"], ["a"], ["b"])
    assert judge.report().retries in (2, 3, 4)  # the other order may have begun


def test_a_hanging_server_times_out(endpoint: Endpoint) -> None:
    def hang(count: int, body: dict) -> tuple[int, str]:
        if count == 1:
            endpoint.stopping.wait(30)
        return 200, "1"

    endpoint.reply = hang
    judge = judge_of(endpoint, timeout=0.2)
    started = time.monotonic()
    assert judge(["p"], ["a"], ["b"]).tolist() == [0.5]
    assert time.monotonic() - started < 5
    assert judge.report().retries == 1
    endpoint.requests.clear()
    with pytest.raises(JudgeError, match=r"failed 1 times, the last time with: .*timed out"):
        judge_of(endpoint, timeout=0.2, retries=0)(["p"], ["a"], ["b"])


def test_a_server_that_is_not_there_is_named(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint, base_url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1/chat/completions failed 2 times"):
        judge(["p"], ["a"], ["b"])


def test_waits_double_with_jitter_and_heed_the_server(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    endpoint.reply = lambda count, body: (503, {}) if count <= 5 else (200, "1")
    judge_of(endpoint, backoff=1.0, max_backoff=6.0)(["p"], ["a"], ["b"])
    for wait, most in zip(waits, [1, 2, 4, 6, 6], strict=True):
        assert most / 2 <= wait <= most
    assert len({wait / most for wait, most in zip(waits, [1, 2, 4, 6, 6], strict=True)}) == 5
    waits.clear()
    endpoint.headers = {"Retry-After": "3"}
    endpoint.requests.clear()
    judge_of(endpoint, max_backoff=60.0)(["p"], ["a"], ["b"])
    assert waits == [3.0] * 5
    waits.clear()
    endpoint.requests.clear()
    judge_of(endpoint, max_backoff=2.0)(["p"], ["a"], ["b"])
    assert waits == [2.0] * 5


def test_a_refusal_is_one_error_at_once(endpoint: Endpoint) -> None:
    endpoint.reply = lambda count, body: (404, {"error": {"message": "no model tiny"}})
    judge = judge_of(endpoint)
    with pytest.raises(JudgeError, match=r"refused with HTTP 404: .*no model tiny"):
        judge(["p"] * 50, ["a"] * 50, ["b"] * 50)
    assert len(endpoint.requests) < 20  # the rest was not sent
    assert judge.report().retries == 0


def test_key_goes_into_the_header_and_nowhere_else(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    # The server echoes the key, as some do.
    endpoint.reply = lambda count, body: (401, {"error": f"Incorrect API key: {SECRET}"})
    judge = judge_of(endpoint, api_key_env="JUDGE_KEY")
    with pytest.raises(JudgeError, match=r"HTTP 401.*JUDGE_KEY") as caught:
        judge(["p"], ["a"], ["b"])
    assert endpoint.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    error = caught.value
    assert error.__cause__ is None
    assert error.__suppress_context__
    for text in (str(error), repr(error), repr(judge), str(vars(judge)), caplog.text):
        assert SECRET not in text
    assert all(SECRET not in json.dumps(body) for _, _, body in endpoint.requests)


def test_without_a_key_no_header_is_sent(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_of(endpoint)(["p"], ["a"], ["b"])
    assert "Authorization" not in endpoint.requests[0][1]
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    judge_of(endpoint)(["p"], ["a"], ["b"])
    assert endpoint.requests[-1][1]["Authorization"] == f"Bearer {SECRET}"


def test_a_key_that_is_no_header_is_refused_without_showing_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX: y")
    with pytest.raises(JudgeError, match="OPENAI_API_KEY holds characters") as caught:
        judge_of(endpoint)(["p"], ["a"], ["b"])
    assert SECRET not in str(caught.value)
    assert endpoint.requests == []


def test_redirects_are_not_followed(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    endpoint.headers = {"Location": endpoint.url + "/elsewhere"}
    endpoint.reply = lambda count, body: (302, {})
    with pytest.raises(JudgeError, match=r"HTTP 302 .*redirects are not followed"):
        judge_of(endpoint)(["p"], ["a"], ["b"])
    assert {path for path, _, _ in endpoint.requests} == {"/v1/chat/completions"}


def test_concurrent_requests_are_limited_and_keep_their_order(endpoint: Endpoint) -> None:
    def slow(count: int, body: dict) -> tuple[int, str]:
        time.sleep(0.02)
        return prefers_longer(count, body)

    endpoint.reply = slow
    judge = judge_of(endpoint, max_concurrency=4)
    ones = ["x" * (i % 3 + 1) for i in range(20)]
    twos = ["xx"] * 20
    verdicts = judge(["p"] * 20, ones, twos)
    assert verdicts.tolist() == [[0.0, 0.5, 1.0][i % 3] for i in range(20)]
    assert 2 <= endpoint.most_at_once <= 4
    assert judge.report().calls == 40
    counts = Counter(shown(body) for _, _, body in endpoint.requests)
    assert counts == Counter([*zip(ones, twos, strict=True), *zip(twos, ones, strict=True)])


def test_win_rate_passes_the_report_of_its_pairs_on(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint)
    win_rate(judge, ["p"], ["a"], ["b"])
    endpoint.reply = prefers_longer
    result = win_rate(judge, ["p"] * 2, ["long", "longer"], ["x", "y"])
    assert result.win_rate == 1.0
    assert result.position_bias is not None
    assert (result.position_bias.pairs, result.position_bias.calls) == (2, 4)
    assert result.position_bias.order_disagreement == 0.0
    assert judge.report().order_disagreement == pytest.approx(1 / 3)


def test_an_unasked_judge_reports_nothing() -> None:
    report = ChatJudge(base_url="https://host/v1", model="m").report()
    assert report == JudgeReport()
    assert report.order_disagreement is None
    assert report.first_shown_wins is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "host/v1"}, "must begin with http"),
        ({"base_url": "file:///etc"}, "must begin with http"),
        ({"base_url": "http:// host"}, "white space"),
        ({"template": "{prompt} {completion_1}"}, r"must contain \{completion_2\}"),
        ({"timeout": 0.0}, "timeout must be positive"),
        ({"max_concurrency": 0}, "max_concurrency must be positive"),
        ({"retries": -1}, "retries must not be negative"),
        ({"backoff": -1.0}, "backoff must not be negative"),
        ({"max_tokens": -1}, "max_tokens must not be negative"),
    ],
)
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatJudge(**{"base_url": "http://host/v1", "model": "m", **change})


def test_a_key_in_the_url_is_refused_without_showing_it() -> None:
    for url in (f"https://user:{SECRET}@host/v1", f"https://host/v1?key={SECRET}"):
        with pytest.raises(ValueError, match="no user name, password or query") as caught:
            ChatJudge(base_url=url, model="m")
        assert SECRET not in str(caught.value)
