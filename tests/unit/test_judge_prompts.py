import pytest

from megatron_sip.judge.prompts import PLACEHOLDERS, load_prompt, parse_prompt, prompt_names

GOOD = "version: 1\nplaceholders: prefix\nlabels: 1 2\n\n--- user\nHi $prefix, $$5\n"


@pytest.mark.parametrize("name", prompt_names())
def test_every_prompt_loads_with_known_placeholders(name):
    prompt = load_prompt(name)
    assert prompt.placeholders <= PLACEHOLDERS
    assert prompt.messages[-1][0] == "user"


def test_the_prefix_comes_before_all_other_placeholders():
    for name in prompt_names():
        text = "\n".join(body for _, body in load_prompt(name).messages)
        others = [text.index(f"${p}") for p in load_prompt(name).placeholders - {"prefix", "nonce"}]
        assert text.find("$prefix") < min(others)


def test_a_prompt_has_its_parts():
    prompt = parse_prompt(GOOD + "\n--- answer\nSo (\n", name="x_v1")
    assert prompt.messages == (("user", "Hi $prefix, $$5"),)
    assert (prompt.answer, prompt.labels, prompt.version) == ("So (", ("1", "2"), 1)
    assert prompt.digest != parse_prompt(GOOD, name="x_v1").digest


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("version: 1", "version: 2", "version"),
        ("labels: 1 2\n", "", "header"),
        ("placeholders: prefix", "placeholders:", "declares"),
        ("placeholders: prefix", "placeholders: prefix suffix", "declares"),
        ("$$5", "$5", "lone"),
        ("--- user", "--- judge", "roles"),
        ("--- user", "", "header|roles"),
    ],
)
def test_a_broken_prompt_names_its_rule(old, new, rule):
    with pytest.raises(ValueError, match=rule):
        parse_prompt(GOOD.replace(old, new), name="x_v1")


def test_an_unknown_placeholder_is_an_error():
    with pytest.raises(ValueError, match="must be among"):
        parse_prompt(GOOD.replace("prefix", "secret"), name="x_v1")


def test_an_unknown_prompt_names_those_there_are():
    with pytest.raises(ValueError, match="quality_pairwise_v1"):
        load_prompt("../types")
