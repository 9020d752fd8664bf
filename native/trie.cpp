// The C interface of the tokenizer, for fledge/tokenizer/native.py. Text and ids are anything at all.
//
// Ids are uint16 where the vocabulary has up to 65536 of them, else uint32. What a buffer has no room for is refused
// before anything is written. Nothing here knows Python: making a list of ids, which would otherwise take longer than
// finding them, goes through functions that the caller hands over.
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#include "export.h"
#include "trie_encode.h"

using namespace fledge::trie;

namespace {

constexpr int64_t NO_ROOM = -1, NO_MEMORY = -2;
constexpr size_t SMALL = 4096;  // bytes of a text that is encoded on the stack, and without letting other threads run

bool wide(const Trie& trie) { return trie.count() > 1 << 16; }

template <class Id>
size_t encode_one(const Trie& trie, const Byte* text, size_t n, Id* out) {
    const Piece piece{text, text + n, text + n};
    Cut cut;
    return encode(trie, &piece, 1, out, &cut);
}

size_t encode_any(const Trie& trie, const Byte* text, size_t n, void* out) {
    return wide(trie) ? encode_one(trie, text, n, static_cast<uint32_t*>(out))
                      : encode_one(trie, text, n, static_cast<uint16_t*>(out));
}

// Many texts, or a long one, in pieces that threads take as they come free; their ids are joined at the end.
template <class Id>
class Batch {
   public:
    Batch(const Trie& trie, const Byte* const* texts, const size_t* sizes, size_t count, size_t total, int threads)
        : trie_(trie), threads_(threads) {
        const size_t share = std::min(std::max(total / (8 * static_cast<size_t>(threads)), size_t{1} << 15), LONGEST);
        for (size_t i = 0; i < count; i++) {
            const Byte *at = texts[i], *end = texts[i] + sizes[i];
            do {
                const size_t size = std::min(static_cast<size_t>(end - at), share);
                if (groups_.empty() || used_ - groups_.back().out >= share) groups_.push_back({pieces_.size(), used_});
                pieces_.push_back({at, at + size, end});
                used_ += size;
                at += size;
            } while (at < end);
        }
        cuts_.resize(pieces_.size());
        ids_.reset(new Id[used_]);
    }

    // Ids at `out`; ends[i]: how many there are up to the end of text i.
    size_t run(Id* out, size_t* ends) {
        std::vector<std::thread> others;
        others.reserve(static_cast<size_t>(threads_));
        try {
            for (int i = 1; i < threads_; i++) others.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            // No more threads to be had: those there are do it all.
        }
        work();
        for (std::thread& other : others) other.join();
        return join_all(out, ends);
    }

   private:
    static constexpr size_t LONGEST = 1 << 20;

    struct Group {
        size_t first;  // of its pieces
        size_t out;    // where its ids begin: there is room for one a byte
    };

    void work() noexcept {
        for (size_t i; (i = next_.fetch_add(1)) < groups_.size();) {
            const size_t first = groups_[i].first, end = i + 1 < groups_.size() ? groups_[i + 1].first : pieces_.size();
            encode(trie_, &pieces_[first], end - first, ids_.get() + groups_[i].out, &cuts_[first]);
        }
    }

    size_t join_all(Id* out, size_t* ends) const {
        Sink<Id> sink{out};
        const Byte* at = nullptr;
        for (size_t group = 0, i = 0; group < groups_.size(); group++) {
            const Id* ids = ids_.get() + groups_[group].out;
            const size_t end = group + 1 < groups_.size() ? groups_[group + 1].first : pieces_.size();
            for (; i < end; ids += cuts_[i++].count) {
                const Piece& piece = pieces_[i];
                if (i == 0 || pieces_[i - 1].end == pieces_[i - 1].limit) at = piece.begin;
                at = join(trie_, Run<Id>{piece.begin, cuts_[i].reached, ids, cuts_[i].count}, at, piece.limit, sink);
                if (piece.end == piece.limit) *ends++ = sink.count;
            }
        }
        return sink.count;
    }

    const Trie& trie_;
    int threads_;
    std::vector<Piece> pieces_;
    std::vector<Group> groups_;
    std::vector<Cut> cuts_;
    std::unique_ptr<Id[]> ids_;
    size_t used_ = 0;
    std::atomic<size_t> next_{0};
};

template <class Id>
size_t encode_many(const Trie& trie, const Byte* const* texts, const size_t* sizes, size_t count, size_t total,
                   int threads, void* out, size_t* ends) {
    Id* ids = static_cast<Id*>(out);
    if (threads > 1) return Batch<Id>(trie, texts, sizes, count, total, threads).run(ids, ends);
    std::vector<Piece> pieces(count);
    std::vector<Cut> cuts(count);
    for (size_t i = 0; i < count; i++) pieces[i] = {texts[i], texts[i] + sizes[i], texts[i] + sizes[i]};
    const size_t found = encode(trie, pieces.data(), count, ids, cuts.data());
    for (size_t i = 0, sum = 0; i < count; i++) ends[i] = sum += cuts[i].count;
    return found;
}

// Bytes of all tokens, or -1 minus the position of an id that there is not.
template <class Id>
int64_t decoded_size(const Trie& trie, const Id* ids, size_t n) {
    size_t size = 0;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || static_cast<uint64_t>(ids[i]) >= trie.count()) return -1 - static_cast<int64_t>(i);
        size += trie.length(static_cast<uint32_t>(ids[i]));
    }
    return static_cast<int64_t>(size);
}

