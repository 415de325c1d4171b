// Best-first growth of one tree by cumulative draft log-probability: the twin of drafters/proposal.py, TreeGrowth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dovetail {

// `rows`: of the target's verify pass, the root included; `top_k`: children of a node, and nodes expanded in a level;
// `depth`: expansions after the first level.
struct Budget {
  int32_t rows;
  int32_t top_k;
  int32_t depth;
};

struct Node {
  int64_t token_id;
  int32_t parent;  // -1: the root
  int32_t depth;
  float log_prob;
  double score;  // of the path
};

class Growth {
 public:
  explicit Growth(const Budget& budget) : budget_(budget) {}

  // Adds the children of one expanded node (-1: the root); `end_level` follows the last of a level.
  void add(int32_t parent, const int64_t* token_ids, const float* log_probs, int64_t count);

  // Ranks what the level added and drops what is not among the best `rows - 1`.
  void end_level();

  // Up to top_k nodes of the newest level, best first, that can still have a child among the nodes kept.
  std::vector<int32_t> beam() const;

  // The best `rows - 1` nodes in level order.
  std::vector<int32_t> kept() const;

  const Node& node(int32_t i) const { return nodes_[static_cast<size_t>(i)]; }

 private:
  // The order of nodes: the larger score, among equals the shallower, then the earlier node.
  bool before(int32_t a, int32_t b) const;

  Budget budget_;
  std::vector<Node> nodes_;
  std::vector<int32_t> best_;
  size_t level_begin_ = 0;  // first node of the newest level
  size_t level_end_ = 0;
};

}  // namespace dovetail
