// A hash of 128 bits that tells tables apart by what they hold, at about 8 bytes a cycle: not for who builds
// collisions.
#pragma once
#include <cstdint>
#include <cstring>

namespace mmlm {

struct Digest {
  uint64_t high, low;
};

// Eight lanes, as many as a multiplication takes turns to finish: each step is a bijection of its lane.
inline Digest digest_of(const unsigned char* data, int64_t num_bytes) {
  constexpr int kLanes = 8;
  constexpr uint64_t kFirst = 0x9E3779B185EBCA87, kSecond = 0xC2B2AE3D27D4EB4F;
  const auto rotated = [](uint64_t x, int by) { return x << by | x >> (64 - by); };
  const auto mixed = [](uint64_t x) {
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD;
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53;
    return x ^ x >> 33;
  };
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = mixed(kFirst * static_cast<uint64_t>(i + 1));
  const auto take = [&](const unsigned char* block) {
    __builtin_prefetch(block + 2048);  // a table of 128 KB seldom waits in a near cache
    for (int i = 0; i < kLanes; ++i) {
      uint64_t word;
      std::memcpy(&word, block + 8 * i, 8);
      lanes[i] = rotated((lanes[i] ^ word) * kFirst, 29);
    }
  };
  int64_t at = 0;
  for (; at + 8 * kLanes <= num_bytes; at += 8 * kLanes) take(data + at);
  if (at < num_bytes) {
    unsigned char rest[8 * kLanes] = {};
    std::memcpy(rest, data + at, static_cast<size_t>(num_bytes - at));
    take(rest);
  }
  Digest out = {static_cast<uint64_t>(num_bytes) * kFirst, static_cast<uint64_t>(num_bytes) * kSecond};
  for (uint64_t lane : lanes) {
    out.high = mixed(out.high ^ lane) * kFirst;
    out.low = mixed(out.low + lane * kSecond) * kSecond;
  }
  return out;
}

}  // namespace mmlm
