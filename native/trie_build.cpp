// Making a trie: sort the tokens, walk through them level by level, then find every node a place.
#include <algorithm>
#include <array>
#include <bit>

#include "trie.h"

namespace fledge::trie {
namespace {

// A node before it has a place. Its tokens are those from `first` to `last` in sorted order.
struct Branch {
    uint32_t first, last;
    uint32_t children = 0, count = 0;  // where its children begin among the branches, and how many they are
    uint32_t longest = 0;              // the longest token on the way here,
    uint32_t covers = 0;               // and how many bytes of the way that is
    uint32_t depth = 0;
    uint32_t base = LEAF_BASE, slot = 0;
    Byte label = 0;
};

struct Sorted {
    uint64_t head;  // the first eight bytes, as a number that sorts like them
    uint32_t id;
};

std::vector<Sorted> sort_tokens(const Trie& trie) {
    std::vector<Sorted> order;
    order.reserve(trie.count());
    for (uint32_t id = 0; id < trie.count(); id++) {
        const uint32_t length = trie.length(id);
        const Byte* token = trie.text.data() + trie.starts[id];
        uint64_t head = 0;
        for (uint32_t i = 0; i < 8; i++) head = head << 8 | (i < length ? token[i] : 0);
        if (length) order.push_back({head, id});
    }
    std::sort(order.begin(), order.end(), [&](const Sorted& a, const Sorted& b) {
        if (a.head != b.head) return a.head < b.head;
        const uint32_t na = trie.length(a.id), nb = trie.length(b.id);
        const Byte* text = trie.text.data();
        const int rest = std::memcmp(text + trie.starts[a.id], text + trie.starts[b.id], std::min(na, nb));
        if (rest) return rest < 0;
        return na != nb ? na < nb : a.id < b.id;
    });
    return order;
}

// All nodes, level by level from the root; the children of one are neighbours.
std::vector<Branch> grow(const Trie& trie) {
    const std::vector<Sorted> order = sort_tokens(trie);
    std::vector<Branch> tree;
    tree.reserve(2 * order.size() + 1);
    tree.push_back({0, static_cast<uint32_t>(order.size())});
    for (size_t i = 0; i < tree.size(); i++) {
        Branch here = tree[i];
        const uint32_t depth = here.depth;
        for (; here.first < here.last && trie.length(order[here.first].id) == depth; here.first++)
            here.longest = order[here.first].id, here.covers = depth;
        here.children = static_cast<uint32_t>(tree.size());
        auto next = [&](uint32_t at) { return trie.text[trie.starts[order[at].id] + depth]; };
        for (uint32_t from = here.first, to; from < here.last; from = to) {
            for (to = from + 1; to < here.last && next(to) == next(from);) to++;
            tree.push_back({from, to, 0, 0, here.longest, here.covers, depth + 1, LEAF_BASE, 0, next(from)});
        }
        here.count = static_cast<uint32_t>(tree.size()) - here.children;
        tree[i] = here;
    }
    return tree;
}

// 256 places: which are taken, and which bases in this block are.
struct Block {
    std::array<uint64_t, 4> taken{}, based{};
    uint32_t free = BLOCK, failures = 0;

    static bool get(const std::array<uint64_t, 4>& bits, uint32_t i) { return bits[i / 64] >> (i % 64) & 1; }
    static void set(std::array<uint64_t, 4>& bits, uint32_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); }

    bool fits(uint32_t base, const Branch* children, uint32_t count) const {
        if (get(based, base)) return false;
        for (uint32_t i = 1; i < count; i++)
            if (get(taken, base ^ children[i].label)) return false;
        return true;
    }

    // The first base with room for these children, or BLOCK.
    uint32_t find(const Branch* children, uint32_t count) const {
        for (uint32_t word = 0; word < 4 && count <= free; word++)
            for (uint64_t open = ~taken[word]; open; open &= open - 1) {
                const uint32_t base = (word * 64 + static_cast<uint32_t>(std::countr_zero(open))) ^ children[0].label;
                if (fits(base, children, count)) return base;
            }
        return BLOCK;
    }
};

class Places {
   public:
    explicit Places(std::vector<Branch>& tree) : tree_(tree) {
        place_root();
        // Nodes with several children first, level by level: what is reached most lies together. Then the chains of
        // single children fill the holes, each from its top to its end, so that its nodes are mostly neighbours.
        for (size_t i = 1; i < tree.size(); i++)
            if (tree[i].count > 1) place_family(tree[i]);
        start_ = 0;
        for (size_t i = 0; i < tree.size(); i++)
            if (tree[i].count != 1 || i == 0)
                for (uint32_t k = 0; k < tree[i].count; k++) place_chain(tree[i].children + k);
    }

