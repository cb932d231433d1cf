// TMA's view of tensors: what a map says, and which element of a box lies where.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace fused_resnet::on_host {

// A map as the emulation keeps it in the 128 bytes of a CUtensorMap, whose own format is secret.
struct EncodedMap {
  static constexpr uint64_t kMark = 0x70616d20726f736e;
  uint64_t mark;
  uint64_t address;
  std::array<uint32_t, 4> sizes;
  std::array<uint64_t, 3> strides;
  std::array<uint16_t, 4> box;  // of tiles; channels and pixels of im2col
  std::array<int16_t, 2> lower, upper;
  std::array<uint8_t, 2> stride;
  uint8_t rank, element_bytes, is_im2col, is_swizzled;
  uint8_t rounds;  // what is loaded, to tf32

  uint64_t row_bytes() const { return uint64_t{box[0]} * element_bytes; }
  uint64_t rows() const;
  uint64_t box_bytes() const { return row_bytes() * rows(); }
  uint64_t tensor_bytes() const;  // from the first element to the last
};
static_assert(sizeof(EncodedMap) <= 128);

// How many there were.
int64_t encoded_maps();

// 16 bytes of a box, of which `valid` are the tensor's.
struct BoxChunk {
  char* global;      // of the first byte, if it were there
  uint32_t skipped;  // bytes before those that are
  uint32_t valid;    // bytes that are
  uint32_t address;  // in shared memory
};

// Calls `visit` for every chunk of the box at `at` (and `offset`) that begins at an address of
// shared memory.
void for_each_chunk(const EncodedMap& map, const std::array<int, 4>& at,
                    const std::array<int, 2>& offset, uint32_t address,
                    const std::function<void(const BoxChunk&)>& visit);

// Where Swizzle::k128Bytes puts what would lie at an address.
inline uint32_t swizzled_128(uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

}  // namespace fused_resnet::on_host
