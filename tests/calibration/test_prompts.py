"""Prompts from chat templates and templates of the user, and what forms no prompt."""

import pytest

from fitprune import load_samples, make_batches
from fitprune.calibration.entry import BadSample
from fitprune.calibration.prompts import chat_prompt, format_prompt
from helpers.questions import QUESTION, assert_same, turn, write


@pytest.mark.parametrize("wrap", [str, lambda template: {"default": template, "other": "x"}])
def test_a_chat_template_at_the_tokenizer_alone_or_of_several_is_used(processor, red, wrap):
    expected = next(make_batches([red], processor))
    template = processor.chat_template
    processor.chat_template = wrap(template)
    assert_same(next(make_batches([red], processor)), expected)
    processor.chat_template, processor.tokenizer.chat_template = None, wrap(template)
    assert_same(next(make_batches([red], processor)), expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; pass prompt_template"),
        ({"tools": "x", "rag": "y"}, "the chat templates are tools, rag: one must be called 'default'"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "at fault: it prints a message's content as a list"),
        ("{{ messages[0].content | tojson }}", "at fault: it prints a message's content as a list"),
        ("{{ messages[0].content[1].text }}", "at fault: it writes no '<image>' where the image is"),
        ("USER: <image> ASSISTANT:", "at fault: it does not write the question; pass prompt_template"),
        ("Answer the question 7319: <image>", "at fault: it does not write the question"),
        ("{% for", "the chat template fails"),
        ("{{ raise_exception('system first') }}", r"the chat template fails \(system first\)"),
    ],
)
def test_a_template_that_forms_no_prompt_is_named_as_such(processor, red, template, message):
    processor.chat_template = processor.tokenizer.chat_template = template
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match=message) as caught:
            next(make_batches([red, red], processor, batch_size=batch_size))
        assert not isinstance(caught.value, BadSample)  # not one sample's fault: nothing is skipped


def test_a_template_may_change_the_question_and_must_write_a_conversations_last_text(processor, red):
    processor.chat_template = "<image>{{ messages[-1].content[1].text | upper | trim }}"
    assert format_prompt(processor, "what? ") == "<image>WHAT?"
    assert len(next(make_batches([red], processor))["input_ids"]) == 1
    processor.chat_template = "<image>{{ messages[0].content[0].text }} question"
    with pytest.raises(ValueError, match="at fault: it does not write the question"):
        chat_prompt(processor, [turn("be short", role="system"), turn(red.image, "what?")])
    assert chat_prompt(processor, [turn("what?")]) == "<image>what? question"


def test_a_question_may_look_like_a_printed_list(processor):
    assert "{'type': 'text'}" in format_prompt(processor, "what is {'type': 'text'}?")


def test_an_image_marker_in_a_question(folder, processor):
    (sample,) = load_samples(write(folder, QUESTION | {"text": "<image>\nWhat?"}))
    assert sample.text == "What?"
    with pytest.raises(ValueError, match="contains the image token '<image>'"):
        format_prompt(processor, "<image> What?")


def test_prompts_come_from_the_chat_template_or_the_one_given(processor):
    prompt = format_prompt(processor, "Is there a 7?")
    assert prompt == "USER: <image>\nIs there a 7? ASSISTANT:"
    assert format_prompt(processor, "a{b}", "<image> {question} !") == "<image> a{b} !"
    with pytest.raises(ValueError, match=r"must contain \{question\}"):
        format_prompt(processor, "x", "USER: <image>")
    with pytest.raises(ValueError, match="no visual token in it; put '<image>'"):
        format_prompt(processor, "x", "USER: {question}")

    class Bare:
        chat_template = None

    with pytest.raises(ValueError, match="no chat template"):
        format_prompt(Bare(), "x")
