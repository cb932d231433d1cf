// What dot.inl and lists.inl give to ByteKernels.

namespace fused_resnet::cpu {
namespace {

int64_t pieces(const ByteConv& conv) {
  return bytes_div_up(conv.in.N * conv.P * conv.Q, kDotPixels);
}

void run(const ByteConv& conv, const ByteTask& task) {
  const bool offset = conv.has_offset();
  switch (conv.shortcut) {
    case ByteShortcut::bytes:
      return run_task<ByteShortcut::bytes>(conv, task, offset);
    case ByteShortcut::projection:
      return run_task<ByteShortcut::projection>(conv, task, offset);
    case ByteShortcut::none:
      return run_task<ByteShortcut::none>(conv, task, offset);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
