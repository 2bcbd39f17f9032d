// Merged groups (core/merged.h) as what stores weights sees them.
#pragma once

#include "../core/merged.h"

namespace conv2d_ext::tma {

// Channels and filters of a group that is merged with others; none is if they are 0.
struct OwnGroup {
  int32_t C = 0, K = 0, all_K = 0;

  OwnGroup() = default;
  OwnGroup(Problem const& given, Problem const& merged) {
    if (merged.groups != given.groups) {
      C = int32_t(given.C_per_group()), K = int32_t(given.K_per_group()), all_K = int32_t(given.K);
    }
  }
  // How many of `most` filters of merged groups exist.
  __device__ int filters(int group, int most) const { return C == 0 ? most : min(most, all_K - group * most); }
  // Filter k's channels begin here.
  __device__ int first(int k) const { return C == 0 ? 0 : k / K * C; }
  __device__ bool has(int k, int c) const { return C == 0 || unsigned(c - first(k)) < unsigned(C); }
  // Does a filter of [k, k + filters) have a channel of [c, c + channels)?
  __device__ bool meets(int k, int filters, int c, int channels) const {
    return C == 0 || (first(k) < c + channels && c < first(k + filters - 1) + C);
  }
};

}  // namespace conv2d_ext::tma
