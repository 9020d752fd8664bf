// Builds the trie: sorts the tokens, creates the nodes level by level, then assigns an index to every node.
#include <algorithm>
#include <array>
#include <bit>

#include "tokenizer/trie.h"

namespace fledge::trie {
namespace {

// A node without an index. Its tokens are [first_token, last_token) of the sorted tokens.
struct BuildNode {
    uint32_t first_token;
    uint32_t last_token;
    uint32_t first_child = 0;  // index into the list of build nodes
    uint32_t child_count = 0;
    uint32_t longest_token = 0;   // the longest token on the path to this node
    uint32_t longest_length = 0;  // and its length
    uint32_t depth = 0;
    uint32_t base = LEAF_BASE;
    uint32_t index = 0;
    Byte label = 0;
};

struct SortedToken {
    uint64_t prefix;  // the first eight bytes, as a number with the same order
    uint32_t id;
};

std::vector<SortedToken> sort_tokens(const Trie& trie) {
    std::vector<SortedToken> tokens;
    tokens.reserve(trie.count());
    for (uint32_t id = 0; id < trie.count(); id++) {
        const uint32_t length = trie.length(id);
        const Byte* token = trie.text.data() + trie.starts[id];
        uint64_t prefix = 0;
        for (uint32_t i = 0; i < 8; i++) prefix = prefix << 8 | (i < length ? token[i] : 0);
        if (length) tokens.push_back({prefix, id});
    }
    std::sort(tokens.begin(), tokens.end(), [&](const SortedToken& a, const SortedToken& b) {
        if (a.prefix != b.prefix) return a.prefix < b.prefix;
        const uint32_t a_length = trie.length(a.id);
        const uint32_t b_length = trie.length(b.id);
        const Byte* text = trie.text.data();
        const int order = std::memcmp(text + trie.starts[a.id], text + trie.starts[b.id], std::min(a_length, b_length));
        if (order) return order < 0;
        return a_length != b_length ? a_length < b_length : a.id < b.id;
    });
    return tokens;
}

// All nodes, level by level from the root. The children of a node are adjacent.
std::vector<BuildNode> build_nodes(const Trie& trie) {
    const std::vector<SortedToken> tokens = sort_tokens(trie);
    std::vector<BuildNode> tree;
    tree.reserve(2 * tokens.size() + 1);
    tree.push_back({0, static_cast<uint32_t>(tokens.size())});
    for (size_t i = 0; i < tree.size(); i++) {
        BuildNode node = tree[i];
        const uint32_t depth = node.depth;
        for (; node.first_token < node.last_token && trie.length(tokens[node.first_token].id) == depth;
             node.first_token++) {
            node.longest_token = tokens[node.first_token].id;
            node.longest_length = depth;
        }
        node.first_child = static_cast<uint32_t>(tree.size());
        auto next_byte = [&](uint32_t token) { return trie.text[trie.starts[tokens[token].id] + depth]; };
        for (uint32_t begin = node.first_token, end; begin < node.last_token; begin = end) {
            for (end = begin + 1; end < node.last_token && next_byte(end) == next_byte(begin);) end++;
            tree.push_back(
                {begin, end, 0, 0, node.longest_token, node.longest_length, depth + 1, LEAF_BASE, 0, next_byte(begin)});
        }
        node.child_count = static_cast<uint32_t>(tree.size()) - node.first_child;
        tree[i] = node;
    }
    return tree;
}

// 256 node indices: which ones are used, and which bases in this block are used.
struct Block {
    std::array<uint64_t, 4> used_indices{};
    std::array<uint64_t, 4> used_bases{};
    uint32_t free_count = BLOCK;
    uint32_t failures = 0;

    static bool get(const std::array<uint64_t, 4>& bits, uint32_t i) { return bits[i / 64] >> (i % 64) & 1; }
    static void set(std::array<uint64_t, 4>& bits, uint32_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); }

    bool fits(uint32_t base, const BuildNode* children, uint32_t count) const {
        if (get(used_bases, base)) return false;
        for (uint32_t i = 1; i < count; i++)
            if (get(used_indices, base ^ children[i].label)) return false;
        return true;
    }

    // The first base at which all these children fit, or BLOCK.
    uint32_t find_base(const BuildNode* children, uint32_t count) const {
        for (uint32_t word = 0; word < 4 && count <= free_count; word++)
            for (uint64_t open = ~used_indices[word]; open; open &= open - 1) {
                const uint32_t base = (word * 64 + static_cast<uint32_t>(std::countr_zero(open))) ^ children[0].label;
                if (fits(base, children, count)) return base;
            }
        return BLOCK;
    }
};

// Assigns a base to every node with children, and so an index to every child.
class NodePlacer {
   public:
    explicit NodePlacer(std::vector<BuildNode>& tree) : tree_(tree) {
        place_root();
        // First the nodes with several children, level by level, so that frequently visited nodes are close together.
        // Then the chains of single children fill the gaps, each from its top to its end, so that the nodes of a chain
        // are mostly adjacent.
        for (size_t i = 1; i < tree.size(); i++)
            if (tree[i].child_count > 1) place_siblings(tree[i]);
        first_open_block_ = 0;
        for (size_t i = 0; i < tree.size(); i++)
            if (tree[i].child_count != 1 || i == 0)
                for (uint32_t k = 0; k < tree[i].child_count; k++) place_chain(tree[i].first_child + k);
    }

