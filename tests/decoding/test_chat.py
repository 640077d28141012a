"""Conversations: the template's prompt, where turns end, what is remembered."""

from __future__ import annotations

import copy

import pytest

import larosa
from larosa import LarosaError
from larosa.decoding import Conversation, Sampling
from larosa.decoding.chat import conversation, render, special_tokens, turn_ends

#: Words that the tokenizer of the tests has: w4 a system's message, w5 a user's, w6 an answer, </s> the end of each.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w4', 'user': 'w5', 'assistant': 'w6'}[m.role] }} {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w6{% endif %}"
)


@pytest.fixture
def talker(tokenizer):
    twin = copy.deepcopy(tokenizer)
    twin.chat_template = TEMPLATE
    return twin


@pytest.fixture
def model(make_model):
    found = make_model("llama")
    found.generation_config.eos_token_id = None
    return found


def test_a_prompt(talker):
    said = conversation("w9", "w10 w11", {"role": "assistant", "content": "w12"}, "w13")
    assert render(talker, said) == "w4 w9 </s> w5 w10 w11 </s> w6 w12 </s> w5 w13 </s> w6"
    assert render(talker, conversation(None, "w7")) == "w5 w7 </s> w6"


@pytest.mark.parametrize(("end", "ids"), [("</s>", {2}), ("<pad>", {0}), ("w8", set()), ("", set())])
def test_a_turn_ends_with_the_templates_special_token(talker, end, ids):
    talker.chat_template = TEMPLATE.replace("</s>", end)
    assert turn_ends(talker) == ids


def test_an_answer_ends_with_the_turn(model, talker):
    """At the token that the template puts behind answers, whether the checkpoint names it or not."""
    said = conversation(None, "w9")
    talker.chat_template = TEMPLATE.replace("</s>", "<pad>")
    text = render(talker, said)
    free = larosa.generate(model, talker, text, max_new_tokens=12)
    last = talker(free.text.split()[5])["input_ids"][0]
    model.lm_head.weight[0] = 3 * model.lm_head.weight[last]  # so that it is drawn in its place
    assert larosa.generate(model, talker, text, max_new_tokens=12).finish_reason == "length"
    found = larosa.generate(model, talker, said, max_new_tokens=12)
    assert found.finish_reason == "stop"
    assert free.text.startswith(found.text)


def test_the_special_tokens_among_strings(talker):
    assert special_tokens(talker, ["</s>", "w9", "", "<unk>"]) == {2, 3}


def test_messages_are_encoded_without_further_special_tokens(model, talker, make_model):
    """A template has put them there: a tokenizer that adds some to a text adds none to it."""
    from tokenizers.processors import TemplateProcessing

    said = conversation(None, "w9 w10")
    expected = larosa.generate(model, talker, said, max_new_tokens=8)
    talker.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert larosa.generate(model, talker, said, max_new_tokens=8).text == expected.text
    assert expected.prompt_tokens == 5


def test_without_a_template(model, tokenizer):
    for ask in (
        lambda: larosa.generate(model, tokenizer, conversation(None, "w9")),
        lambda: Conversation(model, tokenizer),
    ):
        with pytest.raises(LarosaError, match="the tokenizer has no chat template") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_system_message(model, talker):
    talker.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nmessage') }}{% endif %}" + TEMPLATE
    )
    Conversation(model, talker)
    with pytest.raises(LarosaError, match="does not take this conversation: no system message"):
        Conversation(model, talker, "w9")


def test_a_broken_template(model, talker):
    talker.chat_template = "{% for %}"
    with pytest.raises(LarosaError, match="does not take this conversation") as caught:
        Conversation(model, talker)
    assert "\n" not in str(caught.value)


class TestConversation:
    def test_every_answer_is_that_to_all_that_was_said(self, model, talker):
        talk = Conversation(model, talker, "w4", max_new_tokens=6, sampling=Sampling(1.0, seed=3))
        said = []
        for text in ("w10 w11", "w12", "w13"):
            said += [{"role": "user", "content": text}]
            expected = larosa.generate(
                model, talker, conversation("w4", *said), max_new_tokens=6, temperature=1.0, seed=3
            )
            pieces = []
            assert talk.answer(text, pieces.append).text == expected.text == "".join(pieces)
            said += [{"role": "assistant", "content": expected.text}]

    def test_forgets_all_but_the_system_message(self, model, talker):
        talk = Conversation(model, talker, "w9", max_new_tokens=6)
        first = talk.answer("w10", lambda _: None)
        assert talk.answer("w10", lambda _: None).prompt_tokens > first.prompt_tokens
        talk.clear()
        again = talk.answer("w10", lambda _: None)
        assert (again.text, again.prompt_tokens) == (first.text, first.prompt_tokens)

    def test_keeps_what_an_interrupted_answer_had_said(self, model, talker):
        talk, pieces = Conversation(model, talker, max_new_tokens=20), []

        def interrupt(piece):
            pieces.append(piece)
            if len(pieces) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            talk.answer("w10", interrupt)
        said = conversation(None, "w10", {"role": "assistant", "content": "".join(pieces)}, "w11")
        expected = larosa.generate(model, talker, said, max_new_tokens=20)
        assert talk.answer("w11", lambda _: None).text == expected.text

    def test_ends_an_answer_with_the_context(self, model, talker, words):
        talk = Conversation(model, talker, max_new_tokens=1000)
        result = talk.answer(words(100), lambda _: None)
        assert result.prompt_tokens + result.tokens == 128
        with pytest.raises(LarosaError, match=r"context is 128: /clear"):
            talk.answer("w9", lambda _: None)
        talk.clear()
        assert talk.answer(words(100), lambda _: None).text == result.text

    def test_uses_the_checkpoints_sampling(self, model, talker):
        model.generation_config.update(do_sample=True, temperature=0.8, top_k=7)
        found = Conversation(model, talker, max_new_tokens=12).answer("w10", lambda _: None)
        options = {"temperature": 0.8, "top_k": 7}
        expected = larosa.generate(model, talker, conversation(None, "w10"), max_new_tokens=12, **options)
        assert found.text == expected.text

    @pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": -5}])
    def test_bad_options_at_once(self, model, talker, options):
        with pytest.raises(LarosaError, match="--max-new-tokens"):
            Conversation(model, talker, **options)
