// Kernels started as a GPU's driver would: by a function's address, with addresses of parameters.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_on_host/execution.h"

namespace fused_resnet::on_host {

using Starter = void (*)(const void* function, const GridShape& shape, void** parameters);

// A launch as it came, whoever it came from.
struct Launch {
  const void* function;
  GridShape shape;
  std::vector<std::string> parameters;  // their bytes
};

// All launches while `logs_launches`; and whether any runs.
inline std::vector<Launch> launches;
inline bool logs_launches = false, runs_kernels = true;

void remember(const void* function, Starter starter, const std::vector<size_t>& sizes);

// Runs a remembered kernel to its end.
void start(const void* function, const GridShape& shape, void** parameters);

template <typename... Parameters>
void remember(void (*kernel)(Parameters...)) {
  static const std::vector<size_t> sizes{sizeof(Parameters)...};
  remember(
      reinterpret_cast<const void*>(kernel),
      [](const void* function, const GridShape& shape, void** parameters) {
        const auto own = reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(function));
        const auto values = [&]<size_t... kIndices>(std::index_sequence<kIndices...>) {
          return std::tuple<Parameters...>(
              *static_cast<std::remove_reference_t<Parameters>*>(parameters[kIndices])...);
        }(std::index_sequence_for<Parameters...>{});
        auto thread = [&] { std::apply(own, values); };
        run_grid(shape, thread);
      },
      sizes);
}

}  // namespace fused_resnet::on_host
