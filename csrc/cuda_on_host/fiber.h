// Stacks to switch between.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fused_resnet::on_host {

// A place to go on at. `switch_fiber(from, to)` leaves `from` where it is and returns when somebody
// switches to it.
#if defined(__x86_64__)

struct Fiber {
  void* stack_pointer;
};

#else

struct Fiber {
  ucontext_t context;
};

#endif

// Makes `fiber` call `entry`, which must not return, on the stack that ends at `stack_end`.
void prepare_fiber(Fiber& fiber, char* stack, char* stack_end, void (*entry)());

}  // namespace fused_resnet::on_host

#if defined(__x86_64__)

// Saves the registers that calls preserve, which is all a compiler counts on across this one.
extern "C" void fused_resnet_switch_fiber(void** save, void* load);

namespace fused_resnet::on_host {

inline void switch_fiber(Fiber& from, const Fiber& to) {
  fused_resnet_switch_fiber(&from.stack_pointer, to.stack_pointer);
}

}  // namespace fused_resnet::on_host

#else

namespace fused_resnet::on_host {

inline void switch_fiber(Fiber& from, const Fiber& to) {
  swapcontext(&from.context, &to.context);
}

}  // namespace fused_resnet::on_host

#endif
