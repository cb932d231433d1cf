// wgmma, a warp's share at a time: descriptors decoded, products done by turns at once or when they
// are waited for. Fragments as csrc/cuda/device/warpgroup.cuh says.
#define FUSED_RESNET_ON_HOST  // in the headers of csrc/cuda/device
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cuda/device/warpgroup.cuh"
#include "cuda_on_host/execution_state.h"
#include "cuda_on_host/tensor_core.h"
#include "cuda_on_host/tensor_map.h"

namespace fused_resnet::on_host {
namespace {

constexpr int kRows = 16;       // of a warp
constexpr int kMostDepth = 16;  // elements of a row

// An operand's rows, eight by eight, and two chunks of 16 bytes of each.
struct Operand {
  uint32_t address, leading, stride;
  bool is_swizzled;

  uint32_t chunk(int row, int chunk) const {
    const uint32_t group = address + row / 8 * stride;
    if (is_swizzled) return swizzled_128(group + row % 8 * 128 + chunk * 16);
    return group + row % 8 * 16 + chunk * leading;
  }
};

Operand operand_of(uint64_t bits) {
  const auto descriptor = std::bit_cast<device::MatrixDescriptor>(bits);
  return {static_cast<uint32_t>(descriptor.address << 4),
          static_cast<uint32_t>(descriptor.leading << 4),
          static_cast<uint32_t>(descriptor.stride << 4),
          descriptor.swizzle == device::MatrixDescriptor::k128Bytes};
}

bool is_same(const WarpgroupMultiply& a, const WarpgroupMultiply& b) {
  return a.element == b.element && a.n == b.n && a.a == b.a && a.b == b.b &&
         a.accumulate == b.accumulate;
}

}  // namespace

void Block::multiply_of_warpgroup(unsigned w) {
  const Place place = current->place;
  Warp& warp = warps_[w];
  Products& products = products_[w];
  const auto of_lane = [&](int lane) {
    return static_cast<const WarpgroupMultiply*>(warp.payloads[lane]);
  };
  const WarpgroupMultiply first = *of_lane(0);
  const unsigned group = w / 4 * 4;
  if (thread_count_ < 32 * (group + 4)) {
    fail_at("divergent warpgroup: it has fewer than four warps", place);
  }
  for (int lane = 1; lane < 32; ++lane) {
    if (!is_same(*of_lane(lane), first)) {
      fail_at("divergent warpgroup: its lanes' products differ", place);
    }
  }
  products.begun.push_back(first);
  const size_t number = products.begun.size() - 1;
  for (unsigned other = group; other < group + 4; ++other) {
    const auto& begun = products_[other].begun;
    if (number < begun.size() && !is_same(begun[number], first)) {
      fail_at("divergent warpgroup: its warps' products differ", place);
    }
  }
  if (!products.is_fenced) {
    fail_at("unfenced: a product begins with no fence behind what last had its sums", place);
  }

  Product product{first, 0, products.groups, {}};
  keep_order();
  const auto reads = [&](uint64_t bits, int rows, const char* what) {
    const auto descriptor = std::bit_cast<device::MatrixDescriptor>(bits);
    const Operand operand = operand_of(bits);
    if (descriptor.swizzle > device::MatrixDescriptor::k128Bytes) {
      fail_at("bad descriptor: a way to permute that is not emulated", place);
    }
    if (operand.is_swizzled && (operand.address >> 7 & 7) != descriptor.base_offset) {
      fail_at("bad descriptor: " + std::string(what) +
                  " begins within eight rows, and its base offset does not say so",
              place);
    }
    // The lines of 128 bytes that the rows lie in.
    uint32_t begin = UINT32_MAX, end = 0;
    for (int row = 0; row < rows; row += operand.is_swizzled ? 8 : 1) {
      for (int chunk = 0; chunk < 2; ++chunk) {
        const uint32_t at = operand.chunk(row, chunk);
        begin = std::min(begin, operand.is_swizzled ? at & ~1023u : at);
        end = std::max(end, operand.is_swizzled ? (at & ~1023u) + 1024 : at + 16);
      }
    }
    const uint32_t base = cluster_->address();
    if (begin < base || end > base + shared_bytes_) {
      fail_at("out of bounds: " + std::string(what) + " of a product, " +
                  std::to_string(end - begin) + " bytes at offset " +
                  std::to_string(static_cast<int64_t>(begin) - base) + " of " +
                  std::to_string(shared_bytes_) + " bytes of shared memory",
              place);
    }
    for (const Product& other : products.under_way) {  // of the same step, at another depth
      for (const uint64_t known : other.reads) {
        if (other.group == product.group &&
            shared_accesses_.is_of(known, begin - base, end - base)) {
          product.reads.push_back(known);
          return;
        }
      }
    }
    SharedAccesses::Time time = now();
    for (unsigned lane = 0; lane < 32; ++lane) {
      time.thread = 32 * w + lane;
      if (!shared_accesses_.is_free(begin - base, end - base, false, "a product of", time)) {
        fail_at(shared_accesses_.complaint(), place);
      }
    }
    SharedAccesses::Asynchronous work{begin - base, end - base, SharedAccesses::Work::kProduct,
                                      current->index, place};
    work.agent = cluster_->order().warp(rank_ * ((thread_count_ + 31) / 32) + w);
    const uint64_t begun = shared_accesses_.begin_asynchronous(work, now());
    if (!begun) fail_at(shared_accesses_.complaint(), place);
    product.reads.push_back(begun);
  };
  reads(first.a, 64, "A");
  reads(first.b, first.n, "B");

  // The sums belong to the products from now on.
  auto& accumulators = products.accumulators;
  const auto found = std::find_if(accumulators.begin(), accumulators.end(),
                                  [&](const auto& known) { return known.sums[0] == first.sums; });
  product.sums = found - accumulators.begin();
  if (found == accumulators.end()) {
    accumulators.push_back({{}, first.n, std::vector<float>(kRows * first.n)});
    for (int lane = 0; lane < 32; ++lane) {
      float* const sums = of_lane(lane)->sums;
      accumulators.back().sums[lane] = sums;
      for (int i = 0; i < first.n / 2; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        accumulators.back().values[row * first.n + column] = sums[i];
        sums[i] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  } else if (found->n != first.n) {
    fail_at("divergent warpgroup: products of two shapes have the same sums", place);
  }
  statistics.multiplications += 1;
  if (!late_copies_) carry_out(w, product);
  products.under_way.push_back(std::move(product));
}

void Block::carry_out(unsigned w, const Product& product) {
  const WarpgroupMultiply& multiply = product.multiply;
  std::vector<float>& values = products_[w].accumulators[product.sums].values;
  if (!multiply.accumulate) std::fill(values.begin(), values.end(), 0.f);
  const auto read = [&](uint64_t bits, int row, float* wide, int step) {
    const Operand operand = operand_of(bits);
    for (int chunk = 0; chunk < 2; ++chunk) {
      const char* const at = shared_begin + (operand.chunk(row, chunk) - cluster_->address());
      wide += step * read_chunk(multiply.element, at, wide, step);
    }
  };
  const int depth = depth_of(multiply.element);
  float a[kRows * kMostDepth];
  for (int row = 0; row < kRows; ++row) {
    read(multiply.a, w % 4 * kRows + row, &a[row * depth], 1);
  }
  std::vector<float> b(depth * multiply.n);
  for (int row = 0; row < multiply.n; ++row) read(multiply.b, row, &b[row], multiply.n);
  multiply_rows(multiply.element, values.data(), a, b.data(), kRows, multiply.n);
}

void Block::wait_for_products_of(unsigned w, int groups_left) {
  Products& products = products_[w];
  Order& order = keep_order();
  const unsigned agent = order.warp(rank_ * ((thread_count_ + 31) / 32) + w);
  ++products.waits;
  size_t done = 0;
  while (done < products.under_way.size() &&
         products.under_way[done].group + groups_left < products.groups) {
    const Product& product = products.under_way[done++];
    if (late_copies_) carry_out(w, product);
    for (const uint64_t number : product.reads) {
      shared_accesses_.end_asynchronous(number, agent, products.waits);
    }
  }
  products.under_way.erase(products.under_way.begin(), products.under_way.begin() + done);
  for (unsigned lane = 0; lane < 32; ++lane)
    order.of(agent_of(32 * w + lane))[agent] = products.waits;
  products.is_fenced = false;
  // Sums of which no product is under way any more are the threads' again.
  std::vector<Accumulators> kept;
  std::vector<size_t> place_of(products.accumulators.size());
  for (size_t i = 0; i < products.accumulators.size(); ++i) {
    Accumulators& accumulators = products.accumulators[i];
    const bool is_used = std::any_of(products.under_way.begin(), products.under_way.end(),
                                     [&](const Product& product) { return product.sums == i; });
    if (is_used) {
      place_of[i] = kept.size();
      kept.push_back(std::move(accumulators));
      continue;
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < accumulators.n / 2; ++j) {
        const int row = lane / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
        accumulators.sums[lane][j] = accumulators.values[row * accumulators.n + column];
      }
    }
  }
  products.accumulators = std::move(kept);
  for (Product& product : products.under_way) product.sums = place_of[product.sums];
}

// When all threads of the block have ended.
void Block::check_warpgroup_ends() {
  for (unsigned w = 0; w < warp_count_; ++w) {
    const unsigned first = w / 4 * 4;
    if (products_[w].begun.size() != products_[first].begun.size()) {
      fail("divergent warpgroup: its warps begin " + std::to_string(products_[w].begun.size()) +
           " and " + std::to_string(products_[first].begun.size()) + " products, " +
           where(threads_[32 * w], Origin(threads_[32 * w].place).line()));
    }
    if (warps_[w].registers != warps_[first].registers) {
      fail("register budget: warps of a warpgroup have " + std::to_string(warps_[w].registers) +
           " and " + std::to_string(warps_[first].registers) + ", " +
           where(threads_[32 * w], Origin(threads_[32 * w].place).line()));
    }
  }
}

}  // namespace fused_resnet::on_host
