// The lanes; trie_encode.h explains them.
#include "tokenizer/trie_encode.h"

#include <algorithm>
#include <utility>

namespace fledge::trie {
namespace {

constexpr int LANES = 6;
constexpr int STEPS = 32;                  // steps of every lane between two checks of their progress
constexpr ptrdiff_t SEGMENT_BYTES = 2048;  // the most text a lane gets at a time
constexpr ptrdiff_t MIN_LANE_BYTES = 64;   // less text than this is not worth a lane
constexpr ptrdiff_t PLAIN_BYTES = 256;     // up to this text size the plain loop is faster
constexpr size_t RING_SIZE = 12;           // segments in progress; lanes do not finish in text order

// A lane moves at most two bytes per step, reads one byte ahead, and takes STEPS steps between two checks.
constexpr ptrdiff_t OVERRUN = 2 * STEPS + 4;

constexpr Byte IDLE_TEXT[OVERRUN + 4] = {};  // the text of an idle lane

template <class Id>
struct Lanes {
    const Byte* position[LANES];
    Id* out[LANES];
    Node node[LANES];
};

// Advances one lane by one byte. If the trie has a child for the byte, the lane moves to it. Otherwise the token is
// complete: its id is kept, and the lane continues after the first two bytes of the next token. Both outcomes are
// computed, and `mismatch` (all ones or all zeros) selects one of them, because a branch would often be mispredicted.
template <class Id>
inline void step(const Node* nodes, const Node* pair_nodes, const Byte*& position, Id*& out, Node& node) {
    const Byte byte = *position;
    const Node next = nodes[child_index(node, byte)];
    const ptrdiff_t surplus = backtrack(node);
    const Node restart = pair_nodes[pair_index(position - surplus)];
    *out = static_cast<Id>(token_id(node));
    const ptrdiff_t mismatch = -static_cast<ptrdiff_t>(label(next) != byte);
    position += 1 + (mismatch & (1 - surplus));
    out -= mismatch;
    node = next ^ ((restart ^ next) & static_cast<Node>(mismatch));
}

template <class Id, size_t... I>
inline void advance_lanes(const Trie& trie, Lanes<Id>& lanes, std::index_sequence<I...> /*lane numbers*/) {
    const Node* nodes = trie.nodes.data();
    const Node* pair_nodes = trie.pair_nodes.data();
    Lanes<Id> local = lanes;  // a copy that can be kept in registers
    for (int i = 0; i < STEPS; i++) (step(nodes, pair_nodes, local.position[I], local.out[I], local.node[I]), ...);
    lanes = local;
}

template <class Id>
struct Segment {
    TokenRun<Id> run;
    const Piece* piece;
    const Byte* stop;  // the end of its lane; `run.begin` if the segment needs no lane
    bool is_last;      // of its piece
    bool is_done;
    Id ids[SEGMENT_BYTES + OVERRUN + 4];
};

// Splits the pieces into segments, encodes the segments in the lanes, and merges the results in text order.
template <class Id>
class Encoder {
   public:
    Encoder(const Trie& trie, const Piece* pieces, size_t count, Id* out, PieceResult* results)
        : trie_(trie), piece_(pieces), pieces_end_(pieces + count), result_(results), writer_{out} {
        for (int lane = 0; lane < LANES; lane++) set_idle(lane);
        if (count) next_ = pieces->begin;
    }

    size_t run() {
        for (;;) {
            for (int lane = 0; lane < LANES; lane++)
                if (!lane_segment_[lane]) start_segment(lane);
            for (; head_ < tail_ && slot(head_).is_done; head_++) write_segment(slot(head_));
            if (head_ < tail_)
                advance();
            else if (piece_ == pieces_end_)
                return writer_.count;
        }
    }

   private:
    Segment<Id>& slot(size_t number) { return ring_[number % RING_SIZE]; }

    void set_idle(int lane) {
        busy_lanes_ -= lane_segment_[lane] != nullptr;
        lane_segment_[lane] = nullptr;
        lanes_.position[lane] = IDLE_TEXT + 2;
        lanes_.out[lane] = discarded_;
        lanes_.node[lane] = trie_.pair_nodes[0];
    }