    // A free record gets a label for which its base would be nobody's: no step takes it for a child. A block with a
    // free record has such a base, because every base there has taken a record at least.
    std::vector<Record> records() const {
        std::vector<Record> nodes(blocks_.size() * BLOCK);
        for (size_t block = 0; block < blocks_.size(); block++) {
            uint32_t nobodys = 0;
            while (nobodys < BLOCK - 1 && Block::get(blocks_[block].based, nobodys)) nobodys++;
            for (uint32_t i = 0; i < BLOCK; i++) nodes[block * BLOCK + i] = i ^ nobodys;
        }
        for (size_t i = 1; i < tree_.size(); i++) {
            const Branch& it = tree_[i];
            nodes[it.slot] = record(it.label, it.depth - it.covers, it.longest, it.base);
        }
        return nodes;
    }

   private:
    static constexpr uint32_t PATIENCE = 4;  // failures until a block is left to the chains

    void place_root() {
        blocks_.emplace_back();
        settle(tree_[0], 0, ROOT_BASE);
        Block::set(blocks_[0].based, LEAF_BASE);
        start_ = 1;
    }

    void place_family(Branch& parent) {
        const Branch* children = &tree_[parent.children];
        for (size_t block = start_;; block++) {
            if (block == blocks_.size()) blocks_.emplace_back();
            if (blocks_[block].failures >= PATIENCE) {
                if (block == start_) start_++;
                continue;
            }
            const uint32_t base = blocks_[block].find(children, parent.count);
            if (base < BLOCK) return settle(parent, block, base);
            blocks_[block].failures++;
        }
    }

    void place_chain(uint32_t at) {
        for (; tree_[at].count == 1; at = tree_[at].children)
            for (size_t block = start_;; block++) {
                if (block == blocks_.size()) blocks_.emplace_back();
                const uint32_t base = blocks_[block].find(&tree_[tree_[at].children], 1);
                if (base < BLOCK) {
                    settle(tree_[at], block, base);
                    break;
                }
                if (block == start_ && blocks_[block].failures++ >= PATIENCE) start_++;
            }
    }

    void settle(Branch& parent, size_t block, uint32_t base) {
        Block& home = blocks_[block];
        parent.base = static_cast<uint32_t>(block * BLOCK) + base;
        Block::set(home.based, base);
        for (uint32_t i = 0; i < parent.count; i++) {
            Branch& it = tree_[parent.children + i];
            it.slot = parent.base ^ it.label;
            Block::set(home.taken, it.slot % BLOCK);
        }
        home.free -= parent.count;
    }

    std::vector<Branch>& tree_;
    std::vector<Block> blocks_;
    size_t start_ = 0;  // blocks before this one have no room
};

std::vector<Record> make_pairs(const std::vector<Record>& nodes) {
    std::vector<Record> pairs(1 << 16);
    for (uint32_t first = 0; first < 256; first++)
        for (uint32_t second = 0; second < 256; second++) {
            const Byte both[2] = {static_cast<Byte>(first), static_cast<Byte>(second)};
            const Record found = nodes[child(nodes[first], both[1])];
            pairs[pair_at(both)] = label(found) == second ? found : record(first, 1, id(nodes[first]), LEAF_BASE);
        }
    return pairs;
}

}  // namespace

bool build(Trie& trie, const Byte* text, const Byte* lengths, size_t count) {
    if (count > LARGEST) return false;
    trie.starts.resize(count + 1);
    for (size_t id = 0; id < count; id++) trie.starts[id + 1] = trie.starts[id] + lengths[id];
    trie.text.assign(text, text + trie.starts[count]);
    trie.text.resize(trie.text.size() + PADDING);
    std::vector<Branch> tree = grow(trie);
    if (tree[0].count != 256) return false;
    trie.nodes = Places(tree).records();
    if (trie.nodes.size() > LARGEST) return false;
    for (uint32_t byte = 0; byte < 256; byte++)
        if (back(trie.nodes[byte])) return false;
    trie.pairs = make_pairs(trie.nodes);
    return true;
}

}  // namespace fledge::trie
