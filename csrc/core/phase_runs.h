// Which blocks compute which tiles of dgrad's phases with a stride: the phases with most steps first, each tile by the
// block that has least to do till then.
#pragma once

#include <cstdint>

namespace conv2d_ext {

// Of a phase: tiles first, first + 1, .. have the blocks from `block` on, `blocks` of them, in turn.
struct PhaseRun {
  int32_t first = 0, tiles = 0;
  int16_t block = 0, blocks = 0;
};

// What a tile takes beside its steps.
inline constexpr int kPhaseTileSteps = 4;

struct PhaseRuns {
  static constexpr int kMost = 20;
  PhaseRun run[kMost];
  int32_t count = 0;    // 0: blocks have every so many tiles in their order
  int32_t longest = 0;  // steps of the block that has most to do, and what its tiles take beside them

  // tiles: of each phase, whose numbers begin at multiples of `apart`. steps: of a tile of it.
  constexpr void share(int64_t const* tiles, int64_t const* steps, int phases, int64_t apart, int blocks) {
    struct Level {
      int16_t begin, end;
      int32_t load;
    } level[kMost + 1] = {{0, int16_t(blocks), 0}};  // blocks that have as much to do, side by side
    int levels = 1;
    int32_t little = int32_t(steps[0]);  // is no difference
    for (int i = 0; i < phases; ++i) little = steps[i] < little ? int32_t(steps[i]) : little;
    little = (little + kPhaseTileSteps) / 4;
    auto merge = [&](int i) {  // with the one behind
      if (i < 0 || i + 1 >= levels) return;
      int32_t const more = level[i + 1].load - level[i].load;
      if (more > little || -more > little) return;
      level[i].end = level[i + 1].end, level[i].load += more > 0 ? more : 0;
      for (int j = i + 1; j + 1 < levels; ++j) level[j] = level[j + 1];
      --levels;
    };
    uint32_t done = 0;
    count = longest = 0;
    for (int k = 0; k < phases; ++k) {
      int phase = -1;
      for (int i = 0; i < phases; ++i)
        if ((done >> i & 1) == 0 && (phase < 0 || steps[i] > steps[phase])) phase = i;
      done |= 1u << phase;
      int32_t const load = int32_t(steps[phase]) + kPhaseTileSteps;
      for (int64_t next = 0; next < tiles[phase];) {
        int least = 0;
        for (int i = 1; i < levels; ++i)
          if (level[i].load < level[least].load) least = i;
        int32_t second = INT32_MAX;
        for (int i = 0; i < levels; ++i)
          if (i != least && level[i].load < second) second = level[i].load;
        Level& l = level[least];
        int32_t const left = int32_t(tiles[phase] - next), width = l.end - l.begin;
        int32_t rounds = (second - l.load) / load + 1;
        rounds = left < width ? 1 : rounds < left / width ? rounds : left / width;
        int32_t const taken = left < width * rounds ? left : width * rounds;
        if (count == kMost) {
          count = 0;
          return;
        }
        run[count++] = {int32_t(phase * apart + next), taken, l.begin, int16_t(width)};
        next += taken;
        if (taken < width) {  // the level's last blocks have none
          for (int j = levels++; j > least + 1; --j) level[j] = level[j - 1];
          level[least + 1] = {int16_t(l.begin + taken), l.end, l.load};
          l.end = int16_t(l.begin + taken);
        }
        l.load += rounds * load;
        if (l.load > longest) longest = l.load;
        merge(least), merge(least - 1);
      }
    }
  }
};

// What the block that has most to do takes, in what `times` are in; 0: not shared out so. Long times are counted in a
// larger unit, lest their sums leave 32 bits.
constexpr double phases_longest(int64_t const* tiles, double const* times, int64_t phases, int64_t blocks) {
  double whole = 0;
  for (int i = 0; i < phases; ++i) whole += double(tiles[i]) * (times[i] + kPhaseTileSteps);
  double const unit = whole > double(1 << 29) ? whole / double(1 << 29) : 1;
  int64_t rounded[16] = {};
  for (int i = 0; i < phases; ++i) rounded[i] = int64_t(times[i] / unit);
  PhaseRuns runs;
  runs.share(tiles, rounded, int(phases), 0, int(blocks));
  return runs.count == 0 ? 0 : double(runs.longest) * unit;
}

}  // namespace conv2d_ext
