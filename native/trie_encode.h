// Cutting text into tokens: from left to right, the longest token that the rest of the text starts with.
//
// Plain code for this (`take` below) cuts 210 MB/s on the machine it was written on, a Zen 4 at 3.7 GHz: where a token
// ends cannot be predicted, and a wrong guess at every token costs more than the steps to it. Two ideas make that 590.
//
//   Lanes.  Six places of the text are worked on in turn, each step without any branch on what was found (`step`), so
//           nothing is guessed, and the loads of the lanes overlap. Fewer lanes wait for memory, more do not fit the
//           registers: the steps alone ran at 460, 540, 605, 635, 590, 570 MB/s with 3, 4, 5, 6, 7, 8 lanes. With a
//           branch in the step, six lanes were little better than plain code (270).
//   Joins.  What follows a place depends on nothing before it. So a lane may begin anywhere, and its tokens count from
//           the first boundary between tokens that it shares with the lane before it: from there on both would go on
//           alike. They mostly meet within a few tokens; where they never do (long runs of one character), the text is
//           gone through once more with plain code. The result is always exactly that of plain code.
//
// Tried and not kept: beginning each token at the root instead of at the node of its first two bytes (430 MB/s in six
// lanes); placing the nodes level by level only (6 % slower than with chains kept together, trie_build.cpp).
//
// The same joins let several threads share one text.
#pragma once
#include "trie.h"

namespace fledge::trie {

// Part of a text: the tokens that begin from `begin` to before `end`; the last may reach up to `limit`, the text's end.
struct Piece {
    const Byte *begin, *end, *limit;
};

// What came of a piece: so many ids, and where the last token ends.
struct Cut {
    size_t count;
    const Byte* reached;
};

// Tokens that some place of a text leads to, and the place after them.
template <class Id>
struct Run {
    const Byte *begin, *reached;
    const Id* ids;
    size_t count;
};

// Where ids go; without `out` they are counted only.
template <class Id>
struct Sink {
    Id* out;
    size_t count = 0;

    void put(uint32_t id) {
        if (out) out[count] = static_cast<Id>(id);
        count++;
    }
    void put(const Id* ids, size_t n) {
        if (out && n) std::memcpy(out + count, ids, n * sizeof(Id));
        count += n;
    }
};

// Follow the text from `node` as far as the trie knows it.
inline void descend(const Trie& trie, Record& node, const Byte*& at, const Byte* limit) {
    for (; at < limit; at++) {
        const Record next = trie.nodes[child(node, *at)];
        if (label(next) != *at) return;
        node = next;
    }
}

// The token at `at`, which moves behind it.
inline uint32_t take(const Trie& trie, const Byte*& at, const Byte* limit) {
    if (limit - at < 2) return id(trie.nodes[*at++]);
    Record node = trie.pairs[pair_at(at)];
    at += 2;
    descend(trie, node, at, limit);
    at -= back(node);
    return id(node);
}

// Goes on from `at`, a boundary between tokens, with the tokens of `run` from where both meet. Returns how far it came;
// that is before the end of the run where they never met.
template <class Id>
const Byte* join(const Trie& trie, const Run<Id>& run, const Byte* at, const Byte* limit, Sink<Id>& sink) {
    const Byte* other = run.begin;
    size_t skipped = 0;
    for (;;) {
        while (other < at && skipped < run.count) other += trie.length(run.ids[skipped++]);
        if (other < at) return at;
        if (other == at) {
            sink.put(run.ids + skipped, run.count - skipped);
            return run.reached;
        }
        sink.put(take(trie, at, limit));
    }
}

// The ids of all pieces, one behind the other, at `out`, which has room for one id a byte of them; or only their
// number, where `out` is null. cuts: one a piece. Returns how many ids there are.
template <class Id>
size_t encode(const Trie& trie, const Piece* pieces, size_t count, Id* out, Cut* cuts);

}  // namespace fledge::trie
