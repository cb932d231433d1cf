#include "cuda_on_host/fiber.h"

#include <cstdint>

namespace fused_resnet::on_host {

#if defined(__x86_64__)

// Of the host: saves what a called function must preserve, changes stacks, and restores it there.
// swapcontext would ask the kernel for the signal mask each time, which takes longer than the rest.
asm(R"(
.text
.globl fused_resnet_switch_fiber
.hidden fused_resnet_switch_fiber
.type fused_resnet_switch_fiber, @function
fused_resnet_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_resnet_switch_fiber, .-fused_resnet_switch_fiber
)");

void prepare_fiber(Fiber& fiber, char*, char* stack_end, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack_end) & ~uintptr_t{15});
  *--top = nullptr;  // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  fiber.stack_pointer = top;
}

#else

void prepare_fiber(Fiber& fiber, char* stack, char* stack_end, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = static_cast<size_t>(stack_end - stack);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

}  // namespace fused_resnet::on_host
