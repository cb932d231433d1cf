// Encoding tensor maps under the driver's conditions (CUDA driver API, "Tensor map object
// management"), and walking boxes as the PTX ISA says ("Tensors", tiled and im2col mode).
#define FUSED_RESNET_ON_HOST  // in the headers of csrc/cuda/device
#include "cuda_on_host/tensor_map.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cuda/device/tensor_map.h"
#include "cuda_on_host/execution.h"

namespace fused_resnet::on_host {
namespace {

std::atomic<int64_t> maps_so_far{0};

void require(bool condition, const std::string& what) {
  if (!condition) throw_error("bad tensor map: " + what);
}

int bytes_of(device::TensorElement element) {
  switch (element) {
    case device::TensorElement::kByte:
      return 1;
    case device::TensorElement::kFloat32:
    case device::TensorElement::kTf32:
      return 4;
    default:
      return 2;
  }
}

EncodedMap encoded(const device::TensorOf& tensor, device::Swizzle swizzle) {
  EncodedMap map{};
  map.mark = EncodedMap::kMark;
  map.address = reinterpret_cast<uintptr_t>(tensor.address);
  map.rank = static_cast<uint8_t>(tensor.rank);
  map.element_bytes = static_cast<uint8_t>(bytes_of(tensor.element));
  map.is_swizzled = swizzle == device::Swizzle::k128Bytes;
  map.rounds = tensor.element == device::TensorElement::kTf32;
  require(map.address % 16 == 0, "the tensor is not aligned to 16 bytes");
  require(tensor.rank >= 1 && tensor.rank <= 4, "its rank is not 1 to 4");
  for (int i = 0; i < tensor.rank; ++i) {
    require(tensor.sizes[i] >= 1 && tensor.sizes[i] <= UINT32_MAX, "a size is not 1 to 2^32");
    map.sizes[i] = static_cast<uint32_t>(tensor.sizes[i]);
  }
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    require(tensor.strides[i] % 16 == 0 && tensor.strides[i] >= 0 &&
                tensor.strides[i] < int64_t{1} << 40,
            "a stride is no multiple of 16 bytes below 2^40");
    map.strides[i] = tensor.strides[i];
  }
  return map;
}

void check_row(const EncodedMap& map) {
  require(map.row_bytes() % 16 == 0, "a box's rows are no multiple of 16 bytes");
  // Shorter rows are allowed, but how they are laid out is not written down.
  require(!map.is_swizzled || map.row_bytes() == 128, "swizzled rows are not of 128 bytes");
}

void store(void* target, const EncodedMap& map) {
  memset(target, 0, sizeof(device::TensorMap));
  memcpy(target, &map, sizeof(map));
  ++maps_so_far;
}

}  // namespace

int64_t encoded_maps() {
  return maps_so_far;
}

void encode_map(void* target, const device::Tiles& tiles) {
  EncodedMap map = encoded(tiles.tensor, tiles.swizzle);
  for (int i = 0; i < map.rank; ++i) {
    require(tiles.box[i] >= 1 && tiles.box[i] <= 256, "a box's side is not 1 to 256");
    map.box[i] = static_cast<uint16_t>(tiles.box[i]);
  }
  check_row(map);
  store(target, map);
}

void encode_map(void* target, const device::Im2col& im2col) {
  EncodedMap map = encoded(im2col.tensor, im2col.swizzle);
  map.is_im2col = true;
  require(map.rank == 4, "im2col of a tensor that has not four dimensions");
  require(im2col.channels >= 1 && im2col.channels <= 256, "im2col channels are not 1 to 256");
  require(im2col.pixels >= 1 && im2col.pixels <= 1024, "im2col pixels are not 1 to 1024");
  map.box = {static_cast<uint16_t>(im2col.channels), static_cast<uint16_t>(im2col.pixels), 1, 1};
  for (int i = 0; i < 2; ++i) {
    for (const int corner : {im2col.lower[i], im2col.upper[i]}) {
      require(corner >= -128 && corner <= 127, "a corner of the im2col box is not -128 to 127");
    }
    require(im2col.stride[i] >= 1 && im2col.stride[i] <= 8, "an im2col stride is not 1 to 8");
    map.lower[i] = static_cast<int16_t>(im2col.lower[i]);
    map.upper[i] = static_cast<int16_t>(im2col.upper[i]);
    map.stride[i] = static_cast<uint8_t>(im2col.stride[i]);
    require(map.lower[i] < static_cast<int64_t>(map.sizes[i + 1]) + map.upper[i],
            "the im2col box is empty");
  }
  check_row(map);
  store(target, map);
}

uint64_t EncodedMap::rows() const {
  uint64_t count = 1;
  for (int i = 1; i < rank; ++i) count *= box[i];
  return count;
}

uint64_t EncodedMap::tensor_bytes() const {
  uint64_t bytes = uint64_t{sizes[0]} * element_bytes;
  for (int i = 1; i < rank; ++i) bytes += (sizes[i] - 1) * strides[i - 1];
  return bytes;
}

void for_each_chunk(const EncodedMap& map, const std::array<int, 4>& at,
                    const std::array<int, 2>& offset, uint32_t address,
                    const std::function<void(const BoxChunk&)>& visit) {
  const int64_t chunk_elements = 16 / map.element_bytes;
  // Where a row of the box lies in dimensions 1 to 3.
  std::array<int64_t, 4> place{at[0], at[1], at[2], at[3]};
  const uint64_t rows = map.rows();
  for (uint64_t row = 0; row < rows; ++row) {
    std::array<int64_t, 4> seen = place;
    if (map.is_im2col) {
      seen[1] += offset[0];
      seen[2] += offset[1];
    }
    bool exists = true;
    int64_t distance = 0;
    for (int i = 1; i < map.rank; ++i) {
      exists = exists && seen[i] >= 0 && seen[i] < static_cast<int64_t>(map.sizes[i]);
      distance += seen[i] * static_cast<int64_t>(map.strides[i - 1]);
    }
    for (int64_t first = 0; first < map.box[0]; first += chunk_elements) {
      const int64_t begin = place[0] + first;
      const int64_t low = std::clamp<int64_t>(-begin, 0, chunk_elements);
      const int64_t high =
          std::clamp<int64_t>(static_cast<int64_t>(map.sizes[0]) - begin, low, chunk_elements);
      BoxChunk chunk;
      chunk.global = reinterpret_cast<char*>(map.address + distance + begin * map.element_bytes);
      chunk.skipped = exists ? low * map.element_bytes : 0;
      chunk.valid = exists ? (high - low) * map.element_bytes : 0;
      chunk.address = address + row * map.row_bytes() + first * map.element_bytes;
      if (map.is_swizzled) chunk.address = swizzled_128(chunk.address);
      visit(chunk);
    }
    if (map.is_im2col) {
      // The next window: along a row of the box of first taps, then rows, then images.
      place[1] += map.stride[0];
      if (place[1] < static_cast<int64_t>(map.sizes[1]) + map.upper[0]) continue;
      place[1] = map.lower[0];
      place[2] += map.stride[1];
      if (place[2] < static_cast<int64_t>(map.sizes[2]) + map.upper[1]) continue;
      place[2] = map.lower[1];
      ++place[3];
    } else {
      for (int i = 1; i < map.rank; ++i) {
        if (++place[i] < at[i] + static_cast<int64_t>(map.box[i])) break;
        place[i] = at[i];
      }
    }
  }
}

}  // namespace fused_resnet::on_host