    // Gives the lane the next segment that needs one, if there is such a segment and a free slot.
    void start_segment(int lane) {
        while (piece_ < pieces_end_ && tail_ - head_ < RING_SIZE) {
            Segment<Id>& segment = slot(tail_++);
            init_segment(segment);
            if (segment.is_done) continue;
            busy_lanes_++;
            lane_segment_[lane] = &segment;
            lanes_.position[lane] = segment.run.begin + 2;
            lanes_.out[lane] = segment.ids;
            lanes_.node[lane] = trie_.pair_nodes[pair_index(segment.run.begin)];
            return;
        }
    }

    void init_segment(Segment<Id>& segment) {
        const ptrdiff_t piece_size = piece_->end - piece_->begin;
        const ptrdiff_t target = std::clamp((piece_size + LANES - 1) / LANES, MIN_LANE_BYTES, SEGMENT_BYTES);
        const ptrdiff_t remaining = piece_->end - next_;
        const ptrdiff_t length = std::min(target, remaining);
        const ptrdiff_t lane_length = piece_size > PLAIN_BYTES ? std::min(length, remaining - OVERRUN) : 0;
        segment.run = {next_, next_, segment.ids, 0};
        segment.piece = piece_;
        segment.stop = next_ + std::max<ptrdiff_t>(lane_length, 0);
        segment.is_last = length == remaining;
        segment.is_done = lane_length <= 0;
        next_ += length;
        if (segment.is_last && ++piece_ < pieces_end_) next_ = piece_->begin;
    }

    void advance() {
        // A single lane at the end of the input is slower than the plain loop.
        const bool use_plain_loop = busy_lanes_ == 1 && piece_ == pieces_end_;
        if (!use_plain_loop) advance_lanes(trie_, lanes_, std::make_index_sequence<LANES>());
        for (int lane = 0; lane < LANES; lane++) {
            if (!lane_segment_[lane])
                set_idle(lane);
            else if (use_plain_loop || lanes_.position[lane] >= lane_segment_[lane]->stop)
                finish_segment(lane);
        }
    }

    // Completes the current token of the lane and encodes what is left of its segment.
    void finish_segment(int lane) {
        Segment<Id>& segment = *lane_segment_[lane];
        const Byte* position = lanes_.position[lane];
        const Byte* limit = segment.piece->limit;
        Id* out = lanes_.out[lane];
        descend(trie_, lanes_.node[lane], position, limit);
        position -= backtrack(lanes_.node[lane]);
        *out++ = static_cast<Id>(token_id(lanes_.node[lane]));
        while (position < segment.stop) *out++ = static_cast<Id>(next_token(trie_, position, limit));
        segment.run.reached = position;
        segment.run.count = static_cast<size_t>(out - segment.ids);
        segment.is_done = true;
        set_idle(lane);
    }

    void write_segment(const Segment<Id>& segment) {
        const Piece& piece = *segment.piece;
        if (segment.run.begin == piece.begin) {
            position_ = piece.begin;
            previous_count_ = writer_.count;
        }
        position_ = merge_run(trie_, segment.run, position_, piece.limit, writer_);
        if (!segment.is_last) return;
        while (position_ < piece.end) writer_.append(next_token(trie_, position_, piece.limit));
        *result_++ = {writer_.count - previous_count_, position_};
    }

    const Trie& trie_;
    const Piece* piece_;  // the piece that is being split into segments
    const Piece* pieces_end_;
    const Byte* next_ = nullptr;  // the start of its next segment
    PieceResult* result_;
    IdWriter<Id> writer_;
    const Byte* position_ = nullptr;  // the end of the tokens written for the current piece
    size_t previous_count_ = 0;       // ids of the pieces before it
    size_t head_ = 0;                 // number of the first segment in progress
    size_t tail_ = 0;                 // number after the last one
    int busy_lanes_ = 0;
    Segment<Id>* lane_segment_[LANES] = {};
    Lanes<Id> lanes_;
    Id discarded_[STEPS + 1];  // the ids of idle lanes
    Segment<Id> ring_[RING_SIZE];
};

}  // namespace

template <class Id>
size_t encode(const Trie& trie, const Piece* pieces, size_t count, Id* out, PieceResult* results) {
    return Encoder<Id>(trie, pieces, count, out, results).run();
}

template size_t encode(const Trie&, const Piece*, size_t, uint16_t*, PieceResult*);
template size_t encode(const Trie&, const Piece*, size_t, uint32_t*, PieceResult*);

}  // namespace fledge::trie
