// Between floating-point tensors and bytes, on the vectors of bytes_*.h, which the including file
// has included.

namespace fused_resnet::cpu {
namespace {

template <class V>
void quantize_as(const typename V::Element* source, int64_t count, float inverse,
                 int32_t zero_point, uint8_t* target) {
  const Floats factor = broadcast(inverse);
  const Floats least = broadcast(static_cast<float>(-zero_point));
  const Floats most = broadcast(static_cast<float>(255 - zero_point));
  const Ints zero = broadcast_int(zero_point);
  alignas(64) uint8_t bytes[kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = count - i;
    const Floats x = rest >= kLanes ? V::load(source + i) : V::load(source + i, rest);
    const Ints q = add_ints(round_between(multiply(x, factor), least, most), zero);
    if (rest >= kLanes) {
      store_bytes(target + i, q);
    } else {
      store_bytes(bytes, q);
      for (int64_t k = 0; k < rest; ++k) target[i + k] = bytes[k];
    }
  }
}

void quantize(ByteFloats type, const void* source, int64_t count, float inverse, int32_t zero_point,
              uint8_t* target) {
  switch (type) {
    case ByteFloats::float32:
      return quantize_as<FloatValues>(static_cast<const float*>(source), count, inverse, zero_point,
                                      target);
    case ByteFloats::float16:
      return quantize_as<HalfValues>(static_cast<const Half*>(source), count, inverse, zero_point,
                                     target);
    case ByteFloats::bfloat16:
      return quantize_as<Bfloat16Values>(static_cast<const BFloat16*>(source), count, inverse,
                                         zero_point, target);
  }
}

template <class V>
void quantize_words_as(const typename V::Element* source, int64_t count, float inverse,
                       uint16_t* target) {
  constexpr float kMost = 127 * 256 + 127;
  const Floats factor = broadcast(inverse), least = broadcast(-kMost), most = broadcast(kMost);
  const Ints middle = broadcast_int(128 * 256 + 128);
  alignas(64) uint16_t words[kLanes];
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = count - i;
    const Floats x = rest >= kLanes ? V::load(source + i) : V::load(source + i, rest);
    const Ints q = add_ints(round_between(multiply(x, factor), least, most), middle);
    if (rest >= kLanes) {
      store_words(target + i, q);
    } else {
      store_words(words, q);
      for (int64_t k = 0; k < rest; ++k) target[i + k] = words[k];
    }
  }
}

void quantize_words(ByteFloats type, const void* source, int64_t count, float inverse,
                    uint16_t* target) {
  switch (type) {
    case ByteFloats::float32:
      return quantize_words_as<FloatValues>(static_cast<const float*>(source), count, inverse,
                                            target);
    case ByteFloats::float16:
      return quantize_words_as<HalfValues>(static_cast<const Half*>(source), count, inverse,
                                           target);
    case ByteFloats::bfloat16:
      return quantize_words_as<Bfloat16Values>(static_cast<const BFloat16*>(source), count, inverse,
                                               target);
  }
}

template <class V>
void dequantize_as(const uint8_t* source, int64_t count, float step, typename V::Element* target) {
  const Floats factor = broadcast(step);
  alignas(64) uint8_t bytes[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = count - i;
    if (rest >= kLanes) {
      V::store(target + i, multiply(to_floats(load_bytes(source + i)), factor));
    } else {
      for (int64_t k = 0; k < rest; ++k) bytes[k] = source[i + k];
      V::store(target + i, multiply(to_floats(load_bytes(bytes)), factor), rest);
    }
  }
}

void dequantize(ByteFloats type, const uint8_t* source, int64_t count, float step, void* target) {
  switch (type) {
    case ByteFloats::float32:
      return dequantize_as<FloatValues>(source, count, step, static_cast<float*>(target));
    case ByteFloats::float16:
      return dequantize_as<HalfValues>(source, count, step, static_cast<Half*>(target));
    case ByteFloats::bfloat16:
      return dequantize_as<Bfloat16Values>(source, count, step, static_cast<BFloat16*>(target));
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
