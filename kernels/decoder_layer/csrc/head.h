// What is read off an LM head: the best token of each row, or the best few with their log-probabilities.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace dovetail {

// Its memory is kept from call to call. One call at a time.
class Head {
 public:
  // The id and value of the largest of each row's products, without the matrix of all of them.
  void argmax(Pool& pool, const Packed& head, const float* x, int64_t rows, int64_t* ids, float* logits);

  // The k (at most head.out) best of each row, best first, the smaller id first among equals: ids and log_probs [rows, k].
  void top_k(Pool& pool, const Packed& head, const float* x, int64_t rows, int64_t k, int64_t* ids, float* log_probs);

 private:
  Workspace workspace_;
  std::vector<float> logits_;
};

}  // namespace dovetail
