// The tokenizer's trie in memory. trie_encode.h explains how text is split with it.
//
// A 64-bit node holds everything that one step needs, so a step is one load:
//
//     label      8 bits   the byte that leads to this node
//     backtrack  8 bits   path length minus the length of the longest token on the path
//     id        24 bits   the id of that token
//     base      24 bits   the child for byte b, if it exists, is nodes[base ^ b]
//
// No two nodes have the same base. Therefore the label shows whether nodes[base ^ b] is the child for b (its label must
// be b), and no parent is stored. The 116 thousand nodes of the World vocabulary take 0.9 MB and fit into a level-2
// cache. All children of a node are in one block of 256 nodes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fledge::trie {

using Byte = uint8_t;
using Node = uint64_t;

constexpr uint32_t MAX_INDEX = (1U << 24) - 1;  // the largest id, and the largest base
constexpr uint32_t ROOT_BASE = 0;               // block 0 holds the nodes of the single bytes: nodes[b] for byte b
constexpr uint32_t LEAF_BASE = 1;  // nodes[1 ^ b] has the label 1 ^ b, never b: a leaf has no child for any byte
constexpr size_t BLOCK = 256;
constexpr size_t PADDING = 16;  // allows a short token to be read as 16 bytes

inline Node make_node(uint32_t label, uint32_t backtrack, uint32_t id, uint32_t base) {
    return label | backtrack << 8 | static_cast<Node>(id) << 16 | static_cast<Node>(base) << 40;
}
inline Byte label(Node node) { return static_cast<Byte>(node); }
inline ptrdiff_t backtrack(Node node) { return static_cast<Byte>(node >> 8); }
inline uint32_t token_id(Node node) { return static_cast<uint32_t>(node >> 16) & MAX_INDEX; }
inline size_t child_index(Node node, Byte next) { return static_cast<size_t>(node >> 40) ^ next; }

// Two bytes of text as an index into Trie::pair_nodes.
inline uint32_t pair_index(const Byte* text) {
    uint16_t pair;
    std::memcpy(&pair, text, 2);
    return pair;
}

struct Trie {
    std::vector<Node> nodes;
    // The node for each pair of bytes, so that a token starts with one load instead of two. If a pair has no node, the
    // entry is the node of its first byte, as a leaf, with backtrack 1 for the second byte.
    std::vector<Node> pair_nodes;
    std::vector<Byte> text;        // all tokens, concatenated, followed by PADDING bytes
    std::vector<uint32_t> starts;  // the start of each token in `text`, and the end of the last one

    uint32_t count() const { return static_cast<uint32_t>(starts.size() - 1); }
    uint32_t length(uint32_t id) const { return starts[id + 1] - starts[id]; }
};

// text: the tokens in id order, concatenated. lengths: the length of each token in bytes (0: a reserved id). If two
// tokens are equal, the larger id is used. Returns false if a single byte is not a token, or if there are more tokens
// or nodes than a node can address.
bool build_trie(Trie& trie, const Byte* text, const Byte* lengths, size_t count);

}  // namespace fledge::trie
