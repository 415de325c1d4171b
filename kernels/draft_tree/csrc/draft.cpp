// A feature-level drafter at work: passes over committed positions, and whole trees for several slots in one call.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "encode.h"
#include "fusion.h"
#include "growth.h"
#include "head.h"
#include "layer.h"

namespace dovetail {

struct DraftModel {
  Fusion fusion;
  Packed head;              // [draft vocabulary, hidden]
  const Layer* layers;
  int64_t num_layers;
  const uint8_t* embedding;  // [vocabulary, hidden], bf16 or fp32
  const int64_t* draft_ids;  // [draft vocabulary], or null: all tokens in order
  const float* confidence;   // [hidden + 1]: weights and bias of the first child's acceptance, or null: rank by probability
  const float* cosine;       // [capacity, head_dim]
  const float* sine;
  int64_t capacity;  // rows of a slot
  int32_t embedding_bf16;
  CacheFormat slots_format;
  Slots slots;
};

// A committed slot whose tree is to be grown; `output` [hidden] is what the drafter predicted at its last position.
struct Root {
  const float* output;
  int32_t slot;
  int32_t length;
};

namespace {

// One tree between two levels.
struct Tree {
  Tree(const Root& its_root, const Budget& budget) : root(its_root), growth(budget) {}

  Root root;
  Growth growth;
  int32_t num_expanded = 0;
  std::vector<std::vector<uint8_t>> seen;  // for each expanded row, which expanded rows it sees
  std::vector<int32_t> row_of;             // node -> its expanded row, -1 where it has none
  std::vector<int32_t> output_of;          // node -> its row in the pass that expanded it
  std::vector<int32_t> beam;
  std::vector<uint8_t> mask;  // [beam, num_expanded] of the pass at hand
};

class Drafting {
 public:
  // Rows of a pass: outputs [rows, hidden] of features [rows, hidden] and the tokens that follow them.
  void forward(Pool& pool, const DraftModel& model, const std::vector<Segment>& segments, const std::vector<int64_t>& token_ids,
               const std::vector<int32_t>& positions, const float* features, std::vector<float>& outputs);

  void grow(Pool& pool, const DraftModel& model, std::vector<Tree>& trees, const Budget& budget);

 private:
  void rank(Pool& pool, const DraftModel& model, const float* outputs, int64_t rows, const Budget& budget);
  void rank_by_confidence(const DraftModel& model, const float* outputs, int64_t rows);
  void expand(Tree& tree, const DraftModel& model);

