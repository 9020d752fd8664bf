"""Text to token ids and back: vocabularies, the World tokenizer, streaming text, chat templates. Needs no torch."""

from fledge.tokenizer.base import NO_EOS, Tokenizer
from fledge.tokenizer.chat_template import TEMPLATES, ChatTemplate, Message, pieces, render, template_named
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
    "pieces",
    "prune",
    "render",
    "template_named",
    "tokenizer_for",
    "world_vocabulary",
]
