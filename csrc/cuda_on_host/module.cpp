// The Python module of the tests, and the operators of torch.ops.fused_resnet_on_host.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cuda/schemas.h"
#include "cuda_on_host/execution_state.h"
#include "cuda_on_host/launches.h"
#include "cuda_on_host/memory.h"
#include "cuda_on_host/tensor_map.h"

STABLE_TORCH_LIBRARY(fused_resnet_on_host, m)
{
  for (const char* schema : fused_resnet::kCudaSchemas) m.def(schema);
}

namespace on_host = fused_resnet::on_host;

PYBIND11_MODULE(fused_resnet_on_host, m) {
  m.def(
      "set_seed", [](uint64_t seed) { on_host::settings.seed = seed; },
      "Chooses the order of blocks and threads and when a cp.async arrives.");
  m.def(
      "set_processors", [](int count) { on_host::settings.processors = count; },
      "How many multiprocessors the kernels' launchers are told of.");
  m.def(
      "set_at_once",
      [](unsigned blocks, unsigned accesses_a_turn) {
        on_host::settings.at_once = blocks;
        on_host::settings.accesses_a_turn = accesses_a_turn;
      },
      "How many blocks (or clusters) run at once, and of how many accesses to global memory others "
      "run before one; 0 for what is drawn from the seed.");
  m.def(
      "order_global_accesses", [](bool does) { on_host::settings.orders_global_accesses = does; },
      "Whether accesses of several blocks that nothing orders are faults.");
  m.def(
      "run_kernels", [](bool does) { on_host::runs_kernels = does; },
      "Whether launches run; where they do not, what is left is the time of the host.");
  m.def(
      "log_launches", [](bool does) { on_host::logs_launches = does; },
      "Whether launches are kept for `launches`.");
  m.def(
      "launches",
      [] {
        pybind11::list all;
        for (const on_host::Launch& launch : std::exchange(on_host::launches, {})) {
          const auto& [function, shape, parameters] = launch;
          pybind11::list bytes;
          for (const std::string& each : parameters) bytes.append(pybind11::bytes(each));
          all.append(pybind11::make_tuple(
              reinterpret_cast<uintptr_t>(function),
              pybind11::make_tuple(shape.blocks.x, shape.blocks.y, shape.blocks.z), shape.threads,
              shape.shared_bytes, shape.cluster, bytes));
        }
        return all;
      },
      "Those since the last call: function, grid, threads, shared bytes, cluster, parameters.");
  m.def(
      "guard",
      [](const std::string& where) {
        on_host::guard_tensors(where == "end"     ? on_host::Guard::kEnd
                               : where == "begin" ? on_host::Guard::kBegin
                                                  : on_host::Guard::kOff);
      },
      "Guards the \"end\" or the \"begin\" of tensors made on the CPU from now on; \"off\" stops.");
  m.def(
      "statistics",
      [] {
        const on_host::Statistics& s = on_host::statistics;
        pybind11::dict counts;
        counts["blocks"] = s.blocks;
        counts["threads"] = s.threads;
        counts["barriers"] = s.barriers;
        counts["multiplications"] = s.multiplications;
        return counts;
      },
      "What ran since the module was loaded.");
  m.def(
      "encoded_maps", [] { return on_host::encoded_maps(); },
      "How many tensor maps were encoded since then.");
  m.def(
      "loads",
      [] {
        const auto& by_logarithm = on_host::statistics.loads;
        pybind11::dict counts;
        for (size_t i = 0; i < by_logarithm.size(); ++i) {
          counts[pybind11::int_(1 << i)] = by_logarithm[i];
        }
        return counts;
      },
      "How many loads of so many bytes went through csrc/cuda/device since then.");
}
