"""A message of the user is cut where it should be, whatever the chat template; templates that cannot be are refused."""

import pytest

from kvpress_moe.benchmark.prompts import encode
from kvpress_moe.benchmark.tasks.sample import Sample
from kvpress_moe.errors import UnsupportedModelError
from kvpress_moe.model.chat_template import cut_message
from kvpress_moe.training.sampling import request_ids
from tests.tiny import byte_tokenizer

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
TRIMMED = PLAIN.replace("m.content", "m.content | trim")
TWICE = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")
UPPER = PLAIN.replace("m.content", "m.content | upper")
NEVER = "{{ messages[0].role }}"
FAILS = "{{ raise_exception('no') }}"
WRONG = "{{ 1 / 0 }}"
NAMED = {"tool_use": PLAIN}  # several templates, and none of them is the default


def with_template(template):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("row", ["", "#" * 40, "\n" + "#" * 40 + "\n"])
def test_the_cut_is_between_both_parts(row):
    before, after = f"x = 1\n{row}\ny = 2\n", f"\nWhat is y?{row}"
    assert cut_message(with_template(PLAIN), before, after) == (f"<user>{before}", f"{after}</user><assistant>")


def test_white_space_that_a_template_removes_is_no_error():
    assert cut_message(with_template(TRIMMED), "  a\n", "\nb ") == ("<user>a\n", "\nb</user><assistant>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (TWICE, "2 times"),
        (NEVER, "0 times"),
        (UPPER, "times|changes"),
        (FAILS, "fails for one message"),
        (WRONG, "ZeroDivisionError"),
        (NAMED, "fails"),
    ],
)
def test_templates_that_change_the_message_are_refused(template, says):
    with pytest.raises(UnsupportedModelError, match=says):
        cut_message(with_template(template), "Some text", "and more")
    with pytest.raises(UnsupportedModelError, match=says):
        request_ids(with_template(template), "Write")


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
@pytest.mark.parametrize("context", ["A row.", "<user>", " <user>", "  indented\n" + "#" * 40 + "\ncode"])
def test_the_prefix_is_what_comes_before_the_context(template, context):
    tokenizer = with_template(template)
    prompt = encode(Sample("t", "test", 9, 0, context, "Who?", "", " I", (), "tokens"), tokenizer)
    text = tokenizer.decode(prompt.context[0])
    assert tokenizer.decode(prompt.context[0, : prompt.n_prefix]) == "<user>"
    assert text.endswith(context.lstrip() + "\n")
