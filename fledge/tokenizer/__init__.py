"""L1: text to token ids and back: vocabularies, the World tokenizer, incremental decoding, chat templates.

This package never imports torch. It contains no sampling and no matching of stop strings (`fledge.engine`).
"""

from fledge.tokenizer.base import NO_EOS, Tokenizer
from fledge.tokenizer.chat_template import TEMPLATES, ChatTemplate, Message, render, render_segments, template_named
from fledge.tokenizer.native_tokenizer import NativeTokenizer
from fledge.tokenizer.stream_decoder import StreamDecoder
from fledge.tokenizer.trie import TrieTokenizer
from fledge.tokenizer.vocabulary import Vocabulary, byte_vocabulary, prune, world_vocabulary
from fledge.tokenizer.world import load_world, tokenizer_for

__all__ = [
    "NO_EOS",
    "TEMPLATES",
    "ChatTemplate",
    "Message",
    "NativeTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "TrieTokenizer",
    "Vocabulary",
    "byte_vocabulary",
    "load_world",
    "prune",
    "render",
    "render_segments",
    "template_named",
    "tokenizer_for",
    "world_vocabulary",
]
