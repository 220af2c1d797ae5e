// Layout shared by the plan and the kernels: a tile holds the samples of kTileFrames frames, transposed by hop,
// tile[m][l] = x[160 l + m], so that sample n of consecutive frames is one vector at [n % 160][n / 160].
#pragma once
#include "audio/log_mel.h"

namespace mmlm {

constexpr int kTileColumns = kTileFrames + 2;  // the last frame reaches two hops further
constexpr int kTileStride = kTileFrames + 8;
constexpr int kTileSamples = kHopLength * kTileColumns;
// Column c of the first stage holds this frequency modulo 25; the other twelve are their conjugates.
constexpr int kColumnFrequency[kColumns] = {0, 5, 10, 1, 6, 11, 16, 21, 2, 7, 12, 17, 22};

// In place of a tile's minimum: the tile sees zeros only and is not written; its value follows from the clip's maximum.
constexpr float kSilentTile = -1e30f;
constexpr float kSilentLog = -10.f;  // log10 of the mel floor

}  // namespace mmlm