template <class Id>
int64_t decode(const Trie& trie, const Id* ids, size_t n, Byte* out, size_t capacity) {
    const int64_t size = decoded_size(trie, ids, n);
    if (size <= 0 || static_cast<size_t>(size) > capacity) return size;
    const Byte* end = out + size;
    for (size_t i = 0; i < n; i++) {
        const uint32_t token = static_cast<uint32_t>(ids[i]), length = trie.length(token);
        const bool short_one = length <= PADDING && end - out >= static_cast<ptrdiff_t>(PADDING);
        std::memcpy(out, trie.text.data() + trie.starts[token], short_one ? PADDING : length);
        out += length;
    }
    return size;
}

}  // namespace

// What makes lists, by the names these functions have in Python's stable interface.
struct fledge_list_calls {
    void* (*repeat)(void*, ptrdiff_t);
    int (*set_item)(void*, ptrdiff_t, void*);
    void (*incref)(void*);
    void* (*save_thread)();
    void (*restore_thread)(void*);
    void* (*no_memory)();
    void* seed;            // a list of one element
    void* const* numbers;  // an int object for every id
};

// Tokens by id: their bytes one behind the other, and how many each has. Null where they are no vocabulary: a single
// byte is missing, or they are too many; or where memory did not suffice.
FLEDGE_API Trie* fledge_trie_new(const uint8_t* text, const uint8_t* lengths, size_t count) {
    try {
        auto trie = std::make_unique<Trie>();
        return build(*trie, text, lengths, count) ? trie.release() : nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

FLEDGE_API void fledge_trie_free(Trie* trie) { delete trie; }

// How many ids a text has. They are written to `out`, which must have room for `n`, unless it is null.
FLEDGE_API int64_t fledge_trie_encode(const Trie* trie, const uint8_t* text, size_t n, void* out, size_t capacity) {
    if (out && capacity < n) return NO_ROOM;
    return static_cast<int64_t>(encode_any(*trie, text, n, out));
}

// The ids of all texts, one behind the other, at `out`, which has room for one id a byte. ends[i]: where those of text
// i end. Or -1 where there is no room, -2 where memory did not suffice.
FLEDGE_API int64_t fledge_trie_encode_batch(const Trie* trie, const uint8_t* const* texts, const size_t* sizes,
                                            size_t count, void* out, size_t capacity, size_t* ends, int threads) {
    constexpr size_t WORTH_A_THREAD = 1 << 16;
    size_t total = 0;
    for (size_t i = 0; i < count; i++) total += sizes[i];
    if (capacity < total) return NO_ROOM;
    threads = static_cast<int>(std::min(static_cast<size_t>(std::max(threads, 1)), 1 + total / WORTH_A_THREAD));
    try {
        const auto many = wide(*trie) ? encode_many<uint32_t> : encode_many<uint16_t>;
        return static_cast<int64_t>(many(*trie, texts, sizes, count, total, threads, out, ends));
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

// Bytes that `ids` (of 2, 4 or, signed, 8 bytes each) stand for; written to `out` if `capacity` allows it. -1 - i where
// id i is outside the vocabulary.
FLEDGE_API int64_t fledge_trie_decode(const Trie* trie, const void* ids, int id_bytes, size_t n, uint8_t* out,
                                      size_t capacity) {
    if (id_bytes == 2) return decode(*trie, static_cast<const uint16_t*>(ids), n, out, capacity);
    if (id_bytes == 4) return decode(*trie, static_cast<const uint32_t*>(ids), n, out, capacity);
    return decode(*trie, static_cast<const int64_t*>(ids), n, out, capacity);
}

// A list of ids that `fledge_trie_encode` or its kin has written. To be called with Python's lock held.
//
// The list begins as a repeated element, because set_item looks at what it replaces: in a new list, reading untouched
// memory and then writing to it makes the system visit every page twice (10 ns an id instead of 7 for a long list).
FLEDGE_API void* fledge_trie_list(const Trie* trie, const void* ids, size_t n, const fledge_list_calls* calls) {
    void* list = calls->repeat(calls->seed, static_cast<ptrdiff_t>(n));
    if (!list) return nullptr;
    for (size_t i = 0; i < n; i++) {
        const uint32_t id = wide(*trie) ? static_cast<const uint32_t*>(ids)[i] : static_cast<const uint16_t*>(ids)[i];
        calls->incref(calls->numbers[id]);
        calls->set_item(list, static_cast<ptrdiff_t>(i), calls->numbers[id]);
    }
    return list;
}

// The ids of a text as a list. To be called with Python's lock held; it is let go while a long text is encoded.
FLEDGE_API void* fledge_trie_encode_list(const Trie* trie, const uint8_t* text, size_t n,
                                         const fledge_list_calls* calls) {
    if (n <= SMALL) {
        uint32_t ids[SMALL];
        return fledge_trie_list(trie, ids, encode_any(*trie, text, n, ids), calls);
    }
    const std::unique_ptr<uint32_t[]> ids(new (std::nothrow) uint32_t[wide(*trie) ? n : n / 2 + 1]);
    if (!ids) return calls->no_memory();
    void* thread = calls->save_thread();
    const size_t count = encode_any(*trie, text, n, ids.get());
    calls->restore_thread(thread);
    return fledge_trie_list(trie, ids.get(), count, calls);
}
