// Packing and unpacking: a tensor in any strides <-> a dense one in channels_last whose channels, and for filters whose
// filters, are padded a group. A line is a pixel of an image (a tap of a filter), a word 4 bytes of its channels: a
// float or two halves.
//
// A block moves a tile of lines x words, kTile words in all, through shared memory: on the packed side a thread moves
// 16 bytes of channels, on the strided side a vector of pixels of one word's channels. Where channels lie closer than
// pixels (channels_last with odd channel counts) the strided side moves single elements instead; if such a tensor has
// no gaps, threads put 16 bytes of the one side together from 32 of the other. Images of an odd number of pixels, up to
// 17x17, and filters, whose channels follow each other without gaps, are moved as runs of channels.
#pragma once

#include <cstdint>

#include "gather.cuh"
#include "ptx.cuh"
#include "types.cuh"
#include "window.cuh"

namespace conv2d_ext::pack {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;            // an SM; what hides the latency
constexpr int kTile = 2048;           // words
constexpr int kMaxLines = kTile / 4;  // of a tile
constexpr int kMaxChannels = 64;
constexpr int kMaxRunVectors = 640;  // of a tile of runs
constexpr int kRunVectors = 512;     // of a tile of several images, at most

struct Tensor {
  void* plain;
  void* packed;
  int64_t lines;                     // N * H * W, padded filters included
  int64_t n, c, h, w;                // element strides of `plain`
  uint32_t pixels, W;                // H * W
  uint32_t group_n, group_n_packed;  // filters a group
  int32_t group_c, group_c_packed;   // channels a group
  int32_t channels;                  // packed, of all groups
  int32_t vector;                    // pixels that are moved at once, 0: not through shared memory
  int32_t log_lines, log_words;      // of a tile
  int32_t run_images;                // or filters of a tile of runs; 0: not moved so
  int32_t run_log_vectors;           // of a pixel's channels in such a tile
  int32_t step_h, step_w;            // unpacked pixels of a packed one, of which others are zeros; 0: all are packed
  uint32_t packed_pixels, packed_W;  // step_w > 0
  int32_t dense;                     // vectors a thread, if one group is channels_last without gaps; else 0
  uint32_t first_block, tiles_c;
};

// A launch's operands.
struct Params {
  Tensor tensor[3];  // with the bias
  int32_t count;
  bool early;  // the launch behind may begin before this one ends
};

// Shared memory, words. Every eighth line is followed by one more word: vectors of pixels meet few banks twice.
__device__ inline int word_at(int line, int word, int words) { return line * (words + 1) + line / 8 + word; }

struct Tables {
  int64_t line[kMaxLines];        // offset in `plain`, -1: padding
  int64_t channel[kMaxChannels];  // likewise
  int32_t from[kMaxLines];        // packed lines, if not all are there; -1: zeros
  alignas(16) uint32_t word[kTile + kMaxLines + kMaxLines / 8];
};

static_assert(kMaxRunVectors * 16 <= int(sizeof(Tables::word)));

// Words of V pixels from and to the vectors of their channels.
template <class T, int V>
__device__ void load_words(uint32_t (&words)[V], T const* plain, int64_t line, int64_t const* channel) {
  constexpr int per_word = 4 / int(sizeof(T));
  Vector<T, V> v[per_word];
#pragma unroll
  for (int e = 0; e < per_word; ++e) {
    v[e] = {};
    if (line >= 0 && channel[e] >= 0) v[e] = *reinterpret_cast<Vector<T, V> const*>(plain + line + channel[e]);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    words[i] = v[0].v[i];
    if constexpr (per_word == 2) words[i] |= uint32_t(v[1].v[i]) << 16;
  }
}

template <class T, int V>
__device__ void store_words(uint32_t const (&words)[V], T* plain, int64_t line, int64_t const* channel) {
  constexpr int per_word = 4 / int(sizeof(T));
#pragma unroll
  for (int e = 0; e < per_word; ++e) {
    Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.v[i] = T(words[i] >> (16 * e));
    if (line >= 0 && channel[e] >= 0) *reinterpret_cast<Vector<T, V>*>(plain + line + channel[e]) = v;
  }
}

template <class T, int V, bool unpack>
__device__ void plain_side(Tensor const& t, Tables& tables) {
  constexpr int per_word = 4 / int(sizeof(T)), units = kTile / V / kThreads;
  int const words = kTile >> t.log_lines;
  auto at = [&](int i, int& line, int& word) {
    int const first = (i * kThreads + int(threadIdx.x)) * V;
    line = first & ((1 << t.log_lines) - 1), word = first >> t.log_lines;
  };
  constexpr int together = units < 8 ? units : 8;  // loads that are under way at once
#pragma unroll 1
  for (int first = 0; first < units; first += together) {
    uint32_t moved[together][V];
    if constexpr (!unpack) {
#pragma unroll
      for (int i = 0; i < together; ++i) {
        int line, word;
        at(first + i, line, word);
        load_words<T, V>(moved[i], static_cast<T const*>(t.plain), tables.line[line], &tables.channel[word * per_word]);
      }
    }
#pragma unroll
    for (int i = 0; i < together; ++i) {
      int line, word;
      at(first + i, line, word);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        uint32_t& shared = tables.word[word_at(line + k, word, words)];
        if constexpr (unpack)
          moved[i][k] = shared;
        else
          shared = moved[i][k];
      }
      if constexpr (unpack)
        store_words<T, V>(moved[i], static_cast<T*>(t.plain), tables.line[line], &tables.channel[word * per_word]);
    }
  }
}