  Fuser fuser_;
  Runner runner_;
  Head head_;
  int64_t num_children_ = 0;
  std::vector<int64_t> child_ids_;
  std::vector<float> child_log_probs_;
  std::vector<float> embeddings_, features_, outputs_;
  std::vector<Segment> segments_;
  std::vector<int64_t> token_ids_;
  std::vector<int32_t> positions_;
  std::vector<const float*> parent_outputs_;
};

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

void read_embedding(const DraftModel& model, int64_t token_id, int64_t width, float* out) {
  if (model.embedding_bf16 == 0) {
    std::memcpy(out, model.embedding + token_id * width * 4, static_cast<size_t>(width) * 4);
    return;
  }
  const uint16_t* row = reinterpret_cast<const uint16_t*>(model.embedding) + token_id * width;
  for (int64_t i = 0; i < width; ++i) out[i] = bits_float(uint32_t{row[i]} << 16);
}

void Drafting::forward(Pool& pool, const DraftModel& model, const std::vector<Segment>& segments, const std::vector<int64_t>& token_ids,
                       const std::vector<int32_t>& positions, const float* features, std::vector<float>& outputs) {
  const size_t rows = token_ids.size();
  const int64_t width = model.head.in;
  embeddings_.resize(rows * width);
  outputs.resize(rows * width);
  for (size_t r = 0; r < rows; ++r) read_embedding(model, token_ids[r], width, embeddings_.data() + r * width);
  fuser_.run(pool, model.fusion, features, embeddings_.data(), static_cast<int64_t>(rows), outputs.data());
  const Pass pass{segments.data(), static_cast<int32_t>(segments.size()), static_cast<int32_t>(rows), positions.data(),
                  model.cosine, model.sine, model.layers[0].head_dim, 0, model.capacity, model.slots_format};
  runner_.run(pool, model.layers, model.num_layers, pass, model.slots, outputs.data());
}

// The children of `rows` outputs, into child_ids_ and child_log_probs_.
void Drafting::rank(Pool& pool, const DraftModel& model, const float* outputs, int64_t rows, const Budget& budget) {
  num_children_ = std::min<int64_t>(budget.top_k, model.head.out);
  child_ids_.resize(static_cast<size_t>(rows * num_children_));
  child_log_probs_.resize(child_ids_.size());
  head_.top_k(pool, model.head, outputs, rows, num_children_, child_ids_.data(), child_log_probs_.data());
  if (model.confidence != nullptr) rank_by_confidence(model, outputs, rows);
  if (model.draft_ids == nullptr) return;
  for (int64_t& id : child_ids_) id = model.draft_ids[id];
}

// The twin of drafters/growing_tree.py, by_confidence: log-probabilities of acceptance in place of the drafter's own.
void Drafting::rank_by_confidence(const DraftModel& model, const float* outputs, int64_t rows) {
  const int64_t width = model.head.in;
  constexpr double kSmallestRest = 1e-6;
  for (int64_t r = 0; r < rows; ++r) {
    double logit = model.confidence[width];
    for (int64_t i = 0; i < width; ++i) logit += static_cast<double>(outputs[r * width + i]) * model.confidence[i];
    const double accepted = -softplus(-logit), missed = -softplus(logit);
    float* log_probs = child_log_probs_.data() + r * num_children_;
    const double rest = std::log(std::max(-std::expm1(static_cast<double>(log_probs[0])), kSmallestRest));
    log_probs[0] = static_cast<float>(accepted);
    for (int64_t i = 1; i < num_children_; ++i) log_probs[i] = static_cast<float>(std::min(missed + log_probs[i] - rest, accepted));
  }
}

// Gives each node of the beam a row behind those of the levels before. It sees its ancestors and itself.
void Drafting::expand(Tree& tree, const DraftModel& model) {
  const int64_t width = model.head.in;
  const int32_t before = tree.num_expanded;
  const int32_t after = before + static_cast<int32_t>(tree.beam.size());
  tree.mask.assign(tree.beam.size() * static_cast<size_t>(after), 0);
  for (size_t i = 0; i < tree.beam.size(); ++i) {
    const Node& node = tree.growth.node(tree.beam[i]);
    std::vector<uint8_t> seen(static_cast<size_t>(after), 0);
    if (node.parent >= 0) {
      const std::vector<uint8_t>& above = tree.seen[static_cast<size_t>(tree.row_of[static_cast<size_t>(node.parent)])];
      std::copy(above.begin(), above.end(), seen.begin());
    }
    seen[static_cast<size_t>(before) + i] = 1;
    std::copy(seen.begin(), seen.end(), tree.mask.begin() + static_cast<int64_t>(i) * after);
    tree.seen.push_back(std::move(seen));
    const size_t at = static_cast<size_t>(tree.beam[i]);
    if (tree.row_of.size() <= at) {
      tree.row_of.resize(at + 1, -1);
      tree.output_of.resize(at + 1, -1);
    }
    const float* output = node.parent < 0 ? tree.root.output : outputs_.data() + tree.output_of[static_cast<size_t>(node.parent)] * width;
    parent_outputs_.push_back(output);
    tree.row_of[at] = before + static_cast<int32_t>(i);
    tree.output_of[at] = static_cast<int32_t>(token_ids_.size());
    token_ids_.push_back(node.token_id);
    positions_.push_back(tree.root.length + node.depth - 1);
  }
  tree.num_expanded = after;
  segments_.push_back({tree.root.slot, tree.root.length, after - before, after, tree.mask.data()});
}

void Drafting::grow(Pool& pool, const DraftModel& model, std::vector<Tree>& trees, const Budget& budget) {
  const int64_t width = model.head.in;
  features_.resize(trees.size() * width);
  for (size_t i = 0; i < trees.size(); ++i) std::copy_n(trees[i].root.output, width, features_.data() + i * width);
  rank(pool, model, features_.data(), static_cast<int64_t>(trees.size()), budget);
  std::vector<Tree*> growing;
  for (size_t i = 0; i < trees.size(); ++i) {
    trees[i].growth.add(-1, child_ids_.data() + i * num_children_, child_log_probs_.data() + i * num_children_, num_children_);
    trees[i].growth.end_level();
    growing.push_back(&trees[i]);
  }
  for (int level = 0; level < budget.depth; ++level) {
    segments_.clear();
    token_ids_.clear();
    positions_.clear();
    parent_outputs_.clear();
    std::erase_if(growing, [&](Tree* tree) {
      tree->beam = tree->growth.beam();
      const int64_t rows = tree->root.length + tree->num_expanded + static_cast<int64_t>(tree->beam.size());
      return tree->beam.empty() || rows > model.capacity;
    });
    if (growing.empty()) return;
    for (Tree* tree : growing) expand(*tree, model);
    features_.resize(parent_outputs_.size() * width);
    for (size_t r = 0; r < parent_outputs_.size(); ++r) std::copy_n(parent_outputs_[r], width, features_.data() + r * width);
    forward(pool, model, segments_, token_ids_, positions_, features_.data(), outputs_);
    rank(pool, model, outputs_.data(), static_cast<int64_t>(token_ids_.size()), budget);
    const int64_t* ids = child_ids_.data();
    const float* log_probs = child_log_probs_.data();
    for (Tree* tree : growing) {
      for (const int32_t node : tree->beam) {
        tree->growth.add(node, ids, log_probs, num_children_);
        ids += num_children_;
        log_probs += num_children_;
      }
      tree->growth.end_level();
    }
  }
}

Drafting& drafting() {  // one for the process: calls are serialised by the pool's lock
  static Drafting* const only = new Drafting;
  return *only;
}

}  // namespace
}  // namespace dovetail

