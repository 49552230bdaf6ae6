"""`reward`: sources told apart by kind, names that differ, length control off by default."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.rewards import FunctionReward, ModelReward, RewardSection

FUNCTION = {"kind": "function", "name": "length", "path": "rewards.py:length"}
MODEL = {"kind": "model", "name": "sentiment", "model": "classifier", "weight": 0.1, "label": 1, "transform": "log_odds"}


def test_the_kind_chooses_the_type():
    section = RewardSection.model_validate({"sources": [FUNCTION, MODEL]})
    assert [type(source) for source in section.sources] == [FunctionReward, ModelReward]
    assert [source.weight for source in section.sources] == [1.0, 0.1]


def test_length_control_is_off_by_default():
    section = RewardSection.model_validate({"sources": [FUNCTION]})
    assert (section.missing_stop.rule, section.soft_overlong.buffer, section.minimum_length.tokens) == ("none", 0, 0)


def test_two_rewards_of_one_name_are_refused_by_name():
    with pytest.raises(ValidationError, match="two rewards are called 'length'; names must differ"):
        RewardSection.model_validate({"sources": [FUNCTION, FUNCTION]})


@pytest.mark.parametrize(
    "source",
    [
        FUNCTION | {"kind": "http"},
        FUNCTION | {"name": "with space"},
        FUNCTION | {"normalise": "yes"},
        FUNCTION | {"clip": 0},
        MODEL | {"label": -1},
        MODEL | {"transform": "softmax"},
        MODEL | {"path": "a key of another kind"},
        {"kind": "function", "name": "no_path"},
    ],
)
def test_a_wrong_source_is_refused(source):
    with pytest.raises(ValidationError, match="sources"):
        RewardSection.model_validate({"sources": [source]})


def test_a_run_without_rewards_is_refused():
    with pytest.raises(ValidationError, match="sources"):
        RewardSection.model_validate({"sources": []})


HTTP = {"kind": "http", "name": "judge", "url": "https://judge.example/score"}


def test_functions_stop_the_run_and_endpoints_are_asked_again_by_default():
    function, http = RewardSection.model_validate({"sources": [FUNCTION, HTTP]}).sources
    assert (function.on_failure, function.retries, function.timeout_s, function.default) == ("raise", 0, 60.0, None)
    assert (http.on_failure, http.retries, http.timeout_s) == ("retry", 3, 60.0)
    assert not function.counts_failures and not http.counts_failures


@pytest.mark.parametrize("source", [FUNCTION, HTTP | {"retries": 0}])
@pytest.mark.parametrize(
    "rules",
    [
        {"on_failure": "raise"},
        {"on_failure": "retry", "retries": 2},
        {"on_failure": "drop_group"},
        {"on_failure": "drop_group", "retries": 1},
        {"on_failure": "default", "default": 0.0},
        {"on_failure": "default", "default": -1.0, "retries": 1},
    ],
)
def test_rules_for_failures_come_back_as_they_were_written(source, rules):
    section = RewardSection.model_validate({"sources": [source | rules]})
    assert RewardSection.model_validate(section.model_dump()) == section
    assert section.sources[0].counts_failures == (rules["on_failure"] in ("drop_group", "default"))


@pytest.mark.parametrize(
    "rules, said",
    [
        ({"retries": 2}, "retries=2 does nothing with on_failure=raise"),
        ({"on_failure": "retry"}, "says nothing without retries"),
        ({"on_failure": "default"}, "needs a value"),
        ({"default": 0.0}, "default=0.0 does nothing with on_failure=raise"),
        ({"on_failure": "drop_group", "default": 1.0}, "does nothing with on_failure=drop_group"),
        ({"on_failure": "default", "default": float("nan")}, "finite"),
        ({"on_failure": "skip"}, "'raise', 'retry', 'drop_group' or 'default'"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"start_timeout_s": -1}, "greater than 0"),
        ({"retries": -1, "on_failure": "drop_group"}, "greater than or equal to 0"),
    ],
)
def test_a_rule_that_does_nothing_or_lacks_something_is_refused(rules, said):
    with pytest.raises(ValidationError, match=said):
        RewardSection.model_validate({"sources": [FUNCTION | rules]})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"url": "ftp://judge.example/"}, "must begin with http"),
        ({"url": "judge.example/score"}, "must begin with http"),
        ({"url": "https://"}, "name a host"),
        ({"url": "https://me:pw@judge.example/"}, "user name or password"),
        ({"url": "https://judge.example/#here"}, "fragment"),
        ({"url": "http://127.0.0.1:80800/"}, "a port is 1 to 65535"),
        ({"url": "http://127.0.0.1:0/"}, "a port is 1 to 65535"),
        ({"url": "http://[::1]:x/"}, "a port is 1 to 65535"),
        ({"url": "http://judge..example/"}, "a part of a host's name 1 to 63 characters"),
        ({"url": f"http://{'a' * 64}.example/"}, "a part of a host's name 1 to 63 characters"),
        ({"url": "http://[::1/"}, "host that cannot be read"),
        ({"url": "http://judge.example/\x01"}, "cannot be printed"),
        ({"url": "http://jud\tge.example/"}, "cannot be printed"),
        ({"url": "http://judge .example/"}, "url holds a space"),
        ({"auth_env": "Bearer abc"}, "match pattern"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"on_failure": "raise"}, "retries=3 does nothing with on_failure=raise"),
        ({"path": "m:f"}, "path"),
    ],
)
def test_a_wrong_endpoint_is_refused(change, said):
    with pytest.raises(ValidationError, match=said):
        RewardSection.model_validate({"sources": [HTTP | change]})


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:65535/", "http://[::1]:8900/score?key=%20a", "https://jüdge.example/ü", "http://reward_server/", "http://a:/"]
)
def test_a_sound_address_is_kept_as_it_was_written(url):
    assert RewardSection.model_validate({"sources": [HTTP | {"url": url}]}).sources[0].url == url


@pytest.mark.parametrize("url", ["https://me:hunter2@judge.example/", "https://me:hunter2@\uff0f.example/", "https://me:hunter2/@judge/"])
def test_a_password_in_a_url_stands_in_no_message(url):
    from rlhf_dist.config.errors import UserError
    from rlhf_dist.config.loading import load_config

    with pytest.raises(UserError) as caught:
        load_config(RewardSection, None, [f"sources=[{{kind: http, name: j, url: '{url}'}}]"])
    assert "hunter2" not in str(caught.value) and ("auth_env" in str(caught.value) or "host" in str(caught.value))
