// The C interface of the tokenizer, used by fledge/tokenizer/native_tokenizer.py. All text and ids are valid input.
//
// Ids are uint16 if the vocabulary has at most 65536 of them, otherwise uint32. If a buffer is too small, nothing is
// written. This code has no Python headers. Building a list of ids would otherwise take longer than encoding, so it is
// done through functions that the caller provides.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#include "export.h"
#include "tokenizer/trie_encode.h"

using namespace fledge::trie;

namespace {

constexpr int64_t BUFFER_TOO_SMALL = -1;
constexpr int64_t OUT_OF_MEMORY = -2;
constexpr size_t SMALL_TEXT = 4096;  // up to this size a text is encoded on the stack, without releasing the GIL

bool has_wide_ids(const Trie& trie) { return trie.count() > 1 << 16; }

template <class Id>
size_t encode_text_as(const Trie& trie, const Byte* text, size_t n, Id* out) {
    const Piece piece{text, text + n, text + n};
    PieceResult result;
    return encode(trie, &piece, 1, out, &result);
}

size_t encode_text(const Trie& trie, const Byte* text, size_t n, void* out) {
    return has_wide_ids(trie) ? encode_text_as(trie, text, n, static_cast<uint32_t*>(out))
                              : encode_text_as(trie, text, n, static_cast<uint16_t*>(out));
}

// Encodes many texts, or a long one, with several threads. The texts are split into pieces, the threads take groups of
// pieces in turn, and the ids are merged at the end.
template <class Id>
class BatchEncoder {
   public:
    BatchEncoder(const Trie& trie, const Byte* const* texts, const size_t* sizes, size_t count, size_t total,
                 int threads)
        : trie_(trie), threads_(threads) {
        const size_t group_size =
            std::min(std::max(total / (8 * static_cast<size_t>(threads)), size_t{1} << 15), MAX_GROUP_BYTES);
        for (size_t i = 0; i < count; i++) {
            const Byte* position = texts[i];
            const Byte* end = texts[i] + sizes[i];
            do {
                const size_t size = std::min(static_cast<size_t>(end - position), group_size);
                if (groups_.empty() || total_bytes_ - groups_.back().first_id >= group_size)
                    groups_.push_back({pieces_.size(), total_bytes_});
                pieces_.push_back({position, position + size, end});
                total_bytes_ += size;
                position += size;
            } while (position < end);
        }
        results_.resize(pieces_.size());
        ids_.reset(new Id[total_bytes_]);
    }

    // Writes the ids to `out`. ends[i]: the number of ids up to the end of text i.
    size_t run(Id* out, size_t* ends) {
        std::vector<std::thread> workers;
        workers.reserve(static_cast<size_t>(threads_));
        try {
            for (int i = 1; i < threads_; i++) workers.emplace_back([this] { encode_groups(); });
        } catch (const std::system_error&) {
            // The system provides no more threads; the existing ones do all the work.
        }
        encode_groups();
        for (std::thread& worker : workers) worker.join();
        return merge_pieces(out, ends);
    }

   private:
    static constexpr size_t MAX_GROUP_BYTES = 1 << 20;

    struct Group {
        size_t first_piece;
        size_t first_id;  // index into `ids_`, which has room for one id per byte
    };

    void encode_groups() noexcept {
        for (size_t i; (i = next_group_.fetch_add(1)) < groups_.size();) {
            const size_t first = groups_[i].first_piece;
            const size_t end = i + 1 < groups_.size() ? groups_[i + 1].first_piece : pieces_.size();
            encode(trie_, &pieces_[first], end - first, ids_.get() + groups_[i].first_id, &results_[first]);
        }
    }

    size_t merge_pieces(Id* out, size_t* ends) const {
        IdWriter<Id> writer{out};
        const Byte* position = nullptr;
        for (size_t group = 0, i = 0; group < groups_.size(); group++) {
            const Id* ids = ids_.get() + groups_[group].first_id;
            const size_t end = group + 1 < groups_.size() ? groups_[group + 1].first_piece : pieces_.size();
            for (; i < end; ids += results_[i++].count) {
                const Piece& piece = pieces_[i];
                if (i == 0 || pieces_[i - 1].end == pieces_[i - 1].limit) position = piece.begin;
                const TokenRun<Id> run{piece.begin, results_[i].reached, ids, results_[i].count};
                position = merge_run(trie_, run, position, piece.limit, writer);
                if (piece.end == piece.limit) *ends++ = writer.count;
            }
        }
        return writer.count;
    }

