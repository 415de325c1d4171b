from tokenizers import AddedToken, Tokenizer, decoders, models

from server.token_bytes import TokenBytes, byte_level_alphabet


def test_every_byte_has_a_character_of_its_own():
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["a"], alphabet["Ċ"]) == (32, 97, 10)


def test_bytes_of_a_byte_level_vocabulary(codec):
    text = "Grüße 🌍,\n"
    assert b"".join(map(codec.token_bytes.of, codec.encode(text))) == text.encode()
    assert codec.token_bytes.of(0) == b"<|end|>"
    assert codec.token_bytes.of(10**6) == b""


def test_bytes_where_single_bytes_are_tokens_of_their_own():
    vocabulary = {"<unk>": 0, "<0xF0>": 1, "▁one": 2, "é": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<0xAA>x", special=True)])
    known = TokenBytes(tokenizer)
    assert [known.of(i) for i in range(5)] == [b"<unk>", b"\xf0", b" one", "é".encode(), b"<0xAA>x"]
