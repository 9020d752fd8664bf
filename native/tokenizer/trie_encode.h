// Splits text into tokens, from left to right: each token is the longest one that the remaining text starts with.
//
// A plain loop (`next_token` below) reaches 210 MB/s on a Zen 4 at 3.7 GHz. The end of a token cannot be predicted, and
// a mispredicted branch at every token costs more than the steps to it. Two techniques raise this to 590 MB/s:
//
//   Lanes.  Six positions of the text are processed in turn, and no step branches on the data (`step`). So there is
//           nothing to mispredict, and the loads of the lanes overlap. With fewer lanes the memory latency shows; more
//           lanes do not fit into the registers: the steps alone reached 460, 540, 605, 635, 590 and 570 MB/s with 3,
//           4, 5, 6, 7 and 8 lanes. With a branch in the step, six lanes were little better than the plain loop (270).
//   Merges. The tokens after a position do not depend on the text before it. So a lane may start anywhere. Its tokens
//           are used from the first token boundary that it shares with the lane before it; after that boundary both
//           produce the same tokens. They usually meet within a few tokens. If they never meet (long runs of one
//           character), the text is split again with the plain loop. The result always equals that of the plain loop.
//
// Two variants were measured and rejected: starting each token at the root instead of the node of its first two bytes
// (430 MB/s with six lanes), and placing the nodes by level only (6% slower than keeping chains together; see
// trie_build.cpp).
//
// Merging also allows several threads to share one text.
#pragma once
#include "tokenizer/trie.h"

namespace fledge::trie {

// A part of a text: the tokens that start in [begin, end). The last token may extend to `limit`, the end of the text.
struct Piece {
    const Byte* begin;
    const Byte* end;
    const Byte* limit;
};

// The result of encoding a piece.
struct PieceResult {
    size_t count;         // ids
    const Byte* reached;  // the end of the last token
};

// The tokens of the text in [begin, reached).
template <class Id>
struct TokenRun {
    const Byte* begin;
    const Byte* reached;
    const Id* ids;
    size_t count;
};

// The destination of the ids. Without `out` they are only counted.
template <class Id>
struct IdWriter {
    Id* out;
    size_t count = 0;

    void append(uint32_t id) {
        if (out) out[count] = static_cast<Id>(id);
        count++;
    }
    void append(const Id* ids, size_t n) {
        if (out && n) std::memcpy(out + count, ids, n * sizeof(Id));
        count += n;
    }
};

// Follows the text from `node` until no child matches.
inline void descend(const Trie& trie, Node& node, const Byte*& position, const Byte* limit) {
    for (; position < limit; position++) {
        const Node next = trie.nodes[child_index(node, *position)];
        if (label(next) != *position) return;
        node = next;
    }
}

// Returns the token at `position` and moves `position` to its end.
inline uint32_t next_token(const Trie& trie, const Byte*& position, const Byte* limit) {
    if (limit - position < 2) return token_id(trie.nodes[*position++]);
    Node node = trie.pair_nodes[pair_index(position)];
    position += 2;
    descend(trie, node, position, limit);
    position -= backtrack(node);
    return token_id(node);
}

// Writes tokens from `position`, which is a token boundary, until it meets a boundary of `run`; then writes the rest of
// the run. Returns the end of the last token written. This is before the end of the run if the two never met.
template <class Id>
const Byte* merge_run(const Trie& trie, const TokenRun<Id>& run, const Byte* position, const Byte* limit,
                      IdWriter<Id>& writer) {
    const Byte* boundary = run.begin;
    size_t skipped = 0;
    for (;;) {
        while (boundary < position && skipped < run.count) boundary += trie.length(run.ids[skipped++]);
        if (boundary < position) return position;
        if (boundary == position) {
            writer.append(run.ids + skipped, run.count - skipped);
            return run.reached;
        }
        writer.append(next_token(trie, position, limit));
    }
}

// Writes the ids of all pieces, concatenated, to `out`, which must hold one id per byte of the pieces. If `out` is
// null, the ids are only counted. results: one per piece. Returns the number of ids.
template <class Id>
size_t encode(const Trie& trie, const Piece* pieces, size_t count, Id* out, PieceResult* results);

}  // namespace fledge::trie
