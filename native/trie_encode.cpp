// The lanes: see trie_encode.h for what they are and why.
#include "trie_encode.h"

#include <algorithm>
#include <utility>

namespace fledge::trie {
namespace {

constexpr int LANES = 6;
constexpr int STEPS = 32;            // of every lane, between looks at how far they are
constexpr ptrdiff_t SEGMENT = 2048;  // bytes a lane is given at a time
constexpr ptrdiff_t SMALLEST = 64;   // bytes that are worth a lane
constexpr ptrdiff_t PLAIN = 256;     // bytes of a text up to which plain code is faster
constexpr size_t RING = 12;          // segments under way: lanes do not finish in the order of the text

// A lane moves at most two bytes a step and looks one byte further, and goes through STEPS of them between two looks.
constexpr ptrdiff_t OVERRUN = 2 * STEPS + 4;

constexpr Byte NOTHING[OVERRUN + 4] = {};  // what a lane without work reads

template <class Id>
struct Lanes {
    const Byte* at[LANES];
    Id* out[LANES];
    Record node[LANES];
};

// One byte further in one lane, if the trie knows it there. Else the token goes out, and the lane is behind the second
// byte of the next one. Both are worked out, and `no` (all ones or all zeros) chooses: a branch would be guessed wrong
// too often.
template <class Id>
inline void step(const Record* nodes, const Record* pairs, const Byte*& at, Id*& out, Record& node) {
    const Byte byte = *at;
    const Record next = nodes[child(node, byte)];
    const ptrdiff_t over = back(node);
    const Record restart = pairs[pair_at(at - over)];
    *out = static_cast<Id>(id(node));
    const ptrdiff_t no = -static_cast<ptrdiff_t>(label(next) != byte);
    at += 1 + (no & (1 - over));
    out -= no;
    node = next ^ ((restart ^ next) & static_cast<Record>(no));
}

template <class Id, size_t... I>
inline void steps(const Trie& trie, Lanes<Id>& lanes, std::index_sequence<I...>) {
    const Record *nodes = trie.nodes.data(), *pairs = trie.pairs.data();
    Lanes<Id> here = lanes;  // a copy, so that it can live in registers
    for (int i = 0; i < STEPS; i++) (step(nodes, pairs, here.at[I], here.out[I], here.node[I]), ...);
    lanes = here;
}

template <class Id>
struct Segment {
    Run<Id> run;
    const Piece* piece;
    const Byte* stop;  // where its lane ends, or `run.begin` where none is to begin
    bool last;         // of its piece
    bool done;
    Id ids[SEGMENT + OVERRUN + 4];
};

// Pieces are cut into segments, segments go through the lanes, and are joined in the order of the text.
template <class Id>
class Encoder {
   public:
    Encoder(const Trie& trie, const Piece* pieces, size_t count, Id* out, Cut* cuts)
        : trie_(trie), piece_(pieces), pieces_end_(pieces + count), cut_(cuts), sink_{out} {
        for (int lane = 0; lane < LANES; lane++) park(lane);
        if (count) next_ = pieces->begin;
    }

    size_t run() {
        for (;;) {
            for (int lane = 0; lane < LANES; lane++)
                if (!work_[lane]) feed(lane);
            for (; head_ < tail_ && slot(head_).done; head_++) commit(slot(head_));
            if (head_ < tail_)
                advance();
            else if (piece_ == pieces_end_)
                return sink_.count;
        }
    }

   private:
    Segment<Id>& slot(size_t number) { return ring_[number % RING]; }

    void park(int lane) {
        busy_ -= work_[lane] != nullptr;
        work_[lane] = nullptr;
        lanes_.at[lane] = NOTHING + 2;
        lanes_.out[lane] = waste_;
        lanes_.node[lane] = trie_.pairs[0];
    }

    // The next segment with work for a lane, if there is one and a slot is free.
    void feed(int lane) {
        while (piece_ < pieces_end_ && tail_ - head_ < RING) {
            Segment<Id>& it = slot(tail_++);
            cut_segment(it);
            if (it.done) continue;
            busy_++;
            work_[lane] = &it;
            lanes_.at[lane] = it.run.begin + 2;
            lanes_.out[lane] = it.ids;
            lanes_.node[lane] = trie_.pairs[pair_at(it.run.begin)];
            return;
        }
    }

    void cut_segment(Segment<Id>& it) {
        const ptrdiff_t size = piece_->end - piece_->begin;
        const ptrdiff_t part = std::clamp((size + LANES - 1) / LANES, SMALLEST, SEGMENT);
        const ptrdiff_t rest = piece_->end - next_, room = rest - OVERRUN;
        const ptrdiff_t length = std::min(part, rest), lane = size > PLAIN ? std::min(length, room) : 0;
        it.run = {next_, next_, it.ids, 0};
        it.piece = piece_;
        it.stop = next_ + std::max<ptrdiff_t>(lane, 0);
        it.last = length == rest;
        it.done = lane <= 0;
        next_ += length;
        if (it.last && ++piece_ < pieces_end_) next_ = piece_->begin;
    }

    void advance() {
        // A single lane at the end of everything is slower than plain code.
        const bool plain = busy_ == 1 && piece_ == pieces_end_;
        if (!plain) steps(trie_, lanes_, std::make_index_sequence<LANES>());
        for (int lane = 0; lane < LANES; lane++) {
            if (!work_[lane])
                park(lane);
            else if (plain || lanes_.at[lane] >= work_[lane]->stop)
                finish(lane);
        }
    }

    // The token the lane is in the middle of, and whatever is left of its segment.
    void finish(int lane) {
        Segment<Id>& it = *work_[lane];
        const Byte *at = lanes_.at[lane], *limit = it.piece->limit;
        Id* out = lanes_.out[lane];
        descend(trie_, lanes_.node[lane], at, limit);
        at -= back(lanes_.node[lane]);
        *out++ = static_cast<Id>(id(lanes_.node[lane]));
        while (at < it.stop) *out++ = static_cast<Id>(take(trie_, at, limit));
        it.run.reached = at;
        it.run.count = static_cast<size_t>(out - it.ids);
        it.done = true;
        park(lane);
    }

    void commit(const Segment<Id>& it) {
        const Piece& piece = *it.piece;
        if (it.run.begin == piece.begin) at_ = piece.begin, before_ = sink_.count;
        at_ = join(trie_, it.run, at_, piece.limit, sink_);
        if (!it.last) return;
        while (at_ < piece.end) sink_.put(take(trie_, at_, piece.limit));
        *cut_++ = {sink_.count - before_, at_};
    }

    const Trie& trie_;
    const Piece *piece_, *pieces_end_;  // being cut into segments,
    const Byte* next_ = nullptr;        // from here on
    Cut* cut_;
    Sink<Id> sink_;
    const Byte* at_ = nullptr;    // how far the piece that goes out is cut
    size_t before_ = 0;           // ids of the pieces before it
    size_t head_ = 0, tail_ = 0;  // numbers of the first segment under way and of the one behind the last
    int busy_ = 0;
    Segment<Id>* work_[LANES] = {};
    Lanes<Id> lanes_;
    Id waste_[STEPS + 1];
    Segment<Id> ring_[RING];
};

}  // namespace

template <class Id>
size_t encode(const Trie& trie, const Piece* pieces, size_t count, Id* out, Cut* cuts) {
    return Encoder<Id>(trie, pieces, count, out, cuts).run();
}

template size_t encode(const Trie&, const Piece*, size_t, uint16_t*, Cut*);
template size_t encode(const Trie&, const Piece*, size_t, uint32_t*, Cut*);

}  // namespace fledge::trie
