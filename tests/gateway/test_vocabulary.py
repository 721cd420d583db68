"""What is kept of the texts of tokens."""

from dataclasses import replace

from gateway.vocabulary import Vocabulary
from tests.support.fake_inference import KINDS, PIPELINE, FakeInference


async def test_texts_are_asked_for_once_and_anew_when_the_model_is_another():
    inference = FakeInference()
    vocabulary = Vocabulary(inference)
    assert (await vocabulary.texts(PIPELINE, [97, 98]))[98] == "b"
    await vocabulary.texts(PIPELINE, [98, 97])
    await vocabulary.texts(KINDS, [97])
    await vocabulary.texts(PIPELINE, [97])
    assert len(inference.calls) == 2
    for i in range(20):
        replaced = replace(PIPELINE, steps=(f"tiny.tokenizer.{i}",))
        assert (await vocabulary.texts(replaced, [97])) == {97: "a"}
    assert len(inference.calls) == 22
    assert len(vocabulary._texts) == 2, "nothing is kept of models that were replaced"
