#include "growth.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dovetail {

void Growth::add(int32_t parent, const int64_t* token_ids, const float* log_probs, int64_t count) {
  const double base = parent < 0 ? 0.0 : node(parent).score;
  const int32_t depth = parent < 0 ? 1 : node(parent).depth + 1;
  for (int64_t i = 0; i < count; ++i) {
    // What is not a number is never drafted, and rounding must not lift a child above its parent.
    const double value = std::isnan(log_probs[i]) ? -std::numeric_limits<double>::infinity() : std::min<double>(log_probs[i], 0.0);
    nodes_.push_back({token_ids[i], parent, depth, log_probs[i], base + value});
  }
}

bool Growth::before(int32_t a, int32_t b) const {
  const Node& first = node(a);
  const Node& second = node(b);
  if (first.score != second.score) return first.score > second.score;
  return first.depth != second.depth ? first.depth < second.depth : a < b;
}

void Growth::end_level() {
  level_begin_ = level_end_;
  level_end_ = nodes_.size();
  for (size_t i = level_begin_; i < level_end_; ++i) best_.push_back(static_cast<int32_t>(i));
  std::sort(best_.begin(), best_.end(), [this](int32_t a, int32_t b) { return before(a, b); });
  // What has fallen out cannot return, since nodes are only ever added.
  best_.resize(std::min<size_t>(best_.size(), static_cast<size_t>(budget_.rows - 1)));
}

std::vector<int32_t> Growth::beam() const {
  std::vector<int32_t> beam;
  for (const int32_t i : best_) {
    if (static_cast<size_t>(i) >= level_begin_ && beam.size() < static_cast<size_t>(budget_.top_k)) beam.push_back(i);
  }
  return beam;
}

std::vector<int32_t> Growth::kept() const {
  std::vector<int32_t> kept = best_;
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace dovetail