template <class T, bool unpack>
__device__ void plain_side(Tensor const& t, Tables& tables) {
  if (t.vector == 16 / int(sizeof(T)))
    plain_side<T, 16 / int(sizeof(T)), unpack>(t, tables);
  else if (t.vector == 8 / int(sizeof(T)))
    plain_side<T, 8 / int(sizeof(T)), unpack>(t, tables);
  else
    plain_side<T, 1, unpack>(t, tables);
}

// 16 packed bytes of single elements.
template <class T>
__device__ uint4 load_elements(Tensor const& t, Tables const& tables, int line, int channel) {
  constexpr int count = 16 / int(sizeof(T));
  Vector<T, count> v;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    int64_t const l = tables.line[line], c = tables.channel[channel + i];
    v.v[i] = l >= 0 && c >= 0 ? static_cast<T const*>(t.plain)[l + c] : T(0);
  }
  return *reinterpret_cast<uint4 const*>(&v);
}

// A tile's single elements; neighbouring threads have neighbouring channels.
template <class T>
__device__ void store_elements(Tensor const& t, Tables const& tables) {
  constexpr int per_word = 4 / int(sizeof(T));
  int const words = kTile >> t.log_lines, channels = words * per_word;
#pragma unroll 4
  for (int i = int(threadIdx.x); i < kTile * per_word; i += kThreads) {
    int const channel = i & (channels - 1), line = i / per_word >> t.log_words;
    int64_t const l = tables.line[line], c = tables.channel[channel];
    uint32_t const word = tables.word[word_at(line, channel / per_word, words)];
    if (l >= 0 && c >= 0) static_cast<T*>(t.plain)[l + c] = T(word >> (channel % per_word * 16));
  }
}

// A tile of runs: the same channels of `run_images` images or filters.
template <class T, bool unpack>
__device__ void move_runs(Tensor const& t, uint32_t block, uint32_t* words) {
  constexpr int vector = 16 / int(sizeof(T)), units = (kMaxRunVectors + kThreads - 1) / kThreads;
  T* const shared = reinterpret_cast<T*>(words);  // image, channel, pixel
  int const vectors = 1 << t.run_log_vectors, pixels = int(t.pixels), run = pixels * vectors, most = t.run_images * run;
  int64_t const first_n = int64_t(block / t.tiles_c) * t.run_images;
  int const first_c = int(block % t.tiles_c) * (vectors * vector);
  uint4 v[units];
  // The plain side of vector i; null: padding.
  auto plain = [&](int i) -> uint4* {
    int const image = i / run, at = first_c * pixels + i % run * vector;
    uint32_t const n = uint32_t(first_n) + uint32_t(image), group = n / t.group_n_packed,
                   in_group = n % t.group_n_packed;
    if (i >= most || (first_n + image) * pixels >= t.lines || in_group >= t.group_n || at >= t.group_c * pixels)
      return nullptr;
    return reinterpret_cast<uint4*>(static_cast<T*>(t.plain) + (int64_t(group) * t.group_n + in_group) * t.n + at);
  };
  // Likewise the packed side, and where the vector's first channel is in shared memory.
  auto packed = [&](int i, T*& from) -> uint4* {
    int const c = (i & (vectors - 1)) * vector, line_of_tile = i >> t.run_log_vectors;
    int const image = line_of_tile / pixels, pixel = line_of_tile % pixels;
    from = shared + (image * vectors * vector + c) * pixels + pixel;
    int64_t const line = (first_n + image) * pixels + pixel;
    if (i >= most || line >= t.lines || first_c + c >= t.channels) return nullptr;
    return reinterpret_cast<uint4*>(static_cast<T*>(t.packed) + line * t.channels + first_c + c);
  };
  auto each = [&](auto&& work) {
#pragma unroll
    for (int u = 0; u < units; ++u) work(u, u * kThreads + int(threadIdx.x));
  };
  T* from;
  each([&](int u, int i) {
    uint4 const* const address = unpack ? packed(i, from) : plain(i);
    v[u] = address != nullptr ? *address : make_uint4(0, 0, 0, 0);
  });
  each([&](int u, int i) {
    if constexpr (unpack) {
      if (packed(i, from) == nullptr) return;
      Vector<T, vector> const e = *reinterpret_cast<Vector<T, vector>*>(&v[u]);
#pragma unroll
      for (int j = 0; j < vector; ++j) from[j * pixels] = e.v[j];
    } else if (i < most) {
      reinterpret_cast<uint4*>(shared)[i] = v[u];
    }
  });
  __syncthreads();
  each([&](int, int i) {
    if constexpr (unpack) {
      if (uint4* const address = plain(i)) *address = reinterpret_cast<uint4*>(shared)[i];
    } else if (uint4* const address = packed(i, from)) {
      Vector<T, vector> e;
#pragma unroll
      for (int j = 0; j < vector; ++j) e.v[j] = from[j * pixels];
      *address = *reinterpret_cast<uint4*>(&e);
    }
  });
}

