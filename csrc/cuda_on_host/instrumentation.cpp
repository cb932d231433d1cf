// What the compiler calls before each load and store of a kernel: -fsanitize=thread asks it to, and
// these functions stand in for that sanitizer's library. Stores to variables that nobody else can
// see are left out.
#include "cuda_on_host/execution_state.h"

namespace {

using fused_resnet::on_host::Origin;
using fused_resnet::on_host::running;

inline void on_access(void* address, size_t bytes, size_t alignment, bool writes,
                      const void* return_address) {
  if (!running) return;
  const Origin call = Origin::instruction(static_cast<const char*>(return_address) - 1);
  running->check_access(address, bytes, alignment, writes, call);
}

}  // namespace

#define FUSED_RESNET_ON_ACCESS(name, bytes, alignment, writes)                 \
  extern "C" void __tsan_##name(void* address) {                               \
    on_access(address, bytes, alignment, writes, __builtin_return_address(0)); \
  }

FUSED_RESNET_ON_ACCESS(read1, 1, 1, false)
FUSED_RESNET_ON_ACCESS(read2, 2, 2, false)
FUSED_RESNET_ON_ACCESS(read4, 4, 4, false)
FUSED_RESNET_ON_ACCESS(read8, 8, 8, false)
FUSED_RESNET_ON_ACCESS(read16, 16, 8, false)  // what the compiler calls aligned
FUSED_RESNET_ON_ACCESS(unaligned_read2, 2, 1, false)
FUSED_RESNET_ON_ACCESS(unaligned_read4, 4, 1, false)
FUSED_RESNET_ON_ACCESS(unaligned_read8, 8, 1, false)
FUSED_RESNET_ON_ACCESS(unaligned_read16, 16, 1, false)
FUSED_RESNET_ON_ACCESS(write1, 1, 1, true)
FUSED_RESNET_ON_ACCESS(write2, 2, 2, true)
FUSED_RESNET_ON_ACCESS(write4, 4, 4, true)
FUSED_RESNET_ON_ACCESS(write8, 8, 8, true)
FUSED_RESNET_ON_ACCESS(write16, 16, 8, true)
FUSED_RESNET_ON_ACCESS(unaligned_write2, 2, 1, true)
FUSED_RESNET_ON_ACCESS(unaligned_write4, 4, 1, true)
FUSED_RESNET_ON_ACCESS(unaligned_write8, 8, 1, true)
FUSED_RESNET_ON_ACCESS(unaligned_write16, 16, 1, true)

extern "C" void __tsan_read_range(void* address, unsigned long bytes) {
  on_access(address, bytes, 1, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, unsigned long bytes) {
  on_access(address, bytes, 1, true, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}

// Atomic operations of the host code in the same files, such as counting references, become calls
// too.
#define FUSED_RESNET_ATOMICS(bits, T)                                                           \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* target, int) {                      \
    return __atomic_load_n(target, __ATOMIC_SEQ_CST);                                           \
  }                                                                                             \
  extern "C" void __tsan_atomic##bits##_store(volatile T* target, T value, int) {               \
    __atomic_store_n(target, value, __ATOMIC_SEQ_CST);                                          \
  }                                                                                             \
  extern "C" T __tsan_atomic##bits##_exchange(volatile T* target, T value, int) {               \
    return __atomic_exchange_n(target, value, __ATOMIC_SEQ_CST);                                \
  }                                                                                             \
  extern "C" T __tsan_atomic##bits##_fetch_add(volatile T* target, T value, int) {              \
    return __atomic_fetch_add(target, value, __ATOMIC_SEQ_CST);                                 \
  }                                                                                             \
  extern "C" T __tsan_atomic##bits##_fetch_sub(volatile T* target, T value, int) {              \
    return __atomic_fetch_sub(target, value, __ATOMIC_SEQ_CST);                                 \
  }                                                                                             \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(volatile T* target, T* expected, \
                                                               T value, int, int) {             \
    return __atomic_compare_exchange_n(target, expected, value, false, __ATOMIC_SEQ_CST,        \
                                       __ATOMIC_SEQ_CST);                                       \
  }

FUSED_RESNET_ATOMICS(8, unsigned char)
FUSED_RESNET_ATOMICS(32, int)
FUSED_RESNET_ATOMICS(64, long)