#pragma GCC visibility push(default)
extern "C" {

using namespace dovetail;

// Extends slots by committed rows: for segment s, num_rows[s] rows behind the lengths[s] that its slot holds. features
// [rows, hidden] and token_ids [rows] lie behind one another; outputs [segments, hidden] gets the last row of each.
void dovetail_draft_observe(const DraftModel* model, const int32_t* slots, const int32_t* lengths, const int32_t* num_rows,
                            int64_t num_segments, const int64_t* token_ids, const float* features, float* const* outputs) {
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("observe", num_segments, std::accumulate(num_rows, num_rows + num_segments, int64_t{0})));
  std::vector<Segment> segments;
  std::vector<int32_t> positions;
  for (int64_t s = 0; s < num_segments; ++s) {
    for (int32_t first = 0; first < num_rows[s]; first += kBlock) {  // earlier rows count as prefix
      const int32_t rows = std::min<int32_t>(kBlock, num_rows[s] - first);
      segments.push_back({slots[s], lengths[s] + first, rows, rows, nullptr});
    }
    for (int32_t row = 0; row < num_rows[s]; ++row) positions.push_back(lengths[s] + row);
  }
  const std::vector<int64_t> ids(token_ids, token_ids + positions.size());
  std::vector<float> all;
  drafting().forward(pool, *model, segments, ids, positions, features, all);
  const int64_t width = model->head.in;
  for (int64_t s = 0, end = 0; s < num_segments; ++s) {
    end += num_rows[s];
    std::copy_n(all.data() + (end - 1) * width, width, outputs[s]);
  }
}

// Grows one tree for each root. Tree i's kept nodes go to places i * (rows - 1) and up of token_ids, parents (-1: the root)
// and log_probs, in level order; counts[i] says how many they are.
void dovetail_draft_trees(const DraftModel* model, const Root* roots, int64_t num_roots, const Budget* budget, int64_t* token_ids,
                          int32_t* parents, float* log_probs, int32_t* counts) {
  Pool& pool = Pool::instance();
  const Pool::Turn turn(pool, Pool::kind("trees", budget->rows, num_roots));
  std::vector<Tree> trees;
  for (int64_t i = 0; i < num_roots; ++i) trees.emplace_back(roots[i], *budget);
  drafting().grow(pool, *model, trees, *budget);
  for (int64_t i = 0; i < num_roots; ++i) {
    const std::vector<int32_t> kept = trees[i].growth.kept();
    const int64_t first = i * (budget->rows - 1);
    for (size_t place = 0; place < kept.size(); ++place) {
      const Node& node = trees[i].growth.node(kept[place]);
      const auto parent = std::lower_bound(kept.begin(), kept.end(), node.parent);
      token_ids[first + place] = node.token_id;
      parents[first + place] = node.parent < 0 ? -1 : static_cast<int32_t>(parent - kept.begin());
      log_probs[first + place] = node.log_prob;
    }
    counts[i] = static_cast<int32_t>(kept.size());
  }
}
}
#pragma GCC visibility pop