// A block's vectors of 16 bytes of a tensor in channels_last without gaps, on the side that is written. What they hold
// begins anywhere on the other side, so that two vectors of that are read, or one of each line. Offsets are elements
// from the block's first.
template <class T, bool unpack>
__device__ void move_dense(Tensor const& t, uint32_t block) {
  constexpr uint32_t size = sizeof(T), n = 16 / size, step = kThreads * n;
  uint32_t const channels = uint32_t(t.group_c), written = unpack ? channels : uint32_t(t.channels),
                 read = unpack ? uint32_t(t.channels) : channels;
  int64_t const lines = int64_t(t.group_n) * t.pixels, first = int64_t(block) * t.dense * step;
  int64_t begin = first, first_line = divide(begin, written);
  int64_t const first_read = first_line * read / n * n;
  T const* const from = static_cast<T const*>(unpack ? t.packed : t.plain) + first_read;
  T* const to = static_cast<T*>(unpack ? t.plain : t.packed) + first;
  // None behind the filters that there are.
  uint32_t const end = uint32_t(min(max(lines * read - first_read, int64_t(0)), int64_t(1) << 31)), whole = end / n;
  uint32_t const write_end = uint32_t(min((unpack ? lines : t.lines) * written - first, int64_t(1) << 31));
  auto vector = [=](uint32_t i, bool there = true) {
    return there && i < whole ? reinterpret_cast<uint4 const*>(from)[i] : make_uint4(0, 0, 0, 0);
  };

  uint32_t put = threadIdx.x * n, moved = uint32_t(begin) + put;
  uint32_t c = moved % written;  // where the vector begins in its line
  uint32_t line = uint32_t(first_line * read - first_read) + moved / written * read;
  uint32_t const step_c = step % written, step_line = step / written * read;
#pragma unroll 1
  for (int u = 0; u < t.dense; ++u, put += step) {
    if (put >= write_end) return;
    uint32_t const at = line + c, left = channels - c;  // of the line; wraps where that is padding
    bool const several = unpack && channels < n;
    uint4 const low = vector(at / n, !several), high = vector(at / n + 1, !several);
    uint4 const next = vector((line + read) / n, unpack && !several && left < n);
    uint4 v = window(low, high, at % n * size);
    if constexpr (unpack) {
      if (several) {  // of several lines, whose channels are their first 16 bytes
        constexpr uint32_t most = size == 2 ? 4 : 2;
        uint4 lines[most];
#pragma unroll
        for (uint32_t i = 0; i < most; ++i) lines[i] = vector((line + i * read) / n, i * channels < c + n);
        uint4 const none = make_uint4(0, 0, 0, 0);
        v = window(first_bytes(lines[0], int(channels * size)), none, c * size);
#pragma unroll
        for (uint32_t i = 1; i < most; ++i) {
          uint32_t const at_byte = (i * channels - c) * size;
          uint4 const more = window(none, first_bytes(lines[i], int(channels * size)), 16 - at_byte);
          if (at_byte < 16) v.x |= more.x, v.y |= more.y, v.z |= more.z, v.w |= more.w;
        }
      } else if (left < n) {  // the next line's first channels follow
        uint4 const behind = window(make_uint4(0, 0, 0, 0), next, (n - left) * size);
        v = first_bytes(v, int(left * size));
        v.x |= behind.x, v.y |= behind.y, v.z |= behind.z, v.w |= behind.w;
      }
      if (put + n <= write_end) {
        *reinterpret_cast<uint4*>(to + put) = v;
      } else {
        Vector<T, n> const e = *reinterpret_cast<Vector<T, n> const*>(&v);
#pragma unroll
        for (uint32_t i = 0; i < n; ++i)
          if (put + i < write_end) to[put + i] = e.v[i];
      }
    } else {
      if (at + n > whole * n && at < end) {  // what is left behind the last whole vector
        Vector<T, n> e;
#pragma unroll
        for (uint32_t i = 0; i < n; ++i) e.v[i] = at + i < end ? from[at + i] : T(0);
        v = *reinterpret_cast<uint4 const*>(&e);
      }
      *reinterpret_cast<uint4*>(to + put) = first_bytes(v, int(left) * int(size));
    }
    c += step_c, line += step_line;
    if (c >= written) c -= written, line += read;
  }
}

