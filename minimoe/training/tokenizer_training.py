"""Training a SentencePiece tokenizer of the family that Mixtral uses, with pieces for the white space of code."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import sentencepiece

from .corpus import Corpus

VOCAB_SIZE = 1024
SAMPLE_CHARACTERS = 1_000_000  # per domain; more changes hardly any of so few merges
_SPACE = "\u2581"  # SentencePiece's mark for a space

# Byte-pair merging never joins white space with what surrounds it in a useful way, and a newline would be three byte
# tokens: indentation steps, empty lines and tabs are pieces from the start.
WHITESPACE_PIECES = (
    *(_SPACE * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16)),
    *("\n" + _SPACE * n for n in (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20)),
    "\n\n",
    "\n\n" + _SPACE * 4,
    "\n\n\n",
    "\t",
    "\n\t",
    "\n\t\t",
)


def train_tokenizer(texts: dict[str, str], folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """Train byte-pair merges on equal amounts of text per domain and write `tokenizer.model`.

    Parameters
    ----------
    texts
        Domain to text; each is cut to the length of the shortest.
    folder
        Where `tokenizer.model` goes; made if missing.
    vocab_size
        Including `<unk>` (0), `<s>` (1), `</s>` (2), 256 byte tokens and `WHITESPACE_PIECES`.

    Returns
    -------
    Path
        Of the file written. The same texts give the same bytes.
    """
    shortest = min(map(len, texts.values()))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(text[:shortest] for text in texts.values()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=0.9999,
        required_chars="~^$",
        user_defined_symbols=list(WHITESPACE_PIECES),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def sample_texts(corpus: Corpus, characters: int = SAMPLE_CHARACTERS) -> dict[str, str]:
    """Draw training documents of each domain, in an order that is always the same, up to a number of characters."""
    texts = {}
    for domain, documents in corpus.train.items():
        shuffled = list(documents)
        Random(0).shuffle(shuffled)
        texts[domain] = "".join(document.text for document in shuffled)[:characters]
    return texts


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into lines: merges never cross one, and the trainer wants them short."""
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                yield line
