// The tokenizer's trie in memory. How text is cut with it: trie_encode.h.
//
// One 64-bit record a node says everything a step needs, so a step is one load:
//
//     label   8 bits   the byte that leads here
//     back    8 bits   how many bytes of the way here the longest token on it does not cover
//     id     24 bits   that token
//     base   24 bits   the child for byte b, if there is one, is nodes[base ^ b]
//
// No two nodes have the same base. So the label alone tells whether nodes[base ^ b] is really the child for b (it is
// where its label is b) and no parent needs to be stored: 116 thousand nodes of World take 0.9 MB and fit a level-2
// cache. All children of a node lie in one block of 256 records.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fledge::trie {

using Byte = uint8_t;
using Record = uint64_t;

constexpr uint32_t LARGEST = (1u << 24) - 1;  // id, and base
constexpr uint32_t ROOT_BASE = 0;             // block 0 holds the nodes of the single bytes, nodes[b] for byte b
constexpr uint32_t LEAF_BASE = 1;             // nodes[1 ^ b] has the label 1 ^ b, never b: no child for any byte
constexpr size_t BLOCK = 256;
constexpr size_t PADDING = 16;  // so that a short token can be read as 16 bytes

inline Record record(uint32_t label, uint32_t back, uint32_t id, uint32_t base) {
    return label | back << 8 | static_cast<Record>(id) << 16 | static_cast<Record>(base) << 40;
}
inline Byte label(Record node) { return static_cast<Byte>(node); }
inline ptrdiff_t back(Record node) { return static_cast<Byte>(node >> 8); }
inline uint32_t id(Record node) { return static_cast<uint32_t>(node >> 16) & LARGEST; }
inline size_t child(Record node, Byte next) { return static_cast<size_t>(node >> 40) ^ next; }

// Two bytes of text as an index of Trie::pairs.
inline uint32_t pair_at(const Byte* text) {
    uint16_t pair;
    std::memcpy(&pair, text, 2);
    return pair;
}

struct Trie {
    std::vector<Record> nodes;
    // The node after any two bytes, so that a token begins with one load instead of two. Where the two lead nowhere
    // together: the node of the first byte, as a leaf and with `back` 1 for the byte too many.
    std::vector<Record> pairs;
    std::vector<Byte> text;        // all tokens, one behind the other, and PADDING bytes
    std::vector<uint32_t> starts;  // where each begins; one more for the end of the last

    uint32_t count() const { return static_cast<uint32_t>(starts.size() - 1); }
    uint32_t length(uint32_t token) const { return starts[token + 1] - starts[token]; }
};

// Tokens by id: their bytes one behind the other, and how many each has (0: a reserved id). Of equal tokens the last
// counts. False where a single byte is no token, or there are more tokens or nodes than a record can number.
bool build(Trie& trie, const Byte* text, const Byte* lengths, size_t count);

}  // namespace fledge::trie