    // An unused node gets a label for which its base would be an unused base, so no step mistakes it for a child. A
    // block with an unused node has an unused base, because every base of the block uses at least one node of the
    // block.
    std::vector<Node> make_nodes() const {
        std::vector<Node> nodes(blocks_.size() * BLOCK);
        for (size_t block = 0; block < blocks_.size(); block++) {
            uint32_t unused_base = 0;
            while (unused_base < BLOCK - 1 && Block::get(blocks_[block].used_bases, unused_base)) unused_base++;
            for (uint32_t i = 0; i < BLOCK; i++) nodes[block * BLOCK + i] = i ^ unused_base;
        }
        for (size_t i = 1; i < tree_.size(); i++) {
            const BuildNode& node = tree_[i];
            nodes[node.index] = make_node(node.label, node.depth - node.longest_length, node.longest_token, node.base);
        }
        return nodes;
    }

   private:
    static constexpr uint32_t MAX_FAILURES = 4;  // after these, only chains are placed in a block

    void place_root() {
        blocks_.emplace_back();
        assign(tree_[0], 0, ROOT_BASE);
        Block::set(blocks_[0].used_bases, LEAF_BASE);
        first_open_block_ = 1;
    }

    void place_siblings(BuildNode& parent) {
        const BuildNode* children = &tree_[parent.first_child];
        for (size_t block = first_open_block_;; block++) {
            if (block == blocks_.size()) blocks_.emplace_back();
            if (blocks_[block].failures >= MAX_FAILURES) {
                if (block == first_open_block_) first_open_block_++;
                continue;
            }
            const uint32_t base = blocks_[block].find_base(children, parent.child_count);
            if (base < BLOCK) {
                assign(parent, block, base);
                return;
            }
            blocks_[block].failures++;
        }
    }

    void place_chain(uint32_t node) {
        for (; tree_[node].child_count == 1; node = tree_[node].first_child)
            for (size_t block = first_open_block_;; block++) {
                if (block == blocks_.size()) blocks_.emplace_back();
                const uint32_t base = blocks_[block].find_base(&tree_[tree_[node].first_child], 1);
                if (base < BLOCK) {
                    assign(tree_[node], block, base);
                    break;
                }
                if (block == first_open_block_ && blocks_[block].failures++ >= MAX_FAILURES) first_open_block_++;
            }
    }

    void assign(BuildNode& parent, size_t block_index, uint32_t base) {
        Block& block = blocks_[block_index];
        parent.base = static_cast<uint32_t>(block_index * BLOCK) + base;
        Block::set(block.used_bases, base);
        for (uint32_t i = 0; i < parent.child_count; i++) {
            BuildNode& child = tree_[parent.first_child + i];
            child.index = parent.base ^ child.label;
            Block::set(block.used_indices, child.index % BLOCK);
        }
        block.free_count -= parent.child_count;
    }

    std::vector<BuildNode>& tree_;
    std::vector<Block> blocks_;
    size_t first_open_block_ = 0;  // the blocks before it are full
};

std::vector<Node> make_pair_nodes(const std::vector<Node>& nodes) {
    std::vector<Node> pair_nodes(1 << 16);
    for (uint32_t first = 0; first < 256; first++)
        for (uint32_t second = 0; second < 256; second++) {
            const Byte pair[2] = {static_cast<Byte>(first), static_cast<Byte>(second)};
            const Node next = nodes[child_index(nodes[first], pair[1])];
            pair_nodes[pair_index(pair)] =
                label(next) == second ? next : make_node(first, 1, token_id(nodes[first]), LEAF_BASE);
        }
    return pair_nodes;
}

}  // namespace

bool build_trie(Trie& trie, const Byte* text, const Byte* lengths, size_t count) {
    if (count > MAX_INDEX) return false;
    trie.starts.resize(count + 1);
    for (size_t id = 0; id < count; id++) trie.starts[id + 1] = trie.starts[id] + lengths[id];
    trie.text.assign(text, text + trie.starts[count]);
    trie.text.resize(trie.text.size() + PADDING);
    std::vector<BuildNode> tree = build_nodes(trie);
    if (tree[0].child_count != 256) return false;
    trie.nodes = NodePlacer(tree).make_nodes();
    if (trie.nodes.size() > MAX_INDEX) return false;
    for (uint32_t byte = 0; byte < 256; byte++)
        if (backtrack(trie.nodes[byte])) return false;
    trie.pair_nodes = make_pair_nodes(trie.nodes);
    return true;
}

}  // namespace fledge::trie
