// How a drafter mixes the target's feature with the token that follows it: the twins of drafters/dgf.py and linear_fusion.py.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace dovetail {

struct Fusion {
  Packed feature;           // W1 [hidden, hidden]; where not gated: the one matrix [hidden, 2 * hidden], embedding first
  Packed token;             // W2 [hidden, hidden], of the gated fusion as all below
  Packed gate;              // Wz [hidden, 2 * hidden], feature branch first
  const float* token_norm;  // [hidden]
  const float* bias;        // [hidden], of the linear fusion
  int32_t gated;
  float epsilon;
};

// Its memory is kept from call to call. One call at a time.
class Fuser {
 public:
  // features and embeddings [rows, hidden] -> out [rows, hidden].
  void run(Pool& pool, const Fusion& fusion, const float* features, const float* embeddings, int64_t rows, float* out);

 private:
  void gated(Pool& pool, const Fusion& fusion, const float* features, const float* embeddings, int64_t rows, float* out);

  Workspace workspace_;
  std::vector<float> normal_, joined_, gate_;
};

}  // namespace dovetail
