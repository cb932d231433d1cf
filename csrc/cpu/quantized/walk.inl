// The output pixels of a task of dot.inl or lists.inl, kDotPixels at a time, each by its own
// address.

namespace fused_resnet::cpu {
namespace {

// Output pixels that are taken together, and where each one's input, output and shortcut begin.
struct DotPixels {
  int64_t count;  // of those that have an output; the others are like the last of these
  const uint8_t* in[kDotPixels];
  const uint8_t* projected[kDotPixels];
  const uint8_t* added[kDotPixels];
  uint8_t* out[kDotPixels];
};

// A task's output pixels, line by line.
class DotWalk {
 public:
  DotWalk(const ByteConv& conv, int64_t begin, int64_t end)
      : conv_(conv), left_(end - begin), n_(begin / (conv.P * conv.Q)) {
    const int64_t in_image = begin % (conv.P * conv.Q);
    p_ = in_image / conv.Q;
    q_ = in_image % conv.Q;
    find();
  }

  // The next of them; false where there are none.
  FR_BYTES_INLINE bool next(DotPixels& pixels) {
    if (left_ == 0) return false;
    pixels.count = left_ < kDotPixels ? left_ : kDotPixels;
    left_ -= pixels.count;
    const int64_t in_step = conv_.stride_w * conv_.in.pixel(), out_step = conv_.out.pixel();
    const int64_t projected_step = projected_ == nullptr ? 0 : conv_.projection.pixel();
    const int64_t added_step = added_ == nullptr ? 0 : conv_.added.pixel();
    for (int64_t i = 0; i < pixels.count; ++i) {
      pixels.in[i] = in_;
      pixels.projected[i] = projected_;
      pixels.added[i] = added_;
      pixels.out[i] = out_;
      in_ += in_step;
      projected_ += projected_step;
      added_ += added_step;
      out_ += out_step;
      if (++q_ == conv_.Q) {
        q_ = 0;
        if (++p_ == conv_.P) p_ = 0, ++n_;
        find();
      }
    }
    for (int64_t i = 1; i < kDotPixels; ++i) {
      if (i < pixels.count) continue;
      pixels.in[i] = pixels.in[i - 1];
      pixels.projected[i] = pixels.projected[i - 1];
      pixels.added[i] = pixels.added[i - 1];
      pixels.out[i] = pixels.out[i - 1];
    }
    return true;
  }

 private:
  void find() {
    const int64_t lines = conv_.in.lines(), pitch = conv_.in.pitch();
    const int64_t index = (n_ * lines + p_ * conv_.stride_h) * pitch + q_ * conv_.stride_w;
    in_ = conv_.in.data + (conv_.origin + index) * conv_.in.pixel();
    out_ = conv_.out.data + conv_.out.position(n_, p_, q_) * conv_.out.pixel();
    added_ = projected_ = nullptr;
    if (conv_.shortcut == ByteShortcut::bytes) {
      added_ = conv_.added.data + conv_.added.position(n_, p_, q_) * conv_.added.pixel();
    }
    if (conv_.projected != nullptr) {
      projected_ = conv_.projected + index * conv_.projection.pixel();
    }
  }

  const ByteConv& conv_;
  int64_t left_, n_, p_, q_;
  const uint8_t *in_, *projected_, *added_;
  uint8_t* out_;
};

FR_BYTES_INLINE Ints broadcast_four(const uint8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return broadcast_int(four);
}

}  // namespace
}  // namespace fused_resnet::cpu
