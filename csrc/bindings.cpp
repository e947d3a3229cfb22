// The export list: what Python sees of the core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "plan.h"
#include "torch_doors.h"
#include "update_cpu.h"
#include "watch.h"
#ifdef EMA_FUSED_HAVE_CUDA
#include "update_cuda.cuh"
#endif

namespace py = pybind11;
using namespace ema_fused;

namespace {

// (devices the runtime counts, its reason where there are none)
std::pair<int, std::string> cuda_devices() {
#ifdef EMA_FUSED_HAVE_CUDA
  const cuda::DeviceReport report = cuda::devices();
  return {report.count, report.why_none};
#else
  return {0, "built without CUDA"};
#endif
}

std::string why_not_on_cuda([[maybe_unused]] int device) {
#ifdef EMA_FUSED_HAVE_CUDA
  return cuda::why_not_on(device);
#else
  return "built without CUDA";
#endif
}

std::int64_t chunk_elements(bool cuda) { return cuda ? kChunkElementsCuda : kChunkElementsCpu; }

// For tests of the address arithmetic: the table of pairs that need not exist.
// pairs: (averaged address, source address, elements, averaged dtype code, source dtype code)
using PlainPair = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, int, int>;
using PlainChunk = std::tuple<std::uintptr_t, std::uintptr_t, std::uint32_t, std::uint32_t>;

std::vector<Pair> as_pairs(const std::vector<PlainPair>& plain) {
  std::vector<Pair> pairs;
  for (const auto& [averaged, source, count, averaged_dtype, source_dtype] : plain) {
    pairs.push_back({reinterpret_cast<void*>(averaged), reinterpret_cast<void*>(source), count,
                     static_cast<DType>(averaged_dtype), static_cast<DType>(source_dtype), false,
                     static_cast<std::uint32_t>(pairs.size())});
  }
  return pairs;
}

std::vector<PlainChunk> chunk_table(const std::vector<PlainPair>& plain, std::int64_t elements) {
  std::vector<PlainChunk> table;
  for (const Chunk& chunk : build_chunks(as_pairs(plain), elements)) {
    table.emplace_back(reinterpret_cast<std::uintptr_t>(chunk.averaged),
                       reinterpret_cast<std::uintptr_t>(chunk.source), chunk.count, chunk.pair);
  }
  return table;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  static PyObject* overlap_error =
      PyErr_NewException("ema_fused._C.OverlapError", PyExc_ValueError, nullptr);
  module.attr("OverlapError") = py::handle(overlap_error);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (const OverlapError& error) {
      PyErr_SetObject(overlap_error, py::make_tuple(error.first, error.second, error.what).ptr());
    }
  });

  py::enum_<Operation>(module, "Operation")
      .value("AVERAGE", Operation::kAverage)
      .value("COPY", Operation::kCopy)
      .value("SWAP", Operation::kSwap);
  py::enum_<Arithmetic>(module, "Arithmetic")
      .value("LERP", Arithmetic::kLerp)
      .value("AXPBY", Arithmetic::kAxpby)
      .value("DELTA", Arithmetic::kDelta);

  module.def("connect", &torch_doors::connect, py::arg("tensor_type"), py::arg("library"),
             py::arg("make_handles").none(true));
  module.def("missing_doors", &torch_doors::missing);
  module.def("build_info", &build_info);
  module.def("cpu_isa", [] { return cpu_kernel().isa; });
  module.def("cuda_devices", &cuda_devices);
  module.def("why_not_on_cuda", &why_not_on_cuda, py::arg("device"));
  module.def("chunk_elements", &chunk_elements, py::arg("cuda"));
  module.def("chunk_table", &chunk_table, py::arg("pairs"), py::arg("chunk_elements"));

  module.def(
      "inspect",
      [](const py::list& averaged, const py::list& source) {
        Inspection result = inspect(averaged, source);
        return std::make_pair(std::move(result.refusals), std::move(result.devices));
      },
      py::arg("averaged"), py::arg("source"));

  py::class_<Plan>(module, "Plan")
      .def(py::init<const py::list&, const py::list&, const std::vector<bool>&, Arithmetic>(),
           py::arg("averaged"), py::arg("source"), py::arg("only_copy"), py::arg("arithmetic"))
      .def("ready", &Plan::ready)
      .def("run", &Plan::run, py::arg("operation"), py::arg("weight") = 0.0,
           py::arg("weights") = std::vector<double>())
      .def("changed", &Plan::changed)
      .def_property_readonly("no_average", &Plan::no_average)
      .def_property_readonly("no_swap", &Plan::no_swap)
      .def_property_readonly("elements", &Plan::elements)
      .def_property_readonly("chunks", &Plan::chunks)
      .def_property_readonly("tensors", &Plan::tensors)
      .def_property_readonly("table_bytes", &Plan::table_bytes);

  py::class_<SlotWatch>(module, "SlotWatch")
      .def(py::init<const py::list&>(), py::arg("dictionaries"))
      .def("changed", &SlotWatch::changed);
}