    const Trie& trie_;
    int threads_;
    std::vector<Piece> pieces_;
    std::vector<Group> groups_;
    std::vector<PieceResult> results_;
    std::unique_ptr<Id[]> ids_;
    size_t total_bytes_ = 0;
    std::atomic<size_t> next_group_{0};
};

template <class Id>
size_t encode_batch(const Trie& trie, const Byte* const* texts, const size_t* sizes, size_t count, size_t total,
                    int threads, void* out, size_t* ends) {
    Id* ids = static_cast<Id*>(out);
    if (threads > 1) return BatchEncoder<Id>(trie, texts, sizes, count, total, threads).run(ids, ends);
    std::vector<Piece> pieces(count);
    std::vector<PieceResult> results(count);
    for (size_t i = 0; i < count; i++) pieces[i] = {texts[i], texts[i] + sizes[i], texts[i] + sizes[i]};
    const size_t id_count = encode(trie, pieces.data(), count, ids, results.data());
    size_t end = 0;
    for (size_t i = 0; i < count; i++) {
        end += results[i].count;
        ends[i] = end;
    }
    return id_count;
}

// The size of all tokens in bytes, or -1 - i if id i is invalid.
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
        const auto id = static_cast<uint32_t>(ids[i]);
        const uint32_t length = trie.length(id);
        const bool copy_fixed_size = length <= PADDING && end - out >= static_cast<ptrdiff_t>(PADDING);
        std::memcpy(out, trie.text.data() + trie.starts[id], copy_fixed_size ? PADDING : length);
        out += length;
    }
    return size;
}

}  // namespace

// The functions that build a list, named as in Python's stable interface.
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

// text: the tokens in id order, concatenated. lengths: the length of each token. Returns null if a single byte is not a
// token, if there are too many tokens, or if memory is exhausted.
FLEDGE_API Trie* fledge_trie_new(const uint8_t* text, const uint8_t* lengths, size_t count) {
    try {
        auto trie = std::make_unique<Trie>();
        return build_trie(*trie, text, lengths, count) ? trie.release() : nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

FLEDGE_API void fledge_trie_free(Trie* trie) { delete trie; }

// The number of ids of a text. They are written to `out`, which must hold `n` ids, unless it is null.
FLEDGE_API int64_t fledge_trie_encode(const Trie* trie, const uint8_t* text, size_t n, void* out, size_t capacity) {
    if (out && capacity < n) return BUFFER_TOO_SMALL;
    return static_cast<int64_t>(encode_text(*trie, text, n, out));
}

// Writes the ids of all texts, concatenated, to `out`, which must hold one id per byte. ends[i]: the number of ids up
// to the end of text i. Returns the number of ids, -1 if `out` is too small, or -2 if memory is exhausted.
FLEDGE_API int64_t fledge_trie_encode_batch(const Trie* trie, const uint8_t* const* texts, const size_t* sizes,
                                            size_t count, void* out, size_t capacity, size_t* ends, int threads) {
    constexpr size_t MIN_BYTES_PER_THREAD = 1 << 16;
    size_t total = 0;
    for (size_t i = 0; i < count; i++) total += sizes[i];
    if (capacity < total) return BUFFER_TOO_SMALL;
    threads = static_cast<int>(std::min(static_cast<size_t>(std::max(threads, 1)), 1 + total / MIN_BYTES_PER_THREAD));
    try {
        const auto encode_all = has_wide_ids(*trie) ? encode_batch<uint32_t> : encode_batch<uint16_t>;
        return static_cast<int64_t>(encode_all(*trie, texts, sizes, count, total, threads, out, ends));
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
}

// The size in bytes of the text of `ids` (2, 4 or, signed, 8 bytes each). The text is written to `out` if it fits into
// `capacity`. Returns -1 - i if id i is outside the vocabulary.
FLEDGE_API int64_t fledge_trie_decode(const Trie* trie, const void* ids, int id_bytes, size_t n, uint8_t* out,
                                      size_t capacity) {
    if (id_bytes == 2) return decode(*trie, static_cast<const uint16_t*>(ids), n, out, capacity);
    if (id_bytes == 4) return decode(*trie, static_cast<const uint32_t*>(ids), n, out, capacity);
    return decode(*trie, static_cast<const int64_t*>(ids), n, out, capacity);
}

// A list of ids that one of the encode functions has written. The caller must hold the GIL.
//
// The list starts as a repeated element because set_item reads the item that it replaces. In a new list, reading
// untouched memory and then writing to it makes the system fault twice on every page (10 ns per id instead of 7 for a
// long list).
FLEDGE_API void* fledge_trie_list(const Trie* trie, const void* ids, size_t n, const fledge_list_calls* calls) {
    void* list = calls->repeat(calls->seed, static_cast<ptrdiff_t>(n));
    if (!list) return nullptr;
    for (size_t i = 0; i < n; i++) {
        const uint32_t id =
            has_wide_ids(*trie) ? static_cast<const uint32_t*>(ids)[i] : static_cast<const uint16_t*>(ids)[i];
        calls->incref(calls->numbers[id]);
        calls->set_item(list, static_cast<ptrdiff_t>(i), calls->numbers[id]);
    }
    return list;
}

// The ids of a text as a list. The caller must hold the GIL. The GIL is released while a long text is encoded.
FLEDGE_API void* fledge_trie_encode_list(const Trie* trie, const uint8_t* text, size_t n,
                                         const fledge_list_calls* calls) {
    if (n <= SMALL_TEXT) {
        uint32_t ids[SMALL_TEXT];
        return fledge_trie_list(trie, ids, encode_text(*trie, text, n, ids), calls);
    }
    const std::unique_ptr<uint32_t[]> ids(new (std::nothrow) uint32_t[has_wide_ids(*trie) ? n : n / 2 + 1]);
    if (!ids) return calls->no_memory();
    void* thread_state = calls->save_thread();
    const size_t count = encode_text(*trie, text, n, ids.get());
    calls->restore_thread(thread_state);
    return fledge_trie_list(trie, ids.get(), count, calls);
}
