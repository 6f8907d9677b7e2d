"""The three tokenizers of the embedded pipeline, trained on the captions of the shapes world."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

MAX_TOKENS = 12
"""Length of every text sequence: the longest caption has eight words, and each tokenizer adds at most two."""
CLIP_PATTERN = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")


def train_clip_tokenizer(texts: Sequence[str], *, pad_token: str) -> CLIPTokenizer:
    """A byte-level BPE of the words in `texts`; SD3's two CLIP tokenizers differ in what they pad with."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(CLIP_PATTERN, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # The trainer would find the letters that end words by itself, but number them in the order of a hash table.
    last_letters = [f"{letter}</w>" for letter in string.ascii_lowercase]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|startoftext|>", "<|endoftext|>", "!", *last_letters],
        initial_alphabet=list(string.ascii_lowercase),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges, pad_token=pad_token, model_max_length=MAX_TOKENS)


def train_t5_tokenizer(texts: Sequence[str]) -> T5TokenizerFast:
    """A unigram tokenizer whose pieces are the words of `texts`, scored by their log frequency, and single letters.

    Counting is the whole of the training: with every word a piece, the likeliest segmentation is the words themselves,
    so expectation-maximisation has nothing left to move. (UnigramTrainer seeds only substrings of two different words,
    and would cut most of these words into letters.)
    """
    counts = Counter(f"▁{word}" for text in texts for word in text.split())
    total = counts.total()
    words = [(word, math.log(count / total)) for word, count in counts.most_common()]
    rare = words[-1][1] - 10.0
    letters = [(letter, rare) for letter in ("▁", *string.ascii_lowercase)]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=[*specials, *words, *letters], extra_ids=0, model_max_length=MAX_TOKENS)
