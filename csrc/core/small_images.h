// small_images_wgrad.cuh: wgrad of 3x3 filters over one small image in strict float32, whose weights are most of its
// bytes. What its row takes and costs, and what the launcher shares with the planner.
#pragma once

#include <cstdint>

#include "row.h"

namespace conv2d_ext {

constexpr bool is_small_images(Row const& row) {
  return row.family == Family::pixels && row.variant == Variant::halo && row.op == Op::wgrad;
}

inline constexpr int kSmallFilters = 32, kSmallChannels = 16, kSmallPitch = kSmallFilters + 4;  // of a block
inline constexpr int64_t kSmallPixels = 64;  // of the image: a thread's chain

// In shared memory: the pixels that an image's taps meet, channel by channel, and y's, or the weights on their way out.
struct SmallImage {
  int64_t H, W, channel, bytes;
  constexpr explicit SmallImage(Problem const& p)
      : H(p.P() + 2),
        W(p.Q() + 2),
        channel(H * W | 1),
        bytes(4 * max64(kSmallChannels * ((channel + 3) / 4 * 4) + p.P() * p.Q() * kSmallPitch,
                        kSmallFilters * (kSmallChannels * 9 + 4))) {}
};

constexpr bool small_images_supports(Problem const& p) {
  if (p.dtype != DType::f32 || p.groups != 1 || p.R != 3 || p.S != 3) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.N != 1 || p.C < 1 || p.K < 1 || p.P() < 1 || p.Q() < 1 || p.K > 1 << 20) return false;
  if (p.P() > kSmallPixels || p.Q() > kSmallPixels || p.P() * p.Q() > kSmallPixels) return false;
  return SmallImage(p).bytes <= 72 * 1024;
}

// As measured (26 layers): loads and stores that nothing hides, the pixels of up to four blocks an SM, and of those
// behind them.
constexpr Estimate small_images_estimate(Problem const& p, Device const& d) {
  double const blocks = double(ceil_div(p.K, kSmallFilters) * ceil_div(p.C, kSmallChannels)) / d.sm_count;
  double const beside = blocks < 1 ? 1 : blocks < 4 ? blocks : 4, behind = blocks > 4 ? blocks / 4 - 1 : 0;
  double const pixels = double(p.P() * p.Q());
  return {7700 + pixels * (140 + 33 * beside) + behind * (2500 + pixels * 260), 1};
}

}  // namespace conv2d_ext
