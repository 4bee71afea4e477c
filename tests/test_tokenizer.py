from hypothesis import given, settings
from hypothesis import strategies as st

from whalepod.model.tiny_tokenizer import PROTOCOL, small_tokenizer
from whalepod.model.tokenizer import Tokenizer

TOKENIZER = Tokenizer(small_tokenizer(1024))
CONTROL = set(range(3)) | {TOKENIZER.control_id(n) for n in PROTOCOL}
TEXTS = ["The whale swam.", "鲸鱼在游泳，很快。", "Кит — 🐋🐳!", "a\u0301\r\n\t 1234567", "ﬁ№½", ""]


def pushed(ids: list[int]) -> list[str]:
    detokenizer = TOKENIZER.detokenizer()
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def test_text_round_trips_through_ids_and_streams() -> None:
    for text in TEXTS:
        ids = TOKENIZER.encode_text(text)
        assert TOKENIZER.decode(ids) == text
        parts = pushed(ids)
        assert "".join(parts) == text
        assert not any("\ufffd" in p for p in parts)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_any_text_streams_whole_characters(text: str) -> None:
    ids = TOKENIZER.encode_text(text)
    assert not CONTROL & set(ids)
    assert "".join(pushed(ids)) == text == TOKENIZER.decode(ids)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1023), max_size=30))
def test_random_ids_stream_without_loss(ids: list[int]) -> None:
    """Broken bytes may be grouped otherwise, but no valid character is lost or invented."""
    whole = "".join(pushed(ids)).replace("\ufffd", "")
    assert whole == TOKENIZER.decode(ids).replace("\ufffd", "")


def test_every_id_decodes_and_protocol_tokens_stand_at_the_end() -> None:
    assert TOKENIZER.vocab_size == 1024
    assert all(TOKENIZER.decode([i]) for i in range(1024))
    assert [TOKENIZER.decode([i]) for i in range(1024 - len(PROTOCOL), 1024)] == list(PROTOCOL)