template <class T, bool unpack>
__global__ void __launch_bounds__(kThreads, kBlocks) pack_kernel(__grid_constant__ Params const p) {
  constexpr int per_word = 4 / int(sizeof(T));
  __shared__ Tables tables;
  if constexpr (!unpack)
    if (p.early) ptx::griddepcontrol_launch_dependents();
  int which = p.count - 1;
  while (blockIdx.x < p.tensor[which].first_block) --which;
  Tensor const& t = p.tensor[which];
  uint32_t const block = blockIdx.x - t.first_block;
  if (t.run_images > 0) {
    if constexpr (unpack) ptx::griddepcontrol_wait();
    move_runs<T, unpack>(t, block, tables.word);
    return;
  }
  if (t.dense > 0) {
    if constexpr (unpack) ptx::griddepcontrol_wait();
    move_dense<T, unpack>(t, block);
    return;
  }
  int const lines = 1 << t.log_lines, words = kTile >> t.log_lines;
  int64_t const first_line = int64_t(block / t.tiles_c) * lines;
  int const first_channel = int(block % t.tiles_c) * words * per_word;

  int64_t first_pixel = first_line;
  uint32_t const first_n = uint32_t(divide(first_pixel, t.pixels));
  for (int i = int(threadIdx.x); i < lines; i += kThreads) {
    uint32_t const moved = uint32_t(first_pixel) + uint32_t(i), pixel = moved % t.pixels;
    uint32_t const n = first_n + moved / t.pixels, group = n / t.group_n_packed, in_group = n % t.group_n_packed;
    bool const there = first_line + i < t.lines && in_group < t.group_n;
    tables.line[i] = there ? (int64_t(group) * t.group_n + in_group) * t.n + pixel / t.W * t.h + pixel % t.W * t.w : -1;
    if (!unpack || t.step_w == 0) continue;
    int const h = int(pixel / t.W), w = int(pixel % t.W);
    bool const met = h % t.step_h == 0 && w % t.step_w == 0;
    tables.from[i] = met ? int(n * t.packed_pixels) + h / t.step_h * int(t.packed_W) + w / t.step_w : -1;
  }
  if (threadIdx.x < words * per_word) {
    int const c = first_channel + int(threadIdx.x), group = c / t.group_c_packed, in_group = c % t.group_c_packed;
    bool const there = c < t.channels && in_group < t.group_c;
    tables.channel[threadIdx.x] = there ? (int64_t(group) * t.group_c + in_group) * t.c : -1;
  }
  __syncthreads();
  if constexpr (unpack) ptx::griddepcontrol_wait();
  if (!unpack && t.vector > 0) {
    plain_side<T, unpack>(t, tables);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kTile / 4 / kThreads; ++i) {
    int const first = (i * kThreads + int(threadIdx.x)) * 4;
    int const word = first & (words - 1), line = first >> t.log_words, channel = first_channel + word * per_word;
    if (first_line + line >= t.lines || channel >= t.channels) continue;
    int64_t const from = unpack && t.step_w > 0 ? tables.from[line] : first_line + line;
    uint4* const packed = reinterpret_cast<uint4*>(static_cast<T*>(t.packed) + from * t.channels + channel);
    uint32_t* const shared = &tables.word[word_at(line, word, words)];
    if constexpr (unpack) {
      uint4 const v = from < 0 ? make_uint4(0, 0, 0, 0) : *packed;
      shared[0] = v.x, shared[1] = v.y, shared[2] = v.z, shared[3] = v.w;
    } else {
      *packed = t.vector > 0 ? make_uint4(shared[0], shared[1], shared[2], shared[3])
                             : load_elements<T>(t, tables, line, word * per_word);
    }
  }
  if constexpr (unpack) {
    __syncthreads();
    if (t.vector > 0)
      plain_side<T, unpack>(t, tables);
    else
      store_elements<T>(t, tables);
  }
}

}  // namespace conv2d_ext::pack
