// What the blocks of an SM take that begin as others end.
#pragma once

#include <cstdint>

namespace conv2d_ext {

// `blocks` of an SM in rounds of as many as it holds `together`; round_ns(n): what n at a time take, at least `alone`.
template <typename Round>
constexpr double in_rounds(int64_t blocks, int64_t together, double alone, Round round_ns) {
  int64_t const rest = blocks % together;
  double const last = double(rest) > alone ? double(rest) : alone;
  return double(blocks / together) * round_ns(double(together)) + (rest > 0 ? round_ns(last) : 0);
}

}  // namespace conv2d_ext
