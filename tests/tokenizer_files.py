"""Small tokenizer.json files of the kinds that there are, trained on the bundled texts with the package itself."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minimoe import texts

CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPACE = "\u2581"


def _trained(pre_tokenizer, alphabet=()):
    """Tokens and merges of a byte-pair encoding."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=list(alphabet))
    trainee.train_from_iterator([text[:4000].replace("\t", " ") for text in texts.load().values()], trainer)
    model = json.loads(trainee.to_str())["model"]
    return list(model["vocab"]), [tuple(pair) for pair in model["merges"]]


def _with_bytes():
    """As Llama and Mixtral have it: control tokens, bytes, pieces in which U+2581 stands for a space."""
    pieces, merges = _trained(pre_tokenizers.Metaspace(prepend_scheme="never", split=False))
    names = [*CONTROL, *BYTES, *pieces]
    vocabulary = {name: token for token, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROL])
    return made


def llama():
    """A space is put before every text."""
    made = _with_bytes()
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def mistral():
    """A space is put before a text that does not begin with one."""
    made = _with_bytes()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def byte_level():
    """As GPT-2 and Llama 3: bytes are characters of an alphabet of their own, and no space is added."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces, merges = _trained(pre_tokenizer, pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({name: token for token, name in enumerate(pieces)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


KINDS = {"llama": llama, "mistral": mistral, "byte level": byte_level}
